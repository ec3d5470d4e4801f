"""The loss in blocks of rows that fit the cache, with its closed gradient made in the forward pass.

Derivation. With q_k = s + h [k = target] (h, s = LossOptions.weights) and a(p) = 1 - w p b'(p), w the bonus weight,

    L = sum_k q_k (-log p_k + w b(p_k)),    dL/dz_i = -q_i a(p_i) + p_i * sum_k q_k a(p_k)

Near p = 0, a(p) = 1 + w c p + O(p^2) and b(p) = -c p + O(p^2), with c = 1 (log, power 1) or 0. So for the many types
of small p the gradient is p_i (G - s w c) - s, one multiply-add of exp(z_i), and the sums over them are known from
sum p = 1. Only groups of types that hold a p above `_threshold` are gathered and treated exactly; below it what is
left out is smaller than the rounding of the result. The top type, the only one that may be near p = 1, is kept out of
every sum: 1 - p of it is the sum of the others' exponentials, and no difference of large terms is formed.

Memory: the gradient [tokens, V], in float32 for half types, so that nothing is lost before the loss scale is known,
and temporaries of one block.
"""

import math
import mmap
import os
import sys

import torch
from torch import Tensor

from .bonuses import bonus_of, scaled_slope
from .options import LossOptions, LossTerms, clone_terms

GROUP = 64  # types that are gathered together
BLOCK_ELEMENTS = 1 << 20  # of one block of rows on CPU: 4 MiB in float32, within the cache
GPU_BLOCK_ELEMENTS = 1 << 24  # elsewhere: 64 MiB


def supports(options: LossOptions) -> bool:
    """Whether b(p) is linear in p near 0 up to p^2, as the derivation needs."""
    return not (options.bonus == "power" and 1 < options.bonus_exponent < 2)


def loss_terms(logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, reduce: bool) -> LossTerms:
    """As `encourage_mt.reference.loss_terms`; only loss has a gradient."""
    return LossTerms(*_Chunked.apply(logits, target, options, ignored, reduce))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, options, ignored, reduce):
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = _new_gradient(logits)
        terms = _in_blocks(logits, target, options, ignored, gradient)
        ctx.gradient = gradient
        ctx.dtype = logits.dtype
        loss, nll_loss, bonus = clone_terms(terms, reduce)
        ctx.mark_non_differentiable(nll_loss, bonus)
        return loss, nll_loss, bonus

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        if upstream.dim() == 1:
            upstream = upstream.unsqueeze(1)
        if _graph_is_kept():
            gradient = ctx.gradient * upstream
        else:
            gradient, ctx.gradient = ctx.gradient, None
            if upstream.device.type != "cpu" or upstream.dim() or upstream.item() != 1:
                gradient *= upstream
        return gradient.to(ctx.dtype), None, None, None, None


def _graph_is_kept():
    """Whether backward runs with retain_graph=True and may be asked again; True where torch cannot tell."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


_rooms = []  # at most one


def _new_gradient(logits):
    """Room for the gradient. On CPU it is kept from call to call: to have fresh pages mapped takes a third of all time.

    A tensor on a mapping holds a reference to it, so one that is still in use anywhere is never handed out again.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = logits.numel() * dtype.itemsize
    if logits.device.type != "cpu" or not size:
        return logits.new_empty(logits.shape, dtype=dtype)
    try:
        room = _rooms.pop()
    except IndexError:
        room = None
    if room is None or len(room) < size or sys.getrefcount(room) > 2:  # 2: here and in the call
        # private, or processes forked from this one would share it
        room = mmap.mmap(-1, size, **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}))
    _rooms[:] = [room]
    return torch.frombuffer(room, dtype=dtype, count=logits.numel()).view(logits.shape)


def release_memory() -> None:
    """Give back the memory kept on CPU for the next gradient."""
    _rooms.clear()


def terms_over_logits(
    logits: Tensor, target: Tensor, options: LossOptions, ignored: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(terms [3, tokens], gradient times `scale` [tokens, V] in the type of `logits`), spending `logits` for it."""
    gradient = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = _in_blocks(gradient, target, options, ignored, gradient)
    if scale != 1:
        gradient *= scale
    return terms, gradient.to(logits.dtype)


def _in_blocks(logits, target, options, ignored, gradient):
    """Terms [3, tokens]; writes the gradient to `gradient` [tokens, V], which may be `logits`, unless it is None."""
    tokens, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    elements = BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    rows = max(1, elements // vocabulary)
    out = logits.new_empty((min(rows, tokens), vocabulary), dtype=dtype) if gradient is None else gradient
    terms = logits.new_empty((3, tokens), dtype=dtype)
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        of_block = out[: block.stop - start] if gradient is None else out[block]
        figures = _block(logits[block].to(dtype), target[block], options, of_block, gradient is not None)
        terms[:, block] = torch.stack(figures)
    if gradient is not None:
        gradient[ignored] = 0.0
    return terms.masked_fill_(ignored, 0.0)


def _threshold(dtype: torch.dtype, share: float) -> float:
    """p below which share * p / 2, what the linear form of b leaves out of the loss, is half a rounding step of 1."""
    return torch.finfo(dtype).eps / share


def _block(logits, target, options, out, needs_gradient):
    """(loss, nll_loss, bonus), each [rows], of a block of rows; writes the gradient to `out` [rows, V]."""
    rows, vocabulary = logits.shape
    of_target, share = options.weights(vocabulary)
    weight = 0.0 if options.bonus == "none" else options.bonus_weight
    linear = 1.0 if options.bonus == "log" or (options.bonus == "power" and options.bonus_exponent == 1) else 0.0
    target = target.unsqueeze(1)

    group_tops = _group_tops(logits)
    highest, top_group = group_tops.max(dim=1, keepdim=True)
    top = _top(logits, top_group)
    torch.sub(logits, highest, out=out)
    shifted_target = out.gather(1, target)
    shifted_sum = out.sum(dim=1, keepdim=True) if share else None
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
    a_target, a_top = of_target * a[:, :1], a[:, 1:]

    nll_loss = log_total - shifted_target
    loss = of_target * nll_loss
    bonus = of_target * b[:, :1]
    a_others = 0.0  # sum of s a(p) over all types but the top
    exact = None
    if share:
        loss += share * (vocabulary * log_total - shifted_sum)
        b_sum = b[:, 1:] - linear * one_minus_top
        a_others = vocabulary - 1 + weight * linear * one_minus_top
        if weight:
            level = math.log(_threshold(logits.dtype, share)) + log_total
            exact = _Exact(out, group_tops - highest > level, total)
            curved_b, curved_a = exact.beyond(linear, options)
            b_sum += exact.sum_rows(curved_b)
            a_others += weight * exact.sum_rows(curved_a)
        bonus += share * b_sum
        a_others *= share
    bonus *= weight
    loss += bonus

    if needs_gradient:
        others = a_others + torch.where(is_top, 0.0, a_target)
        of_top = torch.where(is_top, total.new_tensor(share + of_target), total.new_tensor(share))
        out.mul_((others + of_top * a_top - share * weight * linear) / total)
        if share:
            out.sub_(share)
        if exact is not None:
            exact.subtract(out, share * weight * curved_a)
        out.scatter_add_(1, target, -a_target)
        out.scatter_(1, top, p[:, 1:] * others - of_top * a_top * one_minus_top)
    return loss.squeeze(1), nll_loss.squeeze(1), bonus.squeeze(1)


def _group_tops(logits):
    """The highest logit of each GROUP of types [rows, groups]; the last group may be short."""
    rows, vocabulary = logits.shape
    whole = vocabulary // GROUP * GROUP
    tops = []
    if whole:
        tops.append(logits[:, :whole].unflatten(1, (-1, GROUP)).amax(dim=2))
    if whole < vocabulary:
        tops.append(logits[:, whole:].amax(dim=1, keepdim=True))
    return tops[0] if len(tops) == 1 else torch.cat(tops, dim=1)


def _columns(group, vocabulary):
    """Types of `group` [...] as [..., GROUP]; a short last group repeats its last type."""
    columns = group.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=group.device)
    return columns.clamp_(max=vocabulary - 1) if vocabulary % GROUP else columns


def _top(logits, top_group):
    """The type of the highest logit of each row [rows, 1], found in its group [rows, 1]."""
    columns = _columns(top_group.squeeze(1), logits.size(1))
    return columns.gather(1, logits.gather(1, columns).argmax(dim=1, keepdim=True))


class _Exact:
    """The types of the groups chosen in `chosen` [rows, groups], gathered from exponentials `out` [rows, V]."""

    def __init__(self, out, chosen, total):
        self.rows, vocabulary = out.shape
        self.row, group = chosen.nonzero(as_tuple=True)
        self.index = (self.row.unsqueeze(1) * vocabulary + _columns(group, vocabulary)).view(-1)
        self.p = out.view(-1)[self.index].view(-1, GROUP) / total[self.row]
        tail = vocabulary % GROUP
        if tail:  # what a short last group repeats counts once
            self.p[(group == vocabulary // GROUP).nonzero().squeeze(1), tail:] = 0.0

    def beyond(self, linear, options):
        """b(p) and a(p) less their linear forms, of each type gathered [groups chosen, GROUP]; 0 where p is 0."""
        one_minus_p, line = 1.0 - self.p, linear * self.p
        return bonus_of(self.p, one_minus_p, options) + line, scaled_slope(self.p, one_minus_p, options) - line

    def sum_rows(self, values):
        """Sum of `values` [groups chosen, GROUP] over the types of each row [rows, 1]."""
        sums = values.new_zeros(self.rows, 1)
        return sums.index_add_(0, self.row, values.sum(dim=1, keepdim=True))

    def subtract(self, out, values):
        out.view(-1).index_add_(0, self.index, values.view(-1), alpha=-1)
