"""The encouraging loss for any PyTorch program; needs torch only."""

from .functional import BACKENDS, EncouragingLoss, encouraging_loss, loss_terms, projected_loss_terms
from .options import LossOptions, LossTerms

__all__ = [
    "BACKENDS",
    "EncouragingLoss",
    "LossOptions",
    "LossTerms",
    "encouraging_loss",
    "loss_terms",
    "projected_loss_terms",
]
