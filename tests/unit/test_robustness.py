"""Test perturbations, measures of detection and the comparison of arms on texts and scores with known answers."""

import re

import numpy as np
import pytest
from samples import EVALUATION, sample_data, sample_result, sample_run
from scipy import stats

from encourage_mt.data import subwords
from encourage_mt.errors import UserError
from encourage_mt.evaluation.confidence import SCORES
from encourage_mt.evaluation.lengths import LengthRange
from encourage_mt.evaluation.scoring import metrics
from encourage_mt.evaluation.significance import MetricComparison, compare_resampled, count_draws
from encourage_mt.files import read_record, write_record
from encourage_mt.report import measure_charts
from encourage_mt.report.charts import length_charts
from encourage_mt.robustness import detection, measure, summary, tables
from encourage_mt.robustness.detection import auroc, fpr95, resampled_auroc
from encourage_mt.robustness.measure import CLEAN, LENGTH, SHUFFLED, Foreign, Noise, Robustness, choose, share_changed
from encourage_mt.robustness.perturbations import CHARACTER_ERRORS, NEIGHBOURS, perturb, perturbations

LINES = ["Der kleine Hund läuft über die Straße, schnell!", "Sie liest ein Buch (oder zwei).", "Ja."] * 40


# --- perturbations


def test_errors_of_characters_change_one_letter():
    assert CHARACTER_ERRORS["swapped characters"]("aab-c") == ["aba-c"]
    assert CHARACTER_ERRORS["dropped characters"]("Ab.") == ["b.", "A."]
    assert CHARACTER_ERRORS["dropped characters"]("a.") == []
    assert CHARACTER_ERRORS["doubled characters"]("ab1") == ["aab1", "abb1"]
    assert set(CHARACTER_ERRORS["neighbouring keys"]("Q")) == {"W", "A"}
    assert set(NEIGHBOURS["g"]) == set("tyfhvb") and CHARACTER_ERRORS["neighbouring keys"]("ß9") == []


def test_perturbations_do_what_they_say():
    assert list(perturbations([20, 5]))[:2] == ["doubled characters 5%", "doubled characters 20%"], "in numeric order"
    every = perturbations([10])
    changed = {name: perturb(LINES, perturbation, name, 1)[0] for name, perturbation in every.items()}
    assert changed["no diacritics"] == "Der kleine Hund lauft uber die Straße, schnell!"
    assert changed["lower case"] == LINES[0].lower() and changed["upper case"] == LINES[0].upper()
    assert changed["no punctuation"] == "Der kleine Hund läuft über die Straße schnell"
    assert re.fullmatch(r"[a-z]{3} [a-z]{6} [a-z]{4} .*, [a-z]{7}!", changed["total noise"])
    for number in range(1, 9):
        attacked = changed[f"attack {number}"].split()
        assert sum(a != b for a, b in zip(attacked, LINES[0].split(), strict=True)) == 1


def test_spaces_that_do_not_break_are_kept():
    line = "Il dit\u00a0: \u00ab\u00a0oui\u00a0\u00bb"
    every = perturbations([20])
    for number in range(1, 9):
        (attacked,) = perturb([line], every["attack 1"], "attack 1", number)
        assert attacked != line and abs(len(attacked) - len(line)) <= 1 and attacked.count("\u00a0") == 3
    kept = "".join(perturb([line] * 20, every["dropped words 20%"], "dropped words 20%", 1))
    assert "dit\u00a0" in kept and "dit :" not in kept


@pytest.mark.parametrize("percent", [10, 20, 100])
def test_the_percentage_is_that_of_the_words(percent):
    words = [" ".join(["abc"] * 20)] * 200
    for name, perturbation in perturbations([percent]).items():
        if name.endswith("%"):
            lines = perturb(words, perturbation, name, 1)
            if name.startswith("dropped words"):
                share = 1 - sum(len(line.split()) for line in lines) / 4000 if percent < 100 else 1
            elif name.startswith("repeated words"):
                share = sum(len(line.split()) for line in lines) / 4000 - 1
            else:
                share = sum(word != "abc" for line in lines for word in line.split()) / 4000
            assert share == pytest.approx(percent / 100, abs=0.02), name


def test_a_line_depends_on_seed_name_and_number_alone_and_is_never_empty():
    every = perturbations([50])
    for name, perturbation in every.items():
        lines = perturb(LINES, perturbation, name, 1)
        assert lines == perturb(LINES, perturbation, name, 1) and all(lines)
        assert lines[:5] == perturb(LINES[:5], perturbation, name, 1)
    swapped = every["swapped characters 50%"]
    assert perturb(LINES, swapped, "a", 1) != perturb(LINES, swapped, "a", 2) != perturb(LINES, swapped, "b", 2)
    assert perturb(["!?", ""], every["no punctuation"], "a", 1) == ["!?", ""]


@pytest.mark.parametrize(
    "options", [{"merges": 30}, {"vocab_size": 60, "model_type": "bpe"}, {"vocab_size": 40, "model_type": "unigram"}]
)
def test_other_segmentations_have_the_same_text(tmp_path, options):
    pairs = [(line, line) for line in LINES]
    subwords.learn(pairs, len(pairs), options, tmp_path / "subword")
    lines = ["kleine Straße", "Der Hund"] * 20
    sampled = subwords.sample(lines, tmp_path / "subword", 1)
    assert sampled == subwords.sample(lines, tmp_path / "subword", 1) != subwords.sample(lines, tmp_path / "subword", 2)
    joined = [line.replace("@@ ", "").replace(" ", "" if "merges" not in options else " ") for line in sampled]
    assert [line.replace("▁", " ").strip() for line in joined] == lines


def test_a_model_of_characters_has_no_other_segmentation(tmp_path):
    subwords.learn(
        [(line, line) for line in LINES],
        len(LINES),
        {"model_type": "char", "vocab_size": 40, "hard_vocab_limit": False},
        tmp_path / "x",
    )
    assert subwords.sample(["der"], tmp_path / "x", 1) is None


def test_a_sentence_that_becomes_another_one_of_the_set_has_changed():
    clean = [("a",), ("b", "c"), ("d",), ("d",)]
    assert share_changed(clean, clean) == 0
    assert share_changed(clean, [("b", "c"), ("b", "c"), ("d",), ("e",)]) == 0.5


def test_empty_translations_of_noisy_and_clean_text_are_the_same():
    found = measure.chrf_of_sentences(metrics("en")["chrF++"], ["", "", "a cat", "."], ["", "a cat", "a cat", "."])
    assert found == [100, 0, 100, 100]


# --- detection


def test_auroc_of_scores_with_known_answers():
    high, low = np.array([3.0, 4, 5]), np.array([0.0, 1])
    assert auroc((high, low)) == [1.0] and auroc((low, high)) == [0.0] and auroc((high, high)) == [0.5]
    assert auroc((np.array([1.0, 2]), np.array([1.0, 0]))) == [0.875]
    assert fpr95((high, low)) == 0 and fpr95((low, high)) == 1 and fpr95((high, high)) == 1
    assert fpr95((np.arange(100.0), np.array([4.0, 5, 6, 200]))) == 0.75


def test_auroc_is_the_statistic_of_mann_and_whitney():
    rng = np.random.default_rng(1)
    pair = rng.integers(0, 20, 300).astype(float), rng.integers(0, 15, 200).astype(float)
    expected = stats.mannwhitneyu(*pair).statistic / (300 * 200)
    assert auroc(pair)[0] == pytest.approx(expected)
    weights = tuple(rng.integers(0, 4, (2, len(side))).astype(float) for side in pair)
    for row, value in enumerate(auroc(pair, weights=weights)):
        repeated = [np.repeat(side, weight[row].astype(int)) for side, weight in zip(pair, weights, strict=True)]
        assert value == pytest.approx(stats.mannwhitneyu(*repeated).statistic / np.prod(list(map(len, repeated))))


def test_equal_length_removes_what_length_alone_explains():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 15, 500).astype(float), rng.integers(10, 20, 400).astype(float)
    assert auroc(lengths)[0] < 0.2 and auroc(lengths, lengths)[0] == 0.5
    pair = tuple(side + rng.normal(0, 0.1, len(side)) + shift for side, shift in zip(lengths, (0.5, 0), strict=True))
    assert auroc(pair, lengths)[0] > 0.99
    equal = lengths[0][:, None] == lengths[1]
    assert auroc(pair, lengths)[0] == pytest.approx((pair[0][:, None] > pair[1])[equal].mean())
    assert np.isnan(auroc(pair, (lengths[0], lengths[1] + 100))[0])


def test_sets_of_one_kind_give_half_within_the_interval():
    rng = np.random.default_rng(1)
    length, covered = np.ones(80), []
    drawn = rng.integers(80, size=(400, 80))
    for _ in range(40):
        pair = rng.normal(size=80), rng.normal(size=80)
        low, high = np.quantile(resampled_auroc([pair], (length, length), paired=False)(drawn), [0.025, 0.975])
        covered.append(low <= 50 <= high)
    assert np.mean(covered) > 0.85
    same = resampled_auroc([(pair[0], pair[0])], (length, length), paired=True)
    assert same(np.arange(80)[None]) == 50 and np.allclose(same(drawn).mean(), 50, atol=0.5)


def test_models_that_separate_equally_well_rarely_differ():
    rng = np.random.default_rng(2)
    alarms = []
    for _ in range(30):
        base = rng.normal(size=(2, 60)) + np.array([[1.0], [0]])
        length = np.ones(60)
        sides = [
            {1: resampled_auroc([tuple(base + rng.normal(0, 1, base.shape))], (length, length), paired=False)}
            for _ in range(2)
        ]
        alarms.append(compare_resampled(["x"], sides, 60)[0].bootstrap_p < 0.05)
    assert np.mean(alarms) < 0.2


def test_a_large_foreign_text_is_drawn_in_parts_that_give_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    pair, lengths = (rng.normal(1, 1, 20), rng.normal(size=90)), (np.ones(20), np.ones(90))
    drawn, sizes = rng.integers(20, size=(13, 20)), []
    whole = resampled_auroc([pair], lengths, paired=False)(drawn)
    monkeypatch.setattr(detection, "count_draws", lambda drawn: sizes.append(drawn.size) or count_draws(drawn))
    monkeypatch.setattr(detection, "LARGEST_BLOCK", 500)
    assert (resampled_auroc([pair], lengths, paired=False)(drawn) == whole).all() and max(sizes) == 4 * 90


# --- comparison of arms


def record(rng, loss, shift):
    """What a run would measure whose chrF++ falls by `loss` and whose scores are `shift` lower on shuffled text."""
    clean = rng.uniform(60, 80, 200)
    noise = {CLEAN: (40.0, clean, np.full(200, 100.0))}
    for name in ("upper case", "total noise", *(f"attack {number}" for number in range(1, 9))):
        noise[name] = 40.0 - loss, clean - loss + rng.normal(0, 1, 200), np.full(200, 90.0)
    lengths = rng.integers(5, 8, 200).astype(float)
    inside = {score: rng.normal(0, 1, 200) for score in SCORES} | {LENGTH: -lengths}
    outside = {score: rng.normal(-shift, 1, 200) for score in SCORES} | {LENGTH: -lengths}
    return Robustness(
        **{"checkpoint_sha256": "c", "beam": 5, "lenpen": 1.0, "signatures": {"sacreBLEU": "s"}},
        noise={
            "test": {
                name: Noise(source_sha256=name, changed=0.5, bleu=bleu, chrf=chrf.tolist(), consistency=same.tolist())
                for name, (bleu, chrf, same) in noise.items()
            }
        },
        foreign={
            "test": {
                name: Foreign(source_sha256=name, scores={k: v.tolist() for k, v in scores.items()})
                for name, scores in ((CLEAN, inside), (SHUFFLED, outside))
            }
        },
    )


@pytest.fixture
def arms():
    """What three seeds of two arms measure: noise costs el less, and its scores see more."""
    losses = {"ce": (10, 1), "el": (5, 3)}
    return {
        arm: {seed: record(np.random.default_rng(seed), loss + seed * loss / 100, shift) for seed in (1, 2, 3)}
        for arm, (loss, shift) in losses.items()
    }


def test_arms_are_compared_over_seeds_and_sentences(arms, tmp_path):
    found = summary.summarize(arms, [])
    rows = {(row.name, row.score): row.values for row in found.rows}
    worst, mean = (rows[f"attack, {kind} of 8", ""]["chrF++ change"]["ce"][1] for kind in ("worst", "mean"))
    assert worst < mean - 1 and ("attack 1", "") not in rows
    attacks = [arms["ce"][1].noise["test"][f"attack {number}"] for number in range(1, 9)]
    lowest = np.mean(np.min([each.consistency for each in attacks], axis=0))
    assert rows["attack, worst of 8", ""]["consistency"]["ce"][1] == pytest.approx(lowest)
    auroc = rows[SHUFFLED, "maximum logit"]["AUROC"]
    expected = [100 * stats.norm.cdf(shift / np.sqrt(2)) for shift in (1, 3)]
    assert [np.mean(list(side.values())) for side in auroc.values()] == pytest.approx(expected, abs=4)
    assert set(rows[SHUFFLED, LENGTH]["AUROC of equal length"]["el"].values()) == {50.0}
    (upper,) = (gain for gain in found.gains("el") if gain.metric == "chrF++ change, upper case")
    assert upper.gain == pytest.approx(5.1, abs=0.01) and upper.p < 0.01 and upper.bootstrap_p < 0.01
    assert 5 < upper.bootstrap_interval[0] < 5.1 < upper.bootstrap_interval[1] < 5.2
    write_record(tmp_path / "summary.json", found)
    assert read_record(tmp_path / "summary.json", summary.Summary) == found


def test_the_tables_count_the_comparisons_and_correct_p(arms):
    found = summary.summarize(arms, ["lr: 1 or 2"])
    gains = found.gains("el")
    assert len(gains) == 3 + len(SCORES) - 1 and not any("total noise" in gain.metric for gain in gains)
    assert all(gain.holm_p >= gain.p for gain in gains)
    text = tables.markdown(found)
    assert f"there are {len(gains)} comparisons" in text and "el against ce, test, chrF++ change:" in text
    assert "| upper case " in text and "50%" in text and SHUFFLED in text and "lr: 1 or 2" in text
    two = {arm: {seed: side[seed] for seed in (1, 2)} for arm, side in arms.items()}
    more = tables.markdown(summary.summarize({**arms, "el": two["el"]}, []))
    assert more == tables.markdown(summary.summarize(two, [])), "the values are of the seeds that the gains compare"
    one_seed = summary.summarize({arm: {1: side[1]} for arm, side in arms.items()}, [])
    assert "el against ce" in tables.markdown(one_seed)
    assert "against ce" not in tables.markdown(summary.summarize({"ce": arms["ce"]}, []))


def test_a_name_with_signs_of_a_formula_can_be_drawn():
    gain = MetricComparison("AUROC, $x^{ and $y, maximum logit", {1: 50.0}, {1: 60.0}, bootstrap_interval=(5.0, 15.0))
    assert measure_charts.gains("name", "title", [gain], "gain in AUROC").svg().startswith("<svg")
    (chart, _) = length_charts("test", [LengthRange("1-5", 20, dict.fromkeys(["$x^{", "$y"], (1, 0, 2)), (0, -1, 1))])
    assert chart.svg().startswith("<svg")


def test_what_runs_have_not_measured_alike_is_left_out(arms):
    noise = dict(arms["ce"][1].noise["test"])
    noise["upper case"] = noise["upper case"].model_copy(update={"source_sha256": "other"})
    arms["ce"][1] = arms["ce"][1].model_copy(update={"noise": {"test": noise}, "foreign": {}})
    found = summary.summarize(arms, [])
    assert not {"upper case", SHUFFLED} & {row.name for row in found.rows} and found.rows
    other = arms["el"][1].foreign["test"]
    other = {**other, CLEAN: other[CLEAN].model_copy(update={"source_sha256": "other"})}
    one = {arm: {1: side[2]} for arm, side in arms.items()}
    one["el"][1] = one["el"][1].model_copy(update={"foreign": {"test": other}})
    assert SHUFFLED not in {row.name for row in summary.summarize(one, []).rows}, "the clean text is another one"
    only_clean = {
        arm: {1: side[2].model_copy(update={"noise": {"test": {CLEAN: side[2].noise["test"][CLEAN]}}})}
        for arm, side in arms.items()
    }
    assert {row.name for row in summary.summarize(only_clean, []).rows} == {SHUFFLED}


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    data = sample_data(tmp_path / "data", {"de": ["x"], "en": ["x"]}).folder
    runs = [sample_run(tmp_path / arm, data, arm) for arm in ("ce", "el")]
    for run, training in zip(runs, ({"lr": 1}, {"lr": 2}), strict=True):
        sample_result(run.arm, training=training).write(run.folder)
    with pytest.raises(UserError, match="ce: seed 1 appears twice"):
        summary.group([*runs, runs[0]])
    with pytest.raises(UserError, match="lr.*--allow-differences"):
        summary.group(runs)
    arms, unequal = summary.group(runs, allow_differences=True)
    assert arms == {"ce": {1: runs[0]}, "el": {1: runs[1]}} and unequal == ["lr: 1 or 2"]
    sample_result("el", evaluation={**EVALUATION, "data_sha256": "0" * 64}).write(runs[1].folder)
    with pytest.raises(UserError, match="not the data that el.seed1 was scored on"):
        summary.group(runs)
    sample_result("el", training={"lr": 1}, alarms=["diverged"]).write(runs[1].folder)
    assert summary.group([runs[0], runs[1]])[1] == ["el.seed1: diverged"]
    for run, bonus in zip(runs, ("log", "power"), strict=True):
        result = sample_result("el", training={}, criterion={"bonus": bonus})
        result.model_copy(update={"seed": runs.index(run)}).write(run.folder)
    with pytest.raises(UserError, match="bonus: log or power"):
        summary.group(runs)


def test_a_damaged_record_is_refused_and_cannot_name_files(arms):
    content = arms["ce"][1].model_dump()
    foreign = arms["ce"][1].foreign["test"][CLEAN].scores
    for scores in ({LENGTH: [1.0]}, {**foreign, LENGTH: [1.0]}):
        with pytest.raises(ValueError, match="maximum logit.*one value a sentence"):
            Foreign(source_sha256="c", scores=scores)
    noise, sets = content["noise"]["test"], content["foreign"]["test"]
    shorter = {**noise[CLEAN], "consistency": [1.0]}
    clean = {name: values[:9] for name, values in foreign.items()}
    for change in (
        {"noise": {"test": {**noise, "upper case": shorter}}},
        {"noise": {"test": {name: each for name, each in noise.items() if name != CLEAN}}},
        {"noise": {"test": {CLEAN: {**noise[CLEAN], "chrf": [], "consistency": []}}}, "foreign": {}},
        {"foreign": {"test": {CLEAN: {"source_sha256": "c", "scores": clean}}}},
        {"foreign": {"test": {SHUFFLED: sets[SHUFFLED]}}},
        {"foreign": {"test": {**sets, "own": {"source_sha256": "c", "scores": dict.fromkeys(foreign, [])}}}},
    ):
        with pytest.raises(ValueError, match="test: must have"):
            Robustness.model_validate({**content, **change})
    with pytest.raises(ValueError, match="cannot be the name of a split"):
        Robustness.model_validate({**content, "noise": {"../test": content["noise"]["test"]}})


# --- what to measure


def test_bad_files_and_names_are_refused(tmp_path):
    data = sample_data(tmp_path / "data", {"de": ["eins", "zwei"], "en": ["one", "two"]})
    files = {"empty": "", "blank": "\n\n", "single": "eins\n", "same": "eins\n\nzwei\n", "fine": "drei\nvier\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, words in (("empty", "empty file"), ("blank", "at least 2"), ("single", "1 sentence"), ("same", "test")):
        with pytest.raises(UserError, match=words) as refusal:
            choose(data, [], [10], 1, [("own", tmp_path / name)])
        assert str(tmp_path / name) in str(refusal.value)
    with pytest.raises(UserError, match="--ood clean"):
        choose(data, [], [10], 1, [(CLEAN, tmp_path / "fine")])
    with pytest.raises(UserError, match="--ood own"):
        choose(data, [], [10], 1, [("own", tmp_path / "fine")] * 2)
    with pytest.raises(UserError, match="--tests other.*test"):
        choose(data, ["other"], [10], 1, [])
    assert choose(data, [], [10], 1, [("own", tmp_path / "fine")]) == measure.Choice(
        ["test"], [10], 1, {"own": ["drei", "vier"]}
    )
