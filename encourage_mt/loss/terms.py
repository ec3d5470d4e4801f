"""Define the terms that every backend returns, and the helpers that all custom backward passes share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """The parts of the loss, in nats: each a scalar sum over tokens, or one value per token [tokens].

    loss is label-smoothed cross entropy plus bonus; nll_loss is -log p of the target, without smoothing and bonus;
    bonus is the smoothed, weighted bonus as contained in loss. All are zero for ignored tokens.
    """

    loss: Tensor
    nll_loss: Tensor
    bonus: Tensor


def clone_terms(terms: Tensor, reduce: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of `terms` [3, ...], summed if `reduce`, as tensors that own their memory.

    A custom autograd function must not return views: fairseq writes to the loss of an empty batch (loss *= 0).
    """
    loss, nll_loss, bonus = (term.sum() if reduce else term.clone() for term in terms)
    return loss, nll_loss, bonus


def class_indices(target: Tensor) -> Tensor:
    """Return `target` as int64. Raises ValueError if it is not of an integer type."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(
            f"target must contain class indices (torch.long), got {target.dtype}: "
            "class probabilities (soft targets) are not supported"
        )
    return target.long()


def without_unused_gradient(logits: Tensor) -> Tensor:
    """Return `logits`, detached under no_grad: a custom function would compute their gradient all the same.

    Other logits stay as they are, because detaching would silently drop their forward-mode derivatives.
    """
    return logits.detach() if logits.requires_grad and not torch.is_grad_enabled() else logits


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count; if the count is 0, NaN with a gradient of 0, as torch's cross entropy does."""
    return torch.where(count > 0, total / count.where(count > 0, 1), math.nan)


def refuse_double_backward() -> None:
    """Raise RuntimeError in a backward pass that is itself recorded (create_graph=True).

    The gradient is computed without a graph, so a gradient penalty on it would be silently ignored.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss has no second derivative (create_graph=True); only encouraging_loss and loss_terms with "
            "backend='reference' have one (in fairseq: --loss-backend reference, without --rdrop-alpha)"
        )


def multiply_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Return `gradient` [tokens, V] times `upstream`, a scalar or [tokens].

    In place, unless the backward pass may run again (retain_graph=True) or torch.compile traces it.
    """
    if upstream.dim() == 1:
        upstream = upstream.unsqueeze(1)
    if torch.compiler.is_compiling() or _graph_is_kept():
        return gradient * upstream
    if upstream.device.type == "cpu" and upstream.dim() == 0 and upstream.item() == 1:
        return gradient
    return gradient.mul_(upstream)


def _graph_is_kept() -> bool:
    """Return whether backward runs with retain_graph=True; True if torch cannot say."""
    return bool(getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)())
