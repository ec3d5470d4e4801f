"""Comparison of runs: t-tests against closed forms, false alarms over many draws, planted differences, refusals."""

import functools
import json
import math
from argparse import Namespace
from copy import deepcopy

import numpy as np
import pytest
from conftest import refused
from sacrebleu.metrics import BLEU

from encourage_mt.errors import UserError
from encourage_mt.evaluation import comparison, scoring
from encourage_mt.evaluation.comparison import Seeds, compare, differences, paired_tests, seeds_needed
from encourage_mt.files import write_json
from encourage_mt.training.run_folder import open_run, training_settings

WORDS = np.array([f"w{number}" for number in range(300)])


def draw_references(rng, count):
    return [" ".join(rng.choice(WORDS, rng.integers(6, 16))) for _ in range(count)]


def corrupt(rng, references, rate):
    """A system that gets each word wrong with probability `rate`."""
    lines = [np.array(line.split()) for line in references]
    return [" ".join(np.where(rng.random(len(w)) < rate, rng.choice(WORDS, len(w)), w)) for w in lines]


EVALUATION = {"average": 10, "beam": 5, "lenpen": 1.0, "comet": None, "data_sha256": "d" * 64}
TRAINING = {"tokens per update": 4000, "updates": 500, "max_update": 500, "lr": [0.002], "dropout": 0.2}
CRITERIA = {
    "ce": {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1},
    "el": {"_name": "label_smoothed_encouraging_loss", "label_smoothing": 0.1, "log_end": 0.5},
}


class Bench:
    """A folder of prepared data and of runs that were never trained but have translations and scores.json."""

    def __init__(self, folder, references):
        self.folder, self.references = folder, references
        self.data = folder / "data"
        (self.data / "text").mkdir(parents=True)
        self.write(self.data / "text" / "test.en", references)
        text = {"source": "de", "target": "en", "tests": ["test"], "lowercase": False}
        write_json(self.data / "manifest.json", {"text": text, "checksums": {}})

    @staticmethod
    def write(path, lines):
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def run(self, arm, seed, hypotheses, work="", **changes):
        folder = self.folder / work / f"{arm}.seed{seed}"
        folder.mkdir(parents=True)
        self.write(folder / "test.en", hypotheses)
        record = {"recipe": "r", "arm": arm, "seed": seed, "data": str(self.data), "command": "c"}
        how = {"average": 10, "beam": 5, "lenpen": 1.0, "precision": "fp32", "provenance": {}}
        write_json(folder / "run.json", {**record, **how})
        result = {
            **record,
            "scores": {"test": scoring.score(hypotheses, self.references, "en")},
            "evaluation": EVALUATION,
            "training": TRAINING,
            "criterion": CRITERIA[arm],
        }
        result = deepcopy(result)
        for path, value in changes.items():
            section, name = path.split("__")
            result[section][name] = value
        write_json(folder / "scores.json", result)
        return open_run(folder)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, draw_references(np.random.default_rng(5), 20))


@pytest.fixture
def quick(monkeypatch):
    """sacreBLEU's tests with 199 samples, not 1,000 and 10,000."""
    monkeypatch.setattr(comparison, "PairedTest", functools.partial(comparison.PairedTest, n_samples=199))


# --- over seeds


def as_seeds(baseline, candidate, metric="sacreBLEU", first=1):
    """Seeds 1, 2, ... on the side of the baseline, `first`, ... on that of the candidate."""
    return Seeds(metric, dict(enumerate(baseline, 1)), dict(enumerate(candidate, first)))


def test_matching_seeds_get_the_paired_t_test():
    result = as_seeds([30.0, 31.0, 29.0], [30.5, 32.5, 30.0])  # gains 0.5, 1.5, 1.0
    t = 1.0 / (0.5 / math.sqrt(3))
    assert result.gain == pytest.approx(1.0) and result.test == "paired t-test over 3 seeds"
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form of Student's t, 2 degrees of freedom
    half = 4.302653 * 0.5 / math.sqrt(3)  # t table, 0.975, 2 degrees of freedom
    assert result.interval == pytest.approx((1 - half, 1 + half), abs=1e-6)


def test_two_matching_seeds_have_one_degree_of_freedom():
    result = as_seeds([30.0, 30.0], [31.0, 33.0])
    assert result.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert result.interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)


def test_seeds_that_do_not_match_get_welchs_test():
    result = as_seeds([30.0, 30.0], [31.0, 33.0], first=7)  # one variance 0: 1 degree of freedom, standard error 1
    assert result.test == "Welch's t-test, 2 against 2 seeds"
    assert result.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert result.interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)
    equal = as_seeds([29.0, 31.0], [32.0, 34.0], first=7)  # equal variances 2: 2 degrees of freedom, standard error √2
    t = 3 / math.sqrt(2)
    assert equal.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_seeds_of_which_some_match_are_compared_on_those():
    result = Seeds("sacreBLEU", {1: 30.0, 2: 31.0, 3: 90.0}, {1: 31.0, 2: 33.0, 4: 10.0})
    assert result.gain == pytest.approx(1.5) and result.test == "paired t-test over 2 seeds"


def test_of_ter_less_is_better():
    result = as_seeds([60.0, 61.0, 62.0], [57.0, 58.1, 58.9], metric="TER")
    assert result.gain == pytest.approx(3.0) and result.interval[0] > 0
    assert result.verdict("ce", "el").startswith("el is better than ce: +3.00 TER (reduction)")
    assert [row[4] for row in result.rows()][:3] == ["+3.00", "+2.90", "+3.10"]
    welch = as_seeds([60.0, 61.0, 62.0], [57.0, 58.1, 58.9], metric="TER", first=11)
    assert welch.gain == pytest.approx(3.0)


@pytest.mark.parametrize(
    "effect, paired, independent", [(0.2, 199, 394), (0.5, 34, 64), (0.8, 15, 26), (1.0, 10, 17), (2.0, 5, 6)]
)
def test_seeds_needed_are_those_of_the_tables_of_power(effect, paired, independent):
    """Two-sided 5%, power 80%: Cohen 1988, tables 2.4.1 as G*Power refines them."""
    assert seeds_needed(effect, 1.0) == seeds_needed(-3 * effect, 3.0) == paired
    assert seeds_needed(effect, math.sqrt(2), groups=2) == independent


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0.0, 1.0) is None and seeds_needed(0.01, 1.0) is None
    assert seeds_needed(1.0, 0.0) == 2 and seeds_needed(0.0, 0.0) is None
    assert seeds_needed(1000.0, 1.0) == seeds_needed(1e6, 1.0, groups=2) == 2


def test_so_many_seeds_do_find_it_four_times_in_five(monkeypatch):
    count = seeds_needed(1.2, 1.0)
    monkeypatch.setattr(comparison, "seeds_needed", lambda *arguments, **options: None)
    rng = np.random.default_rng(1)
    found = [as_seeds(np.zeros(count), 1.2 + rng.standard_normal(count)).p < 0.05 for _ in range(1000)]
    assert 0.77 < np.mean(found) < 0.90
    too_few = [as_seeds(np.zeros(count - 1), 1.2 + rng.standard_normal(count - 1)).p < 0.05 for _ in range(1000)]
    assert np.mean(too_few) < 0.83


@pytest.mark.parametrize("sizes, first", [((5, 5), 1), ((2, 2), 1), ((5, 5), 11), ((4, 6), 11)])
def test_two_halves_of_one_system_differ_at_the_nominal_rate(sizes, first, monkeypatch):
    """2,000 draws of one system's seeds, dealt to two sides: 5% false alarms, 95% of the intervals hold 0."""
    monkeypatch.setattr(comparison, "seeds_needed", lambda *arguments, **options: None)
    rng = np.random.default_rng(sum(sizes) + first)
    alarms, held, better = 0, 0, 0
    for _ in range(2000):
        scores = 30 + 0.3 * rng.standard_normal(sum(sizes))
        result = as_seeds(scores[: sizes[0]], scores[sizes[0] :], first=first)
        alarms += result.p < 0.05
        better += "better" in result.verdict("a", "b")
        held += result.interval[0] <= 0 <= result.interval[1]
    assert 70 <= alarms <= 130, "100 are expected, standard deviation 10"
    assert held == 2000 - alarms and 0.3 * alarms < better < 0.7 * alarms


def test_a_gain_larger_than_the_spread_is_found_and_named():
    result = as_seeds([30.0, 30.2, 29.9, 30.1, 30.0], [31.0, 31.1, 31.0, 31.0, 31.2])
    line = result.verdict("ce", "el")
    assert line.startswith("el is better than ce: +1.02 sacreBLEU (95% interval +") and "\n" not in line
    worse = as_seeds([31.0, 31.1, 31.0], [30.0, 30.2, 29.9]).verdict("ce", "el")
    assert worse.startswith("el is worse than ce: -1.00 sacreBLEU (95% interval -")


def test_a_gain_within_the_spread_is_no_evidence_and_the_verdict_says_what_would_be():
    result = as_seeds([30.0, 31.0, 29.0], [31.0, 30.5, 30.0])  # gains 1, -0.5, 1: mean 0.5, deviation 0.866
    assert result.seeds_needed == seeds_needed(0.5, math.sqrt(0.75)) == 26
    line = result.verdict("ce", "el")
    assert line.startswith("Not enough evidence that el and ce differ: +0.50 sacreBLEU") and "\n" not in line
    assert "about 26 seeds a side would show a gain of this size 4 times in 5" in line
    assert "more than 1,000 seeds" in as_seeds([30.0, 31.0], [31.0, 30.0]).verdict("ce", "el")


@pytest.mark.parametrize("first", [1, 2])
def test_one_seed_is_never_enough(first):
    result = as_seeds([20.0], [40.0], first=first)
    assert result.gain == 20 and result.p is result.interval is result.seeds_needed is None
    assert result.verdict("ce", "el").startswith("Not enough evidence: +20.00 sacreBLEU with one seed")
    assert result.rows()[-1] == ["sacreBLEU", "mean", "20.00", "40.00", "+20.00", "", ""]


def test_the_same_scores_on_both_sides_are_no_difference():
    result = as_seeds([30.0, 31.0], [30.0, 31.0])
    assert (result.gain, result.p, result.interval) == (0.0, 1.0, (0.0, 0.0))
    assert result.verdict("ce", "el").startswith("Not enough evidence")


def test_the_table_has_a_row_for_each_seed_with_the_tests_and_the_mean():
    result = Seeds("sacreBLEU", {1: 30.0, 2: 31.0, 5: 7.0}, {1: 30.5, 2: 32.0}, {1: {"bs": 0.25, "ar": 0.125}})
    assert result.rows()[:3] == [
        ["sacreBLEU", "1", "30.00", "30.50", "+0.50", "0.250", "0.125"],
        ["sacreBLEU", "2", "31.00", "32.00", "+1.00", "", ""],
        ["sacreBLEU", "5", "7.00", "", "", "", ""],
    ]
    assert result.rows()[3][:4] == ["sacreBLEU", "mean", "22.67 ± 13.58", "31.25 ± 1.06"]
    assert result.rows()[3][4].startswith("+0.75 [")


# --- over sentences


def test_a_planted_difference_is_found_over_sentences_and_over_seeds(tmp_path, quick):
    rng = np.random.default_rng(2)
    bench = Bench(tmp_path, draw_references(rng, 120))
    sides = [
        [bench.run(arm, seed, corrupt(rng, bench.references, rate)) for seed in (1, 2, 3, 4)]
        for arm, rate in (("ce", 0.30), ("el", 0.18))
    ]
    found = compare(*sides)
    for metric, result in found.tests["test"].items():
        assert result.p < 0.01 and result.gain > 5, metric
        assert result.verdict("ce", "el").startswith("el is better than ce")
        for seed in (1, 2, 3, 4):
            assert set(result.sentence_p[seed]) == {"bs", "ar"} and max(result.sentence_p[seed].values()) < 0.05
    swapped = compare(*sides[::-1]).tests["test"]["sacreBLEU"]
    assert swapped.gain == pytest.approx(-found.tests["test"]["sacreBLEU"].gain)
    assert swapped.verdict("el", "ce").startswith("ce is worse than el")
    assert found.markdown().count("| sacreBLEU | ") == 5 and "**el is better than ce: +" in found.markdown()
    for metric in ("sacreBLEU", "chrF++", "TER"):
        assert f"{metric} signature: `nrefs:1|case:" in found.markdown()


def test_two_systems_with_the_same_errors_differ_at_the_nominal_rate(tmp_path, quick, monkeypatch):
    """240 draws of two systems that err alike: randomization alarms in 5%, sacreBLEU's bootstrap in 10%, as we say."""
    monkeypatch.setattr(scoring, "metrics", lambda language, lowercase: {"sacreBLEU": BLEU()})
    rng = np.random.default_rng(3)
    p = {"bs": [], "ar": []}
    for number in range(240):
        references = draw_references(rng, 40)
        bench = Bench(tmp_path / str(number), references)
        runs = [bench.run(arm, 1, corrupt(rng, references, 0.25)) for arm in ("ce", "el")]
        pair = [(run, json.loads((run.folder / "scores.json").read_text())) for run in runs]
        for test, by_metric in paired_tests(pair, "test", {"target": "en", "lowercase": False}).items():
            p[test].append(by_metric["sacreBLEU"])
    alarms = {test: np.sum(np.array(values) < 0.05) for test, values in p.items()}
    assert 3 <= alarms["ar"] <= 22, "12 are expected, standard deviation 3.4"
    assert 12 <= alarms["bs"] <= 40 and alarms["bs"] > alarms["ar"], "24 are expected, standard deviation 4.6"
    assert 0.4 < np.mean(np.array(p["ar"]) < 0.5) < 0.6
    assert "falls below 0.05 about twice as often" in comparison.Comparison.explanation


def test_translations_that_hardly_differ_are_not_significant(bench, quick):
    rng = np.random.default_rng(4)
    lines = corrupt(rng, bench.references, 0.3)
    baseline = [bench.run("ce", seed, lines) for seed in (1, 2, 3)]
    three = [*bench.references[:3], *lines[3:]]
    candidate = [bench.run("el", 1, lines), bench.run("el", 2, [bench.references[0], *lines[1:]])]
    candidate += [bench.run("el", 3, three)]
    result = compare(baseline, candidate).tests["test"]
    for metric in ("sacreBLEU", "chrF++", "TER"):
        assert result[metric].sentence_p[1] == {"bs": 1.0, "ar": 1.0}, "the same translations"
        assert result[metric].sentence_p[2] == {"bs": 1.0, "ar": 1.0}, "one sentence: both exchanges are as large"
        assert min(result[metric].sentence_p[3].values()) >= 0.25, "three sentences: 2 of 8 exchanges are as large"


# --- what is refused


def pair_of(bench, **changes):
    rng = np.random.default_rng(6)
    lines = [corrupt(rng, bench.references, 0.3) for _ in range(2)]
    return [bench.run("ce", 1, lines[0])], [bench.run("el", 1, lines[1], **changes)]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"evaluation__data_sha256": "e" * 64}, f"data_sha256: {'d' * 64} | {'e' * 64}"),
        ({"evaluation__beam": 4}, "beam: 5 | 4"),
        ({"evaluation__lenpen": 0.6}, "lenpen: 1.0 | 0.6"),
        ({"evaluation__average": 5}, "average: 10 | 5"),
        ({"evaluation__comet": "m"}, "comet: None | m"),
        ({"training__tokens per update": 8000}, "tokens per update: 4000 | 8000"),
        ({"training__lr": [0.001]}, "lr: [0.002] | [0.001]"),
        ({"training__max_update": 600}, "max_update: 500 | 600"),
        ({"training__clip_norm": 1.0}, "clip_norm: None | 1.0"),
    ],
)
def test_runs_that_differ_in_more_than_the_criterion_are_refused_unless_allowed(changes, expected, bench, quick):
    runs = pair_of(bench, **changes)
    with pytest.raises(UserError) as error:
        compare(*runs)
    assert f"the runs differ in {expected} (--allow-differences" in str(error.value)
    found = compare(*runs, allow_differences=True)
    assert found.differences == [expected]
    assert found.markdown().startswith(f"**These runs differ in more than the criterion**: {expected}.")


def test_updates_that_overflowed_in_fp16_are_no_difference(bench, quick):
    assert not compare(*pair_of(bench, training__updates=498)).differences


def test_a_difference_far_into_a_long_value_counts_and_a_number_written_otherwise_does_not():
    long = ["0.001"] * 50
    results = [{"training": {"lr": long, "dropout": 1}}, {"training": {"lr": [*long[:-1], "0.1"], "dropout": 1.0}}]
    (found,) = differences(results, ("training",))
    assert found.startswith("lr: ")


def test_scores_with_other_signatures_are_refused(bench):
    baseline, candidate = pair_of(bench)
    path = candidate[0].folder / "scores.json"
    path.write_text(path.read_text().replace("|version:", "|version:1."))
    with pytest.raises(UserError, match="the runs differ in sacreBLEU signature: nrefs"):
        compare(baseline, candidate)


def test_runs_of_one_side_that_differ_in_the_criterion_are_refused(bench):
    baseline, candidate = pair_of(bench)
    candidate.append(bench.run("el", 2, bench.references, criterion__log_end=0.75))
    with pytest.raises(UserError, match=r"differ in log_end: 0.5 \| 0.75"):
        compare(baseline, candidate)
    with pytest.raises(UserError, match="differ in _name: label_smoothed_cross_entropy | label_smoothed_enc"):
        compare([baseline[0], candidate[1]], [candidate[0]])


def test_a_seed_twice_on_a_side_and_a_run_on_both_sides_are_refused(bench):
    baseline, candidate = pair_of(bench)
    with pytest.raises(UserError, match="ce.seed1: seed 1 stands twice on one side"):
        compare(baseline * 2, candidate)
    again = bench.run("ce", 1, bench.references, work="again")
    with pytest.raises(UserError, match="again/ce.seed1: seed 1 stands twice on one side"):
        compare([*baseline, again], candidate)
    with pytest.raises(UserError, match="ce.seed1: stands on both sides"):
        compare(baseline, baseline)


def test_sides_of_one_arm_are_told_apart(bench, quick):
    baseline, _ = pair_of(bench)
    other = bench.run("ce", 2, bench.references)
    found = compare(baseline, [other])
    assert (found.baseline, found.candidate) == ("ce.seed1", "ce.seed2")
    again = bench.run("ce", 1, bench.references, work="again")
    found = compare(baseline, [again])
    assert found.baseline != found.candidate and found.candidate.endswith("again/ce.seed1")


def test_a_metric_that_one_run_lacks_is_left_out(bench, quick):
    baseline, candidate = pair_of(bench)
    path = baseline[0].folder / "scores.json"
    result = json.loads(path.read_text())
    result["scores"]["test"]["COMET"] = {"score": 0.8, "signature": "s"}
    write_json(path, result)
    found = compare(baseline, candidate, allow_differences=True)
    assert set(found.tests["test"]) == set(found.signatures) == {"sacreBLEU", "chrF++", "TER"}
    result["scores"] = {"valid": result["scores"]["test"]}
    write_json(path, result)
    with pytest.raises(UserError, match="not every run has a sacreBLEU of test"):
        compare(baseline, candidate, allow_differences=True)


def spoil_nan(run):
    path = run.folder / "scores.json"
    result = json.loads(path.read_text())
    result["scores"]["test"]["TER"]["score"] = math.nan
    path.write_text(json.dumps(result))


def spoil_version(run):
    path = run.folder / "scores.json"
    result = json.loads(path.read_text())
    del result["training"]
    path.write_text(json.dumps(result))


def spoil_translation(run):
    path = run.folder / "test.en"
    path.write_text(path.read_text().replace("w1", "v", 3))


def spoil_reference(run):
    path = run.data / "text" / "test.en"
    path.write_text(path.read_text().replace("w1", "<<unk>>", 1))


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda run: (run.folder / "scores.json").unlink(), "el.seed1: not scored yet; bash scripts/evaluate.sh"),
        (lambda run: (run.folder / "scores.json").write_text("{"), "scores.json: not JSON"),
        (spoil_nan, "scores.json: TER of test is nan, not a number"),
        (spoil_version, "scores.json: written by another version; remove it and evaluate again"),
        (spoil_translation, "el.seed1: the translation of test is not the one that was scored"),
        (lambda run: (run.folder / "test.en").write_text("a\n"), "test.en: 1 hypotheses for 20 references"),
        (lambda run: (run.folder / "test.en").write_text(""), "test.en: empty file"),
        (lambda run: (run.folder / "test.en").write_text("\n" * 20), "test.en: the hypotheses are empty"),
        (lambda run: (run.folder / "test.en").unlink(), "test.en: No such file"),
        (spoil_reference, "reference line 1 holds <<unk>>"),
        (lambda run: (run.data / "manifest.json").unlink(), "no data of `encourage-mt prepare` there"),
        (lambda run: (run.data / "manifest.json").write_text("{}"), "prepared by another version"),
        (lambda run: (run.folder / "run.json").write_text("{"), "run.json: not JSON"),
        (lambda run: (run.folder / "run.json").write_text('{"arm": 1}'), "run.json: written by another version"),
        (lambda run: (run.folder / "run.json").unlink(), "el.seed1: no checkpoints there"),
    ],
    ids="unscored,broken,nan,older,changed,short,empty,blank,gone,unk,no data,old data,bad run,old run,no run".split(
        ","
    ),
)
def test_compare_refuses_in_one_line_what_it_cannot_trust(spoil, expected, bench, quick, capsys):
    baseline, candidate = pair_of(bench)
    spoil(candidate[0])
    argv = ["compare", "--baseline", baseline[0].folder, "--candidate", candidate[0].folder]
    assert expected in refused(capsys, *argv)


def test_compare_refuses_a_folder_that_is_not_there(bench, tmp_path, capsys):
    baseline, _ = pair_of(bench)
    argv = ["compare", "--baseline", baseline[0].folder, "--candidate", tmp_path / "none"]
    assert "none: no such run directory" in refused(capsys, *argv)


# --- what a checkpoint says of its training


def checkpoint_state(**changes):
    sections = {
        "common": {"fp16": False, "bf16": False, "amp": False, "seed": 1, "log_interval": 20},
        "distributed_training": {"distributed_world_size": 1},
        "dataset": {"max_tokens": 1000, "batch_size": None},
        "optimization": {"_name": None, "update_freq": [1], "lr": [0.002], "clip_norm": 0.0},
        "optimizer": {"_name": "adam", "adam_betas": [0.9, 0.98], "lr": [0.002]},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 100},
        "criterion": {"_name": "cross_entropy", "label_smoothing": 0.1},
        "model": Namespace(arch="transformer", dropout=0.2, seed=1, label_smoothing=0.1, criterion="cross_entropy"),
    }
    for path, value in changes.items():
        section, name = path.split("__")
        if section == "model":
            setattr(sections["model"], name, value)
        else:
            sections[section][name] = value
    return {"cfg": sections, "optimizer_history": [{"num_updates": 77}]}


def differing(**changes):
    results = [{"training": training_settings(state)} for state in (checkpoint_state(), checkpoint_state(**changes))]
    return [found.split(":")[0] for found in differences(results, ("training",))]


def test_the_effective_batch_is_tokens_times_updates_times_processes():
    changes = {
        "dataset__max_tokens": 500,
        "optimization__update_freq": [4],
        "distributed_training__distributed_world_size": 3,
    }
    assert training_settings(checkpoint_state(**changes))["tokens per update"] == 6000
    same = {
        "dataset__max_tokens": 250,
        "optimization__update_freq": [2],
        "distributed_training__distributed_world_size": 2,
    }
    assert differing(**same) == []
    assert differing(optimization__update_freq=[2]) == ["tokens per update"]
    assert differing(dataset__batch_size=64) == ["sentences per update"]
    assert differing(optimization__update_freq=[1, 4])[:1] == ["tokens per update"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"optimization__lr": [0.1], "optimizer__lr": [0.1]}, ["lr"]),
        ({"optimizer___name": "adagrad"}, ["optimizer"]),
        ({"lr_scheduler__warmup_updates": 4000}, ["warmup_updates"]),
        ({"model__dropout": 0.3}, ["dropout"]),
        ({"model__arch": "transformer_iwslt_de_en"}, ["arch"]),
        ({"common__fp16": True}, ["precision"]),
        ({"common__seed": 2, "model__seed": 2}, []),
        ({"criterion___name": "el", "model__criterion": "el", "criterion__label_smoothing": 0.0}, []),
        ({"common__log_interval": 100}, []),
    ],
)
def test_settings_of_a_training_are_all_but_criterion_seed_and_logging(changes, expected):
    assert differing(**changes) == expected


def test_the_batch_in_sentences_and_a_schedule_of_update_freq_are_kept():
    settings = training_settings(checkpoint_state(dataset__max_tokens=None, dataset__batch_size=32))
    assert settings["tokens per update"] == 0 and settings["sentences per update"] == 32
    assert settings["updates"] == 77 and settings["precision"] == "fp32"
