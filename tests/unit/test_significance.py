"""Compare t-tests with closed forms and tables; count false alarms; test sacreBLEU's paired tests."""

import functools
import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from samples import corrupt, draw_references
from scipy import stats

from encourage_mt.evaluation import scoring, significance
from encourage_mt.evaluation.formatting import escape, format_mean, format_p, markdown_table
from encourage_mt.evaluation.lengths import bleu, count
from encourage_mt.evaluation.significance import MetricComparison, holm, paired_tests, seeds_needed, sentences_needed

# --- over seeds


def compared(baseline, candidate, metric="sacreBLEU", first=1):
    """Seeds 1, 2, ... on the side of the baseline, `first`, ... on that of the candidate."""
    return MetricComparison(metric, dict(enumerate(baseline, 1)), dict(enumerate(candidate, first)))


def test_matching_seeds_get_the_paired_t_test():
    result = compared([30.0, 31.0, 29.0], [30.5, 32.5, 30.0])  # gains 0.5, 1.5, 1.0
    t = 1.0 / (0.5 / math.sqrt(3))
    assert result.gain == pytest.approx(1.0) and result.test == "paired t-test over 3 seeds"
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form of Student's t, 2 degrees of freedom
    half = 4.302653 * 0.5 / math.sqrt(3)  # t table, 0.975, 2 degrees of freedom
    assert result.interval == pytest.approx((1 - half, 1 + half), abs=1e-6)


def test_two_matching_seeds_have_one_degree_of_freedom():
    result = compared([30.0, 30.0], [31.0, 33.0])
    assert result.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert result.interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)


def test_seeds_that_do_not_match_get_welchs_test():
    result = compared([30.0, 30.0], [31.0, 33.0], first=7)  # one variance 0: 1 degree of freedom, standard error 1
    assert result.test == "Welch's t-test, 2 against 2 seeds"
    assert result.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert result.interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)
    equal = compared([29.0, 31.0], [32.0, 34.0], first=7)  # equal variances 2: 2 degrees of freedom, standard error √2
    t = 3 / math.sqrt(2)
    assert equal.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_seeds_that_match_in_part_are_compared_on_the_shared_ones():
    result = MetricComparison("sacreBLEU", {1: 30.0, 2: 31.0, 3: 90.0}, {1: 31.0, 2: 33.0, 4: 10.0})
    assert result.gain == pytest.approx(1.5) and result.test == "paired t-test over 2 seeds"


def test_a_lower_ter_is_better():
    result = compared([60.0, 61.0, 62.0], [57.0, 58.1, 58.9], metric="TER")
    assert result.gain == pytest.approx(3.0) and result.interval[0] > 0
    assert result.verdict("ce", "el").startswith("el is better than ce: +3.00 TER (reduction)")
    assert [row[4] for row in result.rows()][:3] == ["+3.00", "+2.90", "+3.10"]
    welch = compared([60.0, 61.0, 62.0], [57.0, 58.1, 58.9], metric="TER", first=11)
    assert welch.gain == pytest.approx(3.0)


@pytest.mark.parametrize(
    "effect, paired, independent", [(0.2, 199, 394), (0.5, 34, 64), (0.8, 15, 26), (1.0, 10, 17), (2.0, 5, 6)]
)
def test_seeds_needed_are_those_of_the_tables_of_power(effect, paired, independent):
    """Two-sided 5%, power 80%: Cohen 1988, tables 2.4.1 as G*Power refines them."""
    assert seeds_needed(effect, 1.0) == seeds_needed(-3 * effect, 3.0) == paired
    assert seeds_needed(effect, math.sqrt(2), groups=2) == independent


def test_seeds_needed_for_extreme_gains():
    assert seeds_needed(0.0, 1.0) is None and seeds_needed(0.01, 1.0) is None
    assert seeds_needed(1.0, 0.0) == 2 and seeds_needed(0.0, 0.0) is None
    assert seeds_needed(1000.0, 1.0) == seeds_needed(1e6, 1.0, groups=2) == 2
    # where scipy's noncentral t gives NaN for one side; a simulation has a power of 0.998 with 3 seeds
    assert seeds_needed(0.4, 0.06) == 3 and seeds_needed(0.4, 0.05, groups=2) == 2


def test_the_seeds_needed_give_80_percent_power(monkeypatch):
    count = seeds_needed(1.2, 1.0)
    monkeypatch.setattr(significance, "seeds_needed", lambda *arguments, **options: None)
    rng = np.random.default_rng(1)
    found = [compared(np.zeros(count), 1.2 + rng.standard_normal(count)).p < 0.05 for _ in range(500)]
    assert 0.75 < np.mean(found) < 0.92
    too_few = [compared(np.zeros(count - 1), 1.2 + rng.standard_normal(count - 1)).p < 0.05 for _ in range(500)]
    assert np.mean(too_few) < 0.84


@pytest.mark.parametrize("sizes, first", [((5, 5), 1), ((4, 6), 11)], ids=["paired", "Welch"])
def test_two_halves_of_one_system_differ_at_the_nominal_rate(sizes, first, monkeypatch):
    """1,000 draws of one system's seeds, divided between two sides: 5% false alarms, 95% of the intervals contain 0."""
    monkeypatch.setattr(significance, "seeds_needed", lambda *arguments, **options: None)
    rng = np.random.default_rng(sum(sizes) + first)
    alarms, held, better = 0, 0, 0
    for _ in range(1000):
        scores = 30 + 0.3 * rng.standard_normal(sum(sizes))
        result = compared(scores[: sizes[0]], scores[sizes[0] :], first=first)
        alarms += result.p < 0.05
        better += "better" in result.verdict("a", "b")
        held += result.interval[0] <= 0 <= result.interval[1]
    assert 30 <= alarms <= 70, "50 are expected, standard deviation 7"
    assert held == 1000 - alarms and 0.2 * alarms < better < 0.8 * alarms


def test_a_gain_larger_than_the_spread_is_significant_and_named():
    result = compared([30.0, 30.2, 29.9, 30.1, 30.0], [31.0, 31.1, 31.0, 31.0, 31.2])
    line = result.verdict("ce", "el")
    assert line.startswith("el is better than ce: +1.02 sacreBLEU (95% interval +") and "\n" not in line
    worse = compared([31.0, 31.1, 31.0], [30.0, 30.2, 29.9]).verdict("ce", "el")
    assert worse.startswith("el is worse than ce: -1.00 sacreBLEU (95% interval -")


def test_a_gain_within_the_spread_is_not_evidence_and_the_verdict_says_how_many_seeds_are_needed():
    result = compared([30.0, 31.0, 29.0], [31.0, 30.5, 30.0])  # gains 1, -0.5, 1: mean 0.5, deviation 0.866
    assert result.seeds_needed == seeds_needed(0.5, math.sqrt(0.75)) == 26
    line = result.verdict("ce", "el")
    assert line.startswith("Not enough evidence that el and ce differ: +0.50 sacreBLEU") and "\n" not in line
    assert "about 26 seeds per side would detect a gain of this size with 80% power" in line
    assert "more than 1,000 seeds" in compared([30.0, 31.0], [31.0, 30.0]).verdict("ce", "el")


def test_power_says_how_many_seeds_and_sentences_show_a_gain_of_0_4():
    result = compared([30.0, 31.0, 29.0], [31.0, 30.5, 30.0])  # the deviation of the gains is 0.866
    count = seeds_needed(0.4, math.sqrt(0.75))
    assert result.seeds_for_sought == count > result.seeds_needed
    seeds = f"about {count} seeds per side (with this spread)"
    assert result.power() == f"Detecting a gain of 0.4 sacreBLEU with 80% power needs {seeds}."
    result.sentences_for_sought = 8000
    assert result.power().endswith(f"needs {seeds}; about 8,000 test sentences (between two models of one seed).")
    single = compared([20.0], [40.0])
    assert single.power() == ""
    single.sentences_for_sought = 8000
    assert single.power().endswith("with 80% power needs about 8,000 test sentences (between two models of one seed).")
    assert compared([30.0, 31.0], [31.0, 32.5], metric="TER").seeds_for_sought is None


def test_the_sentences_needed_give_80_percent_power():
    rng, metric = np.random.default_rng(3), scoring.metrics("en")["sacreBLEU"]
    references = draw_references(rng, 400)
    first, second = corrupt(rng, references, 0.1), corrupt(rng, references, 0.1)
    needed = sentences_needed([first, second], references, metric)
    assert sentences_needed([first, first], references, metric) == 0
    # with twice the text, the error is 1/sqrt(2), and the number is about the same
    doubled = sentences_needed([first * 2, second * 2], references * 2, metric)
    assert doubled == pytest.approx(needed, rel=0.15)
    # the standard error of a test set of that size lets a normal test show the gain with 80% power
    statistics = [np.array(count(side, references, metric)) for side in (first, second)]
    drawn = np.array([np.bincount(rng.integers(400, size=needed), minlength=400) for _ in range(500)])
    error = np.std(bleu(drawn @ statistics[1]) - bleu(drawn @ statistics[0]))
    assert stats.norm.sf(stats.norm.ppf(0.975) - 0.4 / error) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("first", [1, 2])
def test_one_seed_is_never_enough(first):
    result = compared([20.0], [40.0], first=first)
    assert result.gain == 20 and result.p is result.interval is result.seeds_needed is None
    assert result.verdict("ce", "el").startswith("Not enough evidence: +20.00 sacreBLEU")
    if first == 1:
        assert result.rows() == [["sacreBLEU", "1", "20.00", "40.00", "+20.00", "", ""]], "no mean of a single seed"
    else:
        assert result.rows()[-1] == ["sacreBLEU", "mean", "20.00", "40.00", "+20.00", "", ""]


def test_equal_scores_on_both_sides_are_not_a_difference():
    result = compared([30.0, 31.0], [30.0, 31.0])
    assert (result.gain, result.p, result.interval) == (0.0, 1.0, (0.0, 0.0))
    assert result.verdict("ce", "el").startswith("Not enough evidence")


def test_the_table_has_a_row_for_each_seed_with_the_tests_and_the_mean():
    result = MetricComparison(
        "sacreBLEU", {1: 30.0, 2: 31.0, 5: 7.0}, {1: 30.5, 2: 32.0}, {1: {"bs": 0.25, "ar": 0.125}}
    )
    assert result.rows()[:3] == [
        ["sacreBLEU", "1", "30.00", "30.50", "+0.50", "0.250", "0.125"],
        ["sacreBLEU", "2", "31.00", "32.00", "+1.00", "", ""],
        ["sacreBLEU", "5", "7.00", "", "", "", ""],
    ]
    assert result.rows()[3][:4] == ["sacreBLEU", "mean", "30.50 ± 0.71", "31.25 ± 1.06"], "of the compared seeds"
    assert result.rows()[3][4].startswith("+0.75 [")


def test_equal_gains_are_no_evidence():
    """Accuracies of few examples often differ by the same number of them."""
    equal = compared([30.0, 31.0], [31.0, 32.0])
    assert equal.p is None and equal.interval is None and "Not enough evidence" in equal.verdict("ce", "el")
    for result in (equal, compared([30.0, 31.0], [30.0, 31.0])):
        assert "the same gain" in result.verdict("ce", "el") and result.power() == "", "the spread is unknown"


def test_a_p_value_is_never_printed_as_zero():
    tiny = MetricComparison("sacreBLEU", {1: 30.0}, {1: 31.0}, {1: {"bs": 0.0004, "ar": 0.0}})
    assert tiny.rows()[0][5:] == ["< 0.001", "< 0.001"]
    assert [format_p(p) for p in (None, 0.0, 0.00099, 0.001, 0.0499, 1.0)] == [
        *("", "< 0.001", "< 0.001", "0.001", "0.050", "1.000")
    ]


# --- over sentences


@pytest.fixture
def quick(monkeypatch):
    """Run sacreBLEU's tests with 199 samples instead of 1,000 and 10,000."""
    monkeypatch.setattr(significance, "PairedTest", functools.partial(PairedTest, n_samples=199))


def test_two_metrics_of_one_kind_are_both_tested(quick, monkeypatch):
    """A table of sacreBLEU has one column for both."""
    kinds = {"sacreBLEU": BLEU(), "BLEU of characters": BLEU(tokenize="char")}
    monkeypatch.setattr(significance.scoring, "metrics", lambda *_: kinds)
    references = draw_references(np.random.default_rng(5), 20)
    tested = paired_tests(references, [line[::-1] for line in references], references, "en", False)
    assert list(tested) == list(kinds) and len({second for _, second, _ in tested.values()}) == 2


def test_translations_that_hardly_differ_are_not_significant(quick):
    rng = np.random.default_rng(4)
    references = draw_references(rng, 20)
    lines = corrupt(rng, references, 0.3)
    for metric, (first, second, p) in paired_tests(lines, lines, references, "en", False).items():
        assert first == second and p == {"bs": 1.0, "ar": 1.0}, metric
    one = paired_tests(lines, [references[0], *lines[1:]], references, "en", False)
    three = paired_tests(lines, [*references[:3], *lines[3:]], references, "en", False)
    for metric in ("sacreBLEU", "chrF++", "TER"):
        assert one[metric][2] == {"bs": 1.0, "ar": 1.0}, "one sentence: both exchanges are as large"
        assert min(three[metric][2].values()) >= 0.25, "three sentences: 2 of 8 exchanges are as large"
    equally_bad = [f"{line} zzz" for line in [*references[:3], *lines[3:]]]
    other = paired_tests([f"{line} yyy" for line in lines], equally_bad, references, "en", False)
    for metric in ("sacreBLEU", "chrF++", "TER"):
        assert min(other[metric][2].values()) >= 0.25, "the other sentences differ, but their statistics do not"


# --- text


def test_a_cell_with_markup_is_shown_as_it_is_and_stays_in_its_cell():
    table = markdown_table(["arm", "score"], [["a|b", "1.00"], ["<b>`x`</b>\n*y* [z](http://w)", "37.20"]])
    rows = table.splitlines()
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1, "columns are aligned"
    assert rows[2].startswith(r"| a\|b ")
    assert rows[3].startswith(r"| \<b>\`x\`\</b> \*y\* [z\](http://w) ")
    for plain in ("ce_ls000", "p > 0.5", "< 0.001", "+0.47 [-1.14, +2.08]", "31.00 ± 1.00", "R & D"):
        assert escape(plain) == plain


def test_a_mean_has_its_standard_deviation_if_there_is_one():
    assert format_mean([30.0, 31.0, 32.0]) == "31.00 ± 1.00"
    assert format_mean(iter([0.5]), 3) == "0.500"


# --- several comparisons


def test_the_correction_names_the_comparisons_without_p_over_seeds():
    pair, single = ({seed: float(seed) for seed in range(count)} for count in (2, 1))
    tested, other = MetricComparison("a", pair, {0: 3.0, 1: 5.0}), MetricComparison("b", single, single)
    text = significance.describe_correction([tested, other, other])
    assert "corrected for all 3 (Holm 1979), except p over seeds, for the 1 that have one;" in text
    assert "that have one" not in significance.describe_correction([tested]) + significance.describe_correction([other])


def test_more_comparisons_than_the_bootstrap_can_show_are_announced():
    one = MetricComparison("a", {1: 1.0}, {1: 2.0}, bootstrap_p=0.5)
    assert "choose fewer" not in significance.describe_correction([one] * 250)
    assert "none over sentences can be below 0.050: choose fewer" in significance.describe_correction([one] * 251)


def test_holm_corrects_for_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand: 3 x 0.01, 2 x 0.03, and no less
    assert holm([0.5, None, 0.001, 0.9]) == [1.0, None, 0.003, 1.0]
    assert holm([None]) == [None] and holm([]) == []


def test_one_in_twenty_families_of_tests_has_a_false_alarm_after_the_correction():
    rng = np.random.default_rng(8)
    alarms = [min(holm(rng.random(20).tolist())) < 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(alarms) < 0.065
