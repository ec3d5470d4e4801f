"""Compute the output projection and the loss together, so that logits [tokens, V] are never in memory at once.

Blocks of ROWS tokens go through the matrix product, the loss and its gradient, and the two products back, all in the
forward pass; the backward pass multiplies by the upstream gradient. Ignored tokens are dropped before the product.
Memory beside the results: one block of logits (its gradient replaces it where the types agree), and the gradients of
features, weight and bias in float32, unless they need none.

The gradient with respect to the logits is rounded to the half type of the features for the products back, as in any
mixed-precision training, but before the loss scale is known. It is therefore multiplied by SCALE, a power of two, and
the float32 product is divided by it, both exactly: eps/V = 3e-6 would be subnormal in float16, 3e-6 * 256 is not.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Function.apply untyped.

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .functional import _options, _show_options, find_backend
from .options import LossOptions
from .terms import (
    LossTerms,
    class_indices,
    clone_terms,
    mean_of,
    refuse_double_backward,
    without_unused_gradient,
)

ROWS = 1024
SCALE = 256.0


@_show_options
def linear_encouraging_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Return `encouraging_loss` of logits = features @ weight.T + bias without storing the logits.

    features (..., D), weight [V, D], target (...), bias [V]. reduction "mean" (over targets that are not
    `ignore_index`) or "sum"; "none" is not possible, because the gradient is made before the upstream gradient of a
    token is known. The other keywords are the fields of `LossOptions`. Under autocast the products use its type.
    Raises ValueError for other shapes and values, and for a bonus that only the reference backend computes.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction}")
    if features.shape[:-1] != target.shape:
        raise ValueError(
            f"expected features (..., D) and target (...), got {list(features.shape)} and {list(target.shape)}"
        )
    rows, targets = features.reshape(-1, features.size(-1)), class_indices(target).reshape(-1)
    terms, _ = projected_loss_terms(rows, weight, targets, _options(options), ignore_index, backend, bias=bias)
    return mean_of(terms.loss, targets.ne(ignore_index).sum()) if reduction == "mean" else terms.loss


def projected_loss_terms(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    options: LossOptions,
    ignore_index: int = -100,
    backend: str = "auto",
    accuracy: bool = False,
    bias: Tensor | None = None,
) -> tuple[LossTerms, Tensor]:
    """Return `loss_terms` of logits = features [tokens, D] @ weight.T + bias, weight [V, D], bias [V].

    Also returns the number of targets predicted right if `accuracy`, 0 otherwise. Only the loss term has a gradient.
    Raises ValueError if shapes or devices do not fit, and for a backend or bonus that cannot be fused.
    """
    if (
        features.dim() != 2
        or target.shape != features.shape[:1]
        or weight.dim() != 2
        or weight.size(0) < 2
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        shapes = ", ".join(str(list(each.shape)) for each in (features, weight, target, bias) if each is not None)
        raise ValueError(f"expected features [tokens, D], weight [V >= 2, D], target [tokens], bias [V], got {shapes}")
    if target.device != features.device:
        raise ValueError(f"features are on {features.device}, target is on {target.device}")
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:  # as it would cast them for the product
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    implementation = find_backend(backend, options, device, features.dtype)
    if implementation is reference:
        raise ValueError(
            "the projection cannot be fused with the reference backend, which was asked for or is the only one that "
            f"computes the {options.bonus} bonus with these options: choose another backend or bonus, or do not fuse "
            "(drop --fuse-projection; in PyTorch, use encouraging_loss)"
        )
    target = class_indices(target)
    ignored = target.eq(ignore_index)
    if not torch.compiler.is_compiling():  # a shape that depends on the data would break the graph
        kept = (~ignored).nonzero().squeeze(1)
        features, target, ignored = features[kept], target[kept], ignored[kept]
    features, weight = without_unused_gradient(features), without_unused_gradient(weight)
    bias = None if bias is None else without_unused_gradient(bias)
    with torch.autocast(device, enabled=False):
        *terms, correct = _Fused.apply(
            features, weight, bias, target.masked_fill(ignored, 0), options, ignored, implementation, accuracy
        )
    return LossTerms(*terms), correct


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: LossOptions,
        ignored: Tensor,
        implementation: ModuleType,
        accuracy: bool,
    ) -> tuple[Tensor, ...]:
        exact = torch.promote_types(features.dtype, torch.float32)
        scale = 1.0 if features.dtype == exact else SCALE
        needs_gradient = any(ctx.needs_input_grad)
        grad_features = torch.empty_like(features, dtype=exact) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=exact) if ctx.needs_input_grad[2] else None
        sums = features.new_zeros(3, dtype=exact)
        correct = target.new_zeros(())
        for start in range(0, features.size(0), ROWS):
            block = slice(start, start + ROWS)
            logits = features[block] @ weight.T
            if bias is not None:
                logits += bias
            if accuracy:
                correct += ((logits.argmax(dim=1) == target[block]) & ~ignored[block]).sum()
            arguments = logits, target[block], options, ignored[block]
            if not needs_gradient:
                sums += torch.stack(implementation.loss_terms(*arguments, reduce=True))
                continue
            terms, gradient = implementation.terms_and_gradient_(*arguments, scale)
            sums += terms.sum(dim=1)
            if grad_features is not None:
                grad_features[block] = _product(gradient, weight, exact) / scale
            if grad_weight is not None:
                grad_weight.add_(_product(gradient.T, features[block], exact), alpha=1 / scale)
            if grad_bias is not None:
                grad_bias.add_(gradient.sum(dim=0, dtype=exact), alpha=1 / scale)
        ctx.save_for_backward(grad_features, grad_weight, grad_bias)
        ctx.dtypes = features.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, nll_loss, bonus = clone_terms(sums, reduce=False)
        ctx.mark_non_differentiable(nll_loss, bonus, correct)
        return loss, nll_loss, bonus, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((None if each is None else (each * upstream).to(dtype)) for each, dtype in gradients), *[None] * 5


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
