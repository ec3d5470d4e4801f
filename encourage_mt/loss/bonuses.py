"""The bonuses b(p) and their slopes."""

import math

import torch
from torch import Tensor

from .options import LossOptions

LOG_BONUS_FLOOR = 1e-5  # least 1 - p that log_end 1 tells apart, as in the paper's implementation


def bonus_of(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """b(p), elementwise and unweighted; paper: "normal" bonus is log_end 1, "conservative" is log_end < 1."""
    if options.bonus == "log":
        least = 1.0 - options.log_end if options.log_end < 1 else LOG_BONUS_FLOOR
        held = one_minus_p.clamp(min=least)
        if options.log_end == 1:
            return held.log()
        return held.log() - (held - one_minus_p) / least
    if options.bonus == "power":
        return -(p**options.bonus_exponent)
    if options.bonus == "cosine":
        return -2.0 * torch.sin(0.5 * math.pi * p) ** 2  # cos(pi p) - 1 without its cancellation
    return torch.zeros_like(p)


def scaled_slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """-p * b'(p), elementwise, unweighted and never negative; for log it is p / (1 - min(p, log_end))."""
    if options.bonus == "log":
        if options.log_end == 1:
            return torch.where(one_minus_p < LOG_BONUS_FLOOR, 0.0, p / one_minus_p.clamp(min=LOG_BONUS_FLOOR))
        return p / one_minus_p.clamp(min=1.0 - options.log_end)
    if options.bonus == "power":
        return options.bonus_exponent * p**options.bonus_exponent
    if options.bonus == "cosine":
        return math.pi * p * torch.sin(math.pi * p)
    return torch.zeros_like(p)
