"""Provide what the tests of the loss share: batches, bonuses, and the comparison of a backend with float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from encourage_mt.loss import native
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.options import LossOptions

PAD = 1
EPS32 = torch.finfo(torch.float32).eps
STEPS = {"reference": 120, "chunked": 8}  # of EPS32, see assert_agrees
if not native.unavailable():
    STEPS["native"] = 4
BACKENDS = list(STEPS)

# One of each code path: power 1 is linear near 0, power 1.5 has no form there that chunked knows.
BONUSES = [
    {"bonus": "none"},
    {"bonus": "log", "log_end": 0.5},
    {"bonus": "log", "log_end": 1.0},
    {"bonus": "power", "bonus_exponent": 1.0},
    {"bonus": "power", "bonus_exponent": 2.0},
    {"bonus": "cosine"},
    {"bonus": "log", "log_end": 0.75, "bonus_start": 0.3},
]
FALLBACK = {"bonus": "power", "bonus_exponent": 1.5}
RESTS = (0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-9)  # 1 - p of the top type; none near 1e-5, where log_end 1 has its kink


def name_of(bonus):
    return "-".join(str(value) for value in bonus.values())


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_bonus = pytest.mark.parametrize("bonus", BONUSES, ids=name_of)
each_bonus_and_fallback = pytest.mark.parametrize("bonus", [*BONUSES, FALLBACK], ids=name_of)
each_smoothing = pytest.mark.parametrize("smoothing", (0.0, 0.1))


def random_batch(tokens, vocabulary, spread=3.0, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


def confident_batch(tokens, vocabulary, dtype=torch.float32):
    """For each of RESTS a token whose target has p = 1 - rest, and one where a wrong type has it."""
    assert tokens == 2 * len(RESTS)
    logits, target = random_batch(tokens, vocabulary, spread=1.0, dtype=torch.float64)
    rest = torch.tensor(RESTS, dtype=torch.float64)
    for wrong in (0, 1):
        rows = torch.arange(wrong, tokens, 2)
        top = (target[rows] + wrong) % vocabulary
        logits[rows, top] = -math.inf
        logits[rows, top] = logits[rows].logsumexp(dim=1) + torch.log((1 - rest) / rest)
    return logits.to(dtype), target


def terms_and_gradient(logits, target, options, backend, ignore_index=-100, reduce=True, scale=1.0):
    """(LossTerms, gradient of scale * sum of the loss)."""
    logits = logits.detach().requires_grad_()
    terms = loss_terms(logits, target, options, ignore_index, reduce, backend)
    (gradient,) = torch.autograd.grad((scale * terms.loss).sum(), logits)
    return terms, gradient


def in_float64(logits, target, options, ignore_index=-100, reduce=True):
    """The definition in float64, for the values of `logits` as rounded to its own type."""
    return terms_and_gradient(logits.double(), target, options, "reference", ignore_index, reduce)


def assert_agrees(outcome, expected, backend):
    """Per-token terms and gradient in float32 agree with those in float64.

    A float32 term of size x is off by some rounding steps of 1 + |x| (it is a sum of terms of that size and of
    probabilities near 1), an element of the gradient by some steps of 1 plus the largest element of its token. Autograd
    adds up V terms, lane by lane, in the backward pass of log_softmax: with 1,000 types 20 to 83 steps are lost,
    depending on the CPU.
    """
    steps = STEPS[backend]
    (terms, gradient), (expected_terms, expected_gradient) = outcome, expected
    for name, term, exact in zip(terms._fields, terms, expected_terms, strict=True):
        assert ((term.double() - exact).abs() <= steps * EPS32 * (1 + exact.abs())).all(), name
    largest = expected_gradient.abs().amax(dim=1, keepdim=True)
    assert ((gradient.double() - expected_gradient).abs() <= steps * EPS32 * (1 + largest)).all()


def assert_right(logits, target, options, backend):
    """`backend` agrees with float64 on this batch; returns its (LossTerms, gradient)."""
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)
    return outcome


def options_of(bonus, smoothing=0.1, **more):
    return LossOptions(**bonus, label_smoothing=smoothing, **more)


class LargeTensors(TorchDispatchMode):
    """Collect the memory of all results of at least `size` bytes."""

    def __init__(self, size):
        super().__init__()
        self.size, self.addresses = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                self.addresses.add(tensor.untyped_storage().data_ptr())
        return result
