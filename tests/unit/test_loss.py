"""The loss against the paper's figures, a double loop in pure Python, finite differences and torch's cross entropy."""

import dataclasses
import itertools
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from encourage_mt.loss import bonuses, chunked, reference
from encourage_mt.loss.functional import EncouragingLoss, encouraging_loss, loss_terms
from encourage_mt.loss.options import OPTIONS, LossOptions

RANGES = {name: each.metadata["between"] for name, each in OPTIONS.items() if each.metadata["between"]}

PAD = 1
EPS32 = torch.finfo(torch.float32).eps
STEPS = {"reference": 40, "chunked": 8}  # of EPS32, see assert_agrees
SMOOTHINGS = (0.0, 0.1)
SHAPES_OF_BONUS = [
    {"bonus": "none"},
    {"bonus": "log", "log_end": 0.0},
    {"bonus": "log", "log_end": 0.5},
    {"bonus": "log", "log_end": 0.75},
    {"bonus": "log", "log_end": 1.0},
    {"bonus": "power", "bonus_exponent": 1.0},
    {"bonus": "power", "bonus_exponent": 2.0},
    {"bonus": "power", "bonus_exponent": 3.0},
    {"bonus": "cosine"},
]
FALLBACK = {"bonus": "power", "bonus_exponent": 1.5}  # the chunked backend has no code for it


def named(shape):
    return "-".join(str(value) for value in shape.values())


each_backend = pytest.mark.parametrize("backend", ["reference", "chunked"])
each_shape = pytest.mark.parametrize("shape", SHAPES_OF_BONUS, ids=named)
each_shape_and_fallback = pytest.mark.parametrize("shape", [*SHAPES_OF_BONUS, FALLBACK], ids=named)
each_smoothing = pytest.mark.parametrize("smoothing", SMOOTHINGS)


def random_batch(tokens, vocabulary, spread=3.0, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


def terms_and_gradient(logits, target, options, backend, ignore_index=-100, reduce=True, scale=1.0):
    """(LossTerms, gradient of scale * sum of the loss)."""
    logits = logits.detach().requires_grad_()
    terms = loss_terms(logits, target, options, ignore_index, reduce, backend)
    (gradient,) = torch.autograd.grad((scale * terms.loss).sum(), logits)
    return terms, gradient


def in_float64(logits, target, options, ignore_index=-100, reduce=True):
    """The definition in float64, for the very values that `logits` holds in its own type."""
    return terms_and_gradient(logits.double(), target, options, "reference", ignore_index, reduce)


def assert_agrees(outcome, expected, backend):
    """Per-token terms and gradient in float32 agree with those in float64.

    A float32 term of size x is off by some rounding steps of 1 + |x| (it is a sum of terms of that size and of
    probabilities near 1), an element of the gradient by some steps of 1 plus the largest element of its token. Autograd
    adds up V terms, lane by lane, in the backward pass of log_softmax: with 1,000 types up to 20 steps are lost.
    """
    steps = STEPS[backend]
    (terms, gradient), (expected_terms, expected_gradient) = outcome, expected
    for name, term, exact in zip(terms._fields, terms, expected_terms, strict=True):
        assert ((term.double() - exact).abs() <= steps * EPS32 * (1 + exact.abs())).all(), name
    largest = expected_gradient.abs().amax(dim=1, keepdim=True)
    assert ((gradient.double() - expected_gradient).abs() <= steps * EPS32 * (1 + largest)).all()


# The paper's implementation


def golden_options(options):
    """What a golden case was run with as LossOptions, or None where they do not express it."""
    if options.get("bonus_start", 0.0) != 0.0 or options.get("bonus_rho", 1.0) != 1.0:
        return None  # an offset bonus; a weight that skips the smoothed part
    smoothing = {"label_smoothing": options["label_smoothing"], "smoothing_convention": "paper"}
    gamma = options.get("bonus_gamma", -1)
    if gamma > 0:
        return LossOptions(bonus="power", bonus_exponent=gamma, **smoothing)
    if gamma == -1:
        return LossOptions(bonus="log", log_end=options["log_end"], **smoothing)
    return LossOptions(bonus={0: "none", -2: "cosine"}[gamma], **smoothing)


def golden_cases():
    cases = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    pairs = ((case, golden_options(case["options"])) for case in cases)
    return [(case, options) for case, options in pairs if options is not None]


def is_noisy(case):
    """Two cases at log-end 1 have a target at 1 - p = 2.3e-5, of which a rounding step of p (6e-8) is 0.26 %."""
    return case["options"]["log_end"] == 1.0 and case["implementation"] == "simple" and len(case["logits"]) == 3


GOLDEN = golden_cases()


def test_golden_selection():
    assert len(GOLDEN) == 34
    assert sum(is_noisy(case) for case, _ in GOLDEN) == 2


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "options"), GOLDEN, ids=[named(case["options"]) for case, _ in GOLDEN])
def test_golden(case, options, dtype, backend):
    """The figures were made in float32 with 1 - p as a difference: 1e-3 in the loss, 1e-4 in the gradient.

    In the noisy cases that difference is off by 7e-8, which is 0.0031 in the loss and 0.00162 in the gradient.
    """
    logits = torch.tensor(case["logits"], dtype=dtype).flatten(0, 1)
    target = torch.tensor(case["target"]).flatten()
    terms, gradient = terms_and_gradient(logits, target, options, backend, ignore_index=PAD)
    expected = torch.tensor(case["grad_logits"], dtype=dtype).flatten(0, 1)
    loss_tolerance, gradient_tolerance = (0.0032, 0.0017) if is_noisy(case) else (1e-3, 1e-4)
    assert terms.loss.item() == pytest.approx(case["loss"], abs=loss_tolerance, rel=0)
    assert terms.nll_loss.item() == pytest.approx(case["nll_loss"], abs=1e-4, rel=0)  # no 1 - p in it
    torch.testing.assert_close(gradient, expected, atol=gradient_tolerance, rtol=0)


# By hand


@each_backend
def test_by_hand(backend):
    """p = (.75, .125, .125), target the first, log bonus with log_end .5.

    Target: nll = -log .75 = .2876821; beyond log_end, b = log .5 - (.75 - .5) / .5 = -1.1931472; sum -.9054651.
    Others: nll = -log .125 = 2.0794415; b = log .875 = -.1335314; sum 1.9459101.
    With eps = .2, fairseq convention, q = (.8, .1, .1):
        nll_loss = .2876821
        loss     = .8 * -.9054651 + .2 * 1.9459101 = -.3351900
        bonus    = .8 * -1.1931472 + .2 * -.1335314 = -.9812240
    Gradient, with a(p) = 1 + p / (1 - min(p, .5)): a = (2.5, 8/7, 8/7), sum of q a = 2 + .2 * 8/7 = 2.2285714:
        target: -.8 * 2.5 + .75 * 2.2285714 = -.3285714;  others: -.1 * 8/7 + .125 * 2.2285714 = .1642857
    """
    logits = torch.tensor([[0.75, 0.125, 0.125]], dtype=torch.float64).log() + 3.0  # a shift changes nothing
    options = LossOptions(bonus="log", log_end=0.5, label_smoothing=0.2, smoothing_convention="fairseq")
    terms, gradient = terms_and_gradient(logits, torch.tensor([0]), options, backend)
    assert terms.nll_loss.item() == pytest.approx(0.2876821, abs=1e-7)
    assert terms.loss.item() == pytest.approx(-0.3351900, abs=1e-7)
    assert terms.bonus.item() == pytest.approx(-0.9812240, abs=1e-7)
    assert gradient.tolist()[0] == pytest.approx([-0.3285714, 0.1642857, 0.1642857], abs=1e-7)


@each_backend
def test_even_odds(backend):
    """Of two types at p = .5, nll is log 2 and the log bonus log(1 - .5): they cancel, and the gradient is -1, 1."""
    terms, gradient = terms_and_gradient(torch.zeros(1, 2), torch.tensor([0]), LossOptions(), backend)
    assert terms.loss.item() == pytest.approx(0.0, abs=1e-7)
    assert gradient.tolist()[0] == pytest.approx([-1.0, 1.0], abs=1e-6)


# A second definition, in pure Python


def plain_bonus(p, rest, options):
    """b(p), where `rest` is 1 - p."""
    if options.bonus == "none":
        return 0.0
    if options.bonus == "power":
        return -(p**options.bonus_exponent)
    if options.bonus == "cosine":
        return math.cos(math.pi * p) - 1
    if options.log_end == 1:
        return math.log(max(rest, 1e-5))
    if p <= options.log_end:
        return math.log(rest)
    return math.log(1 - options.log_end) - (p - options.log_end) / (1 - options.log_end)


def plain_terms(row, target, options):
    """(loss, nll_loss, bonus) of one token."""
    vocabulary = len(row)
    exponentials = [math.exp(logit) for logit in row]
    eps = options.label_smoothing
    cross_entropy = bonus = 0.0
    for type_ in range(vocabulary):
        if options.smoothing_convention == "paper":
            q = eps / vocabulary + (1 - eps if type_ == target else 0)
        else:
            q = 1 - eps if type_ == target else eps / (vocabulary - 1)
        others = sum(exponentials[:type_]) + sum(exponentials[type_ + 1 :])
        p = exponentials[type_] / sum(exponentials)
        cross_entropy -= q * math.log(p)
        bonus += options.bonus_weight * q * plain_bonus(p, others / sum(exponentials), options)
        if type_ == target:
            nll_loss = -math.log(p)
    return cross_entropy + bonus, nll_loss, bonus


@each_backend
@pytest.mark.parametrize("weight", [0.3, 2.0])
@pytest.mark.parametrize("convention", ["fairseq", "paper"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@each_shape_and_fallback
def test_agrees_with_double_loop(shape, smoothing, convention, weight, backend):
    """Both in float64, and no term is larger than 100: 1e-11 is a thousand times its rounding."""
    logits, target = random_batch(10, 7, dtype=torch.float64)
    logits[0, target[0]] = 20.0  # past every log_end
    logits[1, (target[1] + 1) % 7] = 20.0
    options = LossOptions(**shape, bonus_weight=weight, label_smoothing=smoothing, smoothing_convention=convention)
    expected = [plain_terms(row, y, options) for row, y in zip(logits.tolist(), target.tolist(), strict=True)]
    terms = loss_terms(logits, target, options, reduce=False, backend=backend)
    torch.testing.assert_close(
        torch.stack(terms, dim=1), torch.tensor(expected, dtype=torch.float64), atol=1e-11, rtol=0
    )


# Gradient


@each_backend
@pytest.mark.parametrize(("smoothing", "convention"), [(0.0, "fairseq"), (0.1, "fairseq"), (0.1, "paper")])
@each_shape_and_fallback
def test_gradcheck(shape, smoothing, convention, backend):
    """No 1 - p is near the floor of log_end 1, whose kink has no derivative; one token is ignored."""
    logits = torch.tensor([[5.0, 0.3, -1.0], [5.0, 0.2, 0.0], [0.3, 0.1, -0.4], [1.0, 2.0, 3.0]], dtype=torch.float64)
    target = torch.tensor([0, 2, 2, PAD])
    assert (1 - logits.softmax(dim=1)).min() > 100 * bonuses.LOG_BONUS_FLOOR
    options = LossOptions(**shape, bonus_weight=0.7, label_smoothing=smoothing, smoothing_convention=convention)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_terms(z, target, options, PAD, False, backend).loss, logits)


@each_shape
@pytest.mark.parametrize("convention", ["fairseq", "paper"])
@each_smoothing
def test_backends_agree_in_float64(smoothing, convention, shape):
    """Two ways to the same gradient, finer than finite differences see: 1e-13 is some 100 rounding steps."""
    logits, target = random_batch(40, 70, dtype=torch.float64)
    logits[torch.arange(0, 40, 2), target[::2]] += 8.0  # half of the targets are the top
    options = LossOptions(**shape, bonus_weight=1.3, label_smoothing=smoothing, smoothing_convention=convention)
    terms, gradient = terms_and_gradient(logits, target, options, "chunked", reduce=False)
    expected_terms, expected = terms_and_gradient(logits, target, options, "reference", reduce=False)
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected_terms), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_fallback_is_logged_once(backend, caplog):
    """Exponents between 1 and 2 have no fast code; these two occur in no other test, as what was logged stays so."""
    exponent = {"auto": 1.25, "chunked": 1.75}[backend]
    options = LossOptions(bonus="power", bonus_exponent=exponent, label_smoothing=0.1)
    logits, target = random_batch(6, 9)
    with caplog.at_level(logging.WARNING, logger="encourage_mt"):
        first = terms_and_gradient(logits, target, options, backend)
        terms_and_gradient(logits, target, options, backend)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reference" in record.getMessage()
    assert f"bonus_exponent={exponent}" in record.getMessage()
    expected = terms_and_gradient(logits, target, options, "reference")
    assert torch.equal(first[0].loss, expected[0].loss)
    assert torch.equal(first[1], expected[1])


@each_shape
def test_fast_options_log_nothing(shape, caplog):
    """The weight occurs in no other test, as what was logged once would not be again."""
    logits, target = random_batch(2, 9)
    loss_terms(logits, target, LossOptions(**shape, bonus_weight=0.123))
    assert not caplog.records


def test_auto_is_chunked():
    """Only the chunked backend detaches nll_loss."""
    logits, target = random_batch(2, 9)
    logits.requires_grad_()
    assert not loss_terms(logits, target, LossOptions()).nll_loss.requires_grad
    assert loss_terms(logits, target, LossOptions(), backend="reference").nll_loss.requires_grad


def test_unknown_backend():
    logits, target = random_batch(2, 9)
    with pytest.raises(ValueError, match="backend.*reference.*chunked.*quick"):
        loss_terms(logits, target, LossOptions(), backend="quick")


@each_shape_and_fallback
def test_negative_slope(shape):
    """-p b'(p) is what autograd makes of bonus_of; both in float64, a few rounding steps apart."""
    p = torch.cat([torch.logspace(-12, -1, 12, dtype=torch.float64), torch.linspace(0.2, 0.9, 36, dtype=torch.float64)])
    p = torch.cat([p, 1 - torch.tensor([1e-3, 1e-4, 2e-5], dtype=torch.float64)]).requires_grad_()
    options = LossOptions(**shape)
    bonus = bonuses.bonus_of(p, 1 - p, options) + 0 * p  # of "none" too there is something to differentiate
    (slope,) = torch.autograd.grad(bonus.sum(), p)
    p = p.detach()
    torch.testing.assert_close(bonuses.scaled_slope(p, 1 - p, options), -p * slope, atol=1e-15, rtol=1e-12)


def test_negative_slope_on_the_floor():
    one_minus_p = torch.tensor([0.0, 1e-9, 0.9e-5, 1.1e-5], dtype=torch.float64, requires_grad=True)
    options = LossOptions(log_end=1.0)
    (slope,) = torch.autograd.grad(bonuses.bonus_of(1 - one_minus_p, one_minus_p, options).sum(), one_minus_p)
    one_minus_p = one_minus_p.detach()
    expected = [0.0, 0.0, 0.0, 1 / 1.1e-5]  # b = log(1 - p)
    assert slope.tolist() == pytest.approx(expected)
    assert bonuses.scaled_slope(1 - one_minus_p, one_minus_p, options).tolist() == pytest.approx(expected, rel=1e-4)


# Confident predictions

RESTS = (0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-9)  # 1 - p of the top type; none near 1e-5, where log_end 1 has its kink


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


def test_confident_batch_is_confident():
    logits, target = confident_batch(12, 50, torch.float64)
    p = logits.softmax(dim=1)
    assert (1 - p[::2].gather(1, target[::2, None])).flatten().tolist() == pytest.approx(RESTS, rel=1e-6)
    assert (1 - p[1::2].max(dim=1).values).tolist() == pytest.approx(RESTS, rel=1e-6)
    assert not p[1::2].argmax(dim=1).eq(target[1::2]).any()


@each_backend
@pytest.mark.parametrize("vocabulary", [3, 1000])
@each_smoothing
@pytest.mark.parametrize(
    "shape",
    [{"bonus": "log", "log_end": end} for end in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
    + [shape for shape in SHAPES_OF_BONUS if shape["bonus"] != "log"],
    ids=named,
)
def test_confident(shape, smoothing, vocabulary, backend):
    logits, target = confident_batch(12, vocabulary)
    options = LossOptions(**shape, label_smoothing=smoothing)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


@pytest.mark.parametrize("log_end", [0.25, 0.5, 0.75, 0.9, 1.0])
def test_chunked_gradient_keeps_its_digits(log_end):
    """Without smoothing the gradient is (1 - p) a(p), as small as 1e-9: chunked has it to 1e-5 of itself, not of 1.

    (The reference backend has not: log_softmax forms p - 1, as for cross entropy.)
    """
    logits, target = confident_batch(12, 1000)
    options = LossOptions(log_end=log_end)
    _, gradient = terms_and_gradient(logits, target, options, "chunked")
    _, expected = in_float64(logits, target, options)
    torch.testing.assert_close(gradient.double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("rest", [1e-4, 1e-9])
def test_complement(rest):
    """In float32 1 - p keeps its digits though p does not: 1 - p as a difference would be 12 % off, or 0.

    What is left is log_softmax's own sum, good to `rest` over the processor's vector width: 1.2e-5 with eight lanes.
    """
    vocabulary = 10_000
    logits = torch.zeros(1, vocabulary, dtype=torch.float64)
    logits[0, 7] = math.log((1 - rest) / rest * (vocabulary - 1))
    one_minus_p = reference.complement(logits.float().log_softmax(dim=1))
    assert one_minus_p[0, 7].item() == pytest.approx(rest, rel=1e-4)
    assert one_minus_p[0, 8].item() == pytest.approx(1 - rest / (vocabulary - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "best"),
    [
        (LossOptions(bonus="none", label_smoothing=0.1), 0.9),
        (LossOptions(log_end=0.25, label_smoothing=0.1), 0.953),
        (LossOptions(log_end=0.5, label_smoothing=0.1), 0.964),
        (LossOptions(log_end=0.75, label_smoothing=0.1), 0.978),
        (LossOptions(log_end=1.0, label_smoothing=0.1), 0.99999),
    ],
)
def test_where_the_smoothed_loss_is_least(options, best):
    """The p of the target at which it is, with the 5,904 types of Multi30k; unbent, only the floor stops it."""
    rest = torch.logspace(-7, -0.5, 400, dtype=torch.float64)
    logits = (rest / 5903).log()[:, None].repeat(1, 5904)
    logits[:, 3] = (1 - rest).log()
    terms = loss_terms(logits, torch.full((400,), 3), options, reduce=False, backend="reference")
    assert 1 - rest[terms.loss.argmin()].item() == pytest.approx(best, abs=0.005 if best < 0.99 else 1e-6)


# Vocabularies


@each_backend
@pytest.mark.parametrize("vocabulary", [2, 3, 4, 5, 63, 64, 65, 128, 200, 1000])
@each_shape
def test_vocabulary(shape, vocabulary, backend):
    """Whole and broken groups of 64 types."""
    logits, target = random_batch(20, vocabulary)
    options = LossOptions(**shape, bonus_weight=1.3, label_smoothing=0.1)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


@each_backend
@pytest.mark.parametrize("shape", [{"bonus": "log"}, {"bonus": "cosine"}], ids=named)
def test_many_rows(shape, backend):
    """More than a block of them, and a block that is not full; with and without gradient the same figures."""
    logits, target = random_batch(1200, 1000)
    assert chunked.BLOCK_ELEMENTS // 1000 < 1200
    options = LossOptions(**shape, label_smoothing=0.1)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)
    validation = loss_terms(logits, target, options, reduce=False, backend=backend)
    assert not validation.loss.requires_grad
    assert torch.equal(torch.stack(validation), torch.stack(outcome[0]))


@each_backend
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0, 4.0])
@each_shape
def test_large_vocabulary(shape, spread, backend):
    """From all types alike to a few that share all mass: few, some and many p above what chunked takes for small."""
    logits, target = random_batch(3, 9001, spread=spread)
    logits[1, 9000] = logits[1].max()  # a tie of the top, its second type in the broken last group
    options = LossOptions(**shape, bonus_weight=2.0, label_smoothing=0.1)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


# Extreme and broken logits


@each_backend
@each_smoothing
@each_shape
def test_large_logits(shape, smoothing, backend):
    """Differences of 1e4 and 2e4 underflow every exponential, and the loss stays finite and right."""
    logits = 1e4 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, 1.0, -1.0, 0.0], [-1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    target = torch.tensor([0, 2, 3, 1])
    options = LossOptions(**shape, label_smoothing=smoothing)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert torch.isfinite(outcome[1]).all()
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


@each_backend
@each_smoothing
@each_shape
def test_ties(shape, smoothing, backend):
    """Types that share the top logit get the same gradient, whichever is taken for the top."""
    logits = torch.zeros(3, 70)
    logits[1:, [3, 68]] = 9.0  # in different groups
    target = torch.tensor([0, 3, 5])
    options = LossOptions(**shape, label_smoothing=smoothing)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)
    gradient = outcome[1]
    torch.testing.assert_close(gradient[0, 1:], gradient[0, 1].expand(69), atol=4 * EPS32, rtol=0)
    torch.testing.assert_close(gradient[2, 3], gradient[2, 68], atol=4 * EPS32, rtol=0)


@each_backend
@each_smoothing
@each_shape
def test_one_row(shape, smoothing, backend):
    logits, target = random_batch(1, 33)
    options = LossOptions(**shape, label_smoothing=smoothing)
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


@each_backend
@each_smoothing
def test_no_rows(smoothing, backend):
    options = LossOptions(label_smoothing=smoothing)
    terms, gradient = terms_and_gradient(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), options, backend)
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
    assert gradient.shape == (0, 5)


@each_backend
@each_smoothing
@each_shape
def test_all_pads(shape, smoothing, backend):
    logits, _ = random_batch(4, 9)
    options = LossOptions(**shape, label_smoothing=smoothing)
    terms, gradient = terms_and_gradient(logits, torch.full((4,), PAD), options, backend, ignore_index=PAD)
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
    assert torch.equal(gradient, torch.zeros(4, 9))


@each_backend
@each_smoothing
@each_shape
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logit_is_seen(bad, shape, smoothing, backend):
    """A training must notice: the loss is not finite, wherever in the row the logit stands."""
    options = LossOptions(**shape, label_smoothing=smoothing)
    for column in (0, 3, 64, 69):
        logits, _ = random_batch(3, 70)
        logits[1, column] = bad
        for reduce in (True, False):
            terms = loss_terms(logits, torch.tensor([0, 3, 5]), options, reduce=reduce, backend=backend)
            assert not torch.isfinite(terms.loss).all()
            assert not torch.isfinite(terms.nll_loss).all()


@each_backend
@each_shape
def test_masked_types(shape, backend):
    """Types at -inf, a model's way to forbid them, are as good as absent; only smoothing asks for their p."""
    logits, target = random_batch(4, 200)
    allowed = torch.arange(200) % 3 != 1
    allowed[64:128] = False  # a whole group
    allowed[target] = True
    masked = logits.masked_fill(~allowed, -math.inf)
    terms, gradient = terms_and_gradient(masked, target, LossOptions(**shape), backend, reduce=False)
    position = allowed.cumsum(0) - 1
    without = in_float64(logits[:, allowed], position[target], LossOptions(**shape), reduce=False)
    assert_agrees((terms, gradient[:, allowed]), without, backend)
    assert torch.equal(gradient[:, ~allowed], torch.zeros_like(gradient[:, ~allowed]))


@each_backend
@each_smoothing
@each_shape
def test_strided_logits(shape, smoothing, backend):
    """Logits of any memory layout give the same figures and are left as they were."""
    logits, target = random_batch(5, 70)
    options = LossOptions(**shape, label_smoothing=smoothing)
    expected = terms_and_gradient(logits, target, options, backend)
    transposed = logits.t().contiguous().t()
    gaps = torch.stack([logits, -logits], dim=2).flatten(1)[:, ::2]
    for strided in (transposed, gaps):
        assert not strided.is_contiguous()
        terms, gradient = terms_and_gradient(strided, target, options, backend)
        torch.testing.assert_close(torch.stack(terms), torch.stack(expected[0]), atol=0, rtol=8 * EPS32)
        torch.testing.assert_close(gradient, expected[1], atol=8 * EPS32, rtol=0)
        assert torch.equal(strided, logits)


@each_backend
@pytest.mark.parametrize(
    ("logits", "target"),
    [((6,), (6,)), ((2, 3, 4), (2, 3)), ((6, 4), (5,)), ((6, 4), (6, 1)), ((6, 4), ()), ((6, 1), (6,)), ((6, 0), (6,))],
)
def test_wrong_shapes(logits, target, backend):
    with pytest.raises(ValueError, match="types|expected logits"):
        loss_terms(torch.zeros(logits), torch.zeros(target, dtype=torch.long), LossOptions(), backend=backend)


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
@each_shape
def test_half_types(shape, batch, dtype, backend):
    """Nothing is rounded to the half type but the gradient, once, after the loss scale.

    So its error is half a step of the half type (of its subnormals too), besides that of float32: some steps of p + q,
    the terms it is the difference of. Rounded before scaling, the share .1 / 2499 of a type would be off by 0.05 %.
    """
    logits, target = batch(12, 2500, dtype=dtype)
    scale = 2.0**15
    options = LossOptions(**shape, label_smoothing=0.1)
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
@each_shape
def test_padding_changes_nothing(shape, smoothing, backend):
    """Rows are independent; only the order in which a sum is taken may differ, by a few steps of float32."""
    logits, target = random_batch(8, 70)
    target[target == PAD] = 2
    options = LossOptions(**shape, label_smoothing=smoothing)
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
@each_smoothing
@each_shape
def test_reduce_is_the_sum(shape, smoothing, backend):
    logits, target = random_batch(9, 70, dtype=torch.float64)
    options = LossOptions(**shape, label_smoothing=smoothing)
    terms, gradient = terms_and_gradient(logits, target, options, backend, PAD)
    each, gradient_of_each = terms_and_gradient(logits, target, options, backend, PAD, reduce=False)
    assert all(term.shape == (9,) for term in each)
    torch.testing.assert_close(torch.stack([term.sum() for term in each]), torch.stack(terms), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of_each, gradient, atol=1e-14, rtol=0)


@each_backend
@each_smoothing
@each_shape
def test_bonus_is_what_the_loss_has_beyond_cross_entropy(shape, smoothing, backend):
    logits, target = random_batch(9, 70, dtype=torch.float64)
    options = LossOptions(**shape, bonus_weight=0.6, label_smoothing=smoothing)
    terms = loss_terms(logits, target, options, -100, False, backend)
    plain = loss_terms(logits, target, LossOptions(bonus="none", label_smoothing=smoothing), -100, False, backend)
    torch.testing.assert_close(terms.loss - terms.bonus, plain.loss, atol=1e-12, rtol=0)
    assert torch.equal(plain.bonus, torch.zeros(9, dtype=torch.float64))
    torch.testing.assert_close(terms.nll_loss, -logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1))


@each_backend
@each_shape
def test_upstream_gradient(shape, backend):
    """The gradient of a token is its own, times what comes from above: one factor, or one per token."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    options = LossOptions(**shape, label_smoothing=0.1)
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
    """The second gradient of a retained graph is the first, even where the first was overwritten by its owner."""
    logits, target = random_batch(6, 9)
    logits.requires_grad_()
    loss = scale * loss_terms(logits, target, LossOptions(label_smoothing=0.1), PAD, reduce, backend).loss.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, kept)


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


# In the place of torch.nn.CrossEntropyLoss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_smoothing
@pytest.mark.parametrize("more", [(), (5,), (3, 2)], ids=str)
def test_is_cross_entropy_without_bonus(more, smoothing, reduction):
    """Both in float64: 1e-12 is a thousand of its rounding steps."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 7, *more, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (4, *more), generator=generator)
    weights = torch.rand(target.shape, generator=generator, dtype=torch.float64)
    for ignore_index in (-100, 2):
        target[0] = ignore_index
        losses = (
            EncouragingLoss(bonus="none", label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction),
            torch.nn.CrossEntropyLoss(label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction),
        )
        figures, gradients = [], []
        for loss in losses:
            leaf = logits.clone().requires_grad_()
            figures.append(loss(leaf, target))
            (figures[-1] * (weights if reduction == "none" else 1.7)).sum().backward()
            gradients.append(leaf.grad)
        assert figures[0].shape == figures[1].shape
        torch.testing.assert_close(figures[0], figures[1], atol=1e-12, rtol=0)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


def test_mean_of_no_target_is_nan():
    """As with torch's: there is nothing to take the mean of."""
    logits, _ = random_batch(3, 5)
    target = torch.full((3,), -100)
    assert torch.nn.CrossEntropyLoss()(logits, target).isnan()
    assert EncouragingLoss()(logits, target).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_shape_and_fallback
def test_module_is_the_function(shape, reduction):
    """The module passes every option on, smooths as the paper does, and agrees with loss_terms."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    target[2] = 3
    module = EncouragingLoss(**shape, bonus_weight=0.4, label_smoothing=0.2, ignore_index=3, reduction=reduction)
    options = LossOptions(**shape, bonus_weight=0.4, label_smoothing=0.2, smoothing_convention="paper")
    each = loss_terms(logits, target, options, ignore_index=3, reduce=False, backend="reference").loss
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / target.ne(3).sum()}[reduction]
    torch.testing.assert_close(module(logits, target), expected, atol=1e-12, rtol=0)
    keywords = {"ignore_index": 3, "reduction": reduction, "backend": "reference"}
    function = encouraging_loss(logits, target, **dataclasses.asdict(options), **keywords)
    torch.testing.assert_close(function, expected, atol=1e-12, rtol=0)


def test_module_shows_its_options():
    text = repr(EncouragingLoss(log_end=0.625, ignore_index=3, reduction="sum"))
    for part in ("EncouragingLoss", "log_end=0.625", "ignore_index=3", "'sum'"):
        assert part in text


def test_module_keeps_the_order_of_tokens():
    """With shape (N, C, d1, d2) the loss at [n, i, j] is that of logits[n, :, i, j]."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (2, 3, 4), generator=generator)
    loss = EncouragingLoss(label_smoothing=0.1, reduction="none")
    each = loss(logits, target)
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        alone = loss(logits[n, :, i, j][None], target[n, i, j][None])
        torch.testing.assert_close(each[n, i, j], alone[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("logits", "target"),
    [((4,), ()), ((4, 7), (4, 1)), ((4, 7), (7,)), ((4, 7, 3), (4,)), ((4, 7, 3), (4, 7)), ((4, 7, 3, 2), (4, 2, 3))],
)
def test_module_refuses_shapes(logits, target):
    with pytest.raises(ValueError, match="expected logits"):
        EncouragingLoss()(torch.zeros(logits), torch.zeros(target, dtype=torch.long))


@pytest.mark.parametrize("reduction", ["average", "", None])
def test_module_refuses_reduction(reduction):
    logits, target = random_batch(2, 9)
    with pytest.raises(ValueError, match=f"reduction .*{reduction}"):
        EncouragingLoss(reduction=reduction)(logits, target)


# Options


@each_backend
@pytest.mark.parametrize(
    ("base", "option", "value"),
    [
        ({}, "bonus", "none"),
        ({}, "bonus", "power"),
        ({}, "bonus", "cosine"),
        ({}, "log_end", 0.75),
        ({"bonus": "power"}, "bonus_exponent", 3.0),
        ({}, "bonus_weight", 0.9),
        ({"bonus": "power"}, "bonus_weight", 0.9),
        ({}, "label_smoothing", 0.05),
        ({"label_smoothing": 0.1}, "smoothing_convention", "fairseq"),
    ],
)
def test_every_option_changes_loss_and_gradient(base, option, value, backend):
    """By far more than rounding, in float64: an option that is not passed on would change nothing."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    before, gradient_before = terms_and_gradient(logits, target, LossOptions(**base), backend)
    after, gradient_after = terms_and_gradient(logits, target, LossOptions(**{**base, option: value}), backend)
    assert abs(after.loss - before.loss) > 1e-3
    assert (gradient_after - gradient_before).abs().max() > 1e-3
    torch.testing.assert_close(after.nll_loss, before.nll_loss, atol=1e-12, rtol=0)  # plain likelihood, always
    module_before, module_after = EncouragingLoss(**base), EncouragingLoss(**{**base, option: value})
    assert abs(module_after(logits, target) - module_before(logits, target)) > 1e-4


@pytest.mark.parametrize("make", [LossOptions, EncouragingLoss])
@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("label_smoothing", -0.01, "between 0 and 1"),
        ("label_smoothing", 1.01, "between 0 and 1"),
        ("log_end", -0.01, "between 0 and 1"),
        ("log_end", 1.01, "between 0 and 1"),
        ("bonus_exponent", 0.99, "between 1 and 10"),
        ("bonus_exponent", 10.01, "between 1 and 10"),
        ("bonus_weight", -0.01, "between 0 and 2"),
        ("bonus_weight", 2.01, "between 0 and 2"),
        *((option, bad, "between") for option in RANGES for bad in (math.nan, math.inf, -math.inf)),
        ("bonus", "logarithm", "one of none, log, power, cosine"),
    ],
)
def test_option_out_of_range(option, value, allowed, make):
    with pytest.raises(ValueError, match=option) as raised:
        make(**{option: value})
    assert allowed in str(raised.value)
    assert str(value) in str(raised.value)


def test_unknown_smoothing_convention():
    with pytest.raises(ValueError, match="smoothing_convention must be one of fairseq, paper, got torch"):
        LossOptions(smoothing_convention="torch")


@each_backend
@pytest.mark.parametrize(
    ("option", "value"), [(option, bound) for option, bounds in RANGES.items() for bound in bounds]
)
def test_bounds_of_ranges_are_allowed(option, value, backend):
    logits, target = random_batch(6, 9)
    options = LossOptions(**{"bonus": "power" if option == "bonus_exponent" else "log", option: value})
    outcome = terms_and_gradient(logits, target, options, backend, reduce=False)
    assert_agrees(outcome, in_float64(logits, target, options, reduce=False), backend)


def test_memory_kept_for_the_gradient_is_never_shared():
    """Gradients that are alive at once lie apart, whatever is freed in between; only then is room taken again."""
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
    places = {second.data_ptr(), third.data_ptr()}
    del second, third
    assert gradient(logits).data_ptr() in places
    assert torch.equal(view, kept[3:5])


@pytest.mark.parametrize("reduce", [True, False])
@each_backend
def test_the_loss_may_be_written_to(backend, reduce):
    """fairseq multiplies the loss of an empty batch by 0 in place; the gradient is 0 then."""
    logits, target = random_batch(6, 90)
    leaf = logits.clone().requires_grad_()
    loss = loss_terms(leaf, target, LossOptions(label_smoothing=0.1), reduce=reduce, backend=backend).loss
    loss *= 0
    loss.sum().backward()
    assert not leaf.grad.any()


def test_memory_kept_is_not_shared_with_forked_processes():
    """A child takes the same place for a gradient of its own; the parent's stays as it was."""
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
