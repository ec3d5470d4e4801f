"""Compute the loss on NVIDIA GPUs: one kernel for the sums of a row, one kernel for its gradient.

The derivation is in chunked.py. The forward kernel keeps five numbers a row; the backward kernel reads the logits again
and writes the gradient. That second read costs less than a gradient kept from the forward pass, which would be written
and read in float32. Half types lose nothing, because the upstream gradient (the loss scale) is multiplied in before the
cast. Extra memory: the gradient in the type of the logits.

Rows of up to WHOLE_ROW types stay in registers and are read once by each kernel; the forward kernel reads longer rows
three times (twice without smoothing). Loads and stores are 16 bytes wide if every row starts at a multiple of 16 bytes:
V % 8 == 0 in half types, V % 4 == 0 in float32. Otherwise they are as wide as the start of a row allows: V % 4 gives
8 bytes and V % 2 gives 4 bytes in half types, V % 2 gives 8 bytes in float32, and an odd V gives one value at a time.

Tests run the kernels in Triton's interpreter, and compile them without a GPU (benchmarks/gpu_bounds.py).
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
# Triton's kernels are a language of their own, without Python's types, and torch leaves Function.apply untyped.

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bonuses import LOG_BONUS_FLOOR, find_bonus
from .options import LossOptions
from .terms import LossTerms, clone_terms, refuse_double_backward
from .triton_functions import (
    BONUS_KINDS,
    LOG,
    NONE,
    add_fractions,
    add_quarters,
    bonus_at,
    is_at_top,
    load,
    quarters_of,
)

STATISTICS = 5  # rows of the statistics: the forward kernel stores them, the backward kernel loads them
WHOLE_ROW = 32768  # types of the longest row that stays in registers: 8 blocks
BLOCK = 4096  # types of the longest block
SMALLEST_BLOCK = 256  # of the forward kernel: 8 types a thread of one warp


def supports(bonus: str, is_linear: bool) -> bool:
    """Return whether the kernels compute this bonus."""
    return bonus in BONUS_KINDS


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """Return what `reference.loss_terms` returns; only loss has a gradient. float64 logits are computed in float32."""
    return LossTerms(*_Triton.apply(logits.contiguous(), target, options, ignored, reduce))


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool
    ) -> tuple[Tensor, ...]:
        arguments = bonus_and_scalars(options, logits.size(1))
        terms, statistics = row_sums(logits, target, ignored, *arguments)
        ctx.save_for_backward(logits, target, ignored, statistics)
        ctx.arguments = arguments
        loss, nll_loss, bonus = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus)
        return loss, nll_loss, bonus

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, target, ignored, statistics = ctx.saved_tensors
        upstream = upstream.expand(logits.size(0)).contiguous()
        gradient = torch.empty_like(logits)
        write_gradient(gradient, logits, target, ignored, statistics, upstream, *ctx.arguments)
        return gradient, *[None] * 4


def terms_and_gradient_(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (terms [3, tokens], gradient times `scale` [tokens, V]); the gradient replaces `logits`."""
    arguments = bonus_and_scalars(options, logits.size(1))
    terms, statistics = row_sums(logits, target, ignored, *arguments)
    write_gradient(logits, None, target, ignored, statistics, torch.full_like(terms[0], scale), *arguments)
    return terms, logits


def traced_as(name: str, mutates_args: tuple[str, ...]):
    """Make a function one operator under torch.compile, and call it directly elsewhere: an operator costs 50 us."""

    def decorate(function):
        operator = torch.library.custom_op(f"encourage_mt::triton_{name}", function, mutates_args=mutates_args)

        @functools.wraps(function)
        def call(*arguments):
            return (operator if torch.compiler.is_compiling() else function)(*arguments)

        call.register_fake = operator.register_fake  # type: ignore[attr-defined]
        return call

    return decorate


@traced_as("row_sums", mutates_args=())
def row_sums(
    logits: Tensor, target: Tensor, ignored: Tensor, bonus: str, scalars: list[float]
) -> tuple[Tensor, Tensor]:
    """Return (terms [3, tokens], statistics [STATISTICS, tokens]) of contiguous logits [tokens, V], in float32."""
    tokens, vocabulary = logits.shape
    terms = logits.new_empty((3, tokens), dtype=torch.float32)
    statistics = logits.new_empty((STATISTICS, tokens), dtype=torch.float32)
    shared = constants(logits, bonus, scalars)
    if tokens:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _forward[(tokens,)](
                logits, target, ignored, terms, statistics, tokens, vocabulary, *scalars,
                **shared, **forward_blocks(vocabulary), PAIRS=_has_pairs(logits),
            )  # fmt: skip
    return terms, statistics


@row_sums.register_fake
def _(logits, target, ignored, bonus, scalars):
    return tuple(logits.new_empty((rows, logits.size(0)), dtype=torch.float32) for rows in (3, STATISTICS))


@traced_as("write_gradient", mutates_args=("out",))
def write_gradient(
    out: Tensor,
    logits: Tensor | None,
    target: Tensor,
    ignored: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    bonus: str,
    scalars: list[float],
) -> None:
    """Write the gradient for `upstream` [tokens] to `out` [tokens, V]; without `logits`, `out` contains them."""
    tokens, vocabulary = out.shape
    blocks = backward_blocks(vocabulary)
    if tokens:
        with torch.cuda.device_of(out):
            _backward[(tokens, triton.cdiv(vocabulary, blocks["BLOCK"]))](
                out if logits is None else logits, target, ignored, statistics, upstream, out, tokens, vocabulary,
                *scalars, **constants(out, bonus, scalars), **blocks,
            )  # fmt: skip


def forward_blocks(vocabulary: int) -> dict[str, Any]:
    """Return how the forward kernel divides a row: `BLOCKS` blocks at a time, with 8 types per thread."""
    whole = vocabulary <= WHOLE_ROW
    block = min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(triton.cdiv(vocabulary, WHOLE_ROW // BLOCK))))
    blocks = triton.cdiv(vocabulary, block) if whole else 1
    return {"BLOCK": block, "BLOCKS": blocks, "WHOLE": whole, "num_warps": max(1, block // 256)}


def backward_blocks(vocabulary: int) -> dict[str, Any]:
    """Return how the backward kernel divides a row: one program per block, with 16 types per thread."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def constants(logits: Tensor, bonus: str, scalars: list[float]) -> dict[str, Any]:
    """Return the compile-time constants that both kernels share."""
    _, smoothing_mass, _, start, _, least, _ = scalars
    return {
        "KIND": BONUS_KINDS[bonus],
        "FLOORED": least == LOG_BONUS_FLOOR,
        # whether a type other than the top can lie on the tangent; with a start, the code for it spills fewer registers
        "TANGENT": bonus == "log" and (least > 0.5 or start > 0),
        "STARTED": start > 0,
        "SMOOTHED": smoothing_mass > 0,
        "ALIGNMENT": math.gcd(logits.size(1), 16 // logits.itemsize),
    }


def _has_pairs(logits: Tensor) -> bool:
    """Return whether the GPU computes pairs of float32 numbers, for which other forms spill fewest registers."""
    return logits.is_cuda and torch.cuda.get_device_capability(logits.device) >= (10, 0)


def bonus_and_scalars(options: LossOptions, vocabulary: int) -> tuple[str, list[float]]:
    """Return the bonus in effect and the numbers that both kernels take, in their order."""
    at_start = 0.0
    if options.bonus_start:
        start = torch.tensor(options.bonus_start, dtype=torch.float64, device="cpu")  # whatever the default device is
        at_start = find_bonus(options.bonus).value(start, 1.0 - start, options).item()
    least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
    numbers = [options.bonus_weight, options.bonus_start, at_start, least, options.bonus_exponent]
    return options.bonus if options.has_bonus else "none", [*options.smoothing_masses(vocabulary), *numbers]


@triton.jit
def _forward(
    logits, target, ignored, terms, statistics, tokens, vocabulary,
    target_mass, smoothing_mass, weight, start, at_start, least, exponent,
    KIND: tl.constexpr, FLOORED: tl.constexpr, TANGENT: tl.constexpr, STARTED: tl.constexpr, SMOOTHED: tl.constexpr,
    ALIGNMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(ignored + row):
        for term in tl.static_range(3):
            tl.store(terms + term * tokens + row, 0.0)
        return
    vocabulary = vocabulary // ALIGNMENT * ALIGNMENT  # tells the compiler how rows are aligned
    logits += row.to(tl.int64) * vocabulary
    types = tl.arange(0, BLOCK)
    # a loop of one step is unrolled, and the compiler then merges the three loads of each block
    end = BLOCKS * BLOCK if WHOLE else vocabulary

    highest_logits = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, end, BLOCKS * BLOCK):
        for block in tl.static_range(BLOCKS):
            z, _ = load(logits, first + block * BLOCK + types, vocabulary)
            highest_logits = tl.maximum(highest_logits, z)
    highest = tl.max(highest_logits, axis=0)
    # +inf leaves no finite rest: the row becomes NaN
    highest = tl.where(highest == float("inf"), float("nan"), highest)

    rests = tl.zeros((BLOCK // 4,), tl.float32)
    ties = tl.zeros((BLOCK // 4,), tl.float32)
    shifted_sums = tl.zeros((BLOCK // 4,), tl.float32)
    for first in range(0, end, BLOCKS * BLOCK):
        for block in tl.static_range(BLOCKS):
            z, exists = load(logits, first + block * BLOCK + types, vocabulary)
            # NaN is not at the top, so that it reaches every result of the row
            at_top = is_at_top(z, highest, KIND, SMOOTHED, PAIRS)
            rests += add_quarters(tl.where(at_top, 0.0, tl.exp(z - highest)))
            ties += add_quarters(tl.where(z == highest if KIND == LOG and SMOOTHED else at_top, 1.0, 0.0))
            if SMOOTHED:
                shifted_sums += add_quarters(tl.where(exists, z - highest, 0.0))
    ties = tl.sum(ties, axis=0)
    rest = tl.sum(rests, axis=0) + (ties - 1.0)  # of all types but one of the highest logit
    total = 1.0 + rest
    log_total = tl.where(rest < 1e-4, rest - 0.5 * rest * rest, tl.log(total))  # log(1 + rest) to full precision
    p_top = 1.0 / total
    c_top = rest / total

    correct = tl.load(target + row)
    # a target outside the vocabulary gives NaN, because a kernel cannot raise
    is_type = (correct >= 0) & (correct < vocabulary)
    z_target = tl.load(logits + correct, mask=is_type, other=float("nan")).to(tl.float32)
    is_top = z_target == highest
    shifted = z_target - highest
    p_target = tl.exp(shifted) / total
    c_target = tl.where(is_top, c_top, 1.0 - p_target)
    b_target, slope_target = bonus_at(
        p_target, c_target, shifted - log_total, start, at_start, least, exponent, KIND, FLOORED, STARTED
    )
    b_top, slope_top = bonus_at(p_top, c_top, -log_total, start, at_start, least, exponent, KIND, FLOORED, STARTED)

    # sums over q_k a_k as in chunked.py: the share of the target, of all types but the top, of all types, of the top
    a_target = target_mass * (1.0 + weight * slope_target)
    a_others = tl.where(is_top, 0.0, a_target)
    a_all = a_target
    a_top = tl.where(is_top, a_target, 0.0)
    nll_loss = log_total - shifted
    loss = target_mass * nll_loss
    bonus = target_mass * b_target
    if SMOOTHED:
        # sums over all types but the top
        b_sum = 0.0
        slope_sum = 0.0
        if KIND == LOG:
            # The sum of p / held is kept as a fraction: its denominator is the product of all held, whose logarithm
            # is the sum of log(held). That takes 3 operations a type in place of a division and a logarithm. The
            # product is at least 1/4, because the sum of p is at most 1 and none of these p is above 1/2; nor does
            # any of them reach the floor of log_end 1.
            numerators = tl.zeros((BLOCK // 4,), tl.float32)
            denominators = tl.full((BLOCK // 4,), 1.0, tl.float32)
            excesses = tl.zeros((BLOCK // 4,), tl.float32)
            # The compiler does not know that this is `highest`. It would keep exp(z - highest) from above in registers.
            again = highest if PAIRS else highest + 0.0 * log_total
            for first in range(0, end, BLOCKS * BLOCK):
                for block in tl.static_range(BLOCKS):
                    z, _ = load(logits, first + block * BLOCK + types, vocabulary)
                    quarters = quarters_of(z)
                    for quarter in tl.static_range(4):
                        z = quarters[quarter]
                        p = tl.where(is_at_top(z, again, KIND, SMOOTHED, PAIRS), 0.0, tl.exp(z - again)) * p_top
                        if STARTED:
                            p = tl.where(p < start, 0.0, p)
                            excesses += tl.where(p >= start, least * at_start, 0.0)
                        held = 1.0 - p
                        if TANGENT:
                            held = tl.maximum(held, least)
                            excesses += held - (1.0 - p)
                        numerators = numerators * held + p * denominators
                        denominators *= held
            numerator, denominator = tl.reduce((numerators, denominators), 0, add_fractions)
            b_sum = tl.log(denominator) - tl.sum(excesses, axis=0) / least
            slope_sum = numerator / denominator
        elif KIND != NONE:
            b_sums = tl.zeros((BLOCK,), tl.float32)
            slope_sums = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, end, BLOCKS * BLOCK):
                for block in tl.static_range(BLOCKS):
                    z, _ = load(logits, first + block * BLOCK + types, vocabulary)
                    at_top = is_at_top(z, highest, KIND, SMOOTHED, PAIRS)
                    log_p = tl.where(at_top, float("-inf"), z - highest - log_total)
                    p = tl.exp(log_p)
                    b, slope = bonus_at(p, 1.0 - p, log_p, start, at_start, least, exponent, KIND, FLOORED, STARTED)
                    b_sums += b
                    slope_sums += slope
            b_sum = tl.sum(b_sums, axis=0)
            slope_sum = tl.sum(slope_sums, axis=0)
        loss += smoothing_mass * (vocabulary * log_total - tl.sum(shifted_sums, axis=0))
        bonus += smoothing_mass * (b_sum + ties * b_top)
        a_others += smoothing_mass * (vocabulary - 1 + weight * slope_sum)
        a_all += smoothing_mass * (vocabulary + weight * (slope_sum + ties * slope_top))
        a_top += smoothing_mass * (1.0 + weight * slope_top)
    bonus = weight * bonus

    tl.store(terms + row, loss + bonus)
    tl.store(terms + tokens + row, nll_loss)
    tl.store(terms + 2 * tokens + row, bonus)
    tl.store(statistics + row, highest)
    tl.store(statistics + tokens + row, p_top)
    tl.store(statistics + 2 * tokens + row, a_all)
    tl.store(statistics + 3 * tokens + row, a_target)
    # the gradient of the top type from its exact complement, not as a difference of large terms
    tl.store(statistics + 4 * tokens + row, p_top * a_others - a_top * c_top)


@triton.jit
def _backward(
    logits, target, ignored, statistics, upstream, out, tokens, vocabulary,
    target_mass, smoothing_mass, weight, start, at_start, least, exponent,
    KIND: tl.constexpr, FLOORED: tl.constexpr, TANGENT: tl.constexpr, STARTED: tl.constexpr, SMOOTHED: tl.constexpr,
    ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    vocabulary = vocabulary // ALIGNMENT * ALIGNMENT
    row = tl.program_id(0)
    types = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = types < vocabulary
    offset = row.to(tl.int64) * vocabulary + types
    if tl.load(ignored + row):
        tl.store(out + offset, tl.zeros((BLOCK,), out.dtype.element_ty), mask=exists)
        return

    scale = tl.load(upstream + row).to(tl.float32)
    highest = tl.load(statistics + row)
    p_top = tl.load(statistics + tokens + row)
    a_all = tl.load(statistics + 2 * tokens + row) * scale
    a_target = tl.load(statistics + 3 * tokens + row) * scale
    of_top = tl.load(statistics + 4 * tokens + row) * scale
    correct = tl.load(target + row).to(tl.int32)

    z = tl.load(logits + offset, mask=exists, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - highest) * p_top
    gradient = p * a_all - tl.where(types == correct, a_target, 0.0)
    if SMOOTHED:
        log_p = z - highest + tl.log(p_top)
        _, slope = bonus_at(p, 1.0 - p, log_p, start, at_start, least, exponent, KIND, FLOORED, STARTED)
        gradient -= smoothing_mass * scale * (1.0 + weight * slope)
    # if p_top is at most 1/2 there may be several highest logits, and the difference above loses nothing
    only_top = tl.where(p_top > 0.5, highest, float("nan"))
    gradient = tl.where(z == only_top, of_top, gradient)
    tl.store(out + offset, gradient, mask=exists)
