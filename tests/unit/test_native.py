"""Test what only the native backend has, beside the tests of all backends: widths, memory, torch.compile, fallback."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import EPS32, in_float64, options_of, random_batch, terms_and_gradient

from encourage_mt.loss import bonuses, chunked, functional, native
from encourage_mt.loss.functional import encouraging_loss, loss_terms
from encourage_mt.loss.options import LossOptions

compiled = pytest.mark.skipif(bool(native.unavailable()), reason="native.cpp is not compiled")
EL = LossOptions(label_smoothing=0.1)


@compiled
@pytest.mark.parametrize("vocabulary", [2, 15, 16, 17, 511, 513, 32_001])
@pytest.mark.parametrize(
    "bonus", [{"bonus": "log"}, {"bonus": "log", "log_end": 0.25}, {"bonus": "power", "bonus_exponent": 1.25}]
)
def test_widths(vocabulary, bonus):
    """Rows that end within a vector, and two chunks with one element between them; two steps of float32."""
    logits, target = random_batch(3, vocabulary)
    options = options_of(bonus, 0.1)
    terms, gradient = terms_and_gradient(logits, target, options, "native", reduce=False)
    expected, expected_gradient = in_float64(logits, target, options, reduce=False)
    for term, exact in zip(terms, expected, strict=True):
        assert ((term.double() - exact).abs() <= 2 * EPS32 * (1 + exact.abs())).all()
    assert ((gradient.double() - expected_gradient).abs() <= 2 * EPS32).all()


@compiled
def test_a_target_that_is_not_a_type_is_refused():
    with pytest.raises(IndexError, match="target 9.*8 types"):
        loss_terms(torch.zeros(2, 8), torch.tensor([0, 9]), EL, backend="native")


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_gaps(dtype):
    """A slice of wider logits is read where it is, and gets a dense gradient."""
    logits, target = random_batch(5, 90, dtype=dtype)
    _, gradient = terms_and_gradient(logits[:, :70], target % 70, EL, "native")
    _, expected = terms_and_gradient(logits[:, :70].contiguous(), target % 70, EL, "native")
    assert torch.equal(gradient, expected)


@compiled
@pytest.mark.parametrize(("dtype", "bytes_allowed"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory(dtype, bytes_allowed):
    """A backward pass allocates only the gradient, in the type of the logits; validation nothing that grows with V."""
    logits, target = random_batch(64, 5000, dtype=dtype)

    def allocated(run):
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    leaf = logits.requires_grad_()
    training = allocated(lambda: loss_terms(leaf, target, EL, backend="native").loss.backward())
    with torch.no_grad():
        validation = allocated(lambda: loss_terms(leaf, target, EL, backend="native"))
    assert bytes_allowed * logits.numel() <= training < 1.1 * bytes_allowed * logits.numel()
    assert validation < 64 * 100


@compiled
def test_logits_changed_before_the_backward_pass_are_noticed():
    """Half types compute the gradient there, from the logits."""
    logits, target = random_batch(4, 30, dtype=torch.bfloat16)
    leaf = (logits.requires_grad_() * 1).contiguous()
    loss = loss_terms(leaf, target, EL, backend="native").loss
    leaf.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice(dtype):
    logits, target = random_batch(4, 30, dtype=dtype)
    loss = encouraging_loss(logits.requires_grad_(), target, label_smoothing=0.1, backend="native")
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(second, 3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = encouraging_loss(logits, target, backend="native")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("reference", torch.float32),
        *(pytest.param("native", dtype, marks=compiled) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_compiled_graph_is_whole(backend, dtype):
    features, target = random_batch(6, 8, dtype=dtype)
    layer = torch.nn.Linear(8, 20).to(dtype)

    def loss_of(features):
        return encouraging_loss(layer(features), target, label_smoothing=0.1, backend=backend)

    expected = loss_of(features)
    (expected_gradient,) = torch.autograd.grad(expected, layer.weight)
    value = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(features)
    (gradient,) = torch.autograd.grad(value, layer.weight)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@compiled
def test_a_compiled_graph_has_the_backend_of_its_options(monkeypatch):
    """The options are made in the graph, and a number differs between the calls."""
    chosen, choose = [], functional._choose_in_graph

    def recorded(*arguments):
        chosen.append((arguments, choose(*arguments)))
        return chosen[-1][1]

    recorded._dynamo_marked_constant = True
    monkeypatch.setattr(functional, "_choose_in_graph", recorded)
    square = bonuses.Bonus("plain", lambda p, one_minus_p, options: -(p**2))  # only the reference computes it
    monkeypatch.setitem(bonuses._registry, "plain", square)
    logits, target = random_batch(6, 20)

    def loss_of(logits, **options):
        return encouraging_loss(logits, target, label_smoothing=0.1, **options)

    compiled_loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for options in ({"log_end": 0.5}, {"log_end": 0.7}, {"log_end": 0.8}, {"bonus": "plain"}):
        torch.testing.assert_close(compiled_loss(logits, **options), loss_of(logits, **options))
    assert {name for _, name in chosen} == {"native", "reference"}
    # of a dataclass, torch 2.11 makes no constant
    assert all(isinstance(each, str | bool | torch.dtype) for arguments, _ in chosen for each in arguments)


@compiled
def test_operators_are_registered_properly():
    logits, target = random_batch(3, 20)
    arguments = (logits, target, target.eq(0), *native._arguments(EL, 20))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.encourage_mt.terms.default, arguments, test_utils=tests)
    arguments = (*arguments[:3], torch.tensor(2.0), *arguments[3:])
    torch.library.opcheck(torch.ops.encourage_mt.terms_and_gradient.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.encourage_mt.terms_and_gradient_.default, arguments, test_utils=tests)


def test_chunked_takes_over_where_nothing_is_compiled(monkeypatch, caplog):
    """The smoothing occurs in no other test, because the choice is logged once."""
    monkeypatch.setattr(native, "unavailable", lambda: "native.cpp is not compiled for this test")
    options = LossOptions(label_smoothing=0.0625)
    with caplog.at_level(logging.INFO, logger="encourage_mt"):
        for _ in range(2):
            assert functional.find_backend("auto", options, "cpu", torch.float32) is chunked
    (record,) = caplog.records
    assert "chunked" in record.getMessage() and "not compiled for this test" in record.getMessage()
    assert record.levelno == logging.WARNING
    with pytest.raises(ValueError, match="loss_backend native.*not compiled for this test.*auto"):
        functional.find_backend("native", options, "cpu", torch.float32)
    functional._checked_choice.cache_clear()
    functional._choose_backend.cache_clear()


@compiled
@pytest.mark.skipif(native._library("avx2") is None, reason="not compiled for AVX2")
def test_other_instruction_set():
    """On a processor without AVX-512, the AVX2 code is loaded and agrees with the reference."""
    code = """if True:
        import torch
        from encourage_mt.loss import encouraging_loss, native
        print(native._library(torch.backends.cpu.get_cpu_capability().lower()).name)
        logits, target, results = torch.randn(9, 1001), torch.arange(9), []
        for backend in ("native", "reference"):
            leaf = logits.clone().requires_grad_()
            loss = encouraging_loss(leaf, target, label_smoothing=0.1, backend=backend)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    """
    changes = {"PYTHONPATH": str(Path(native.__file__).parents[2]), "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **changes}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "_native_avx2.so"
