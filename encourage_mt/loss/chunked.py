"""Compute the loss in blocks of rows that fit into the cache, and its gradient in the same forward pass.

Derivation. With q_k = s + h [k = target] (h, s = LossOptions.smoothing_masses) and a(p) = 1 - w p b'(p), w the bonus
weight,

    L = sum_k q_k (-log p_k + w b(p_k)),    dL/dz_i = -q_i a(p_i) + p_i * sum_k q_k a(p_k)

Near p = 0, a(p) = 1 + w c p + O(p^2) and b(p) = -c p + O(p^2), with c = bonuses.linear_coefficient. So for the many
types of small p the gradient is p_i (G - s w c) - s, one multiply-add of exp(z_i), and the sums over them are known
from sum p = 1. Only groups of types that contain a p above `_threshold` are gathered and treated exactly; below it the
omitted terms are smaller than the rounding of the result. The top type, the only one that may be near p = 1, is left
out of every sum: its 1 - p is the sum of the others' exponentials, and no difference of large terms is formed.

Memory: the gradient [tokens, V], in float32 for half types, so that nothing is lost before the loss scale is known,
and temporaries of one block.
"""

import math
import mmap
import os
import sys
from typing import Any

import torch
from torch import Tensor

from .bonuses import bonus_of, linear_coefficient, scaled_slope
from .options import LossOptions
from .terms import LossTerms, clone_terms, multiply_gradient, refuse_double_backward, without_unused_gradient

GROUP = 64  # types that are gathered together
BLOCK_ELEMENTS = 1 << 20  # of one block of rows on CPU: 4 MiB in float32, within the cache
GPU_BLOCK_ELEMENTS = 1 << 24  # of one block on other devices: 64 MiB


def supports(bonus: str, is_linear: bool) -> bool:
    """Return whether b(p) is known to be linear in p near 0 up to p^2, as the derivation needs."""
    return is_linear


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """Return what `reference.loss_terms` returns; only the loss term has a gradient."""
    logits = without_unused_gradient(logits)
    return LossTerms(*_Chunked.apply(logits, target, options, ignored, reduce))  # type: ignore[no-untyped-call]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = _new_gradient(logits)
            ctx.save_for_backward(gradient)
        terms = _in_blocks(logits, target, options, ignored, gradient)
        ctx.dtype = logits.dtype
        loss, nll_loss, bonus = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus)
        return loss, nll_loss, bonus

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (gradient,) = ctx.saved_tensors
        return multiply_gradient(gradient, upstream).to(ctx.dtype), None, None, None, None


_gradient_buffers: list[mmap.mmap] = []  # at most one


def _new_gradient(logits: Tensor) -> Tensor:
    """Allocate the gradient.

    On CPU the buffer is reused, because page-faulting fresh memory takes a third of the run time. A tensor on a mapping
    keeps a reference to it, so a buffer is never reused while any tensor still needs it.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = logits.numel() * dtype.itemsize
    if logits.device.type != "cpu" or not size:
        return logits.new_empty(logits.shape, dtype=dtype)
    buffer = _gradient_buffers.pop() if _gradient_buffers else None
    if buffer is None or len(buffer) < size or sys.getrefcount(buffer) > 2:  # 2: this variable and the call
        # private, or processes forked from this one would share it
        buffer = mmap.mmap(-1, size, **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}))
    _gradient_buffers[:] = [buffer]
    return torch.frombuffer(buffer, dtype=dtype, count=logits.numel()).view(logits.shape)


def release_memory() -> None:
    """Free the memory kept on CPU for the next gradient."""
    _gradient_buffers.clear()


def terms_and_gradient_(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (terms [3, tokens], gradient times `scale` [tokens, V] in the type of `logits`); overwrites `logits`."""
    gradient = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = _in_blocks(gradient, target, options, ignored, gradient)
    if scale != 1:
        gradient *= scale
    return terms, gradient.to(logits.dtype)


def _in_blocks(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, gradient: Tensor | None
) -> Tensor:
    """Return the terms [3, tokens]; write to `gradient` [tokens, V], which may be `logits`, unless it is None."""
    tokens, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    elements = BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    rows = max(1, elements // vocabulary)
    out = logits.new_empty((min(rows, tokens), vocabulary), dtype=dtype) if gradient is None else gradient
    terms = logits.new_empty((3, tokens), dtype=dtype)
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        block_out = out[: block.stop - start] if gradient is None else out[block]
        block_terms = _block(logits[block].to(dtype), target[block], options, block_out, gradient is not None)
        terms[:, block] = torch.stack(block_terms)
    if gradient is not None:
        gradient[ignored] = 0.0
    return terms.masked_fill_(ignored, 0.0)


def _threshold(dtype: torch.dtype, options: LossOptions, smoothing_mass: float) -> float:
    """Return the p up to which the linear form of b is exact enough.

    There smoothing_mass * p / 2, which the linear form leaves out of the loss, is half a rounding step of 1. With a
    bonus start, b is 0 up to it only.
    """
    threshold = torch.finfo(dtype).eps / smoothing_mass
    return min(threshold, options.bonus_start) if options.bonus_start else threshold


def _block(
    logits: Tensor, target: Tensor, options: LossOptions, out: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, nll_loss, bonus), each [rows], of a block of rows; write the gradient to `out` [rows, V]."""
    vocabulary = logits.size(1)
    target_mass, smoothing_mass = options.smoothing_masses(vocabulary)
    weight = options.bonus_weight if options.has_bonus else 0.0
    linear = linear_coefficient(options) or 0.0
    target = target.unsqueeze(1)

    group_tops = _group_tops(logits)
    highest, top_group = group_tops.max(dim=1, keepdim=True)
    top = _top(logits, top_group)
    highest = highest.masked_fill(highest == math.inf, math.nan)  # every value of the row shows it
    torch.sub(logits, highest, out=out)
    shifted_target = out.gather(1, target)
    shifted_sum = out.sum(dim=1, keepdim=True) if smoothing_mass else None
    out.exp_()
    out.scatter_(1, top, 0.0)
    rest = out.sum(dim=1, keepdim=True)
    total = 1.0 + rest
    log_total = rest.log1p()

    # columns: the target, the top type
    is_top = target == top
    p = torch.cat([shifted_target.exp(), torch.ones_like(total)], dim=1) / total
    one_minus_top = rest / total
    one_minus_p = torch.cat([torch.where(is_top, one_minus_top, 1.0 - p[:, :1]), one_minus_top], dim=1)
    b = bonus_of(p, one_minus_p, options)
    a = 1.0 + weight * scaled_slope(p, one_minus_p, options)
    a_target, a_top = target_mass * a[:, :1], a[:, 1:]

    nll_loss = log_total - shifted_target
    loss = target_mass * nll_loss
    bonus = target_mass * b[:, :1]
    a_smoothed = torch.zeros_like(total)  # smoothing_mass * sum of a(p) over all types but the top
    exact = None
    if shifted_sum is not None:
        loss += smoothing_mass * (vocabulary * log_total - shifted_sum)
        b_sum = b[:, 1:] - linear * one_minus_top
        a_smoothed += vocabulary - 1 + weight * linear * one_minus_top
        if weight:
            level = math.log(_threshold(logits.dtype, options, smoothing_mass)) + log_total
            exact = _Exact(out, group_tops - highest > level, total)
            curved_b, curved_a = exact.beyond(linear, options)
            b_sum += exact.sum_rows(curved_b)
            a_smoothed += weight * exact.sum_rows(curved_a)
        bonus += smoothing_mass * b_sum
        a_smoothed *= smoothing_mass
    bonus *= weight
    loss += bonus

    if needs_gradient:
        a_but_top = a_smoothed + torch.where(is_top, 0.0, a_target)  # sum of q a(p) over all types but the top
        top_mass = torch.where(is_top, smoothing_mass + target_mass, total.new_tensor(smoothing_mass))
        out.mul_((a_but_top + top_mass * a_top - smoothing_mass * weight * linear) / total)
        if smoothing_mass:
            out.sub_(smoothing_mass)
        if exact is not None:
            exact.subtract(out, smoothing_mass * weight * curved_a)
        out.scatter_add_(1, target, -a_target)
        out.scatter_(1, top, p[:, 1:] * a_but_top - top_mass * a_top * one_minus_top)
    return loss.squeeze(1), nll_loss.squeeze(1), bonus.squeeze(1)


def _group_tops(logits: Tensor) -> Tensor:
    """Return the highest logit of each GROUP of types [rows, groups]; the last group may be short."""
    vocabulary = logits.size(1)
    whole = vocabulary // GROUP * GROUP
    tops = []
    if whole:
        tops.append(logits[:, :whole].view(-1, whole // GROUP, GROUP).amax(dim=2))
    if whole < vocabulary:
        tops.append(logits[:, whole:].amax(dim=1, keepdim=True))
    return tops[0] if len(tops) == 1 else torch.cat(tops, dim=1)


def _columns(group: Tensor, vocabulary: int) -> Tensor:
    """Return the types of `group` [...] as [..., GROUP]; a short last group repeats its last type."""
    columns = group.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=group.device)
    return columns.clamp_(max=vocabulary - 1) if vocabulary % GROUP else columns


def _top(logits: Tensor, top_group: Tensor) -> Tensor:
    """Return the type of the highest logit of each row [rows, 1], given its group [rows, 1]."""
    columns = _columns(top_group.squeeze(1), logits.size(1))
    return columns.gather(1, logits.gather(1, columns).argmax(dim=1, keepdim=True))


class _Exact:
    """The types of the groups chosen in `chosen` [rows, groups], gathered from exponentials `out` [rows, V]."""

    def __init__(self, out: Tensor, chosen: Tensor, total: Tensor):
        self.rows, vocabulary = out.shape
        self.row, group = chosen.nonzero(as_tuple=True)
        self.index = (self.row.unsqueeze(1) * vocabulary + _columns(group, vocabulary)).view(-1)
        self.p = out.view(-1)[self.index].view(-1, GROUP) / total[self.row]
        tail = vocabulary % GROUP
        if tail:  # the types that a short last group repeats count once
            self.p[(group == vocabulary // GROUP).nonzero().squeeze(1), tail:] = 0.0

    def beyond(self, linear: float, options: LossOptions) -> tuple[Tensor, Tensor]:
        """Return b(p) and -p b'(p) minus their linear forms, for each gathered type [groups chosen, GROUP]."""
        one_minus_p, line = 1.0 - self.p, linear * self.p
        return bonus_of(self.p, one_minus_p, options) + line, scaled_slope(self.p, one_minus_p, options) - line

    def sum_rows(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [groups chosen, GROUP] over the types of each row [rows, 1]."""
        sums = values.new_zeros(self.rows, 1)
        return sums.index_add_(0, self.row, values.sum(dim=1, keepdim=True))

    def subtract(self, out: Tensor, values: Tensor) -> None:
        """Subtract `values` [groups chosen, GROUP] from their types in `out` [rows, V]."""
        out.view(-1).index_add_(0, self.index, values.view(-1), alpha=-1)
