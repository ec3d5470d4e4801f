"""Compute the loss on a CPU with compiled code: one pass over memory, forward and backward.

native.cpp has the kernel and its derivation. setup.py builds it where a C++ compiler and torch are available;
`unavailable()` says why it cannot be used, and functional.py then takes the chunked backend.

float32 and float64: the gradient is computed in the forward pass and multiplied in place by the upstream gradient, so
the extra memory is the gradient. float16 and bfloat16: rounding the gradient before the loss scale is known would lose
small values (eps/V is subnormal in float16), and keeping it in float32 would take twice its memory. The backward pass
therefore computes it again, from the logits, and rounds once. Without a gradient (validation) no [tokens, V] tensor is
allocated.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bonuses import LOG_BONUS_FLOOR
from .options import LossOptions
from .terms import LossTerms, clone_terms, multiply_gradient, refuse_double_backward, without_unused_gradient

BONUSES = ("none", "log", "power", "cosine")  # the order of the enumeration in native.cpp


@functools.cache
def unavailable() -> str:
    """Load the compiled kernel, and return an empty string or the reason why it cannot be used."""
    instruction_set = torch.backends.cpu.get_cpu_capability().lower()
    library = _library(instruction_set)
    if library is None:
        return f"native.cpp is not compiled for {instruction_set}"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:  # built against another torch
        return f"{library.name} does not load: {str(error).splitlines()[0]}"
    torch.library.register_fake("encourage_mt::terms", _fake_terms)
    torch.library.register_fake("encourage_mt::terms_and_gradient", _fake_terms_and_gradient)
    torch.library.register_fake("encourage_mt::terms_and_gradient_", _fake_terms)
    return ""


def _library(instruction_set: str) -> Path | None:
    """Return the path of the compiled file for `instruction_set` or an older one, or None."""
    for name in (instruction_set, *(["avx2"] if instruction_set == "avx512" else []), "default"):
        library = Path(__file__).with_name(f"_native_{name}.so")
        if library.exists():
            return library
    return None


def _fake_terms(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((3, logits.size(0)), dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake_terms_and_gradient(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_terms(logits), torch.empty_like(logits, memory_format=torch.contiguous_format)


def supports(bonus: str, is_linear: bool) -> bool:
    """Return whether the kernel supports the bonus of this name."""
    return bonus in BONUSES


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """Return the terms, like `reference.loss_terms`; only loss has a gradient."""
    logits = without_unused_gradient(logits)
    arguments = _arguments(options, logits.size(1))
    return LossTerms(*_Native.apply(logits, target, ignored, reduce, *arguments))  # type: ignore[no-untyped-call]


def terms_and_gradient_(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (terms [3, tokens], gradient times `scale` [tokens, V]); the gradient overwrites `logits`."""
    arguments = _arguments(options, logits.size(1))
    factor = torch.full((), scale, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    terms: Tensor = torch.ops.encourage_mt.terms_and_gradient_(logits, target, ignored, factor, *arguments)
    return terms, logits


def _arguments(options: LossOptions, vocabulary: int) -> tuple[int, list[float]]:
    """Return bonus and options as the operators take them: the fields of the struct Options in native.cpp."""
    least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
    log_bonus = [least, 1.0 if options.log_end == 1 else 0.0]  # torch.compile cannot take float(bool)
    masses = options.smoothing_masses(vocabulary)
    return BONUSES.index(options.bonus), [
        *masses, options.bonus_weight, *log_bonus, options.bonus_exponent, options.bonus_start,
    ]  # fmt: skip


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignored: Tensor, reduce: bool, bonus: int, options: list[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.arguments = bonus, options
        ctx.recompute = logits.dtype in (torch.float16, torch.bfloat16)
        operators = torch.ops.encourage_mt
        if ctx.recompute or not ctx.needs_input_grad[0]:
            terms = operators.terms(logits, target, ignored, bonus, options)
            ctx.save_for_backward(logits, target, ignored)
        else:
            terms, gradient = operators.terms_and_gradient(logits, target, ignored, None, bonus, options)
            ctx.save_for_backward(gradient)
        loss, nll_loss, bonus_term = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus_term)
        return loss, nll_loss, bonus_term

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if ctx.recompute:
            _, gradient = torch.ops.encourage_mt.terms_and_gradient(*ctx.saved_tensors, upstream, *ctx.arguments)
        else:
            (gradient,) = ctx.saved_tensors
            gradient = multiply_gradient(gradient, upstream)
        return gradient, None, None, None, None, None
