"""Check that without a bonus the loss equals fairseq's own label-smoothed cross entropy."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from loss_cases import EPS32, PAD, each_backend

from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.options import LossOptions


def batch(tokens, vocabulary, spread):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = spread * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[::5] = PAD
    return logits, target


def of_fairseq(logits, target, smoothing, reduce):
    """(loss, nll_loss, gradient) as LabelSmoothedCrossEntropyCriterion makes them from a decoder's output."""
    logits = logits.clone().requires_grad_()
    lprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss, nll_loss = label_smoothed_nll_loss(lprobs, target, smoothing, ignore_index=PAD, reduce=reduce)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach().flatten() if not reduce else loss.detach(), nll_loss.detach(), gradient


def of_ours(logits, target, smoothing, reduce, backend):
    logits = logits.clone().requires_grad_()
    options = LossOptions(bonus="none", label_smoothing=smoothing, smoothing_convention="fairseq")
    terms = loss_terms(logits, target, options, PAD, reduce, backend)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logits)
    return terms.loss.detach(), terms.nll_loss.detach(), gradient


batches = pytest.mark.parametrize(("tokens", "vocabulary", "spread"), [(40, 11, 1.0), (31, 1003, 5.0), (1, 2, 1.0)])
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1])


@batches
@smoothings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reference_is_fairseq_bit_by_bit(tokens, vocabulary, spread, smoothing, dtype):
    """The same operations in the same order, so that a run with bonus none repeats one of fairseq."""
    logits, target = batch(tokens, vocabulary, spread)
    expected = of_fairseq(logits.to(dtype), target, smoothing, reduce=True)
    actual = of_ours(logits.to(dtype), target, smoothing, True, "reference")
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@batches
@smoothings
@pytest.mark.parametrize("reduce", [True, False])
@each_backend
def test_every_backend_is_fairseq_within_rounding(tokens, vocabulary, spread, smoothing, reduce, backend):
    """Both in float32, summed in another order: terms to 1e-6 of themselves.

    Gradient: 20 steps of 1, as autograd adds up V terms in the backward pass of fairseq's log_softmax.
    """
    logits, target = batch(tokens, vocabulary, spread)
    loss, nll_loss, gradient = of_ours(logits, target, smoothing, reduce, backend)
    expected_loss, expected_nll_loss, expected_gradient = of_fairseq(logits, target, smoothing, reduce)
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(nll_loss, expected_nll_loss.view_as(nll_loss), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=20 * EPS32, rtol=0)
    assert torch.equal(gradient[target == PAD], torch.zeros_like(gradient[target == PAD]))
