"""Functions of the GPU kernels: the bonus at a probability, loads, and sums within a thread."""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

import math

import triton
import triton.language as tl

from .bonuses import LOG_BONUS_FLOOR

BONUS_KINDS = {"none": 0, "log": 1, "power": 2, "cosine": 3}
NONE, LOG, POWER, COSINE = (tl.constexpr(kind) for kind in BONUS_KINDS.values())
FLOOR = tl.constexpr(LOG_BONUS_FLOOR)
HALF_PI = tl.constexpr(math.pi / 2)
PI = tl.constexpr(math.pi)


@triton.jit
def sine(x):
    """Return sin(x) for 0 <= x <= pi / 2, to one rounding step of float32; tl.sin would spill registers."""
    square = x * x
    tail = square * (2.7557319e-6 - square * (2.5052108e-8 - square * 1.6059044e-10))
    return x * (1.0 - square * (1.0 / 6 - square * (1.0 / 120 - square * (1.0 / 5040 - tail))))


@triton.jit
def bonus_at(
    p, c, log_p, start, at_start, least, exponent,
    KIND: tl.constexpr, FLOORED: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """Return (b(p), -p b'(p)) for p, its exact complement c, and log p."""
    if KIND == LOG:
        held = tl.maximum(c, least)
        bonus = tl.log(held)
        slope = p / held
        if FLOORED:
            slope = tl.where(c < FLOOR, 0.0, slope)
        else:
            bonus -= (held - c) / least
    elif KIND == POWER:
        power = tl.exp(exponent * log_p)
        bonus = -power
        slope = exponent * power
    elif KIND == COSINE:
        half = sine(p * HALF_PI)
        bonus = -2.0 * half * half
        slope = p * PI * sine(tl.minimum(p, c) * PI)
    else:
        bonus = p * 0.0
        slope = p * 0.0
    if STARTED:
        bonus = tl.where(p < start, 0.0, bonus - at_start)
        slope = tl.where(p < start, 0.0, slope)
    return bonus, slope


@triton.jit
def load(logits, types, vocabulary):
    """Return (logits in float32, whether the types exist); logits are -inf where they do not."""
    exists = types < vocabulary
    return tl.load(logits + types, mask=exists, other=float("-inf")).to(tl.float32), exists


@triton.jit
def is_at_top(z, highest, KIND: tl.constexpr, SMOOTHED: tl.constexpr, PAIRS: tl.constexpr):
    """Whether z is the highest logit, in the form with which rows of WHOLE_ROW types spill no registers."""
    if KIND == LOG and SMOOTHED and not PAIRS:
        return z >= highest
    else:
        return z - highest >= 0.0


@triton.jit
def quarters_of(x):
    """Return four tensors of every fourth value of x; values move between registers of the same thread only."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 4, 2, 2)))
    return tl.split(even) + tl.split(odd)


@triton.jit
def add_quarters(x):
    """Return the sums of four neighbours each."""
    first, second, third, fourth = quarters_of(x)
    return (first + second) + (third + fourth)


@triton.jit
def add_fractions(numerator, denominator, other_numerator, other_denominator):
    """Return the sum of two fractions as (numerator, denominator)."""
    return numerator * other_denominator + other_numerator * denominator, denominator * other_denominator
