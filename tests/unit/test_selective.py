"""Check selective translation on rankings with known areas, and calibration on confidence of known correctness."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from samples import corrupt, draw_references

from encourage_mt.evaluation import significance
from encourage_mt.evaluation.confidence import SCORES, SetConfidence
from encourage_mt.evaluation.lengths import bleu, count
from encourage_mt.evaluation.selective import AREAS, COVERAGE, SelectiveRun, compare_selective

COUNT = 100
ABOVE = AREAS.index("area above all, mean log-probability")


def a_run(statistics, ranking, pieces=None):
    """A run whose every score is `ranking`; pieces: (probability, correct) of each sentence."""
    probability, correct = pieces or ([[0.5]] * len(ranking), [[True]] * len(ranking))
    scores = dict.fromkeys(SCORES, [float(value) for value in ranking])
    return SelectiveRun(statistics, SetConfidence(scores=scores, probability=probability, correct=correct))


def texts(rng, count=COUNT):
    """Return references, and a translation whose first half is perfect and whose second half is half wrong."""
    references = draw_references(rng, count)
    return references, references[: count // 2] + corrupt(rng, references[count // 2 :], 0.5)


def test_bleu_of_sums_is_sacrebleus():
    rng = np.random.default_rng(1)
    references, translations = texts(rng)
    for chosen in (slice(None), slice(50, 60), slice(50, 51), slice(0, 3)):
        lines, wanted = translations[chosen], references[chosen]
        sums = np.array(count(lines, wanted, BLEU()), dtype=float).sum(axis=0)
        assert bleu(sums) == pytest.approx(BLEU().corpus_score(lines, [wanted]).score, abs=1e-9)
    wanted = ["w1 w2 w3 w4 w5", "w1"]
    for lines in (["w1 x y z", ""], ["w1 w2 w3", "w1"], ["x y z x y z", "z"], ["", ""]):  # without 4-grams, matches
        sums = np.array(count(lines, wanted, BLEU()), dtype=float).sum(axis=0)
        assert bleu(sums) == pytest.approx(BLEU().corpus_score(lines, [wanted]).score, abs=1e-9)


def test_a_perfect_ranking_gains_a_random_one_does_not_and_a_reversed_one_loses():
    rng = np.random.default_rng(2)
    references, translations = texts(rng)
    statistics = np.array(count(translations, references, BLEU()), dtype=float)
    everything = np.arange(COUNT)[None]
    perfect = a_run(statistics, -np.arange(COUNT))
    curve = perfect.curves(everything)[0, 0]
    assert len(curve) == len(COVERAGE) and curve[:10] == pytest.approx(100), "the first half is perfect"
    kept = [references[:60]]
    assert curve[11] == pytest.approx(BLEU().corpus_score(translations[:60], kept).score), "60% of the sentences"
    whole = BLEU().corpus_score(translations, [references]).score
    assert curve[-1] == pytest.approx(whole)
    areas = perfect.areas(everything)[0]
    assert areas[0] == pytest.approx(curve.mean()) and areas[ABOVE] == pytest.approx(curve.mean() - whole)
    random = [a_run(statistics, rng.random(COUNT)).areas(everything)[0, ABOVE] for _ in range(200)]
    assert abs(np.mean(random)) < 1 and np.std(random) > 1
    assert a_run(statistics, np.arange(COUNT)).areas(everything)[0, ABOVE] < -10


def test_a_better_ranking_is_found_and_equal_ones_differ_at_the_nominal_rate(monkeypatch):
    monkeypatch.setattr(significance, "SAMPLES", 500)
    rng = np.random.default_rng(3)
    p = []
    for _ in range(20):
        references = draw_references(rng, 40)
        quality = rng.random(40)

        def noisy(noise, references=references, quality=quality):
            lines = [corrupt(rng, [line], 0.7 * (1 - q))[0] for line, q in zip(references, quality, strict=True)]
            statistics = np.array(count(lines, references, BLEU()), dtype=float)
            return a_run(statistics, quality + noise * rng.normal(size=40))

        found = compare_selective({"test": [{1: noisy(0.5)}, {1: noisy(0.5)}]})["test"]
        p.append(found[ABOVE].bootstrap_p)
    assert (np.array(p) < 0.05).mean() < 0.15 and 0.3 < (np.array(p) < 0.5).mean() < 0.7
    better = compare_selective({"test": [{1: noisy(9.0)}, {1: noisy(0.0)}]})["test"][ABOVE]
    assert better.gain > 5 and better.bootstrap_p < 0.05 and better.bootstrap_interval[0] > 0


def calibrated(rng, power, count=300):
    """Pieces that are correct with probability p ** power, for confidence p."""
    probability = [rng.uniform(0.2, 1, rng.integers(4, 9)) for _ in range(count)]
    correct = [(rng.random(len(p)) < p**power).tolist() for p in probability]
    return [p.tolist() for p in probability], correct


def test_confidence_that_is_right_as_often_as_it_says_has_the_lower_calibration_error():
    rng = np.random.default_rng(5)
    statistics = np.ones((300, 10))
    sides = [{1: a_run(statistics, range(300), calibrated(rng, power))} for power in (2, 1)]
    pieces, sentences = compare_selective({"test": sides})["test"][-2:]
    assert pieces.candidate[1] < 5 < 15 < pieces.baseline[1]
    for found in (pieces, sentences):
        assert found.gain == pytest.approx(found.baseline[1] - found.candidate[1]), "a lower error is a gain"
        assert found.gain > 0 and found.bootstrap_p < 0.01 and found.bootstrap_interval[0] > 0
    of_pieces, of_sentences = sides[1][1].calibration()
    assert of_pieces["error"] == pytest.approx(pieces.candidate[1] / 100)
    assert of_sentences["error"] == pytest.approx(sentences.candidate[1] / 100) and sum(of_sentences["tokens"]) == 300


def test_an_empty_translation_has_no_pieces_to_calibrate():
    run = a_run(np.ones((2, 10)), [1, 2], ([[], [0.75]], [[], [True]]))
    assert run.calibration_errors()(np.array([[0, 1], [1, 1]])).tolist() == [[25, 25], [25, 25]]


def test_sentences_of_equal_confidence_count_in_part_whatever_their_order():
    rng = np.random.default_rng(6)
    references, translations = texts(rng)
    statistics = np.array(count(translations, references, BLEU()), dtype=float)
    drawn = np.stack([np.arange(COUNT), rng.integers(COUNT, size=COUNT)])
    assert np.ptp(a_run(statistics, np.zeros(COUNT)).curves(drawn), axis=2).max() < 1e-3
    ranking, order = np.arange(COUNT) // 30, rng.permutation(COUNT)
    position = np.argsort(order)
    areas = [a_run(statistics, ranking).areas(drawn), a_run(statistics[order], ranking[order]).areas(position[drawn])]
    assert areas[0] == pytest.approx(areas[1], abs=1e-3)
    curve = a_run(statistics, ranking).curves(drawn[:1])[0, 0]  # 10 sentences, then 30 at a time
    for coverage, least in ((1, 90), (7, 60)):  # 10% and 40%
        assert curve[coverage] == pytest.approx(bleu(statistics[least:].sum(axis=0)), abs=1e-3)
    half = statistics[90:].sum(axis=0) + statistics[60:90].sum(axis=0) / 2
    assert curve[4] == pytest.approx(bleu(half), abs=1e-3), "25% are 10 sentences and half of the next 30"


def test_coverage_rounds_up_without_errors_of_floats():
    statistics = np.array(count(*[draw_references(np.random.default_rng(7), COUNT)] * 2, BLEU()), dtype=float)
    statistics[55:, :4] = 0
    assert a_run(statistics, -np.arange(COUNT)).curves(np.arange(COUNT)[None])[0, 0, 10] == pytest.approx(100), "of 55"


def test_few_sentences_have_a_curve_of_steps():
    references = ["w1 w2 w3 w4 w5", "w6 w7 w8 w9", "w1 w2 w3 w4"]
    translations = [*references[:2], "x y z"]
    run = a_run(np.array(count(translations, references, BLEU()), dtype=float), [3, 2, 1])
    curve = run.curves(np.arange(3)[None])[0, 0]
    assert curve[:13] == pytest.approx(100) and curve[13:] == pytest.approx(curve[-1]) and curve[-1] < 90
