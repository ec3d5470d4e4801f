"""Define the encouraging loss: cross entropy plus a bonus for well-classified targets (arXiv 2110.06537).

With p = softmax(logits) over V classes and q the (smoothed) target distribution, the loss of one token is

    sum_k q_k * (-log p_k + bonus_weight * b(p_k))

| bonus  | b(p)                                                                                           |
|--------|------------------------------------------------------------------------------------------------|
| none   | 0: label-smoothed cross entropy                                                                |
| log    | log(1 - p) up to p = log_end, its tangent beyond; log_end 1: floored at log(1e-5), no tangent  |
| power  | -p ** bonus_exponent                                                                           |
| cosine | cos(pi p) - 1                                                                                  |

With bonus_start s > 0, b(p) - b(s) takes the place of b(p) for p >= s, and 0 below (the paper's aggressive bonus).
b is negative: the loss of a confident model may be near or below zero. This module is the plain expression,
differentiated by autograd; the fast backends are tested against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bonuses import bonus_of
from .options import LossOptions
from .terms import LossTerms


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """Return the terms for `logits` [tokens, V] and `target` [tokens]: sums or, without `reduce`, values per token.

    `ignored` [tokens] marks the tokens that do not count; their target may be any type from 0 to V - 1.
    """
    target = target.unsqueeze(1)
    logits = logits.masked_fill(ignored.unsqueeze(1), 0.0)  # also NaN, whose gradient would be NaN
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    target_mass, smoothing_mass = options.smoothing_masses(logits.size(1))

    def collect(per_token: Tensor) -> Tensor:
        per_token = per_token.squeeze(1).masked_fill(ignored, 0.0)
        return per_token.sum() if reduce else per_token

    nll_loss = collect(-log_probs.gather(1, target))
    loss = target_mass * nll_loss
    if smoothing_mass:
        loss = loss + smoothing_mass * collect(-log_probs.sum(dim=1, keepdim=True))
    if not options.has_bonus:
        return LossTerms(loss, nll_loss, torch.zeros_like(nll_loss))

    if smoothing_mass:
        bonuses = bonus_of(log_probs.exp(), complement(log_probs), options)
        bonus = target_mass * collect(bonuses.gather(1, target)) + smoothing_mass * collect(
            bonuses.sum(dim=1, keepdim=True)
        )
    else:
        others = log_probs.exp().scatter(1, target, 0.0)
        bonus = collect(bonus_of(log_probs.gather(1, target).exp(), others.sum(dim=1, keepdim=True), options))
    bonus = options.bonus_weight * bonus
    return LossTerms(loss + bonus, nll_loss, bonus)


def complement(log_probs: Tensor) -> Tensor:
    """Return 1 - p for each type of `log_probs` [tokens, V], with full relative precision where p is near 1.

    There p has lost the digits (float32 has none left at 1 - p = 1e-8), but the sum of the other types' p has not.
    At most the top type has p > 1/2, so only its column needs the sum.
    """
    top = log_probs.argmax(dim=1, keepdim=True)
    others = log_probs.exp().scatter(1, top, 0.0)
    return (1.0 - others).scatter(1, top, others.sum(dim=1, keepdim=True))
