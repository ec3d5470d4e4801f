"""The output projection and the loss as one: [tokens, V] is never held, only blocks of ROWS tokens.

Each block goes through the matrix product, the loss and its gradient, and the two products back, in the forward pass;
the backward pass multiplies by the upstream gradient. Memory beside the results: one block of logits (and its gradient,
which takes its place where the types agree), the gradient of the features and that of the weight in float32.

The gradient with respect to the logits is rounded to the half type of the features for the products back, as in any
mixed-precision training, but before the loss scale is known. It is therefore multiplied by SCALE, a power of two, and
the float32 product divided by it, both exact: eps/V = 3e-6 would be subnormal in float16, 3e-6 * 256 is not.
"""

import torch
from torch import Tensor

from .options import LossOptions
from .terms import LossTerms, clone_terms, refuse_double_backward

ROWS = 1024
SCALE = 256.0


def loss_terms(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    options: LossOptions,
    ignored: Tensor,
    terms_and_gradient_,
    accuracy,
) -> tuple[LossTerms, Tensor]:
    """Sums over tokens for logits = features [tokens, D] @ weight.T [D, V], and the number of targets predicted right.

    `terms_and_gradient_` is that function of a backend. Only loss has a gradient, to features and weight. The number is
    0 unless `accuracy`.
    """
    *terms, correct = _Fused.apply(features, weight, target, options, ignored, terms_and_gradient_, accuracy)
    return LossTerms(*terms), correct


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, target, options, ignored, terms_and_gradient_, accuracy):
        exact = torch.promote_types(features.dtype, torch.float32)
        scale = 1.0 if features.dtype == exact else SCALE
        of_features = torch.empty_like(features, dtype=exact)
        of_weight = torch.zeros_like(weight, dtype=exact)
        sums = features.new_zeros(3, dtype=exact)
        correct = target.new_zeros(())
        for start in range(0, features.size(0), ROWS):
            block = slice(start, start + ROWS)
            logits = features[block] @ weight.T
            if accuracy:
                correct += ((logits.argmax(dim=1) == target[block]) & ~ignored[block]).sum()
            terms, gradient = terms_and_gradient_(logits, target[block], options, ignored[block], scale)
            sums += terms.sum(dim=1)
            of_features[block] = _product(gradient, weight, exact) / scale
            of_weight.add_(_product(gradient.T, features[block], exact), alpha=1 / scale)
        ctx.save_for_backward(of_features, of_weight)
        ctx.dtypes = features.dtype, weight.dtype
        loss, nll_loss, bonus = clone_terms(sums, reduce=False)
        ctx.mark_non_differentiable(nll_loss, bonus, correct)
        return loss, nll_loss, bonus, correct

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        of_features, of_weight = ctx.saved_tensors
        features_dtype, weight_dtype = ctx.dtypes
        return (of_features * upstream).to(features_dtype), (of_weight * upstream).to(weight_dtype), *[None] * 5


def _product(a, b, dtype):
    """a @ b accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
