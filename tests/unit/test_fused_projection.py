"""Compare the fused output projection and loss with the two computed separately."""

import pytest
import torch
from loss_cases import LargeTensors

from encourage_mt.loss import (
    LossOptions,
    encouraging_loss,
    fused_projection,
    linear_encouraging_loss,
    loss_terms,
    projected_loss_terms,
)

PAD = 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let a few tokens span several blocks, the last one short."""
    monkeypatch.setattr(fused_projection, "ROWS", 8)


def make(tokens=27, vocabulary=90, width=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    target[4] = PAD
    return features.requires_grad_(), weight.requires_grad_(), target


def apart(features, weight, target, options, scale=1.0):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (features, weight)]
    logits = leaves[0] @ leaves[1].T
    terms = loss_terms(logits, target, options, PAD, backend="reference")
    (terms.loss * scale).backward()
    correct = ((logits.argmax(dim=1) == target) & (target != PAD)).sum()
    return terms, correct, [leaf.grad for leaf in leaves]


def together(features, weight, target, options, scale=1.0):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (features, weight)]
    terms, correct = projected_loss_terms(*leaves, target, options, PAD, accuracy=True)
    (terms.loss * scale).backward()
    return terms, correct, [leaf.grad for leaf in leaves]


def test_without_recording_no_gradient_is_computed(monkeypatch):
    features, weight, target = make()
    expected = together(features, weight, target, LossOptions())[0].loss
    monkeypatch.setattr(fused_projection, "_product", None)
    with torch.no_grad():
        terms, _ = projected_loss_terms(features, weight, target, LossOptions(), PAD)
    torch.testing.assert_close(terms.loss, expected.detach())


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    "options", [LossOptions(label_smoothing=0.1), LossOptions(bonus="none"), LossOptions(log_end=1)]
)
def test_fused_equals_separate_projection_and_loss(options, scale):
    expected, expected_correct, expected_gradients = apart(*make(), options, scale)
    terms, correct, gradients = together(*make(), options, scale)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert correct == expected_correct
    for gradient, of_apart in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, of_apart, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_exact_as_separate_projection_and_loss(dtype):
    """Against float64 of the same rounded input, with a loss scale: the error of the usual half-precision way, which
    rounds the scaled gradient once, is the bound; the fused way rounds it once too, but scaled by a power of two."""
    features, weight, target = make(dtype=dtype)
    options = LossOptions(label_smoothing=0.1)
    _, _, exact = apart(features.double(), weight.double(), target, options)
    _, _, usual = apart(features, weight, target, options, scale=2.0**10)
    terms, _, ours = together(features, weight, target, options, scale=2.0**10)
    assert terms.loss.dtype == torch.float32
    for gradient, of_usual, of_exact in zip(ours, usual, exact, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() / 2**10 - of_exact).abs().max()
        bound = (of_usual.double() / 2**10 - of_exact).abs().max()
        assert error <= 1.5 * bound


def test_float16_keeps_the_gradient_of_smoothing():
    """eps/V = 1e-5 is subnormal in float16 (the least normal number is 6.1e-5): unscaled it would have 3 bits left."""
    tokens, vocabulary, width = 4, 10000, 8
    features = torch.ones(tokens, width, dtype=torch.float16)
    weight = torch.zeros(vocabulary, width, dtype=torch.float16)
    weight[2] = 20.0  # the model is certain of type 2, and right
    target = torch.full((tokens,), 2)
    options = LossOptions(label_smoothing=0.1)
    _, _, (_, exact) = apart(features.double(), weight.double(), target, options)
    _, _, (_, ours) = together(features, weight, target, options, scale=2.0**7)
    torch.testing.assert_close(ours.double()[5] / 2**7, exact[5], rtol=2e-3, atol=0)


def test_autocast_computes_as_half_precision():
    """Products in the type of autocast, and the gradient scaled before it is rounded to it."""
    features, weight, target = make(dtype=torch.float32)
    options = LossOptions(label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = projected_loss_terms(features, weight, target, options, PAD)
    terms.loss.backward()
    expected, _, gradients = together(features.bfloat16(), weight.bfloat16(), target, options)
    assert terms.loss == expected.loss and features.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, gradients[1].float(), rtol=1e-2, atol=1e-4)
    features, weight = features.double(), weight.double()  # autocast leaves float64 as it is
    exact, _, _ = together(features, weight, target, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projected_loss_terms(features, weight, target, options, PAD)[0].loss == exact.loss


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_of_the_whole_batch_are_never_in_memory(training, backend):
    features, weight, target = make(tokens=400)
    with LargeTensors(400 * 90 * 8 // 4) as large, torch.set_grad_enabled(training):
        loss = linear_encouraging_loss(features, weight, target, label_smoothing=0.1, backend=backend)
        if training:
            loss.backward()
    assert not large.addresses


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_encouraging_loss_equals_linear_and_encouraging_loss(reduction):
    """With bias, a batch of sentences, ignored targets, and only some inputs that need a gradient."""
    features, weight, target = make()
    features, target = features.detach().view(3, 9, -1), target.view(3, 9)
    bias = torch.linspace(-1, 1, 90, dtype=torch.float64)
    keywords = {"log_end": 0.9, "label_smoothing": 0.1, "ignore_index": PAD, "reduction": reduction}
    for needed in ({0, 1, 2}, {0}, {1, 2}, set()):
        expected, ours = (
            [each.detach().clone().requires_grad_(i in needed) for i, each in enumerate((features, weight, bias))]
            for _ in range(2)
        )
        logits = torch.nn.functional.linear(*expected).flatten(0, 1)
        expected_loss = encouraging_loss(logits, target.flatten(), backend="reference", **keywords)
        loss = linear_encouraging_loss(*ours[:2], target, ours[2], **keywords)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
        if needed:
            (expected_loss * 3).backward()
            (loss * 3).backward()
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_mean_of_no_target_is_nan_without_gradient():
    features, weight, target = make()
    leaves = [features.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = linear_encouraging_loss(*leaves, torch.full_like(target, PAD), ignore_index=PAD)
    loss.backward()
    assert loss.isnan() and not any(leaf.grad.any() for leaf in leaves)


def test_the_second_backward_pass_and_the_second_derivative_are_refused():
    features, weight, target = make()
    loss = linear_encouraging_loss(features, weight, target)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, features, create_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"reduction": "none"}, "reduction"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "features"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"backend": "reference"}, "--fuse-projection"),
        ({"log_end": 2.0}, "log_end"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, key):
    features, weight, target = make()
    with pytest.raises(ValueError, match=key):
        linear_encouraging_loss(features, weight, **{"target": target, **wrong})
