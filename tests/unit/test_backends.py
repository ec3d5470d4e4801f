"""Test every backend of the loss with difficult sizes, logits, number types, reductions and memory."""

import math
import os

import pytest
import torch
from loss_cases import (
    BONUSES,
    EPS32,
    PAD,
    STEPS,
    assert_agrees,
    assert_right,
    confident_batch,
    each_backend,
    each_bonus,
    each_smoothing,
    in_float64,
    name_of,
    options_of,
    random_batch,
    terms_and_gradient,
)

from encourage_mt.loss import chunked
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.options import LossOptions

# Vocabularies


@each_backend
@pytest.mark.parametrize("vocabulary", [2, 3, 5, 63, 64, 65, 128, 200, 1000])
def test_vocabulary(vocabulary, backend):
    """Groups of 64 types, complete and incomplete."""
    logits, target = random_batch(20, vocabulary)
    for bonus in BONUSES:
        assert_right(logits, target, options_of(bonus, bonus_weight=1.3), backend)


@each_backend
@pytest.mark.parametrize("bonus", [{"bonus": "log"}, {"bonus": "cosine"}], ids=name_of)
def test_many_rows(bonus, backend):
    """Several blocks, the last one not full; the values are the same with and without gradient."""
    logits, target = random_batch(1200, 1000)
    assert chunked.BLOCK_ELEMENTS // 1000 < 1200
    outcome = assert_right(logits, target, options_of(bonus), backend)
    validation = loss_terms(logits, target, options_of(bonus), reduce=False, backend=backend)
    assert not validation.loss.requires_grad
    assert torch.equal(torch.stack(validation), torch.stack(outcome[0]))


@each_backend
@each_bonus
def test_large_vocabulary(bonus, backend):
    """From equal logits to a few types with all the mass: few, some and many p exceed the threshold of chunked."""
    for spread in (0.0, 1.0, 2.0, 4.0):
        logits, target = random_batch(3, 9001, spread=spread)
        logits[1, 9000] = logits[1].max()  # a tie of the top, its second type in the broken last group
        assert_right(logits, target, options_of(bonus, bonus_weight=2.0), backend)


@each_backend
def test_small_bonus_start(backend):
    """Many types are between the start and the p up to which chunked uses the linear form."""
    logits, target = random_batch(3, 9001, spread=2.0)
    assert_right(logits, target, LossOptions(bonus_start=1e-4, bonus_weight=2.0, label_smoothing=0.1), backend)


# Extreme and broken logits


@each_backend
@each_smoothing
@each_bonus
def test_large_logits(bonus, smoothing, backend):
    """Differences of 1e4 and 2e4 underflow every exponential, and the loss stays finite and right."""
    logits = 1e4 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, 1.0, -1.0, 0.0], [-1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    _, gradient = assert_right(logits, torch.tensor([0, 2, 3, 1]), options_of(bonus, smoothing), backend)
    assert torch.isfinite(gradient).all()


@each_backend
@each_smoothing
def test_ties(smoothing, backend):
    """Types that share the highest logit get the same gradient."""
    logits = torch.zeros(3, 70)
    logits[1:, [3, 68]] = 9.0  # in different groups
    _, gradient = assert_right(logits, torch.tensor([0, 3, 5]), options_of({"bonus": "log"}, smoothing), backend)
    torch.testing.assert_close(gradient[0, 1:], gradient[0, 1].expand(69), atol=4 * EPS32, rtol=0)
    torch.testing.assert_close(gradient[2, 3], gradient[2, 68], atol=4 * EPS32, rtol=0)


@each_backend
@each_smoothing
def test_few_rows(smoothing, backend):
    """One row, no row, and only padding."""
    options = LossOptions(label_smoothing=smoothing)
    assert_right(*random_batch(1, 33), options, backend)
    for logits, target in (
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)),
        (random_batch(4, 9)[0], torch.full((4,), PAD)),
    ):
        terms, gradient = terms_and_gradient(logits, target, options, backend, ignore_index=PAD)
        assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
        assert gradient.shape == logits.shape and not gradient.any()


@each_backend
@each_smoothing
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_is_nan_throughout(bad, smoothing, backend):
    """Loss and gradient of the row are NaN, so that fairseq notices; other rows are unchanged."""
    options = LossOptions(label_smoothing=smoothing)
    for column in (0, 3, 64, 69):
        logits, _ = random_batch(3, 70)
        logits[1, column] = bad
        if bad == -math.inf:
            logits[1] = bad
        for reduce in (True, False):
            terms, gradient = terms_and_gradient(logits, torch.tensor([0, 3, 5]), options, backend, reduce=reduce)
            for term in (terms.loss, terms.nll_loss):
                assert term.isnan().tolist() == (True if reduce else [False, True, False])
            assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()
        terms, gradient = terms_and_gradient(logits, torch.tensor([0, PAD, 5]), options, backend, ignore_index=PAD)
        assert terms.loss.isfinite() and gradient.isfinite().all(), "an ignored row does not count"


@each_backend
@each_bonus
def test_masked_types(bonus, backend):
    """Types at -inf, which a model uses to forbid them, do not count; only smoothing needs their p."""
    logits, target = random_batch(4, 200)
    allowed = torch.arange(200) % 3 != 1
    allowed[64:128] = False  # a whole group
    allowed[target] = True
    masked = logits.masked_fill(~allowed, -math.inf)
    terms, gradient = terms_and_gradient(masked, target, LossOptions(**bonus), backend, reduce=False)
    position = allowed.cumsum(0) - 1
    without = in_float64(logits[:, allowed], position[target], LossOptions(**bonus), reduce=False)
    assert_agrees((terms, gradient[:, allowed]), without, backend)
    assert torch.equal(gradient[:, ~allowed], torch.zeros_like(gradient[:, ~allowed]))


@each_backend
def test_strided_logits(backend):
    """Logits of any memory layout give the same values and are left as they were."""
    logits, target = random_batch(5, 70)
    options = LossOptions(label_smoothing=0.1)
    expected = terms_and_gradient(logits, target, options, backend)
    transposed = logits.t().contiguous().t()
    gaps = torch.stack([logits, -logits], dim=2).flatten(1)[:, ::2]
    for strided in (transposed, gaps):
        assert not strided.is_contiguous()
        terms, gradient = terms_and_gradient(strided, target, options, backend)
        torch.testing.assert_close(torch.stack(terms), torch.stack(expected[0]), atol=0, rtol=8 * EPS32)
        torch.testing.assert_close(gradient, expected[1], atol=8 * EPS32, rtol=0)
        assert torch.equal(strided, logits)


@pytest.mark.parametrize(
    ("logits", "target"),
    [((6,), (6,)), ((2, 3, 4), (2, 3)), ((6, 4), (5,)), ((6, 4), (6, 1)), ((6, 4), ()), ((6, 1), (6,)), ((6, 0), (6,))],
)
def test_wrong_shapes(logits, target):
    with pytest.raises(ValueError, match="classes|expected logits"):
        loss_terms(torch.zeros(logits), torch.zeros(target, dtype=torch.long), LossOptions())


# Number types


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_number_types(dtype, backend):
    logits, target = random_batch(5, 9, dtype=dtype)
    terms, gradient = terms_and_gradient(logits, target, LossOptions(label_smoothing=0.1), backend)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [term.dtype for term in terms] == [expected] * 3
    assert gradient.dtype == dtype


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [random_batch, confident_batch], ids=["random", "confident"])
@each_bonus
def test_half_types(bonus, batch, dtype, backend):
    """Only the gradient is rounded to the half type, once, after the loss scale.

    So its error is half a step of the half type (of its subnormals too), besides that of float32: some steps of p + q,
    the terms it is the difference of. Rounded before scaling, the .1 / 2499 that a type gets would be off by 0.05 %.
    """
    logits, target = batch(12, 2500, dtype=dtype)
    scale = 2.0**15
    options = options_of(bonus, smoothing_convention="fairseq")
    terms, gradient = terms_and_gradient(logits, target, options, backend, reduce=False, scale=scale)
    expected_terms, expected = in_float64(logits, target, options, reduce=False)
    half = torch.finfo(dtype)
    rounding = half.eps / 2 * (scale * expected).abs().clamp(min=half.smallest_normal)
    q = torch.full_like(expected, 0.1 / 2499).scatter(1, target[:, None], 0.9)
    of_float32 = STEPS[backend] * EPS32 * (logits.double().softmax(dim=1) + q)
    assert ((gradient.double() - scale * expected).abs() <= rounding + scale * of_float32).all()
    for term, exact in zip(terms, expected_terms, strict=True):
        assert ((term.double() - exact).abs() <= STEPS[backend] * EPS32 * (1 + exact.abs())).all()


# Padding, reduction and the backward pass


@each_backend
@each_smoothing
def test_padding_changes_nothing(smoothing, backend):
    """Rows are independent; only the order in which a sum is taken may differ, by a few steps of float32."""
    logits, target = random_batch(8, 70)
    target[target == PAD] = 2
    options = LossOptions(label_smoothing=smoothing)
    terms, gradient = terms_and_gradient(logits, target, options, backend, PAD)
    padding, _ = random_batch(5, 70, seed=2)
    padded = torch.cat([padding[:2], logits, padding[2:]])
    padded_target = torch.full((13,), PAD)
    padded_target[2:10] = target
    padded_terms, padded_gradient = terms_and_gradient(padded, padded_target, options, backend, PAD)
    torch.testing.assert_close(torch.stack(padded_terms), torch.stack(terms), atol=8 * EPS32, rtol=8 * EPS32)
    torch.testing.assert_close(padded_gradient[2:10], gradient, atol=8 * EPS32, rtol=0)
    each = torch.stack(loss_terms(padded, padded_target, options, PAD, reduce=False, backend=backend))
    for ignored in (padded_gradient[:2], padded_gradient[10:], each[:, :2], each[:, 10:]):
        assert torch.equal(ignored, torch.zeros_like(ignored))


@each_backend
@each_bonus
def test_terms_add_up(bonus, backend):
    """With reduce, each is the sum over tokens; loss - bonus is cross entropy; nll_loss is plain likelihood."""
    logits, target = random_batch(9, 70, dtype=torch.float64)
    options = options_of(bonus, bonus_weight=0.6)
    terms, gradient = terms_and_gradient(logits, target, options, backend, PAD)
    each, gradient_of_each = terms_and_gradient(logits, target, options, backend, PAD, reduce=False)
    assert all(term.shape == (9,) for term in each)
    torch.testing.assert_close(torch.stack([term.sum() for term in each]), torch.stack(terms), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of_each, gradient, atol=1e-14, rtol=0)
    plain = loss_terms(logits, target, options_of({"bonus": "none"}), PAD, False, backend)
    torch.testing.assert_close(each.loss - each.bonus, plain.loss, atol=1e-12, rtol=0)
    assert not plain.bonus.any()
    kept = target != PAD
    nll_loss = -logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(each.nll_loss[kept], nll_loss[kept])


@each_backend
def test_without_weight_there_is_no_bonus(backend):
    """The values equal those of bonus none, bit for bit, as in updates before a deferred bonus."""
    logits, target = random_batch(6, 70)
    without, gradient = terms_and_gradient(logits, target, LossOptions(bonus_weight=0.0), backend)
    expected, expected_gradient = terms_and_gradient(logits, target, LossOptions(bonus="none"), backend)
    assert all(map(torch.equal, without, expected)) and torch.equal(gradient, expected_gradient)


@each_backend
def test_upstream_gradient(backend):
    """The gradient of a token is its own, times the upstream one: one factor, or one per token."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    options = LossOptions(label_smoothing=0.1)
    _, gradient = terms_and_gradient(logits, target, options, backend)
    factors = torch.tensor([0.0, 1.0, -1.0, 2.5, 1e-3, 1e3], dtype=torch.float64)
    for scale, reduce, expected in (
        (-3.5, True, -3.5 * gradient),
        (-3.5, False, -3.5 * gradient),
        (factors, False, factors[:, None] * gradient),
    ):
        _, scaled = terms_and_gradient(logits, target, options, backend, reduce=reduce, scale=scale)
        torch.testing.assert_close(scaled, expected, atol=1e-15, rtol=1e-12)


@each_backend
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("reduce", [True, False])
def test_backward_again(reduce, scale, backend):
    """The second gradient of a retained graph is the first, even where the first was overwritten by its owner.

    Once the graph is freed, torch's usual error is raised.
    """
    logits, target = random_batch(6, 9)
    logits.requires_grad_()
    loss = scale * loss_terms(logits, target, LossOptions(label_smoothing=0.1), PAD, reduce, backend).loss.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


@each_backend
def test_double_backward_is_right_or_refused(backend):
    """A gradient penalty is never ignored silently."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    logits.requires_grad_()

    def penalty(z):
        loss = loss_terms(z, target, LossOptions(label_smoothing=0.1), backend=backend).loss
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        return gradient.pow(2).sum()

    if backend == "reference":
        assert torch.autograd.gradcheck(penalty, logits)
    else:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            penalty(logits)


@each_backend
@pytest.mark.parametrize("view", [False, True], ids=["leaf", "view of leaf"])
def test_accumulation(view, backend):
    """leaf.grad += gradient, in place, must not reach what a retained graph keeps: each pass adds the same."""
    logits, target = random_batch(6, 9)
    options = LossOptions(label_smoothing=0.1)
    _, gradient = terms_and_gradient(logits, target, options, backend)
    leaf = logits.clone().requires_grad_()
    loss = loss_terms(leaf.view(6, 9) if view else leaf, target, options, backend=backend).loss
    for passes in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, passes * gradient, atol=8 * EPS32, rtol=0)


@each_backend
def test_two_losses_of_the_same_logits(backend):
    """Each backward adds its own gradient, in either order, and both at once are their sum."""
    logits, target = random_batch(6, 9)
    options = (LossOptions(log_end=0.75), LossOptions(bonus="cosine", label_smoothing=0.1))
    gradients = [terms_and_gradient(logits, target, option, backend)[1] for option in options]
    for order in ((0, 1), (1, 0)):
        leaf = logits.clone().requires_grad_()
        losses = [loss_terms(leaf, target, option, backend=backend).loss for option in options]
        for which in order:
            losses[which].backward()
        torch.testing.assert_close(leaf.grad, gradients[0] + gradients[1], atol=8 * EPS32, rtol=0)
    leaf = logits.clone().requires_grad_()
    sum(loss_terms(leaf, target, option, backend=backend).loss for option in options).backward()
    torch.testing.assert_close(leaf.grad, gradients[0] + gradients[1], atol=8 * EPS32, rtol=0)


@pytest.mark.parametrize("reduce", [True, False])
@each_backend
def test_the_loss_may_be_changed_in_place(backend, reduce):
    """fairseq multiplies the loss of an empty batch by 0 in place; the gradient is 0 then."""
    logits, target = random_batch(6, 90)
    leaf = logits.clone().requires_grad_()
    loss = loss_terms(leaf, target, LossOptions(label_smoothing=0.1), reduce=reduce, backend=backend).loss
    loss *= 0
    loss.sum().backward()
    assert not leaf.grad.any()


# Memory that the chunked backend keeps


def test_memory_kept_for_the_gradient_is_never_shared():
    """Gradients in use at the same time never share memory; a buffer is reused only after its gradient is freed."""
    chunked.release_memory()
    logits, target = random_batch(40, 300)

    def gradient(of):
        leaf = of.clone().requires_grad_()
        loss_terms(leaf, target, LossOptions(), backend="chunked").loss.backward()
        return leaf.grad

    first = gradient(logits)
    kept, view = first.clone(), first[3:5]
    where = first.data_ptr()
    second = gradient(-logits)
    assert second.data_ptr() != where and torch.equal(first, kept)
    del first
    third = gradient(2 * logits)
    assert third.data_ptr() != where and torch.equal(view, kept[3:5]), "a view keeps the memory too"
    addresses = {second.data_ptr(), third.data_ptr()}
    del second, third
    assert gradient(logits).data_ptr() in addresses
    assert torch.equal(view, kept[3:5])


def test_memory_kept_is_not_shared_with_forked_processes():
    """A child writes a gradient of its own at the same address; the parent's stays as it was."""
    chunked.release_memory()
    logits, target = random_batch(40, 300)
    leaf = logits.clone().requires_grad_()
    loss_terms(leaf, target, LossOptions(), backend="chunked").loss.backward()
    kept = leaf.grad.clone()
    view = torch.frombuffer(chunked._gradient_buffers[0], dtype=leaf.grad.dtype, count=kept.numel())
    child = os.fork()
    if child == 0:
        view.fill_(7.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(leaf.grad, kept)
