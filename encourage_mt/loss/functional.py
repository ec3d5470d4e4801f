"""Provide the encouraging loss as a function and as a module with the shapes of torch's cross entropy.

reference.py defines the loss; every backend agrees with it. Nothing in this package depends on fairseq.
"""

import dataclasses
import functools
import importlib
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import chunked, native, reference
from .bonuses import check_bonus, linear_coefficient
from .options import BACKENDS, LossOptions
from .terms import LossTerms, class_indices, mean_of

logger = logging.getLogger(__name__)

_modules: dict[str, ModuleType] = {"reference": reference, "chunked": chunked, "native": native}  # triton on first use

REDUCTIONS = ("mean", "sum", "none")


def loss_terms(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    ignore_index: int = -100,
    reduce: bool = True,
    backend: str = "auto",
) -> LossTerms:
    """Return loss, likelihood and bonus of `logits` [tokens, V] for `target` [tokens].

    Each term is a sum over tokens or, with reduce=False, one value per token. float16 and bfloat16 are computed in
    float32; float64 stays, except with "triton", which computes in float32. Tokens whose target is `ignore_index` do
    not count and get no gradient. Backend "reference" is the plain expression; the others are fast, and only their loss
    term has a gradient; "auto" takes the fastest that can run here. Raises ValueError if shapes or devices do not fit,
    V < 2, the target is not of an integer type, or the backend is unknown or cannot run.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [tokens, V] and target [tokens], got {list(logits.shape)} and {list(target.shape)}"
        )
    if logits.size(1) < 2:
        raise ValueError("the loss needs at least 2 classes")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, target is on {target.device}")
    target = class_indices(target)
    ignored = target.eq(ignore_index)
    implementation = find_backend(backend, options, logits.device.type, logits.dtype)
    terms: LossTerms = implementation.loss_terms(logits, target.masked_fill(ignored, 0), options, ignored, reduce)
    return terms


def find_backend(backend: str, options: LossOptions, device: str, dtype: torch.dtype) -> ModuleType:
    """Return the module that computes the loss: the first of `_candidates` that runs here and supports the bonus.

    The first use of each combination logs the backend and why it is not a faster one.
    Raises ValueError if the backend is unknown or cannot run on this device.
    """
    is_linear = linear_coefficient(options) is not None
    if torch.compiler.is_compiling():
        return _modules[_choose_in_graph(backend, options.bonus, is_linear, device, dtype)]
    options = dataclasses.replace(options, bonus_weight=1.0)  # schedules change it with each update
    return _modules[_checked_choice(backend, options, is_linear, device, dtype)]


def _choose_in_graph(backend: str, bonus: str, is_linear: bool, device: str, dtype: torch.dtype) -> str:
    """Choose while torch.compile traces, with arguments that it can turn into constants; the bonus is not checked.

    LossOptions would be an error (torch 2.11) or have the defaults if it is made in the graph (torch 2.13), and a
    number would be an error if it varies between calls.
    """
    return _choose_backend(backend, LossOptions(bonus=bonus), is_linear, device, dtype)


# What torch.compiler.assume_constant_result does; that would import torch._dynamo, which takes 3 seconds.
_choose_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _checked_choice(backend: str, options: LossOptions, is_linear: bool, device: str, dtype: torch.dtype) -> str:
    check_bonus(options)
    return _choose_backend(backend, options, is_linear, device, dtype)


@functools.cache  # logs once
def _choose_backend(backend: str, options: LossOptions, is_linear: bool, device: str, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"loss_backend must be one of {', '.join(BACKENDS)}, got {backend}")
    if backend != "auto" and (missing := missing_backend(backend, device)):
        raise ValueError(f"loss_backend {backend} cannot run here: {missing}; use auto")
    passed_over, is_slower = [], False
    for name in _candidates(backend, device, dtype):
        if missing := missing_backend(name, device):
            passed_over.append(f"{name}: {missing}")
            is_slower = True
            continue
        if name == "triton":
            _modules[name] = importlib.import_module(".triton_kernels", __package__)
        if name == "reference" or _modules[name].supports(options.bonus, is_linear):
            is_slower |= name == "reference" != backend
            level = logging.WARNING if is_slower else logging.INFO
            logger.log(level, "loss backend: %s%s", name, f" ({'; '.join(passed_over)})" if passed_over else "")
            return name
        passed_over.append(f"{name}: it does not support {_changed(options)}")
    raise AssertionError("the reference backend computes every bonus")


def _changed(options: LossOptions) -> str:
    """Return the options that are not at their default, as NAME=VALUE."""
    values = ((each, getattr(options, each.name)) for each in dataclasses.fields(options))
    return ", ".join(f"{each.name}={value}" for each, value in values if value != each.default)


def _candidates(backend: str, device: str, dtype: torch.dtype) -> list[str]:
    """Return the backends to try, in this order, for the choice `backend`; Triton's kernels compute in float32."""
    if backend == "auto":
        fastest = {"cpu": ["native"], "cuda": ["triton"] if dtype != torch.float64 else []}.get(device, [])
        return [*fastest, "chunked", "reference"]
    return list(dict.fromkeys([backend, "chunked", "reference"]))


def missing_backend(backend: str, device: str) -> str:
    """Return why `backend` cannot run on this machine, or "" if it can."""
    if backend == "native":
        return f"it needs a CPU, the logits are on {device}" if device != "cpu" else native.unavailable()
    if backend != "triton":
        return ""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device != "cuda":
        return f"it needs an NVIDIA GPU, the logits are on {device}"
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return "" if has_compiler else "Triton needs a C compiler: CC, gcc or clang"


_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def _show_options(function: _Decorated) -> _Decorated:
    """Show the fields of LossOptions as keywords in the signature of a function that takes them as **options."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(LossOptions)
    ]
    function.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
    return function


@_show_options
def encouraging_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Return the loss with the shapes of torch.nn.functional.cross_entropy.

    logits (N, C) with target (N), or (N, C, d1, ...) with target (N, d1, ...); class indices only. reduction "mean"
    (over targets that are not `ignore_index`), "sum", or "none" (shape of target). The other keywords are the fields of
    `LossOptions`, with the same defaults. Raises ValueError for other shapes and values.
    """
    return _loss(logits, target, _options(options), ignore_index, reduction, backend)


class EncouragingLoss(nn.Module):
    """A drop-in replacement for torch.nn.CrossEntropyLoss, equal to it with bonus="none".

    It takes the keywords of `encouraging_loss`. `bonus_weight` is an attribute that may be set during the training.

    >>> loss = EncouragingLoss(log_end=0.75, label_smoothing=0.1)(logits, target)
    """

    @_show_options
    def __init__(
        self, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto", **options: Any
    ) -> None:
        super().__init__()
        self.options = _options(options)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

    @property
    def bonus_weight(self) -> float:
        """The factor of the bonus; set it, for example, to the factor of a `BonusSchedule` for the present update."""
        return self.options.bonus_weight

    @bonus_weight.setter
    def bonus_weight(self, weight: float) -> None:
        self.options = dataclasses.replace(self.options, bonus_weight=weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `logits` (N, C, ...) for `target` (N, ...)."""
        return _loss(logits, target, self.options, self.ignore_index, self.reduction, self.backend)

    def extra_repr(self) -> str:
        """Return the options, as they appear in the module's repr."""
        return f"{self.options}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


def _options(options: dict[str, Any]) -> LossOptions:
    if options.pop("weight", None) is not None:
        raise ValueError("weight: the encouraging loss does not support class weights; drop the argument")
    return LossOptions(**options)


def _loss(
    logits: Tensor, target: Tensor, options: LossOptions, ignore_index: int, reduction: str, backend: str
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction}")
    target = class_indices(target)
    if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"expected logits (N, C, ...) and target (N, ...), got {list(logits.shape)} and {list(target.shape)}"
        )
    rows = logits.movedim(1, -1).reshape(-1, logits.size(1))
    loss = loss_terms(rows, target.reshape(-1), options, ignore_index, reduction != "none", backend).loss
    if reduction == "mean":
        return mean_of(loss, target.ne(ignore_index).sum())
    return loss if reduction == "sum" else loss.view(target.shape)
