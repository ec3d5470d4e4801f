"""The GPU kernels: on a GPU where there is one, else their logic in Triton's interpreter."""

import itertools

import pytest
import torch

from encourage_mt.loss.functional import find_backend, loss_terms
from encourage_mt.loss.options import LossOptions

triton_kernels = pytest.importorskip("encourage_mt.loss.triton_kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD = 1

SHAPES = [
    {"bonus": "none"},
    *({"log_end": end} for end in (0.0, 0.5, 0.9, 1.0)),
    *({"bonus": "power", "bonus_exponent": exponent} for exponent in (1.0, 1.5, 2.0)),
    {"bonus": "cosine", "bonus_weight": 0.7},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of a few hundred types then span several blocks."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 64)


def terms_and_gradient(logits, target, options, backend, upstream=None):
    leaf = logits.detach().clone().requires_grad_()
    terms = loss_terms(leaf, target, options, PAD, reduce=upstream is None, backend=backend)
    terms.loss.backward(upstream if upstream is not None else torch.ones((), device=logits.device))
    return terms, leaf.grad


def assert_agrees(logits, target, options, **tolerance):
    """With the reference in float64, to float32 rounding of sums of V terms."""
    terms, gradient = terms_and_gradient(logits, target, options, "triton")
    expected, expected_gradient = terms_and_gradient(logits.double(), target, options, "reference")
    for name, value in terms._asdict().items():
        assert value.item() == pytest.approx(getattr(expected, name).item(), rel=1e-5, abs=1e-4), name
    torch.testing.assert_close(gradient.double(), expected_gradient, **{"atol": 2e-6, "rtol": 1e-4, **tolerance})


def make(tokens, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    logits[torch.arange(tokens), target] += torch.linspace(0, 20, tokens)
    if tokens > 4:
        target[tokens // 2] = PAD
    return logits.to(DEVICE), target.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 3, 5, 64, 65, 300])
def test_kernels_agree_with_the_reference(vocabulary, shape):
    logits, target = make(9, vocabulary)
    for smoothing, convention in itertools.product((0.0, 0.1), ("fairseq", "paper")):
        assert_agrees(logits, target, LossOptions(**shape, label_smoothing=smoothing, smoothing_convention=convention))


@pytest.mark.parametrize("wrong", [False, True], ids=["target", "wrong type"])
@pytest.mark.parametrize("rest", [0.5, 0.1, 0.01, 0.001, 1e-6, 1e-9])
def test_confident_predictions(rest, wrong):
    """1 - p of the top type is known to float32's relative precision, whatever p is."""
    vocabulary = 200
    logits = torch.zeros(1, vocabulary)
    logits[0, 7] = torch.tensor((1 - rest) / rest * (vocabulary - 1), dtype=torch.float64).log()
    target = torch.tensor([3 if wrong else 7])
    for log_end in (0.0, 0.5, 0.9, 1.0):
        options = LossOptions(log_end=log_end, label_smoothing=0.1)
        assert_agrees(logits.to(DEVICE), target.to(DEVICE), options, atol=1e-6)
    terms, gradient = terms_and_gradient(logits.to(DEVICE), target.to(DEVICE), LossOptions(), "triton")
    expected, expected_gradient = terms_and_gradient(
        logits.double().to(DEVICE), target.to(DEVICE), LossOptions(), "reference"
    )
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_nothing_before_the_loss_scale(dtype):
    """With a loss scale of 2^15 the gradient is that of float64 to one rounding of the half type, where eps/V alone
    would be subnormal in float16."""
    logits, target = make(8, 300)
    logits = (logits / 2).to(dtype)
    options = LossOptions(label_smoothing=0.1)
    scale = torch.tensor(2.0**15, device=DEVICE)
    leaf = logits.clone().requires_grad_()
    terms = loss_terms(leaf, target, options, PAD, backend="triton")
    assert terms.loss.dtype == torch.float32
    (terms.loss / 8 * scale).backward()
    _, expected = terms_and_gradient(logits.double(), target, options, "reference")
    expected = expected / 8 * scale.double()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=step, atol=2e-6 * scale.item() / 8)


def test_extremes_and_padding():
    logits, target = make(6, 130)
    logits[0], logits[1, 5], logits[2, 9] = -1e4, 1e4, -1e4
    assert_agrees(logits, target, LossOptions(label_smoothing=0.1))
    all_pads = torch.full_like(target, PAD)
    terms, gradient = terms_and_gradient(logits, all_pads, LossOptions(label_smoothing=0.1), "triton")
    assert terms.loss == terms.nll_loss == terms.bonus == 0 and not gradient.any()
    assert_agrees(logits.T.contiguous().T, target, LossOptions())
    assert_agrees(logits[:1], target[:1], LossOptions(label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("column", [0, 5, 77, 129])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_stays_visible(bad, column, smoothing):
    logits, target = make(6, 130)
    logits[2, column] = bad
    target[2] = 5
    terms, gradient = terms_and_gradient(logits, target, LossOptions(label_smoothing=smoothing), "triton")
    assert not torch.isfinite(terms.loss) and not torch.isfinite(terms.nll_loss)
    assert not torch.isfinite(gradient[2]).all()


def test_a_target_that_is_no_type_shows():
    logits, target = make(6, 10)
    target[0] = 12
    assert loss_terms(logits, target, LossOptions(), PAD, backend="triton").loss.isnan()


def test_upstream_per_token_and_again():
    logits, target = make(6, 130)
    upstream = torch.linspace(-1, 2, 6, device=DEVICE)
    options = LossOptions(label_smoothing=0.1)
    _, gradient = terms_and_gradient(logits, target, options, "triton", upstream)
    _, expected = terms_and_gradient(logits.double(), target, options, "reference", upstream.double())
    torch.testing.assert_close(gradient.double(), expected, atol=2e-6, rtol=1e-4)
    leaf = logits.clone().requires_grad_()
    loss = loss_terms(leaf, target, options, PAD, backend="triton").loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


def test_auto_takes_the_kernels_on_a_gpu_only(monkeypatch):
    options = LossOptions(bonus_weight=1.001)  # of its own, for what was chosen is remembered
    assert find_backend("auto", options, "cuda", torch.float16) is triton_kernels
    assert find_backend("auto", options, "cuda", torch.float64) is not triton_kernels
    assert find_backend("auto", options, "cpu", torch.float32) is not triton_kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="loss_backend triton .*NVIDIA GPU.*cpu"):
        find_backend("triton", options, "cpu", torch.float16)
