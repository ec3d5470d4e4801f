"""Test the GPU kernels on a GPU, at the sizes of real vocabularies; tests/integration/test_triton.py has small ones."""

import os

import pytest
import torch
from test_triton import PAD, make, terms_and_gradient

from encourage_mt.loss.functional import find_backend, loss_terms
from encourage_mt.loss.fused_projection import projected_loss_terms
from encourage_mt.loss.options import LossOptions

pytestmark = pytest.mark.skipif(
    "GPU_KERNELS" not in os.environ or not torch.cuda.is_available(), reason="needs a GPU and GPU_KERNELS=1"
)
SIZES = (6632, 10000, 10001, 32768, 50265)
SHAPES = ({}, {"bonus": "none"}, {"log_end": 0.3, "bonus_start": 0.1}, {"bonus": "cosine"}, {"log_end": 1.0})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_real_vocabularies_agree_with_float64(vocabulary, dtype, shape):
    options = LossOptions(**shape, label_smoothing=0.1)
    logits, target = make(33, vocabulary, top=25)
    logits = logits.to(dtype)
    assert find_backend("auto", options, "cuda", dtype).__name__.endswith("triton_kernels")
    terms, gradient = terms_and_gradient(logits, target, options, "auto")
    expected, expected_gradient = terms_and_gradient(logits.double(), target, options, "reference")
    torch.testing.assert_close(torch.stack(terms).double(), torch.stack(expected), rtol=2e-5, atol=2e-5)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=max(step, 2e-5), atol=max(step * 1e-3, 2e-6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extra_memory_is_one_gradient_and_none_without_it(dtype):
    logits, target = make(2048, 32000)
    options = LossOptions(label_smoothing=0.1)
    logits = logits.to(dtype).requires_grad_()
    for backward, most in ((True, 1.05), (False, 0.05)):
        logits.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(backward):
            loss = loss_terms(logits, target, options, PAD).loss
        if backward:
            loss.backward()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= most * logits.numel() * logits.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_projection_agrees_with_float64(dtype):
    torch.manual_seed(0)
    features = torch.randn(300, 64, device="cuda").to(dtype)
    weight = (torch.randn(6632, 64, device="cuda") / 4).to(dtype)
    target = torch.randint(2, 6632, (300,), device="cuda")
    target[7] = PAD
    options = LossOptions(label_smoothing=0.1)
    leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    terms = projected_loss_terms(*leaves, target, options, PAD)[0]
    terms.loss.backward()
    wide = [features.double().requires_grad_(), weight.double().requires_grad_()]
    expected = loss_terms(wide[0] @ wide[1].T, target, options, PAD, backend="reference")
    expected.loss.backward()
    error = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]  # of logits in this type
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=error / 10, atol=0)
    for leaf, exact in zip(leaves, wide, strict=True):
        assert (leaf.grad.double() - exact.grad).norm() <= error * exact.grad.norm()
