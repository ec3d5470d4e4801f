"""Options of the loss and the terms it returns."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

BONUSES = ("none", "log", "power", "cosine")
SMOOTHING_CONVENTIONS = ("fairseq", "paper")
RANGES = {
    "label_smoothing": (0, 1),
    "log_end": (0, 1),
    "bonus_exponent": (1, 10),
    "bonus_weight": (0, 2),
}


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

    def weights(self, vocabulary: int) -> tuple[float, float]:
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


def clone_terms(terms: Tensor, reduce: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `terms` [3, ...], summed if `reduce`, as tensors of their own for a custom autograd function to return.

    Views would not do: fairseq writes to the loss of an empty batch (loss *= 0).
    """
    return tuple(term.sum() if reduce else term.clone() for term in terms)
