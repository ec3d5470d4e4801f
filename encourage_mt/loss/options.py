"""Declare every option of the loss once: its default, its range and its help text.

Everything else is derived from the fields below: the range checks, the keywords of `encouraging_loss` and
`EncouragingLoss`, the options of the fairseq criterion and the criterion options that a recipe may set. Importing this
module does not import torch; making a `LossOptions` does, to look up its bonus.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

BACKENDS = ("auto", "reference", "chunked", "native", "triton")


def option(
    default: Any, text: str, between: tuple[float, float] | None = None, choices: tuple[str, ...] | None = None
) -> Any:
    """Return a dataclass field with the default, help text and allowed values of an option."""
    return field(default=default, metadata={"help": text, "between": between, "choices": choices})


class _Checked:
    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            check_option(each.name, getattr(self, each.name))


@dataclass(frozen=True)
class LossOptions(_Checked):
    """The options that shape the loss. Raises ValueError for a value that is not allowed.

    `bonus` is the name of a registered bonus, or MODULE:NAME for a bonus in a module of your own, which is imported.
    `smoothing_convention` decides how much of the label smoothing eps a type other than the target gets: eps/V
    ("paper"; torch does the same, and the target gets eps/V as well) or eps/(V-1) ("fairseq", the convention of its
    LabelSmoothedCrossEntropyCriterion).
    """

    bonus: str = option(
        "log",
        "bonus added to cross entropy: none (label-smoothed cross entropy), log, power, cosine, or MODULE:NAME for one "
        "of your own",
    )
    log_end: float = option(
        0.5,
        "probability above which the log bonus continues linearly, along its tangent; 1 means no tangent",
        between=(0, 1),
    )
    bonus_exponent: float = option(2.0, "exponent of the power bonus", between=(1, 10))
    bonus_weight: float = option(1.0, "factor of the bonus", between=(0, 2))
    bonus_start: float = option(
        0.0, "probability s below which there is no bonus; from s on, the bonus is b(p) - b(s)", between=(0, 1)
    )
    label_smoothing: float = option(0.0, "epsilon of label smoothing", between=(0, 1))
    smoothing_convention: str = option(
        "paper",
        "how label smoothing is distributed: eps/V to every class, as in torch (paper), or eps/(V-1) to every class "
        "except the target (fairseq)",
        choices=("fairseq", "paper"),
    )

    @property
    def has_bonus(self) -> bool:
        """Whether there is a bonus; otherwise the loss is label-smoothed cross entropy."""
        return self.bonus != "none" and self.bonus_weight > 0

    def smoothing_masses(self, vocabulary: int) -> tuple[float, float]:
        """Return (target_mass, smoothing_mass).

        The smoothed sum of any f over V types is target_mass * f(target) + smoothing_mass * sum_k f(k).
        """
        eps = self.label_smoothing
        if self.smoothing_convention == "paper":
            return 1.0 - eps, eps / vocabulary
        smoothing_mass = eps / (vocabulary - 1)
        return 1.0 - eps - smoothing_mass, smoothing_mass


@dataclass(frozen=True)
class BonusSchedule(_Checked):
    """How the weight of the bonus grows during a training. Raises ValueError as `LossOptions` does.

    The paper's code counts epochs; this counts updates.
    """

    bonus_defer_updates: int = option(0, "number of updates before the bonus starts", between=(0, math.inf))
    bonus_schedule: str = option(
        "constant",
        "factor of the bonus weight while x rises from 0 to 1 over --bonus-schedule-updates: constant (1), linear (x), "
        "exp (e^(5 (x - 1))) or cosine ((1 - cos(pi x)) / 2)",
        choices=("constant", "linear", "exp", "cosine"),
    )
    bonus_schedule_updates: int = option(
        0, "number of updates, after the deferred ones, until the bonus has its full weight", between=(0, math.inf)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bonus_schedule != "constant") != (self.bonus_schedule_updates > 0):
            raise ValueError(
                "bonus_schedule and bonus_schedule_updates belong together: set bonus_schedule to linear, exp or "
                f"cosine and bonus_schedule_updates to at least 1, or neither; got {self.bonus_schedule} and "
                f"{self.bonus_schedule_updates}"
            )

    @property
    def varies(self) -> bool:
        """Whether the weight changes during the training."""
        return self.bonus_defer_updates > 0 or self.bonus_schedule != "constant"

    def factor(self, updates: int) -> float:
        """Return the factor of bonus_weight, 0 to 1, for the update that follows the first `updates` ones."""
        if updates < self.bonus_defer_updates:
            return 0.0
        if self.bonus_schedule == "constant":
            return 1.0
        progress = min(1.0, (updates - self.bonus_defer_updates) / self.bonus_schedule_updates)
        if self.bonus_schedule == "exp":
            return math.exp(5 * (progress - 1))
        return progress if self.bonus_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class CriterionOptions(_Checked):
    """The options of the fairseq criterion that the loss does not have. Raises ValueError as `LossOptions` does."""

    loss_backend: str = option(
        "auto", "implementation of the loss; all give the same values up to rounding", choices=BACKENDS
    )
    fuse_projection: bool = option(
        False,
        "during training, compute the output projection and the loss together in blocks of 1,024 tokens, without "
        "storing the logits of the whole batch",
    )
    rdrop_alpha: float = option(
        0.0,
        "R-Drop: pass each sentence twice through the model, and add this factor times the KL divergence between both "
        "predictions; 0 turns it off",
        between=(0, 100),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rdrop_alpha and self.fuse_projection:
            raise ValueError("rdrop_alpha and fuse_projection exclude each other: R-Drop needs the logits; drop one")
        if self.fuse_projection and self.loss_backend == "reference":
            raise ValueError("fuse_projection does not work with loss_backend reference: drop --fuse-projection")


OPTIONS = {
    each.name: each for group in (LossOptions, BonusSchedule, CriterionOptions) for each in dataclasses.fields(group)
}

# The criterion options that an arm of a recipe may set, as on fairseq's command line but without the leading dashes.
OPTION_NAMES = frozenset(name.replace("_", "-") for name in (*OPTIONS, "report_accuracy", "ignore_prefix_size"))


def check_option(name: str, value: Any) -> None:
    """Raise ValueError, which names the option and the allowed values, if `value` is not allowed for `name`."""
    between, choices = OPTIONS[name].metadata["between"], OPTIONS[name].metadata["choices"]
    if between:
        low, high = between
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} must be a number between {low} and {high}, got {value}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")
    if name == "bonus":
        from .bonuses import find_bonus  # imports torch

        find_bonus(value)
