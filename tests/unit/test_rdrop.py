"""Compare R-Drop with a few lines of plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import PAD, LargeTensors, each_backend, random_batch

from encourage_mt.loss import chunked, rdrop
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.options import LossOptions

ALPHA = 5.0


def make(tokens=13, vocabulary=70, dtype=torch.float64):
    logits, _ = random_batch(2 * tokens, vocabulary, dtype=dtype)
    _, target = random_batch(tokens, vocabulary)
    target[3] = PAD
    return logits.requires_grad_(), target


def plainly(logits, target, options):
    """(loss, divergence), each [tokens], by torch's own kl_div."""
    tokens = target.size(0)
    first, second = (loss_terms(half, target, options, PAD, False, "reference").loss for half in logits.split(tokens))
    log_p1, log_p2 = logits.log_softmax(dim=1).split(tokens)
    kl = F.kl_div(log_p1, log_p2, reduction="none", log_target=True).sum(dim=1)
    kl = kl + F.kl_div(log_p2, log_p1, reduction="none", log_target=True).sum(dim=1)
    divergence = ALPHA / 2 * (kl / 2).masked_fill(target == PAD, 0.0)
    return (first + second) / 2 + divergence, divergence


@each_backend
@pytest.mark.parametrize("options", [LossOptions(bonus="none"), LossOptions(label_smoothing=0.1)], ids=["ce", "el"])
@pytest.mark.parametrize("rows", [1000, 4], ids=["one block", "blocks"])
def test_rdrop_equals_plain_pytorch(rows, options, backend, monkeypatch):
    monkeypatch.setattr(rdrop, "BLOCK_ELEMENTS", rows * 70)
    logits, target = make()
    expected, expected_divergence = plainly(logits, target, options)
    weights = torch.linspace(-1, 2, target.size(0), dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    terms, divergence = rdrop.rdrop_terms(logits, target, options, ALPHA, PAD, False, backend)
    (gradient,) = torch.autograd.grad((weights * terms.loss).sum(), logits)
    torch.testing.assert_close(terms.loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(divergence, expected_divergence, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=0)

    sums, _ = rdrop.rdrop_terms(logits, target, options, ALPHA, PAD, True, backend)
    torch.testing.assert_close(torch.stack(sums), torch.stack([term.sum() for term in terms]))
    halves = [loss_terms(half, target, options, PAD, True, backend) for half in logits.detach().split(target.size(0))]
    torch.testing.assert_close(sums.nll_loss, halves[0].nll_loss)
    torch.testing.assert_close(sums.bonus, (halves[0].bonus + halves[1].bonus) / 2)


@each_backend
def test_without_dropout_it_is_the_plain_loss(backend):
    logits, target = random_batch(13, 70, dtype=torch.float64)
    options = LossOptions(label_smoothing=0.1)
    logits.requires_grad_()
    both = rdrop.rdrop_terms(logits.repeat(2, 1), target, options, ALPHA, PAD, backend=backend)[0].loss
    once = loss_terms(logits, target, options, PAD, backend=backend).loss
    torch.testing.assert_close(both, once)
    torch.testing.assert_close(torch.autograd.grad(both, logits), torch.autograd.grad(once, logits))


def test_masked_types_and_half_types():
    """Types at -inf in both passes count nothing; the gradient has the type of the logits, within its rounding."""
    logits, target = make()
    target[target == 5] = 4
    masked = logits.detach().clone()
    masked[:, 5] = -torch.inf
    expected, _ = rdrop.rdrop_terms(
        masked[:, torch.arange(70) != 5], target - (target > 5).long(), LossOptions(), ALPHA
    )
    terms, _ = rdrop.rdrop_terms(masked, target, LossOptions(), ALPHA)
    torch.testing.assert_close(terms.loss, expected.loss)
    half = logits.detach().bfloat16().requires_grad_()
    rdrop.rdrop_terms(half, target, LossOptions(), ALPHA, PAD)[0].loss.backward()
    exact = half.detach().double().requires_grad_()
    rdrop.rdrop_terms(exact, target, LossOptions(), ALPHA, PAD)[0].loss.backward()
    torch.testing.assert_close(half.grad.double(), exact.grad, atol=2e-3, rtol=2**-7)


def test_rdrop_refuses_shapes_and_double_backward():
    logits, target = make()
    with pytest.raises(ValueError, match="2 \\* tokens"):
        rdrop.rdrop_terms(logits[:-1], target, LossOptions(), ALPHA)
    loss = rdrop.rdrop_terms(logits, target, LossOptions(), ALPHA, backend="reference")[0].loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_there_is_one_gradient_and_no_other_tensor_of_its_size(monkeypatch):
    monkeypatch.setattr(rdrop, "BLOCK_ELEMENTS", 4 * 70)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 4 * 70)
    logits, target = make(tokens=130, dtype=torch.float32)
    with LargeTensors(logits.nbytes // 2) as large:
        rdrop.rdrop_terms(logits, target, LossOptions(label_smoothing=0.1), ALPHA, backend="chunked")[0].loss.backward()
    assert large.addresses - {logits.data_ptr()} == {logits.grad.data_ptr()}
