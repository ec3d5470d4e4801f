"""Compare runs: differences made on purpose, refusals, and the content of comparison.json."""

import functools
import json

import numpy as np
import pytest
from conftest import refused
from sacrebleu.significance import PairedTest
from samples import EVALUATION, corrupt, draw_references, sample_data, sample_result, sample_run, write_lines

from encourage_mt.errors import UserError
from encourage_mt.evaluation import scoring, significance
from encourage_mt.evaluation.comparison import Comparison, check_comparable, compare, differences
from encourage_mt.evaluation.significance import MetricComparison
from encourage_mt.files import read_json, read_record, write_json, write_record

TRAINING = {"tokens per update": 4000, "updates": 500, "max_update": 500, "lr": [0.002], "dropout": 0.2}
CRITERIA = {
    "ce": {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1},
    "el": {"_name": "label_smoothed_encouraging_loss", "label_smoothing": 0.1, "log_end": 0.5},
}


def a_result(arm, seed, scores=None, weights=None, **changes):
    """Scores of a run whose settings differ by `changes`, SECTION__NAME=value."""
    sections = {"evaluation": dict(EVALUATION), "training": dict(TRAINING), "criterion": dict(CRITERIA[arm])}
    for path, value in changes.items():
        section, name = path.split("__")
        sections[section][name] = value
    sections["evaluation"]["checkpoints_sha256"] = {"checkpoint10.pt": f"{arm}{seed}"}
    return sample_result(arm, seed, scores=scores or {}, weights_sha256=weights or f"{arm}{seed}", **sections)


class Bench:
    """A folder of prepared data and of runs that were never trained but have translations and scores.json."""

    def __init__(self, folder, references):
        self.folder, self.references = folder, references
        self.data = sample_data(folder / "data", {"en": references}).folder

    def run(self, arm, seed, hypotheses, work="", **changes):
        run = sample_run(self.folder / work / f"{arm}.seed{seed}", self.data, arm, seed)
        write_lines(run.folder / "test.en", hypotheses)
        a_result(arm, seed, {"test": scoring.score(hypotheses, self.references, "en")}, **changes).write(run.folder)
        return run


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, draw_references(np.random.default_rng(5), 20))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Run sacreBLEU's tests with 199 samples instead of 1,000 and 10,000."""
    monkeypatch.setattr(significance, "PairedTest", functools.partial(PairedTest, n_samples=199))


def test_a_known_difference_is_significant_over_sentences_and_over_seeds(tmp_path):
    rng = np.random.default_rng(2)
    bench = Bench(tmp_path, draw_references(rng, 60))
    sides = [
        [bench.run(arm, seed, corrupt(rng, bench.references, rate)) for seed in (1, 2, 3)]
        for arm, rate in (("ce", 0.35), ("el", 0.15))
    ]
    found = compare(*sides)
    for metric, result in found.tests["test"].items():
        assert result.p < 0.05 and result.gain > 5, metric
        assert result.verdict("ce", "el").startswith("el is better than ce")
        for seed in (1, 2, 3):
            assert set(result.sentence_p[seed]) == {"bs", "ar"} and max(result.sentence_p[seed].values()) < 0.05
    swapped = compare(*sides[::-1]).tests["test"]["sacreBLEU"]
    assert swapped.gain == pytest.approx(-found.tests["test"]["sacreBLEU"].gain)
    assert swapped.verdict("el", "ce").startswith("ce is worse than el")
    assert found.markdown().count("| sacreBLEU | ") == 4 and "**el is better than ce: +" in found.markdown()
    for metric in ("sacreBLEU", "chrF++", "TER"):
        assert f"{metric} signature: `nrefs:1|case:" in found.markdown()


# --- what is refused


def pair_of(bench, **changes):
    rng = np.random.default_rng(6)
    lines = [corrupt(rng, bench.references, 0.3) for _ in range(2)]
    return [bench.run("ce", 1, lines[0])], [bench.run("el", 1, lines[1], **changes)]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"evaluation__data_sha256": "e" * 64}, f"data_sha256: {EVALUATION['data_sha256']} or {'e' * 64}"),
        ({"evaluation__beam": 4}, "beam: 5 or 4"),
        ({"evaluation__lenpen": 0.6}, "lenpen: 1.0 or 0.6"),
        ({"evaluation__average": 5}, "average: 10 or 5"),
        ({"evaluation__comet": "m"}, "comet: None or m"),
        ({"training__tokens per update": 8000}, "tokens per update: 4000 or 8000"),
        ({"training__lr": [0.001]}, "lr: [0.002] or [0.001]"),
        ({"training__max_update": 600}, "max_update: 500 or 600"),
        ({"training__clip_norm": 1.0}, "clip_norm: None or 1.0"),
    ],
)
def test_settings_in_which_runs_differ_are_named(changes, expected):
    assert differences([a_result("ce", 1), a_result("el", 2, **changes)]) == [expected]


def test_runs_that_differ_in_more_than_the_criterion_are_refused_unless_allowed(bench):
    runs = pair_of(bench, evaluation__beam=4)
    with pytest.raises(UserError, match="the runs differ in beam: 5 or 4 .*--allow-differences"):
        compare(*runs)
    found = compare(*runs, allow_differences=True)
    assert found.differences == ["beam: 5 or 4"]
    assert found.markdown().startswith("**These runs differ in more than the criterion**: beam: 5 or 4.")


def test_updates_that_overflowed_in_fp16_do_not_count_as_a_difference():
    assert differences([a_result("ce", 1), a_result("el", 1, training__updates=498)]) == []


def test_runs_of_different_length_are_refused():
    """A training by hand that was killed does not say so."""
    long, short = a_result("ce", 1), a_result("el", 1, training__updates=250)
    with pytest.raises(UserError, match="updates: 250 to 500"):
        check_comparable([[long], [short]], False)
    patient = [each.model_copy(update={"options": {**each.options, "patience": 3}}) for each in (long, short)]
    assert check_comparable([patient[:1], patient[1:]], True) == []
    assert check_comparable([[long], patient[1:]], True) == ["updates: 250 to 500"]


def test_a_difference_far_into_a_long_value_counts_but_1_equals_1_0():
    long = ["0.001"] * 50
    first = a_result("ce", 1, training__lr=long, training__dropout=1)
    (line,) = differences([first, a_result("ce", 2, training__lr=[*long[:-1], "0.1"], training__dropout=1.0)])
    assert line.startswith("lr: ")


def test_two_seeds_with_the_same_model_are_named(bench):
    runs = [
        [bench.run(arm, seed, bench.references, weights="w" if arm == "el" else "") for seed in (1, 2)]
        for arm in CRITERIA
    ]
    with pytest.raises(UserError, match="seed: el.seed1 and el.seed2 are the same model"):
        compare(*runs)
    assert len(compare(*runs, allow_differences=True).differences) == 1


def test_scores_with_other_signatures_are_refused(bench):
    baseline, candidate = pair_of(bench)
    path = candidate[0].folder / "scores.json"
    path.write_text(path.read_text().replace("|version:", "|version:1."))
    with pytest.raises(UserError, match="the runs differ in sacreBLEU signature: nrefs"):
        compare(baseline, candidate)


def test_runs_of_one_side_that_differ_in_the_criterion_are_refused(bench):
    baseline, candidate = pair_of(bench)
    candidate.append(bench.run("el", 2, bench.references, criterion__log_end=0.75))
    with pytest.raises(UserError, match=r"differ in log_end: 0.5 or 0.75"):
        compare(baseline, candidate)
    with pytest.raises(UserError, match="differ in _name: label_smoothed_cross_entropy or label_smoothed_enc"):
        compare([baseline[0], candidate[1]], [candidate[0]])


def test_a_seed_twice_on_a_side_and_a_run_on_both_sides_are_refused(bench):
    baseline, candidate = pair_of(bench)
    again = bench.run("ce", 1, bench.references, work="again")
    for side in ([*baseline, baseline[0]], [*baseline, again]):
        with pytest.raises(UserError, match=f"{side[1].folder}: seed 1 appears twice among the baseline runs"):
            compare(side, candidate)
    with pytest.raises(UserError, match=f"{baseline[0].folder}: .*both"):
        compare(baseline, baseline)


def test_two_sides_of_one_arm_have_different_names(bench):
    baseline, _ = pair_of(bench)
    other = bench.run("ce", 2, bench.references)
    found = compare(baseline, [other])
    assert (found.baseline, found.candidate) == ("ce.seed1", "ce.seed2")
    again = bench.run("ce", 1, bench.references, work="again")
    found = compare(baseline, [again])
    assert found.baseline != found.candidate and found.candidate.endswith("again/ce.seed1")


def test_a_metric_that_one_run_lacks_is_left_out(bench):
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


def spoil_score(run):
    path = run.folder / "scores.json"
    content = read_json(path)
    content["scores"]["test"]["TER"]["score"] = float("nan")
    path.write_text(json.dumps(content))


def spoil_version(run):
    path = run.folder / "scores.json"
    path.write_text(json.dumps({**read_json(path), "format": 3}))


def spoil_translation(run):
    path = run.folder / "test.en"
    path.write_text(path.read_text().replace("w1", "v", 3))


def spoil_reference(run):
    path = run.data / "text" / "test.en"
    path.write_text(path.read_text().replace("w1", "<<unk>>", 1))


def spoil_data(run):
    """Let the candidate have been scored on other data than the baseline, although the references are the same."""
    path = run.folder / "scores.json"
    content = read_json(path)
    write_json(path, {**content, "evaluation": {**content["evaluation"], "data_sha256": "0" * 64}})


SPOILED = {
    "unscored": (lambda run: (run.folder / "scores.json").unlink(), ["el.seed1", "encourage-mt evaluate"]),
    "broken": (lambda run: (run.folder / "scores.json").write_text("{"), ["scores.json: not JSON"]),
    "nan": (spoil_score, ["scores.json: scores.test.TER.score", "nan"]),
    "newer": (spoil_version, ["scores.json: format", "encourage-mt evaluate"]),
    "changed": (spoil_translation, ["el.seed1", "translation of test", "encourage-mt evaluate"]),
    "short": (lambda run: (run.folder / "test.en").write_text("a\n"), ["test.en: 1 hypotheses for 20 references"]),
    "empty": (lambda run: (run.folder / "test.en").write_text(""), ["test.en: empty"]),
    "gone": (lambda run: (run.folder / "test.en").unlink(), ["test.en"]),
    "other data": (spoil_data, ["not the data that el.seed1 was scored on"]),
    "unk": (spoil_reference, ["reference line 1 contains <<unk>>"]),
}


@pytest.mark.parametrize("spoil, expected", SPOILED.values(), ids=SPOILED)
def test_compare_refuses_damaged_runs_in_one_line(spoil, expected, bench, capsys):
    baseline, candidate = pair_of(bench)
    spoil(candidate[0])
    error = refused(capsys, "compare", "--baseline", baseline[0].folder, "--candidate", candidate[0].folder)
    assert all(part in error for part in expected), error


def test_markup_in_the_name_of_an_arm_does_not_break_the_table(bench):
    found = compare(*pair_of(bench))
    lines = found.model_copy(update={"baseline": "a|b", "candidate": "<i>"}).markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in table} == {8}
    assert "<i>" not in "\n".join(lines).replace(r"\<i>", "")


def test_a_comparison_is_read_back_as_it_was_written(tmp_path):
    metric = MetricComparison("sacreBLEU", {1: 30.0, 2: 31.0}, {1: 31.0, 2: 33.0}, {1: {"bs": 0.1, "ar": 0.2}})
    sides = {"baseline": "ce", "candidate": "el", "signatures": {"sacreBLEU": "nrefs:1"}, "differences": []}
    comparison = Comparison(tests={"test": {"sacreBLEU": metric}}, **sides)
    path = tmp_path / "comparison.json"
    write_record(path, comparison)
    assert read_record(path, Comparison) == comparison
    content = read_json(path)
    content["tests"]["test"]["sacreBLEU"].update(gain=99.0, p=0.5)
    write_json(path, {name: value for name, value in content.items() if name != "format"})
    assert read_record(path, Comparison) == comparison, "of version 0.1; everything over seeds is computed again"
    for key, value in (("baseline", {"1": "x"}), ("baseline", {}), ("candidate", {"a": 1.0})):
        write_json(
            path,
            {
                **content,
                "tests": {
                    "test": {
                        "sacreBLEU": {
                            "metric": "sacreBLEU",
                            "baseline": {"1": 1.0},
                            "candidate": {"1": 1.0},
                            key: value,
                        }
                    }
                },
            },
        )
        with pytest.raises(UserError, match=f"comparison.json: tests.test.sacreBLEU.*{'' if value == {} else key}"):
            read_record(path, Comparison)
