"""Provide the encouraging loss for any PyTorch program; needs torch only, and imports it on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bonuses import register_bonus
    from .functional import EncouragingLoss, encouraging_loss, loss_terms
    from .fused_projection import linear_encouraging_loss, projected_loss_terms
    from .options import BACKENDS, BonusSchedule, LossOptions
    from .rdrop import rdrop_terms
    from .terms import LossTerms

__all__ = [
    "BACKENDS",
    "BonusSchedule",
    "EncouragingLoss",
    "LossOptions",
    "LossTerms",
    "encouraging_loss",
    "linear_encouraging_loss",
    "loss_terms",
    "projected_loss_terms",
    "rdrop_terms",
    "register_bonus",
]

_MODULES = {
    "BACKENDS": "options",
    "BonusSchedule": "options",
    "LossOptions": "options",
    "LossTerms": "terms",
    "linear_encouraging_loss": "fused_projection",
    "projected_loss_terms": "fused_projection",
    "rdrop_terms": "rdrop",
    "register_bonus": "bonuses",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES.get(name, 'functional')}", __name__), name)
