"""What the encouraging loss is: cross entropy plus a bonus that rewards likelihood (arXiv 2110.06537).

With p = softmax(logits) over V types and q the (smoothed) target distribution, the loss of one token is

    sum_k q_k * (-log p_k + bonus_weight * b(p_k))

| bonus  | b(p)                                                                                           |
|--------|------------------------------------------------------------------------------------------------|
| none   | 0: label-smoothed cross entropy                                                                |
| log    | log(1 - p) up to p = log_end, its tangent beyond; log_end 1: floored at log(1e-5), no tangent  |
| power  | -p ** bonus_exponent                                                                           |
| cosine | cos(pi p) - 1                                                                                  |

b is negative: the loss of a confident model may be near or below zero. This is the plain expression, differentiated by
autograd; the fast backends are tested against it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BONUSES = ("none", "log", "power", "cosine")
SMOOTHING_CONVENTIONS = ("fairseq", "paper")
RANGES = {
    "label_smoothing": (0, 1),
    "log_end": (0, 1),
    "bonus_exponent": (1, 10),
    "bonus_weight": (0, 2),
}
LOG_BONUS_FLOOR = 1e-5  # least 1 - p that log_end 1 tells apart, as in the paper's implementation


def check_range(name: str, value: float) -> None:
    """Raise ValueError, naming option, range and value, unless `value` lies in the range of option `name`."""
    low, high = RANGES[name]
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


@dataclass(frozen=True)
class LossOptions:
    """What shapes the loss; the one place of its defaults. Raises ValueError on a value out of range.

    smoothing_convention says what a non-target type gets of label_smoothing eps: eps/(V-1) with "fairseq", as
    LabelSmoothedCrossEntropyCriterion does, or eps/V with "paper", as the paper's code and torch do (there the
    target gets that share too).
    """

    bonus: str = "log"
    log_end: float = 0.5
    bonus_exponent: float = 2.0
    bonus_weight: float = 1.0
    label_smoothing: float = 0.0
    smoothing_convention: str = "fairseq"

    def __post_init__(self):
        for name, allowed in (("bonus", BONUSES), ("smoothing_convention", SMOOTHING_CONVENTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)}")
        for name in RANGES:
            check_range(name, getattr(self, name))

    def weights(self, vocabulary: int) -> "tuple[float, float]":
        """(h, s) such that the smoothed sum of any f is h * f(target) + s * sum over all V types of f."""
        eps = self.label_smoothing
        if self.smoothing_convention == "paper":
            return 1.0 - eps, eps / vocabulary
        share = eps / (vocabulary - 1)
        return 1.0 - eps - share, share


class LossTerms(NamedTuple):
    """Each a scalar sum over tokens, or one value per token [tokens]; in nats, zero for padding.

    loss is label-smoothed cross entropy plus bonus; nll_loss is -log p of the target, free of smoothing and bonus;
    bonus is the smoothed, weighted bonus term as it stands in the loss.
    """

    loss: Tensor
    nll_loss: Tensor
    bonus: Tensor


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """The terms for `logits` [tokens, V], `target` [tokens] (any valid type where ignored), `ignored` [tokens] bool."""
    target = target.unsqueeze(1)
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_target, of_all = options.weights(logits.size(1))

    def collect(per_token: Tensor) -> Tensor:
        per_token = per_token.squeeze(1).masked_fill(ignored, 0.0)
        return per_token.sum() if reduce else per_token

    nll_loss = collect(-log_probs.gather(1, target))
    loss = of_target * nll_loss
    if of_all:
        loss = loss + of_all * collect(-log_probs.sum(dim=1, keepdim=True))
    if options.bonus == "none":
        return LossTerms(loss, nll_loss, torch.zeros_like(nll_loss))

    if of_all:
        bonuses = bonus_of(log_probs.exp(), complement(log_probs), options)
        bonus = of_target * collect(bonuses.gather(1, target)) + of_all * collect(bonuses.sum(dim=1, keepdim=True))
    else:
        others = log_probs.exp().scatter(1, target, 0.0)
        bonus = collect(bonus_of(log_probs.gather(1, target).exp(), others.sum(dim=1, keepdim=True), options))
    bonus = options.bonus_weight * bonus
    return LossTerms(loss + bonus, nll_loss, bonus)


def own_terms(terms: Tensor, reduce: bool) -> "tuple[Tensor, Tensor, Tensor]":
    """Rows of `terms` [3, ...], summed if `reduce`, as tensors of their own for a custom autograd function to return.

    Views would not do: fairseq writes to the loss of an empty batch (loss *= 0).
    """
    return tuple(term.sum() if reduce else term.clone() for term in terms)


def complement(log_probs: Tensor) -> Tensor:
    """1 - p for each type of `log_probs` [tokens, V], with full relative precision where p is near 1.

    There p has lost the digits (float32 has none left at 1 - p = 1e-8), the sum of the other types' p has not.
    At most the top type has p > 1/2, so only its column needs the sum.
    """
    top = log_probs.argmax(dim=1, keepdim=True)
    others = log_probs.exp().scatter(1, top, 0.0)
    return (1.0 - others).scatter(1, top, others.sum(dim=1, keepdim=True))


def bonus_of(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """b(p), elementwise and unweighted; paper: "normal" bonus is log_end 1, "conservative" is log_end < 1."""
    if options.bonus == "log":
        least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
        held = one_minus_p.clamp(min=least)
        if options.log_end == 1:
            return held.log()
        return held.log() - (held - one_minus_p) / least
    if options.bonus == "power":
        return -(p**options.bonus_exponent)
    if options.bonus == "cosine":
        return -2.0 * torch.sin(0.5 * math.pi * p) ** 2  # cos(pi p) - 1 without its cancellation
    return torch.zeros_like(p)


def negative_slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """-p * b'(p), elementwise, unweighted and never negative; for log it is p / (1 - min(p, log_end))."""
    if options.bonus == "log":
        if options.log_end == 1:
            return torch.where(one_minus_p < LOG_BONUS_FLOOR, 0.0, p / one_minus_p.clamp(min=LOG_BONUS_FLOOR))
        return p / one_minus_p.clamp(min=1.0 - options.log_end)
    if options.bonus == "power":
        return options.bonus_exponent * p**options.bonus_exponent
    if options.bonus == "cosine":
        return math.pi * p * torch.sin(math.pi * p)
    return torch.zeros_like(p)
