"""The loss for NVIDIA GPUs: one kernel for the sums of a row, one for its gradient.

Derivation as in chunked.py. The forward kernel reads the logits and keeps seven figures a row; the backward kernel
reads them again and writes the gradient. That is one more read of the logits, where a gradient kept from the forward
pass would cost a write and a read in float32: half types lose nothing before the upstream gradient (the loss scale) is
known, because it is multiplied in before the cast. Memory: the gradient in the type of the logits, no more.

Tested on a CPU with Triton's interpreter (TRITON_INTERPRET=1).
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bonuses import LOG_BONUS_FLOOR
from .options import LossOptions
from .terms import LossTerms, clone_terms, refuse_double_backward

STATISTICS = 7  # of a row: highest logit, 1 / total, top type, 1 - p of it, sum without it, sum of all, a of the target
BLOCK = 4096  # types that a program holds at a time

KINDS = {"none": 0, "log": 1, "power": 2, "cosine": 3}  # bonuses that the kernels compute
NONE, LOG, POWER, COSINE = (tl.constexpr(kind) for kind in KINDS.values())
FLOOR = tl.constexpr(LOG_BONUS_FLOOR)
PI = tl.constexpr(3.141592653589793)


def supports(options: LossOptions) -> bool:
    """Return whether the kernels compute this bonus."""
    return options.bonus in KINDS and not options.bonus_start


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """As `reference.loss_terms`; only loss has a gradient. float64 logits are computed in float32."""
    return LossTerms(*_Triton.apply(logits.contiguous(), target, options, ignored, reduce))


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, options, ignored, reduce):
        terms, statistics = forward(logits, target, options)
        terms.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(logits, target, ignored, statistics)
        ctx.options = options
        loss, nll_loss, bonus = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus)
        return loss, nll_loss, bonus

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        logits, target, ignored, statistics = ctx.saved_tensors
        upstream = upstream.expand(logits.size(0)).masked_fill(ignored, 0.0)
        return backward(logits, target, ctx.options, statistics, upstream, torch.empty_like(logits)), *[None] * 4


def terms_and_gradient_(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(terms [3, tokens], gradient times `scale` [tokens, V]); the gradient takes the place of `logits`."""
    terms, statistics = forward(logits, target, options)
    upstream = torch.where(ignored, 0.0, scale)
    return terms.masked_fill_(ignored, 0.0), backward(logits, target, options, statistics, upstream, logits)


def forward(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(terms [3, tokens], statistics [STATISTICS, tokens]) of contiguous logits [tokens, V], in float32."""
    tokens, vocabulary = logits.shape
    terms = logits.new_empty((3, tokens), dtype=torch.float32)
    statistics = logits.new_empty((STATISTICS, tokens), dtype=torch.float32)
    if tokens:
        with _on_device_of(logits):
            _forward[(tokens,)](
                logits, target, terms, statistics, tokens, vocabulary, *_figures(options, vocabulary),
                **_constants(options), SMOOTHED=options.label_smoothing > 0, BLOCK=_block(vocabulary), num_warps=8,
            )  # fmt: skip
    return terms, statistics


def backward(
    logits: Tensor, target: Tensor, options: LossOptions, statistics: Tensor, upstream: Tensor, out: Tensor
) -> Tensor:
    """Gradient for `upstream` [tokens] (0 where ignored), written to `out` [tokens, V]; `out` may be `logits`."""
    tokens, vocabulary = logits.shape
    block = _block(vocabulary)
    if tokens:
        with _on_device_of(logits):
            _backward[(tokens, triton.cdiv(vocabulary, block))](
                logits, target, statistics, upstream, out, tokens, vocabulary, *_figures(options, vocabulary),
                **_constants(options), BLOCK=block, num_warps=8,
            )  # fmt: skip
    return out


def _on_device_of(logits):
    """Triton launches on the current device, which need not be that of the logits."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _block(vocabulary):
    return min(BLOCK, triton.next_power_of_2(vocabulary))


def _figures(options, vocabulary):
    of_target, share = options.smoothing_masses(vocabulary)
    weight = options.bonus_weight if options.has_bonus else 0.0
    least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
    return of_target, share, weight, least, options.bonus_exponent


def _constants(options):
    return {"KIND": KINDS[options.bonus], "FLOORED": options.log_end == 1}


@triton.jit
def _bonus(p, c, least, exponent, KIND: tl.constexpr, FLOORED: tl.constexpr):
    """(b(p), -p b'(p)) for p and its exact complement c."""
    if KIND == LOG:
        held = tl.maximum(c, least)
        bonus = tl.log(held)
        slope = p / held
        if FLOORED:
            slope = tl.where(c < FLOOR, 0.0, slope)
        else:
            bonus -= (held - c) / least
    elif KIND == POWER:
        power = tl.exp(exponent * tl.log(p))
        bonus = -power
        slope = exponent * power
    elif KIND == COSINE:
        half = tl.sin(p * (0.5 * PI))
        bonus = -2.0 * half * half
        slope = p * PI * tl.sin(p * PI)
    else:
        bonus = p * 0.0
        slope = p * 0.0
    return bonus, slope


@triton.jit
def _forward(
    logits, target, terms, statistics, tokens, vocabulary, of_target, share, weight, least, exponent,
    KIND: tl.constexpr, FLOORED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * vocabulary
    types = tl.arange(0, BLOCK)

    highest = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), 0, tl.int32)
    not_numbers = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z = tl.load(start_of_row + start + types, mask=start + types < vocabulary, other=float("-inf")).to(tl.float32)
        of_block = tl.max(z, axis=0)
        top = tl.where(of_block > highest, start + tl.argmax(z, axis=0), top)
        highest = tl.maximum(highest, of_block)
        not_numbers += tl.sum(tl.where((z != z) | (z == float("inf")), 1.0, 0.0), axis=0)
    # maxima pass over NaN, and +inf leaves no finite rest: make every figure of the row show it
    highest = tl.where(not_numbers > 0, float("nan"), highest)

    rest = tl.full((), 0.0, tl.float32)
    shifted_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        exists = start + types < vocabulary
        z = tl.load(start_of_row + start + types, mask=exists, other=float("-inf")).to(tl.float32)
        shifted = z - highest
        rest += tl.sum(tl.where(exists & (start + types != top), tl.exp(shifted), 0.0), axis=0)
        if SMOOTHED:
            shifted_sum += tl.sum(tl.where(exists, shifted, 0.0), axis=0)
    total = 1.0 + rest
    log_total = tl.where(rest < 1e-4, rest - 0.5 * rest * rest, tl.log(total))  # log(1 + rest) to full precision
    c_top = rest / total

    correct = tl.load(target + row)
    is_top = correct == top
    # a target that is no type shows as NaN, for a kernel cannot raise
    is_type = (correct >= 0) & (correct < vocabulary)
    shifted_target = tl.load(start_of_row + correct, mask=is_type, other=float("nan")).to(tl.float32) - highest
    p_target = tl.exp(shifted_target) / total
    c_target = tl.where(is_top, c_top, 1.0 - p_target)
    b_target, slope_target = _bonus(p_target, c_target, least, exponent, KIND, FLOORED)
    b_top, slope_top = _bonus(1.0 / total, c_top, least, exponent, KIND, FLOORED)

    nll_loss = log_total - shifted_target
    loss = of_target * nll_loss
    bonus = of_target * b_target
    others = tl.where(is_top, 0.0, of_target * (1.0 + weight * slope_target))
    if SMOOTHED:
        b_sum = b_top
        slope_sum = tl.full((), 0.0, tl.float32)
        if KIND != NONE:
            for start in range(0, vocabulary, BLOCK):
                exists = start + types < vocabulary
                z = tl.load(start_of_row + start + types, mask=exists, other=float("-inf")).to(tl.float32)
                p = tl.where(start + types != top, tl.exp(z - highest) / total, 0.0)
                b, slope = _bonus(p, 1.0 - p, least, exponent, KIND, FLOORED)
                b_sum += tl.sum(tl.where(exists, b, 0.0), axis=0)
                slope_sum += tl.sum(tl.where(exists, slope, 0.0), axis=0)
        loss += share * (vocabulary * log_total - shifted_sum)
        bonus += share * b_sum
        others += share * (vocabulary - 1 + weight * slope_sum)
    bonus = weight * bonus
    of_top = share + tl.where(is_top, of_target, 0.0)

    tl.store(terms + row, loss + bonus)
    tl.store(terms + tokens + row, nll_loss)
    tl.store(terms + 2 * tokens + row, bonus)
    tl.store(statistics + row, highest)
    tl.store(statistics + tokens + row, 1.0 / total)
    tl.store(statistics + 2 * tokens + row, top.to(tl.float32))  # exact below 2^24 types
    tl.store(statistics + 3 * tokens + row, c_top)
    tl.store(statistics + 4 * tokens + row, others)
    tl.store(statistics + 5 * tokens + row, others + of_top * (1.0 + weight * slope_top))
    tl.store(statistics + 6 * tokens + row, 1.0 + weight * slope_target)


@triton.jit
def _backward(
    logits, target, statistics, upstream, out, tokens, vocabulary, of_target, share, weight, least, exponent,
    KIND: tl.constexpr, FLOORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    types = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = types < vocabulary
    offset = row.to(tl.int64) * vocabulary + types

    highest = tl.load(statistics + row)
    p_top = tl.load(statistics + tokens + row)
    top = tl.load(statistics + 2 * tokens + row).to(tl.int32)
    c_top = tl.load(statistics + 3 * tokens + row)
    others = tl.load(statistics + 4 * tokens + row)
    grand = tl.load(statistics + 5 * tokens + row)
    a_target = tl.load(statistics + 6 * tokens + row)
    scale = tl.load(upstream + row).to(tl.float32)
    correct = tl.load(target + row)

    z = tl.load(logits + offset, mask=exists, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - highest) * p_top
    _, slope = _bonus(p, 1.0 - p, least, exponent, KIND, FLOORED)
    gradient = p * grand - share * (1.0 + weight * slope)
    gradient -= tl.where(types == correct, of_target * a_target, 0.0)
    # the top type: 1 - p of it is known exactly, so no difference of large terms
    _, slope_top = _bonus(p_top, c_top, least, exponent, KIND, FLOORED)
    of_top = share + tl.where(correct == top, of_target, 0.0)
    gradient_top = p_top * others - of_top * (1.0 + weight * slope_top) * c_top
    gradient = tl.where(types == top, gradient_top, gradient)
    gradient = tl.where(scale == 0.0, 0.0, gradient * scale)
    tl.store(out + offset, gradient, mask=exists)
