"""Test the tables of runs, arms, diagnostics, epochs and published figures."""

import pytest
from conftest import write_recipe
from samples import EVALUATION, sample_result

from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.significance import MetricComparison
from encourage_mt.recipe import load_recipe
from encourage_mt.report.tables import (
    DIAGNOSTICS,
    arms_table,
    curve_table,
    describe_setting,
    diagnostics_table,
    gains_table,
    learning_curve,
    name_sides,
    published_table,
    runs_table,
)

SCORES = {"ce": [30.0, 31.0, 32.0], "el": [31.0, 31.5, 33.5], "ce_ls000": [29.0]}
PUBLISHED = {"source": "Somebody 2020", "metric": "sacreBLEU", "scores": {"ce": [35.09, 0.07], "el": [35.5, 0.11]}}


def a_result(arm, seed, score):
    entry = {"score": score, "signature": "nrefs:1", "length_ratio": 0.95}
    versions = {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.13.0"}
    start = {"command": "fairseq-train", "time": "now", "processes": 1, "git_revision": None}
    return sample_result(
        arm,
        seed,
        options={
            **{"source-lang": "de", "target-lang": "en", "seed": seed, "criterion": arm, "log-end": "0.1"},
            "fuse-projection": False,
        },
        evaluation={**EVALUATION, "average": 5, "beam": 4},
        scores={"valid": {"sacreBLEU": {**entry, "score": score + 1}}, "test": {"sacreBLEU": entry}},
        training={
            **{"arch": "transformer", "encoder_layers": 2, "decoder_layers": 3, "encoder_embed_dim": 32},
            **{"tokens per update": 4000, "updates": 1000 + (seed > 1)},
        },
        target_tokens_per_second=3000.4,
        train_seconds=61.6,
        provenance={"data_sha256": "d" * 64, "starts": [{"machine": "CPU", "versions": versions, **start}]},
        diagnostics=dict.fromkeys(DIAGNOSTICS, seed / 4),
    )


@pytest.fixture
def results():
    return [a_result(arm, seed, score) for arm, side in SCORES.items() for seed, score in enumerate(side, 1)]


def compared(baseline, candidate, metric):
    tests = {"test": {"sacreBLEU": metric}}
    return Comparison(baseline=baseline, candidate=candidate, tests=tests, signatures={}, differences=[])


@pytest.fixture
def comparison():
    sides = [dict(enumerate(SCORES[arm], 1)) for arm in ("ce", "el")]
    seeds = MetricComparison("sacreBLEU", *sides, sentence_p={2: {"bs": 0.01, "ar": 0.02}, 1: {"bs": 0.3, "ar": 0.4}})
    return compared("ce", "el", seeds)


def rows_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


def test_a_row_for_each_run_and_set(results):
    rows = rows_of(runs_table(results))
    assert rows[0] == ["run", "set", "sacreBLEU", "length ratio", "target tokens/s", "training time"]
    assert rows[1:3] == [
        ["ce.seed1", "valid", "31.00", "0.950", "3,000", "1:02"],
        ["ce.seed1", "test", "30.00", "0.950", "3,000", "1:02"],
    ]
    assert len(rows) == 1 + 2 * 7 and runs_table(results).endswith("sacreBLEU signature: `nrefs:1`  ")


def test_a_row_for_each_arm_with_mean_deviation_gain_and_p(results, comparison):
    table = arms_table(results, [comparison])
    rows = rows_of(table)
    assert rows[1] == ["ce", "test", "3", "31.00 ± 1.00", "0.950", "", "", ""]
    gain = comparison.tests["test"]["sacreBLEU"]  # gains 1, 0.5, 1.5
    assert gain.p == pytest.approx(0.0742, abs=1e-4)
    low, high = gain.interval
    assert rows[2] == [
        "el",
        "test",
        "3",
        "32.00 ± 1.32",
        "0.950",
        f"ce: +1.00 [{low:+.2f}, {high:+.2f}]",
        "0.074",
        "seed 1, 2: 0.400, 0.020",
    ]
    assert rows[3] == ["ce_ls000", "test", "1", "29.00", "0.950", "ce: -2.00", "-", "-"]
    assert table.splitlines()[-2:] == [
        "Setting: tiny, de to en; transformer, 2+3 layers, 32 wide; 4,000 tokens per update, 1,000 or 1,001 updates; "
        "last epoch checkpoints averaged: 5, beam 4, length penalty 1.0.  ",
        "Trained on: CPU; python 3.11.7, torch 2.13.0; 0.02 hours of training per run, 0.1 if one after another.  ",
    ]
    assert "el: `--criterion el --log-end 0.1`" in table and table.count("signature") == 1
    longer = {**results[3].options, "seed": 1}
    longer = results[3].model_copy(update={"options": {"max-epoch": 9, **longer}})
    assert "differs in" not in table and "`; differs in: max-epoch 9" in arms_table([results[0], longer], [])
    assert [row[:2] for row in rows_of(arms_table(results[:1], []))[1:]] == [["ce", "valid"], ["ce", "test"]]


def test_the_length_ratio_of_an_arm_is_the_mean_over_seeds(results):
    def of_ratio(result, ratio):
        score = result.scores["test"]["sacreBLEU"].model_copy(update={"length_ratio": ratio})
        return result.model_copy(update={"scores": {"test": {"sacreBLEU": score}}})

    runs = [of_ratio(result, ratio) for result, ratio in zip(results[:3], (0.9, 0.96, 0.99), strict=True)]
    assert rows_of(arms_table(runs, []))[1][4] == "0.950"
    assert rows_of(arms_table([of_ratio(results[0], None)], []))[1][4] == ""


def test_the_title_of_a_report_names_the_options_in_which_the_arms_differ():
    common = {"seed": 1, "criterion": "label_smoothed_cross_entropy"}
    weak, strong = (sample_result(options={**common, "label-smoothing": value, "x": True}) for value in (0.1, 0.2))
    assert name_sides({"a": weak, "b": strong}) == "b (label-smoothing 0.2) against a (label-smoothing 0.1)"
    other = sample_result(options={"criterion": "encouraging_loss", "label-smoothing": 0.1})
    assert name_sides({"a": weak, "c": other}) == "c (encouraging loss) against a (label smoothed cross entropy, x)"
    assert name_sides({"a": weak, "d": weak}) == "d against a"
    own = sample_result(options={**weak.options, "bonus": "my_bonus:square"})
    assert name_sides({"a": weak, "e": own}) == "e (bonus my_bonus:square) against a"


def test_each_comparison_gives_a_gain_and_names_its_seeds_if_not_all_are_used(results, comparison):
    """One shared seed is not enough for pairs: the gain is that of all seeds, as in the verdict of `compare`."""
    scores = {1: 31.0, 2: 31.5, 3: 33.5}
    control = MetricComparison("sacreBLEU", {1: 29.0}, scores, {1: {"bs": 0.1, "ar": 0.2}})
    fair = compared("ce_ls000", "el", control)
    row = rows_of(arms_table(results, [comparison, fair]))[2]
    assert row[5].startswith("ce: +1.00 [") and row[5].endswith("]; ce_ls000: +3.00")
    assert control.format_gain() == "+3.00"
    assert row[6:] == ["0.074; -", "seed 1, 2: 0.400, 0.020; seed 1: 0.200"]
    comparison.tests["test"]["sacreBLEU"].sentence_p[3] = {"bs": 0.1, "ar": 0.3}
    assert rows_of(arms_table(results, [comparison, fair]))[2][7] == "0.400, 0.020, 0.300; seed 1: 0.200"
    shared = rows_of(arms_table([*results[:3], *results[3:5]], []))[4]
    assert shared[5].startswith("ce, seed 1, 2: +0.75 [")


def test_arms_without_a_shared_seed_are_compared_over_all_seeds(results):
    others = [result.model_copy(update={"seed": result.seed + 10}) for result in results[3:6]]
    row = rows_of(arms_table(results[:3] + others, []))[4]
    welch = MetricComparison("sacreBLEU", {1: 30.0, 2: 31.0, 3: 32.0}, {11: 31.0, 12: 31.5, 13: 33.5})
    assert row[5:] == [f"ce: {welch.format_gain()}", f"{welch.p:.3f}", "-"] and welch.test.startswith("Welch")


def test_gains_are_listed_with_the_seeds_that_would_detect_a_gain(results):
    ce, el = ([result for result in results if result.arm == arm] for arm in ("ce", "el"))
    header, all_seeds, one = rows_of(gains_table([("many", ce, el), ("one", ce[:1], el[:1])]))
    assert header[3:5] == ["sacreBLEU of ce", "sacreBLEU of el"]
    needed = MetricComparison("sacreBLEU", *(dict(enumerate(SCORES[arm], 1)) for arm in ("ce", "el"))).seeds_for_sought
    means = ["31.00 ± 1.00", "32.00 ± 1.32", "+1.00 [-0.24, +2.24]", "0.074", "3", f"about {needed}"]
    assert all_seeds == ["many", "5 averaged; beam 4, length penalty 1.0", "test", *means]
    assert one[3:] == ["30.00", "31.00", "+1.00", "-", "1", "-"]
    two = rows_of(gains_table([("two", ce, el[:2])]))[1]
    assert two[3:5] == ["30.50 ± 0.71", "31.25 ± 0.35"] and two[5].endswith(", seed 1, 2") and two[7] == "2"
    evaluation = el[0].evaluation.model_copy(update={"average": 1})
    last = [result.model_copy(update={"evaluation": evaluation}) for result in el]
    mixed = rows_of(gains_table([("one", ce, el), ("other", last, ce)]))
    assert mixed[0][4:6] == ["sacreBLEU of the first arm", "sacreBLEU of the second"] and mixed[2][4] == mixed[1][5]
    assert mixed[2][:3] == ["other", "el, ce", "last checkpoint or 5 averaged; beam 4, length penalty 1.0"]
    equal = rows_of(gains_table([("equal", ce, ce)]))[1]
    assert equal[5:7] == ["+0.00 [+0.00, +0.00]", "1.000"] and equal[8] == "-", "the spread is unknown"


def test_diagnostics_are_a_mean_over_the_seeds_that_were_analysed(results):
    results[-1] = results[-1].model_copy(update={"diagnostics": None})
    rows = rows_of(diagnostics_table(results))
    assert rows[0][2:] == list(DIAGNOSTICS)
    assert [row[:3] for row in rows[1:]] == [["ce", "3", "0.500 ± 0.250"], ["el", "3", "0.500 ± 0.250"]]


def test_a_row_for_each_epoch_with_the_gap_between_the_arms(results):
    record = {"epoch": 1, "valid_num_updates": "1200", "valid_nll_loss": "3.5"}
    lost = {**record, "valid_bleu": "99"}
    bleu = ["10", "12", "11", "12", "14", "13"]  # the control has no log
    curves = [learning_curve([lost, {"epoch": 1, "loss": "7"}, {**record, "valid_bleu": value}]) for value in bleu]
    curves[0].append(curves[0][0].model_copy(update={"epoch": 2.0}))
    results = [result.model_copy(update={"curve": curve}) for result, curve in zip(results, curves, strict=False)]
    assert rows_of(curve_table(results)) == [
        ["epoch", "updates", "greedy BLEU ce", "greedy BLEU el", "gap el", "nll ce (bits)", "nll el (bits)"],
        ["1", "1,200", "11.00 ± 1.00", "13.00 ± 1.00", "+2.00", "3.50 ± 0.00", "3.50 ± 0.00"],
    ]
    assert rows_of(curve_table(results[:4]))[1][3:5] == ["12.00", "+1.00"], "one shared seed makes no pairs"
    assert rows_of(curve_table(results[:5]))[1][2:5] == ["11.00 ± 1.41", "13.00 ± 1.41", "+2.00"], "of shared seeds"


def test_published_figures_are_shown_with_ours_or_not_yet_run(results, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, published=PUBLISHED))
    assert rows_of(published_table(recipe, [])) == [
        ["sacreBLEU", "ce", "el", "gain"],
        ["Somebody 2020", "35.09 ± 0.07", "35.50 ± 0.11", "+0.41"],
        ["test, here", "not yet run", "not yet run", ""],
    ]
    ce, el = "31.00 ± 1.00 (3 seeds)", "32.00 ± 1.32 (3 seeds)"
    assert rows_of(published_table(recipe, results[:3]))[2] == ["test, here", ce, "not yet run", ""]
    assert rows_of(published_table(recipe, results))[2] == ["test, here", ce, el, "+1.00"]
    assert not recipe.reversed().published and not recipe.modern().published, "another task"


def test_arms_with_different_searches_name_them(results):
    assert "beam" not in arms_table(results, []).split("Setting: ")[0]
    other = results[0].evaluation.model_copy(update={"beam": 9, "temperature": 0.8})
    tuned = [r.model_copy(update={"evaluation": other}) if r.arm == "el" else r for r in results]
    lines = arms_table(tuned, []).splitlines()
    (ce,), (el,) = ([line for line in lines if line.startswith(f"{arm}: ")] for arm in ("ce", "el"))
    assert ce.endswith("; beam 4, length penalty 1.0  ")
    assert el.endswith("; beam 9, length penalty 1.0, temperature 0.8  ")
    assert "beam 4 or 9, length penalty 1.0, temperature 1.0 or 0.8" in "".join(lines)
    mixed = [result for result in tuned if result.arm == "el"][:1] + results[1:]
    (el,) = (line for line in arms_table(mixed, []).splitlines() if line.startswith("el: "))
    assert "beam 9, length penalty 1.0, temperature 0.8 or beam 4, length penalty 1.0" in el


def test_models_of_different_sizes_are_named(results):
    sizes = [result.model_copy(update={"parameters": 4_000 + 1_000 * (result.arm == "el")}) for result in results]
    assert describe_setting(sizes)["model"].endswith("32 wide, 4,000 or 5,000 parameters")
    assert describe_setting(results)["model"].endswith("32 wide")
