"""The encouraging loss for any PyTorch program: a function and a module with the shapes of torch's cross entropy.

The definition is in reference.py, with which every backend agrees. Nothing here knows of fairseq.
"""

import functools
import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from . import chunked, fused_projection, reference
from .options import LossOptions, LossTerms

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "chunked", "triton")


def loss_terms(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    ignore_index: int = -100,
    reduce: bool = True,
    backend: str = "auto",
) -> LossTerms:
    """Loss, likelihood and bonus of `logits` [tokens, V] for `target` [tokens].

    Each term is a sum over tokens or, with reduce=False, one value per token. float16 and bfloat16 are raised to
    float32; float64 stays. Tokens whose target is `ignore_index` count nothing and get no gradient. backend
    "reference" is the plain expression; "chunked" and "triton" (NVIDIA GPUs) are fast, and only their loss term has a
    gradient; "auto" takes the fastest that serves. Raises ValueError if shapes do not fit, V < 2, or the backend is
    none or cannot run here.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [tokens, V] and target [tokens], got {list(logits.shape)} and {list(target.shape)}"
        )
    if logits.size(1) < 2:
        raise ValueError("the loss needs at least 2 types")
    ignored = target.eq(ignore_index)
    implementation = _implementation(backend, options, logits.device.type, logits.dtype)
    return implementation.loss_terms(logits, target.masked_fill(ignored, 0), options, ignored, reduce)


def projected_loss_terms(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    options: LossOptions,
    ignore_index: int = -100,
    backend: str = "auto",
    accuracy: bool = False,
) -> tuple[LossTerms, Tensor]:
    """`loss_terms` of logits = features [tokens, D] @ weight.T, weight [V, D], without ever holding [tokens, V].

    Also returns the number of targets predicted right, if `accuracy`. Raises ValueError if shapes do not fit, and for
    a backend or bonus that cannot be fused.
    """
    if features.dim() != 2 or target.shape != features.shape[:1] or weight.dim() != 2 or weight.size(0) < 2:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (features, weight, target))
        raise ValueError(f"expected features [tokens, D], weight [V >= 2, D] and target [tokens], got {shapes}")
    device = features.device.type
    if torch.is_autocast_enabled(device):  # as it would cast them for the product
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    ignored = target.eq(ignore_index)
    implementation = _implementation(backend, options, device, features.dtype)
    if implementation is reference:
        raise ValueError(
            "only the reference backend serves here, and it cannot be fused with the projection: drop "
            "--fuse-projection, or take another --loss-backend or, for the power bonus, an exponent of 1 or from 2"
        )
    target = target.masked_fill(ignored, 0)
    with torch.autocast(device, enabled=False):
        return fused_projection.loss_terms(
            features, weight, target, options, ignored, implementation.terms_over_logits, accuracy
        )


@functools.cache  # so that it logs once
def _implementation(backend: str, options: LossOptions, device: str, dtype: torch.dtype):
    """The module that serves `backend`; what "auto" takes, and a bonus that a backend lacks, are logged."""
    if backend not in BACKENDS:
        raise ValueError(f"loss_backend must be one of {', '.join(BACKENDS)}, got {backend}")
    if backend == "reference":
        return reference
    has_triton = find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        lacks = "no NVIDIA GPU" if device != "cuda" else "no Triton" if not has_triton else ""
        lacks = lacks or ("float64" if dtype == torch.float64 else "")
        backend = "chunked" if lacks else "triton"
        logger.info(f"loss backend: {backend}{f' ({lacks})' if lacks else ''}")
    if backend == "triton":
        if not has_triton or not (device == "cuda" or interpreted):
            raise ValueError(f"loss_backend triton needs Triton and an NVIDIA GPU, got {device}; take auto")
        from . import triton_kernels

        return triton_kernels
    if not chunked.supports(options):
        logger.warning(f"the chunked loss backend has no {options.bonus} bonus for {options}: taking reference")
        return reference
    return chunked


def encouraging_loss(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The loss with the shapes of torch.nn.functional.cross_entropy.

    logits (N, C) with target (N), or (N, C, d1, ...) with target (N, d1, ...); class indices only. reduction "mean"
    (over targets that are not `ignore_index`), "sum", or "none" (shape of target). Raises ValueError on others.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction}")
    if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"expected logits (N, C, ...) and target (N, ...), got {list(logits.shape)} and {list(target.shape)}"
        )
    rows = logits.movedim(1, -1).reshape(-1, logits.size(1))
    loss = loss_terms(rows, target.reshape(-1), options, ignore_index, reduction != "none", backend).loss
    if reduction == "mean":
        return loss / target.ne(ignore_index).sum()
    return loss if reduction == "sum" else loss.view(target.shape)


class EncouragingLoss(nn.Module):
    """Stands where torch.nn.CrossEntropyLoss stands; equal to it with bonus="none".

    Shapes and reduction as in `encouraging_loss`. label_smoothing gives eps/C to every class, as torch does.

    >>> loss = EncouragingLoss(log_end=0.75, label_smoothing=0.1)(logits, target)
    """

    def __init__(
        self,
        bonus: str = LossOptions.bonus,
        log_end: float = LossOptions.log_end,
        bonus_exponent: float = LossOptions.bonus_exponent,
        bonus_weight: float = LossOptions.bonus_weight,
        label_smoothing: float = LossOptions.label_smoothing,
        ignore_index: int = -100,
        reduction: str = "mean",
    ):
        super().__init__()
        self.options = LossOptions(bonus, log_end, bonus_exponent, bonus_weight, label_smoothing, "paper")
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return encouraging_loss(logits, target, self.options, self.ignore_index, self.reduction)

    def extra_repr(self) -> str:
        return f"{self.options}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
