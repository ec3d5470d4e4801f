"""The loss against the paper's values, a double loop in pure Python, finite differences and float64."""

import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from loss_cases import (
    BONUSES,
    EPS32,
    PAD,
    RESTS,
    STEPS,
    assert_agrees,
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

from encourage_mt.loss import chunked, reference
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
    """Three cases at log-end 1 have a target at 1 - p = 2.3e-5, of which a rounding step of p (6e-8) is 0.26 %."""
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
    """Two ways to the same gradient, finer than finite differences see: 1e-13 is some 100 rounding steps."""
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
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


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


def test_confident_batch_is_confident():
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
def test_where_the_smoothed_loss_is_least(options, best):
    """The p of the target at which it is, with the 5,904 types of Multi30k; at log_end 1 only the floor stops it."""
    rest = torch.logspace(-7, -0.5, 400, dtype=torch.float64)
    logits = (rest / 5903).log()[:, None].repeat(1, 5904)
    logits[:, 3] = (1 - rest).log()
    options = LossOptions(**options, label_smoothing=0.1, smoothing_convention="fairseq")
    terms = loss_terms(logits, torch.full((400,), 3), options, reduce=False, backend="reference")
    assert 1 - rest[terms.loss.argmin()].item() == pytest.approx(best, abs=0.005 if best < 0.99 else 1e-6)


# Vocabularies


@each_backend
@pytest.mark.parametrize("vocabulary", [2, 3, 5, 63, 64, 65, 128, 200, 1000])
def test_vocabulary(vocabulary, backend):
    """Whole and broken groups of 64 types."""
    logits, target = random_batch(20, vocabulary)
    for bonus in BONUSES:
        assert_right(logits, target, options_of(bonus, bonus_weight=1.3), backend)


@each_backend
@pytest.mark.parametrize("bonus", [{"bonus": "log"}, {"bonus": "cosine"}], ids=name_of)
def test_many_rows(bonus, backend):
    """More than a block of them, and a block that is not full; with and without gradient the same values."""
    logits, target = random_batch(1200, 1000)
    assert chunked.BLOCK_ELEMENTS // 1000 < 1200
    outcome = assert_right(logits, target, options_of(bonus), backend)
    validation = loss_terms(logits, target, options_of(bonus), reduce=False, backend=backend)
    assert not validation.loss.requires_grad
    assert torch.equal(torch.stack(validation), torch.stack(outcome[0]))


@each_backend
@each_bonus
def test_large_vocabulary(bonus, backend):
    """From all types alike to a few that share all mass: few, some and many p above what chunked takes for small."""
    for spread in (0.0, 1.0, 2.0, 4.0):
        logits, target = random_batch(3, 9001, spread=spread)
        logits[1, 9000] = logits[1].max()  # a tie of the top, its second type in the broken last group
        assert_right(logits, target, options_of(bonus, bonus_weight=2.0), backend)


@each_backend
def test_small_bonus_start(backend):
    """Many types lie between the start and the p up to which chunked takes the linear form."""
    logits, target = random_batch(3, 9001, spread=2.0)
    assert_right(logits, target, LossOptions(bonus_start=1e-4, bonus_weight=2.0, label_smoothing=0.1), backend)


# Extreme and broken logits


@each_backend
@each_smoothing
@each_bonus
def test_large_logits(bonus, smoothing, backend):
    """Differences of 1e4 and 2e4 underflow every exponential, and the loss stays finite and right."""
    logits = 1e4 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, 1.0, -1.0, 0.0], [-1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    _, gradient = assert_right(logits, torch.tensor([0, 2, 3, 1]), options_of(bonus, smoothing), backend)
    assert torch.isfinite(gradient).all()


@each_backend
@each_smoothing
def test_ties(smoothing, backend):
    """Types that share the top logit get the same gradient, whichever is taken for the top."""
    logits = torch.zeros(3, 70)
    logits[1:, [3, 68]] = 9.0  # in different groups
    _, gradient = assert_right(logits, torch.tensor([0, 3, 5]), options_of({"bonus": "log"}, smoothing), backend)
    torch.testing.assert_close(gradient[0, 1:], gradient[0, 1].expand(69), atol=4 * EPS32, rtol=0)
    torch.testing.assert_close(gradient[2, 3], gradient[2, 68], atol=4 * EPS32, rtol=0)


@each_backend
@each_smoothing
def test_few_rows(smoothing, backend):
    """One row, none, and pads only."""
    options = LossOptions(label_smoothing=smoothing)
    assert_right(*random_batch(1, 33), options, backend)
    for logits, target in (
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)),
        (random_batch(4, 9)[0], torch.full((4,), PAD)),
    ):
        terms, gradient = terms_and_gradient(logits, target, options, backend, ignore_index=PAD)
        assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
        assert gradient.shape == logits.shape and not gradient.any()


@each_backend
@each_smoothing
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_is_nan_throughout(bad, smoothing, backend):
    """A training must notice: loss and gradient of the row are NaN (fairseq looks at the gradient); others stay."""
    options = LossOptions(label_smoothing=smoothing)
    for column in (0, 3, 64, 69):
        logits, _ = random_batch(3, 70)
        logits[1, column] = bad
        if bad == -math.inf:
            logits[1] = bad
        for reduce in (True, False):
            terms, gradient = terms_and_gradient(logits, torch.tensor([0, 3, 5]), options, backend, reduce=reduce)
            assert terms.loss.isnan().any() and terms.nll_loss.isnan().any()
            assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@each_backend
@each_bonus
def test_masked_types(bonus, backend):
    """Types at -inf, a model's way to forbid them, are as good as absent; only smoothing asks for their p."""
    logits, target = random_batch(4, 200)
    allowed = torch.arange(200) % 3 != 1
    allowed[64:128] = False  # a whole group
    allowed[target] = True
    masked = logits.masked_fill(~allowed, -math.inf)
    terms, gradient = terms_and_gradient(masked, target, LossOptions(**bonus), backend, reduce=False)
    position = allowed.cumsum(0) - 1
    without = in_float64(logits[:, allowed], position[target], LossOptions(**bonus), reduce=False)
    assert_agrees((terms, gradient[:, allowed]), without, backend)
    assert torch.equal(gradient[:, ~allowed], torch.zeros_like(gradient[:, ~allowed]))


@each_backend
def test_strided_logits(backend):
    """Logits of any memory layout give the same values and are left as they were."""
    logits, target = random_batch(5, 70)
    options = LossOptions(label_smoothing=0.1)
    expected = terms_and_gradient(logits, target, options, backend)
    transposed = logits.t().contiguous().t()
    gaps = torch.stack([logits, -logits], dim=2).flatten(1)[:, ::2]
    for strided in (transposed, gaps):
        assert not strided.is_contiguous()
        terms, gradient = terms_and_gradient(strided, target, options, backend)
        torch.testing.assert_close(torch.stack(terms), torch.stack(expected[0]), atol=0, rtol=8 * EPS32)
        torch.testing.assert_close(gradient, expected[1], atol=8 * EPS32, rtol=0)
        assert torch.equal(strided, logits)


@pytest.mark.parametrize(
    ("logits", "target"),
    [((6,), (6,)), ((2, 3, 4), (2, 3)), ((6, 4), (5,)), ((6, 4), (6, 1)), ((6, 4), ()), ((6, 1), (6,)), ((6, 0), (6,))],
)
def test_wrong_shapes(logits, target):
    with pytest.raises(ValueError, match="types|expected logits"):
        loss_terms(torch.zeros(logits), torch.zeros(target, dtype=torch.long), LossOptions())


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
@each_bonus
def test_half_types(bonus, batch, dtype, backend):
    """Nothing is rounded to the half type but the gradient, once, after the loss scale.

    So its error is half a step of the half type (of its subnormals too), besides that of float32: some steps of p + q,
    the terms it is the difference of. Rounded before scaling, the .1 / 2499 that a type gets would be off by 0.05 %.
    """
    logits, target = batch(12, 2500, dtype=dtype)
    scale = 2.0**15
    options = options_of(bonus, smoothing_convention="fairseq")
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
def test_padding_changes_nothing(smoothing, backend):
    """Rows are independent; only the order in which a sum is taken may differ, by a few steps of float32."""
    logits, target = random_batch(8, 70)
    target[target == PAD] = 2
    options = LossOptions(label_smoothing=smoothing)
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
@each_bonus
def test_terms_add_up(bonus, backend):
    """With reduce, each is the sum over tokens; loss - bonus is cross entropy; nll_loss is plain likelihood."""
    logits, target = random_batch(9, 70, dtype=torch.float64)
    options = options_of(bonus, bonus_weight=0.6)
    terms, gradient = terms_and_gradient(logits, target, options, backend, PAD)
    each, gradient_of_each = terms_and_gradient(logits, target, options, backend, PAD, reduce=False)
    assert all(term.shape == (9,) for term in each)
    torch.testing.assert_close(torch.stack([term.sum() for term in each]), torch.stack(terms), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of_each, gradient, atol=1e-14, rtol=0)
    plain = loss_terms(logits, target, options_of({"bonus": "none"}), PAD, False, backend)
    torch.testing.assert_close(each.loss - each.bonus, plain.loss, atol=1e-12, rtol=0)
    assert not plain.bonus.any()
    kept = target != PAD
    nll_loss = -logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(each.nll_loss[kept], nll_loss[kept])


@each_backend
def test_without_weight_there_is_no_bonus(backend):
    """As in updates before a deferred bonus: bit for bit what bonus none gives."""
    logits, target = random_batch(6, 70)
    without, gradient = terms_and_gradient(logits, target, LossOptions(bonus_weight=0.0), backend)
    expected, expected_gradient = terms_and_gradient(logits, target, LossOptions(bonus="none"), backend)
    assert all(map(torch.equal, without, expected)) and torch.equal(gradient, expected_gradient)


@each_backend
def test_upstream_gradient(backend):
    """The gradient of a token is its own, times the upstream one: one factor, or one per token."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    options = LossOptions(label_smoothing=0.1)
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
    """The second gradient of a retained graph is the first, even where the first was overwritten by its owner.

    Once the graph is freed, torch's usual error is raised.
    """
    logits, target = random_batch(6, 9)
    logits.requires_grad_()
    loss = scale * loss_terms(logits, target, LossOptions(label_smoothing=0.1), PAD, reduce, backend).loss.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


@each_backend
def test_double_backward_is_right_or_refused(backend):
    """A gradient penalty is never dropped without a word."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    logits.requires_grad_()

    def penalty(z):
        loss = loss_terms(z, target, LossOptions(label_smoothing=0.1), backend=backend).loss
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        return gradient.pow(2).sum()

    if backend == "reference":
        assert torch.autograd.gradcheck(penalty, logits)
    else:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            penalty(logits)


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


# Memory that the chunked backend keeps


def test_memory_kept_for_the_gradient_is_never_shared():
    """Gradients that are alive at once lie apart, whatever is freed in between; only then is a buffer taken again."""
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
    addresses = {second.data_ptr(), third.data_ptr()}
    del second, third
    assert gradient(logits).data_ptr() in addresses
    assert torch.equal(view, kept[3:5])


def test_memory_kept_is_not_shared_with_forked_processes():
    """A child writes a gradient of its own at the same address; the parent's stays as it was."""
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
