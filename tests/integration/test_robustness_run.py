"""Measure trained runs under noise and on foreign text by the real command: reuse, interruption, bad input, report."""

import shutil

import pytest
from conftest import refused

from encourage_mt.cli import main
from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.results import Result
from encourage_mt.evaluation.significance import holm
from encourage_mt.files import read_json, read_record, write_json
from encourage_mt.robustness import measure
from encourage_mt.robustness.measure import CLEAN, REVERSED, SHUFFLED, read_measured
from encourage_mt.robustness.summary import Summary
from encourage_mt.serving import export
from encourage_mt.training.run_folder import open_run

NOISE = 4 + 2 + 4 + 8 + 1 + 1 + 1  # characters, words, whole lines, attacks, total noise, other segmentation, clean


@pytest.fixture(scope="module")
def measured(el_run, tmp_path_factory):
    """(folders of two evaluated runs of one model, as if of two arms; summary of their measurement)."""
    work = tmp_path_factory.mktemp("robustness")
    first, second = work / "ce.seed1", work / "el.seed1"
    shutil.copytree(el_run, first)
    (work / "foreign.txt").write_text("eins zwei drei\n\nganz etwas anderes\nnoch ein Satz\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "LEAST_SHARE", 0.0)  # a model of two epochs has ties
        main(["evaluate", str(first), "--average", "2", "--beam", "1"])
        shutil.copytree(first, second)
        for folder, arm in ((first, "ce"), (second, "el")):
            Result.read(folder).model_copy(update={"arm": arm}).write(folder)
        command = ["robustness", str(first), str(second), "--strength", "50", "--ood", f"own={work / 'foreign.txt'}"]
        main([*command, "--output", str(work / "summary.json")])
    return command, read_record(work / "summary.json", Summary)


def runs_of(command):
    return [open_run(measure.Path(word)) for word in command[1:3]]


def test_the_record_has_all_noise_and_all_foreign_sets(measured):
    command, summary = measured
    for run in runs_of(command):
        record = read_measured(run)
        assert len(record.noise["test"]) == NOISE and set(record.foreign["test"]) == {CLEAN, SHUFFLED, REVERSED, "own"}
        assert "swapped characters 50%" in record.noise["test"] and "swapped characters 10%" not in record.noise["test"]
        lines = (run.folder / "robustness" / "test.clean.en").read_text(encoding="utf-8")
        assert lines == (run.folder / "test.en").read_text(encoding="utf-8"), "the translation that was scored"
        assert record.noise["test"][CLEAN].bleu == Result.read(run.folder).scores["test"]["sacreBLEU"].score
        assert set(record.noise["test"][CLEAN].consistency) <= {0.0, 100.0}
        assert record.noise["test"][CLEAN].changed == 0 < record.noise["test"]["upper case"].changed
        assert len(record.foreign["test"]["own"].scores["maximum logit"]) == 3
    assert summary.arms == ["ce", "el"]
    assert {gain.gain for gain in summary.gains("el")} == {0.0}, "one model does not differ from itself"
    assert {gain.bootstrap_p for gain in summary.gains("el")} == {1.0}


def test_a_second_run_measures_nothing_and_says_so(measured, capsys, monkeypatch):
    command, _ = measured
    monkeypatch.setattr(measure, "translate_pieces", None)
    monkeypatch.setattr(measure, "load", None)
    main(command)
    text = capsys.readouterr().out
    assert "ce.seed1: measured already" in text and "el.seed1: measured already" in text
    with pytest.raises(TypeError):  # the noise of another seed is measured
        main([*command, "--seed", "2"])
    assert "| attack, worst of 8 " in text and "comparisons: if nothing differed" in text


def test_only_what_was_chosen_is_returned(measured, monkeypatch):
    command, _ = measured
    run = runs_of(command)[0]
    choice = measure.choose(run.prepared(), [], [20, 50], 1, [])
    monkeypatch.setattr(measure, "perturbations", lambda percentages: {"upper case": lambda line, rng: line.upper()})
    record = measure.measure(run, choice)
    assert set(record.noise["test"]) == {CLEAN, "upper case", "other segmentation"}
    assert set(record.foreign["test"]) == {CLEAN, SHUFFLED, REVERSED}
    assert len(read_measured(run).noise["test"]) == NOISE, "the file keeps everything"


def test_a_foreign_file_is_measured_once_for_all_test_sets(measured, monkeypatch):
    command, _ = measured
    run = runs_of(command)[0]
    measurement = measure.Measurement(run, measure.Translator(export.exported(run)), measure.Choice([], [], 1, {}))
    monkeypatch.setattr(measure, "translate_pieces", None)
    lines = ["eins zwei drei", "ganz etwas anderes", "noch ein Satz"]
    monkeypatch.setattr(measurement, "_save", lambda: None)
    measurement._measure_foreign("another", "own", list(map(measurement._pieces, lines)))
    assert measurement.record.foreign["another"]["own"] == measurement.record.foreign["test"]["own"]


def test_noise_that_makes_a_sentence_too_long_is_left_out(measured, monkeypatch, capsys):
    command, _ = measured
    monkeypatch.setattr(measure, "POSITIONS", 1)
    main([*command[:2], *command[3:]])
    output = capsys.readouterr().out
    assert "ce.seed1 test, upper case: left out, a sentence is too long for the model" in output
    assert "clean: left out" not in output


def test_an_interrupted_run_resumes_with_the_noise_that_is_missing(measured, monkeypatch, capsys):
    command, _ = measured
    folder = runs_of(command)[0].folder
    (folder / "robustness.json").unlink()
    translate, calls = measure.translate_pieces, []

    def count(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return translate(*arguments)

    monkeypatch.setattr(measure, "translate_pieces", count)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 130 and len(read_json(folder / "robustness.json")["noise"]["test"]) == 5
    main(command)
    assert len(calls) == 1 + NOISE + 4, "one more than there are noisy and foreign sets: the one that was interrupted"
    resumed, other = map(read_measured, runs_of(command))
    assert resumed.noise == other.noise


def test_a_translation_of_noise_that_lost_lines_is_made_again(measured, capsys):
    command, _ = measured
    path = runs_of(command)[0].folder / "robustness" / "test.upper_case.en"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.split("\n")[0] + "\n", encoding="utf-8")
    main(command)
    assert path.read_text(encoding="utf-8") == whole and "ce.seed1: measured" not in capsys.readouterr().out


def test_the_report_has_a_section_if_all_runs_are_measured_and_corrects_all_its_p_values(measured, tmp_path):
    command, _ = measured
    options = ["--allow-differences", "--output", str(tmp_path / "report")]  # the models are the same
    main(["report", "--baseline", command[1], "--candidate", command[2], *options])
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    measures = read_record(tmp_path / "report" / "comparison.json", Comparison).measures
    everything = [each for kind in ("words", "confidence", "robustness") for each in measures[kind]["test"]]
    assert "Noise and out-of-distribution text" in page and f"corrected for all {len(everything)} " in page
    assert [each.bootstrap_holm_p for each in everything] == holm([each.bootstrap_p for each in everything])
    assert (tmp_path / "report" / "figures" / "gains_chrF_test.svg").exists()
    assert "attack, worst of 8" in (tmp_path / "report" / "tables" / "noise_test.csv").read_text(encoding="utf-8")


def test_what_was_measured_with_another_checkpoint_or_beam_does_not_count(measured, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(measured[0][1], folder)
    record = read_json(folder / "robustness.json")
    for change in ({"checkpoint_sha256": "0" * 64}, {"beam": record["beam"] + 1}):
        write_json(folder / "robustness.json", {**record, **change})
        assert read_measured(open_run(folder)) is None


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(measured, tmp_path, capsys):
    command, _ = measured
    folder = tmp_path / "run"
    shutil.copytree(command[1], folder)
    for path in ("robustness.json", "average.pt"):
        (folder / path).unlink()
    shutil.rmtree(folder / "robustness")
    source = open_run(folder).data / "text" / "test.de"
    (tmp_path / "empty").write_text("", encoding="utf-8")
    for option, words in (
        (["--strength", "0"], "--strength"),
        (["--strength", "101"], "percentage"),
        (["--ood", "file"], "NAME=FILE"),
        (["--ood", f"own={tmp_path / 'empty'}"], "empty file"),
        (["--ood", f"own={tmp_path / 'missing'}"], "missing"),
        (["--ood", f"own={source}"], "is the source of test itself"),
        (["--tests", "test2"], "--tests test2"),
        ([], "average.pt"),
    ):
        assert words in refused(capsys, "robustness", folder, *option)
    (folder / "scores.json").unlink()
    assert "encourage-mt evaluate" in refused(capsys, "robustness", folder)
    assert not (folder / "robustness").exists() and not (folder / "robustness.json").exists()
