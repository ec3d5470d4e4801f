"""Compute R-Drop: the loss of two passes with different dropout plus their KL divergence (arXiv 2106.14448).

With p1 and p2 the predictions of the two passes and L1, L2 their losses, the loss of one token is

    (L1 + L2) / 2 + alpha / 2 * (KL(p1 || p2) + KL(p2 || p1)) / 2

which is half of the paper's objective with the same alpha, so that, in a model without dropout, it equals the loss
without R-Drop. With d = log p1 - log p2 the sum of both divergences is sum_k (p1_k - p2_k) d_k, and the gradient is

    d KL(p1 || p2) / dz1_i = p1_i (d_i - KL(p1 || p2)),    d KL(p2 || p1) / dz1_i = p1_i - p2_i

and the same for z2 with the roles exchanged.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .functional import loss_terms
from .options import LossOptions
from .terms import LossTerms, refuse_double_backward

BLOCK_ELEMENTS = 1 << 20  # of one block of rows in one pass


def rdrop_terms(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    alpha: float,
    ignore_index: int = -100,
    reduce: bool = True,
    backend: str = "auto",
) -> tuple[LossTerms, Tensor]:
    """Return (terms, divergence) of `logits` [2 * tokens, V], the first pass before the second, for `target` [tokens].

    terms.loss is the loss above; terms.nll_loss is that of the first pass alone; terms.bonus is the mean of both
    passes; divergence is the last summand of the loss. Each is a sum over tokens or, with reduce=False, one value per
    token. Memory: the gradient [2 * tokens, V] that the backend needs anyway, and temporaries of a block.
    Raises ValueError if the shapes do not fit.
    """
    if logits.dim() != 2 or target.dim() != 1 or logits.size(0) != 2 * target.size(0):
        raise ValueError(
            f"expected logits [2 * tokens, V] and target [tokens], got {list(logits.shape)} and {list(target.shape)}"
        )
    ignored = target.eq(ignore_index)
    logits, divergence = _WithDivergence.apply(logits, ignored)  # type: ignore[no-untyped-call]
    both = loss_terms(logits, target.repeat(2), options, ignore_index, False, backend)
    divergence = alpha / 2 * divergence
    loss, bonus = (term.view(2, -1).mean(dim=0) for term in (both.loss, both.bonus))
    terms = LossTerms(loss + divergence, both.nll_loss[: target.size(0)], bonus)
    if reduce:
        return LossTerms(*(term.sum() for term in terms)), divergence.sum()
    return terms, divergence


class _WithDivergence(torch.autograd.Function):
    """Pass `logits` [2 * tokens, V] through and return half the sum of both divergences [tokens] with them.

    Because the logits pass through, the backward pass receives the gradient of the loss and adds its own to it in
    place, so that there is only one gradient of the size of the logits. No other code uses that gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, ignored)
        divergence = logits.new_empty(ignored.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        for first, _, p1, p2, difference in _blocks(logits):
            divergence[first] = 0.5 * ((p1 - p2) * difference).sum(dim=1)
        return logits.view_as(logits), divergence.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, upstream: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward()
        logits, ignored = ctx.saved_tensors
        factor = 0.5 * upstream.masked_fill(ignored, 0.0).unsqueeze(1)
        for first, second, p1, p2, difference in _blocks(logits):
            for rows, p, other, d in ((first, p1, p2, difference), (second, p2, p1, -difference)):
                kl = (p * d).sum(dim=1, keepdim=True)
                own = torch.where(factor[first] == 0, 0.0, factor[first] * (p * (d - kl) + p - other))
                gradient[rows] += own.to(gradient.dtype)
        return gradient, None


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Yield (rows of the first pass, rows of the second, p1, p2, log p1 - log p2), block by block."""
    tokens, vocabulary = logits.size(0) // 2, logits.size(1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, BLOCK_ELEMENTS // vocabulary)
    for start in range(0, tokens, rows):
        first = slice(start, min(start + rows, tokens))
        second = slice(tokens + first.start, tokens + first.stop)
        log_p1, log_p2 = (logits[each].log_softmax(dim=1, dtype=dtype) for each in (first, second))
        difference = torch.where(log_p1 == log_p2, 0.0, log_p1 - log_p2)  # 0 for a type at -inf in both
        yield first, second, log_p1.exp(), log_p2.exp(), difference
