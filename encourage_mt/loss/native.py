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

import torch
from torch import Tensor

from .bonuses import LOG_BONUS_FLOOR
from .options import LossOptions, LossTerms, clone_terms

BONUSES = ("none", "log", "power", "cosine")  # the order of the enumeration in native.cpp


@functools.cache
def unavailable() -> str:
    """Load the compiled kernel, and return an empty string or the reason why it cannot be used."""
    instruction_set = torch.backends.cpu.get_cpu_capability().lower()
    library = _library(instruction_set)
    if library is None:
        return f"native.cpp is not compiled for {instruction_set}"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built against another torch
        return f"{library.name} does not load: {str(error).splitlines()[0]}"
    torch.library.register_fake("encourage_mt::terms", _fake_terms)
    torch.library.register_fake("encourage_mt::terms_and_gradient", _fake_terms_and_gradient)
    torch.library.register_fake("encourage_mt::terms_and_gradient_", _fake_terms)
    return ""


def _library(instruction_set):
    """Return the path of the compiled file for `instruction_set`, or None."""
    for name in (instruction_set, "default"):
        library = Path(__file__).with_name(f"_native_{name}.so")
        if library.exists():
            return library
    return None


def _fake_terms(logits, target, ignored, *_):
    return logits.new_empty((3, logits.size(0)), dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake_terms_and_gradient(logits, *rest):
    return _fake_terms(logits, *rest), torch.empty_like(logits, memory_format=torch.contiguous_format)


def supports(options: LossOptions) -> bool:
    """Return whether the kernel has the bonus of `options`."""
    return options.bonus in BONUSES


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """Return the terms, like `reference.loss_terms`; only loss has a gradient."""
    return LossTerms(*_Native.apply(logits, target, ignored, reduce, *_scalars(options, logits.size(1))))


def terms_over_logits(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (terms [3, tokens], gradient times `scale` [tokens, V]); the gradient overwrites `logits`."""
    factor = torch.full((), scale, dtype=torch.promote_types(logits.dtype, torch.float32))
    terms = torch.ops.encourage_mt.terms_and_gradient_(
        logits, target, ignored, factor, *_scalars(options, logits.size(1))
    )
    return terms, logits


def _scalars(options, vocabulary):
    """Return the bonus and the options as native.cpp takes them."""
    target_weight, type_weight = options.weights(vocabulary)
    least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
    start = getattr(options, "bonus_start", 0.0)
    floored = float(options.log_end == 1)
    scalars = [target_weight, type_weight, options.bonus_weight, least, floored, options.bonus_exponent, start]
    return BONUSES.index(options.bonus), scalars


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignored, reduce, bonus, scalars):
        ctx.recomputes = logits.dtype in (torch.float16, torch.bfloat16)
        ctx.options = bonus, scalars
        if ctx.needs_input_grad[0] and not ctx.recomputes:
            terms, gradient = torch.ops.encourage_mt.terms_and_gradient(logits, target, ignored, None, bonus, scalars)
            ctx.save_for_backward(gradient)
        else:
            terms = torch.ops.encourage_mt.terms(logits, target, ignored, bonus, scalars)
            ctx.save_for_backward(logits, target, ignored)
        loss, nll_loss, bonus = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus)
        return loss, nll_loss, bonus

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.recomputes:
            logits, target, ignored = ctx.saved_tensors
            _, gradient = torch.ops.encourage_mt.terms_and_gradient(logits, target, ignored, upstream, *ctx.options)
        else:
            (gradient,) = ctx.saved_tensors
            gradient = _multiplied(gradient, upstream.unsqueeze(1) if upstream.dim() else upstream)
        return gradient, None, None, None, None, None


def _multiplied(gradient, upstream):
    """Return gradient * upstream, in place unless the backward pass may run again or is being compiled."""
    if torch.compiler.is_compiling() or _graph_is_kept():
        return gradient * upstream
    return gradient if upstream.dim() == 0 and upstream.item() == 1 else gradient.mul_(upstream)


def _graph_is_kept():
    """Return whether backward runs with retain_graph=True; True where torch cannot say."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
