"""Compare the loss with the paper's values, a double loop in pure Python, finite differences and float64."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from loss_cases import (
    BONUSES,
    PAD,
    RESTS,
    STEPS,
    assert_right,
    confident_batch,
    each_backend,
    each_bonus,
    each_bonus_and_fallback,
    each_smoothing,
    in_float64,
    name_of,
    options_of,
    random_batch,
    terms_and_gradient,
)

from encourage_mt.loss import chunked, functional, native, reference
from encourage_mt.loss.bonuses import LOG_BONUS_FLOOR
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.options import LossOptions

# The paper's implementation


def golden_options(options):
    """The options of a golden case as LossOptions, or None if they do not express it (bonus_rho: see paper's code)."""
    if options.get("bonus_rho", 1.0) != 1.0:
        return None  # a weight that skips the smoothed part
    shared = {"label_smoothing": options["label_smoothing"], "smoothing_convention": "paper"}
    shared["bonus_start"] = options.get("bonus_start", 0.0)
    gamma = options.get("bonus_gamma", -1)
    if gamma > 0:
        return LossOptions(bonus="power", bonus_exponent=gamma, **shared)
    if gamma == -1:
        return LossOptions(bonus="log", log_end=options["log_end"], **shared)
    return LossOptions(bonus={0: "none", -2: "cosine"}[gamma], **shared)


def golden_cases():
    cases = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    pairs = ((case, golden_options(case["options"])) for case in cases)
    return [(case, options) for case, options in pairs if options is not None]


def is_noisy(case):
    """Whether a target lies at 1 - p = 2.3e-5 with log-end 1: a rounding step of p (6e-8) is 0.26 % of it."""
    options = case["options"]
    return options["log_end"] == 1.0 and options.get("bonus_gamma", -1) == -1 and len(case["logits"]) == 3


GOLDEN = golden_cases()


def test_golden_selection():
    assert len(GOLDEN) == 38
    assert sum(options.bonus_start > 0 for _, options in GOLDEN) == 4
    assert sum(is_noisy(case) for case, _ in GOLDEN) == 3


@each_backend
@pytest.mark.parametrize(("case", "options"), GOLDEN, ids=[name_of(case["options"]) for case, _ in GOLDEN])
def test_golden(case, options, backend):
    """The values were made in float32 with 1 - p as a difference: 1e-3 in the loss, 1e-4 in the gradient.

    In the noisy cases that difference is off by 7e-8, which is 0.0031 in the loss and 0.00162 in the gradient.
    """
    for dtype in (torch.float32, torch.float64):
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
def test_bonus_start_by_hand(backend):
    """p = (.75, .125, .125), power bonus -p^2 from s = .25 on: b = -(.5625 - .0625) = -.5 for the target, else 0.

    With eps = .3, paper convention, q = (.8, .1, .1): bonus = .8 * -.5 = -.4.
    """
    logits = torch.tensor([[0.75, 0.125, 0.125]], dtype=torch.float64).log()
    options = LossOptions(bonus="power", bonus_start=0.25, label_smoothing=0.3)
    terms, _ = terms_and_gradient(logits, torch.tensor([0]), options, backend)
    assert terms.bonus.item() == pytest.approx(-0.4, abs=1e-12)


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
    eps, start = options.label_smoothing, options.bonus_start
    cross_entropy = bonus = 0.0
    for type_ in range(vocabulary):
        if options.smoothing_convention == "paper":
            q = eps / vocabulary + (1 - eps if type_ == target else 0)
        else:
            q = 1 - eps if type_ == target else eps / (vocabulary - 1)
        others = sum(exponentials[:type_]) + sum(exponentials[type_ + 1 :])
        p = exponentials[type_] / sum(exponentials)
        cross_entropy -= q * math.log(p)
        if p >= start:
            b = plain_bonus(p, others / sum(exponentials), options) - plain_bonus(start, 1 - start, options)
            bonus += options.bonus_weight * q * b
        if type_ == target:
            nll_loss = -math.log(p)
    return cross_entropy + bonus, nll_loss, bonus


SMOOTHED = [(0.0, "fairseq", 0.3), (0.1, "fairseq", 2.0), (0.1, "paper", 0.3), (1.0, "paper", 1.0)]


@each_backend
@each_bonus_and_fallback
def test_agrees_with_double_loop(bonus, backend):
    """Both in float64, and no term is larger than 100: 1e-11 is a thousand times its rounding."""
    logits, target = random_batch(10, 7, dtype=torch.float64)
    logits[0, target[0]] = 20.0  # beyond every log_end
    logits[1, (target[1] + 1) % 7] = 20.0
    for smoothing, convention, weight in SMOOTHED:
        options = options_of(bonus, smoothing, smoothing_convention=convention, bonus_weight=weight)
        expected = [plain_terms(row, y, options) for row, y in zip(logits.tolist(), target.tolist(), strict=True)]
        terms = loss_terms(logits, target, options, reduce=False, backend=backend)
        torch.testing.assert_close(
            torch.stack(terms, dim=1), torch.tensor(expected, dtype=torch.float64), atol=1e-11, rtol=0
        )


# Gradient


@each_backend
@each_bonus_and_fallback
def test_gradcheck(bonus, backend):
    """No 1 - p is near the floor of log_end 1, whose kink has no derivative; one token is ignored."""
    logits = torch.tensor([[5.0, 0.3, -1.0], [5.0, 0.2, 0.0], [0.3, 0.1, -0.4], [1.0, 2.0, 3.0]], dtype=torch.float64)
    target = torch.tensor([0, 2, 2, PAD])
    assert (1 - logits.softmax(dim=1)).min() > 100 * LOG_BONUS_FLOOR
    logits.requires_grad_()
    for smoothing, convention in ((0.0, "fairseq"), (0.1, "fairseq"), (0.1, "paper")):
        options = options_of(bonus, smoothing, smoothing_convention=convention, bonus_weight=0.7)
        assert torch.autograd.gradcheck(
            lambda z, options=options: loss_terms(z, target, options, PAD, False, backend).loss, logits
        )


@pytest.mark.parametrize("backend", sorted(set(STEPS) - {"reference"}))
@each_bonus
def test_backends_agree_in_float64(bonus, backend):
    """Two ways to compute the gradient; finite differences would not see 1e-13, which is about 100 rounding steps."""
    logits, target = random_batch(40, 70, dtype=torch.float64)
    logits[torch.arange(0, 40, 2), target[::2]] += 8.0  # half of the targets are the top
    for smoothing, convention in ((0.0, "paper"), (0.1, "fairseq")):
        options = options_of(bonus, smoothing, smoothing_convention=convention, bonus_weight=1.3)
        terms, gradient = terms_and_gradient(logits, target, options, backend, reduce=False)
        expected_terms, expected = terms_and_gradient(logits, target, options, "reference", reduce=False)
        torch.testing.assert_close(torch.stack(terms), torch.stack(expected_terms), atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=0)


def test_fallback_is_logged_once(caplog):
    """Exponents between 1 and 2 have no chunked code; 1.75 occurs in no other test, because it is logged once."""
    backend, exponent = "chunked", 1.75
    options = options_of({"bonus": "power", "bonus_exponent": exponent})
    logits, target = random_batch(6, 9)
    with caplog.at_level(logging.WARNING, logger="encourage_mt"):
        first = terms_and_gradient(logits, target, options, backend)
        terms_and_gradient(logits, target, LossOptions(**{**vars(options), "bonus_weight": 0.5}), backend)
    (record,) = caplog.records
    for part in ("reference", "chunked", "power", f"bonus_exponent={exponent}"):
        assert part in record.getMessage()
    expected = terms_and_gradient(logits, target, options, "reference")
    assert torch.equal(first[0].loss, expected[0].loss)
    assert torch.equal(first[1], expected[1])


@each_bonus
def test_fast_options_warn_of_nothing(bonus, caplog):
    """The smoothing occurs in no other test, because a warning is logged once."""
    logits, target = random_batch(2, 9)
    loss_terms(logits, target, options_of(bonus, 0.123))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("native: " in warning for warning in warnings) and bool(warnings) == bool(native.unavailable())


def test_an_explicit_gpu_backend_falls_back_to_chunked_first():
    assert functional._candidates("triton", "cuda", torch.float32) == ["triton", "chunked", "reference"]


def test_chunked_computes_no_gradient_that_nobody_asked_for(monkeypatch):
    logits, target = random_batch(6, 9)
    logits.requires_grad_()
    monkeypatch.setattr(chunked, "_new_gradient", None)
    with torch.no_grad():
        loss_terms(logits, target, LossOptions(), backend="chunked")
    with pytest.raises(TypeError):
        loss_terms(logits, target, LossOptions(), backend="chunked")


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_the_first_call_may_be_in_inference_mode(backend):
    """The exponent occurs in no other test, because a bonus is checked in its first call."""
    options = options_of({"bonus": "power", "bonus_exponent": 2.03})
    logits, target = random_batch(3, 9)
    with torch.inference_mode():
        value = loss_terms(logits, target, options, backend=backend).loss
    torch.testing.assert_close(value, loss_terms(logits, target, options, backend="reference").loss)


def test_auto_takes_a_fast_backend():
    """Only the fast backends detach nll_loss."""
    logits, target = random_batch(2, 9)
    logits.requires_grad_()
    assert not loss_terms(logits, target, LossOptions()).nll_loss.requires_grad
    assert loss_terms(logits, target, LossOptions(), backend="reference").nll_loss.requires_grad


def test_unknown_backend():
    logits, target = random_batch(2, 9)
    with pytest.raises(ValueError, match="backend.*reference.*chunked.*quick"):
        loss_terms(logits, target, LossOptions(), backend="quick")


# Confident predictions


def test_the_confident_batch_has_probabilities_near_one():
    logits, target = confident_batch(12, 50, torch.float64)
    p = logits.softmax(dim=1)
    assert (1 - p[::2].gather(1, target[::2, None])).flatten().tolist() == pytest.approx(RESTS, rel=1e-6)
    assert (1 - p[1::2].max(dim=1).values).tolist() == pytest.approx(RESTS, rel=1e-6)
    assert not p[1::2].argmax(dim=1).eq(target[1::2]).any()


@each_backend
@each_smoothing
@pytest.mark.parametrize(
    "bonus", [{"bonus": "log", "log_end": 0.0}, {"bonus": "log", "log_end": 0.9}, *BONUSES], ids=name_of
)
def test_confident(bonus, smoothing, backend):
    for vocabulary in (3, 1000):
        logits, target = confident_batch(12, vocabulary)
        assert_right(logits, target, options_of(bonus, smoothing), backend)


@pytest.mark.parametrize("backend", sorted(set(STEPS) - {"reference"}))
def test_small_gradients_keep_their_digits(backend):
    """Without smoothing the gradient is (1 - p) a(p), as small as 1e-9: it is right to 1e-5 of itself, not of 1.

    (Not in the reference backend: log_softmax forms p - 1, as for cross entropy.)
    """
    for log_end in (0.25, 0.5, 0.75, 0.9, 1.0):
        logits, target = confident_batch(12, 1000)
        options = LossOptions(log_end=log_end)
        _, gradient = terms_and_gradient(logits, target, options, backend)
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
        ({"bonus": "none"}, 0.9),
        ({"log_end": 0.25}, 0.953),
        ({"log_end": 0.5}, 0.964),
        ({"log_end": 0.75}, 0.978),
        ({"log_end": 1.0}, 0.99999),
    ],
)
def test_the_minimum_of_the_smoothed_loss(options, best):
    """The p of the target at which it is, with the 5,904 types of Multi30k; at log_end 1 only the floor stops it."""
    rest = torch.logspace(-7, -0.5, 400, dtype=torch.float64)
    logits = (rest / 5903).log()[:, None].repeat(1, 5904)
    logits[:, 3] = (1 - rest).log()
    options = LossOptions(**options, label_smoothing=0.1, smoothing_convention="fairseq")
    terms = loss_terms(logits, torch.full((400,), 3), options, reduce=False, backend="reference")
    assert 1 - rest[terms.loss.argmin()].item() == pytest.approx(best, abs=0.005 if best < 0.99 else 1e-6)
