"""The projection fused with the loss, against the two apart."""

import argparse

import pytest
import torch
from test_criterion import SIZES, build_model, make_criterion, make_sample, task  # noqa: F401

from encourage_mt.loss import fused_projection
from encourage_mt.loss.functional import loss_terms, projected_loss_terms
from encourage_mt.loss.options import LossOptions

PAD = 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A handful of tokens then spans several blocks, the last one short."""
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


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    "options", [LossOptions(label_smoothing=0.1), LossOptions(bonus="none"), LossOptions(log_end=1)]
)
def test_fused_is_the_two_apart(options, scale):
    expected, expected_correct, expected_gradients = apart(*make(), options, scale)
    terms, correct, gradients = together(*make(), options, scale)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert correct == expected_correct
    for gradient, of_apart in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, of_apart, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_no_worse_than_the_two_apart(dtype):
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


def test_float16_keeps_what_smoothing_gives_to_each_type():
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


@pytest.mark.parametrize("share", [False, True], ids=["own output embedding", "tied embeddings"])
def test_the_criterion_fused_trains_as_unfused(share, task):  # noqa: F811
    """Two accumulated batches, accuracy and a prefix to ignore included."""
    outcomes = []
    for fuse_projection in (False, True):
        model = build_model(task, share_decoder_input_output_embed=share).train()
        options = {"ignore_prefix_size": 1, "report_accuracy": True, "fuse_projection": fuse_projection}
        criterion = make_criterion(task, label_smoothing=0.1, **options)
        logs = []
        for lengths in ([7, 5, 9, 4], [6, 8]):
            loss, _, log = criterion(model, make_sample(lengths))
            loss.backward()
            logs.append({name: float(value) for name, value in log.items()})
        outcomes.append((logs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (logs, gradients), (fused_logs, fused_gradients) = outcomes
    for log, fused_log in zip(logs, fused_logs, strict=True):
        assert fused_log == pytest.approx(log, rel=1e-5)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():  # float32 sums in another order
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=2e-5)


def test_logits_of_the_batch_are_never_held(task, monkeypatch):  # noqa: F811
    """In training the model is asked for features only; in validation for logits, as ever."""
    model = build_model(task)
    asked = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, src_tokens, src_lengths, prev_output_tokens, features_only=False: (
            asked.append(features_only)
            or forward(self, src_tokens, src_lengths, prev_output_tokens, features_only=features_only)
        ),
    )
    criterion = make_criterion(task, label_smoothing=0.1, fuse_projection=True)
    for mode in (True, False):
        criterion(model.train(mode), make_sample([5, 3]))
    assert asked == [True, False]


def test_a_model_without_a_plain_projection_is_told_which_option_to_drop(task):  # noqa: F811
    model = build_model(task, adaptive_softmax_cutoff="10,20", criterion="adaptive_loss").train()
    criterion = make_criterion(task, label_smoothing=0.1, fuse_projection=True)
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        criterion(model, make_sample([5, 3]))
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        criterion(torch.nn.Linear(2, 2), make_sample([5, 3]))


def test_the_reference_backend_cannot_be_fused(task):  # noqa: F811
    criterion = make_criterion(task, label_smoothing=0.1, fuse_projection=True, loss_backend="reference")
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        criterion(build_model(task).train(), make_sample([5, 3]))
    assert isinstance(task, argparse.Namespace) and SIZES


def test_autocast_is_as_half_precision():
    """Products in the type of autocast, and the gradient scaled before it is rounded to it."""
    features, weight, target = make(dtype=torch.float32)
    options = LossOptions(label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = projected_loss_terms(features, weight, target, options, PAD)
    terms.loss.backward()
    expected, _, gradients = together(features.bfloat16(), weight.bfloat16(), target, options)
    assert terms.loss == expected.loss and features.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, gradients[1].float(), rtol=1e-2, atol=1e-4)
