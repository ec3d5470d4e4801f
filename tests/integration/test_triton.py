"""Test the GPU kernels: on a GPU with GPU_KERNELS=1, otherwise in Triton's interpreter."""

import pytest
import torch

from encourage_mt.loss.functional import find_backend, loss_terms
from encourage_mt.loss.options import LossOptions

triton_kernels = pytest.importorskip("encourage_mt.loss.triton_kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD = 1

SHAPES = [
    {"bonus": "none"},
    {"bonus_weight": 0.0},
    *({"log_end": end} for end in (0.0, 0.5, 0.9, 1.0)),
    *({"bonus": "power", "bonus_exponent": exponent} for exponent in (1.0, 1.5)),
    {"bonus": "cosine", "bonus_weight": 0.7},
    *({"bonus": bonus, "log_end": 0.3, "bonus_start": 0.1} for bonus in ("log", "power", "cosine")),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let rows of up to 128 types be whole, in up to 4 blocks, and longer rows take several steps of the loop."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 32)
    monkeypatch.setattr(triton_kernels, "SMALLEST_BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "WHOLE_ROW", 128)


def terms_and_gradient(logits, target, options, backend, upstream=None):
    leaf = logits.detach().clone().requires_grad_()
    terms = loss_terms(leaf, target, options, PAD, reduce=False, backend=backend)
    terms.loss.backward(torch.ones_like(terms.loss) if upstream is None else upstream.to(terms.loss.dtype))
    return terms, leaf.grad


def assert_agrees(logits, target, options, rtol=1e-5, atol=2e-6, upstream=None):
    """Compare terms and gradient with the reference in float64, to float32 rounding of sums of V terms."""
    terms, gradient = terms_and_gradient(logits, target, options, "triton", upstream)
    expected, expected_gradient = terms_and_gradient(logits.double(), target, options, "reference", upstream)
    torch.testing.assert_close(torch.stack(terms).double(), torch.stack(expected), rtol=rtol, atol=5e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol)


def make(tokens, vocabulary, top=20):
    """Return logits with targets of p from near 0 to near 1, a pad among them, and the targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    logits[torch.arange(tokens), target] += torch.linspace(0, top, tokens)
    target[tokens // 2] = PAD
    return logits.to(DEVICE), target.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 90, 130], ids=["one block", "whole row", "long row"])
def test_kernels_agree_with_the_reference(vocabulary, shape):
    for smoothing in (0.0, 0.1):
        assert_agrees(*make(5, vocabulary), LossOptions(**shape, label_smoothing=smoothing))


@pytest.mark.parametrize(
    "shape", [{"log_end": 0.0}, {}, {"log_end": 0.9}, {"log_end": 1.0}, {"bonus": "cosine"}], ids=str
)
def test_confident_predictions(shape):
    """1 - p of the top type keeps float32's relative precision for every p, whether it is the target or not."""
    rest = torch.tensor([0.5, 0.1, 0.01, 0.001, 1e-6, 1e-9], dtype=torch.float64)
    logits = torch.zeros(12, 40)
    logits[:, 7] = ((1 - rest) / rest * 39).log().repeat(2)
    target = torch.tensor([7] * 6 + [3] * 6)
    assert_agrees(logits.to(DEVICE), target.to(DEVICE), LossOptions(**shape, label_smoothing=0.1), atol=1e-6)
    if shape.get("log_end") != 1:  # its slope near the floor is 1e5
        assert_agrees(logits.to(DEVICE), target.to(DEVICE), LossOptions(**shape), rtol=2e-5, atol=1e-15)


def test_several_highest_logits():
    logits = torch.tensor([[3.0, 3, 3, 0], [5, 5, 0, 0], [0, 0, 0, 0]], device=DEVICE)
    target = torch.tensor([0, 2, 3], device=DEVICE)
    for shape in ({}, {"bonus": "power"}, {"log_end": 1.0}):
        assert_agrees(logits, target, LossOptions(**shape, label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_nothing_before_the_loss_scale(dtype):
    """With a loss scale of 2^15 the gradient is that of float64 to one rounding of the half type, where eps/V alone
    would be subnormal in float16."""
    logits, target = make(6, 300)
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
    logits[3, 2] = float("nan")  # in an ignored row
    terms, gradient = terms_and_gradient(logits, all_pads, LossOptions(label_smoothing=0.1), "triton")
    assert not torch.stack(terms).any() and not gradient.any()
    logits, target = make(6, 130)
    assert_agrees(logits.T.contiguous().T, target, LossOptions())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_row_that_is_not_finite_is_nan_in_loss_and_gradient(smoothing):
    """NaN and +inf in any block, at the target or elsewhere, upstream 0 included; a target outside the vocabulary."""
    logits, target = make(11, 130)
    target[:] = 5
    for row, (value, column) in enumerate((value, column) for value in ("nan", "inf") for column in (0, 5, 77, 129)):
        logits[row, column] = float(value)
    logits[8] = float("-inf")
    target[9] = 130
    upstream = torch.linspace(0, 1, 11, device=DEVICE)
    terms, gradient = terms_and_gradient(logits, target, LossOptions(label_smoothing=smoothing), "triton", upstream)
    assert terms.loss[:10].isnan().all() and gradient[:10].isnan().all()
    assert terms.loss[10].isfinite() and gradient[10].isfinite().all()


def test_upstream_per_token_and_again():
    logits, target = make(6, 130)
    options = LossOptions(label_smoothing=0.1)
    assert_agrees(logits, target, options, upstream=torch.linspace(-1, 2, 6, device=DEVICE))
    leaf = logits.clone().requires_grad_()
    loss = loss_terms(leaf, target, options, PAD, backend="triton").loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_torch_compile_keeps_the_graph_whole():
    logits, target = make(4, 16)
    options = LossOptions(label_smoothing=0.1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits):
        return loss_terms(logits * 2, target, options, PAD, backend="triton").loss

    first, second = (logits.clone().requires_grad_() for _ in range(2))
    compiled(first).backward()
    loss_terms(second * 2, target, options, PAD, backend="triton").loss.backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_auto_takes_the_kernels_on_a_gpu_only(monkeypatch):
    options = LossOptions(bonus_exponent=3.001)  # not used elsewhere, because the choice is cached
    assert find_backend("auto", options, "cuda", torch.float16) is triton_kernels
    assert find_backend("auto", options, "cuda", torch.float64) is not triton_kernels
    assert find_backend("auto", options, "cpu", torch.float32) is not triton_kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="loss_backend triton .*NVIDIA GPU.*cpu"):
        find_backend("triton", options, "cpu", torch.float16)
