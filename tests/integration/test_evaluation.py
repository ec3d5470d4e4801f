"""`encourage-mt run` and `evaluate`: seeds, interruptions, runs of plain fairseq-train, and bad input."""

import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run

from encourage_mt.cli import main
from encourage_mt.evaluation import evaluate, scoring
from encourage_mt.files import read_json, write_json
from encourage_mt.plugin.checkpoints import load_checkpoint
from encourage_mt.training.run_folder import read_log

RUNS = ("ce.seed1", "el.seed1", "ce.seed2", "el.seed2")


def epochs(log):
    return [record["epoch"] for record in read_log(log) if "train_loss" in record]


# --- seeds in one command


def test_an_interrupted_run_says_so_and_the_next_resumes_it(work):
    assert work.interrupted.returncode == 130
    last = work.interrupted.output.replace("\r", "\n").strip().splitlines()[-1]
    assert last == "encourage-mt: interrupted; run it again to go on"
    log = work.folder / "ce.seed1" / "train.log"
    assert epochs(log) == [1, 2, 3], "each epoch once, over both processes"
    assert "Loaded checkpoint" in log.read_text()
    assert "Loaded checkpoint" not in (work.folder / "el.seed1" / "train.log").read_text()


def test_seeds_and_criteria_are_all_trained_scored_and_compared(work):
    assert {path.parent.name for path in work.folder.glob("*/scores.json")} == set(RUNS)
    for name in RUNS:
        folder = work.folder / name
        assert (folder / "train.done").exists() and epochs(folder / "train.log") == [1, 2, 3]
        result = read_json(folder / "scores.json")
        assert (f"{result['arm']}.seed{result['seed']}") == name
        assert f"--seed {result['seed']} " in result["command"]
        assert set(result["evaluation"]["checkpoints_sha256"]) == {"checkpoint2.pt", "checkpoint3.pt"}
        assert {"torch", "sacrebleu", "encourage-mt"} <= set(result["versions"])
        assert load_checkpoint(folder / "average.pt")["cfg"]["common"]["seed"] == result["seed"]
    assert "paired t-test over 2 seeds" in work.done.stdout
    assert "| el | test | 2 |" in work.done.stdout, "the table over arms"
    assert "| A paper | 30.00 ± 0.10 | 31.00 ± 0.10 | +1.00 |" in work.done.stdout
    for words in ("ce.seed1 valid", "el.seed2 test", "valid BLEU", "/3 epochs", "all trainings"):
        assert words in work.done.stderr, "the progress"
    assert "DEBUG" not in work.done.output and "Warning" not in work.done.output


def test_scores_are_those_of_the_translations_and_the_translations_whole(work):
    result = read_json(work.folder / "el.seed2" / "scores.json")
    for split, count in (("valid", 20), ("test", 21)):
        hypotheses = (work.folder / "el.seed2" / f"{split}.en").read_text(encoding="utf-8").split("\n")[:-1]
        references = (work.folder / "data" / "text" / f"{split}.en").read_text(encoding="utf-8").split("\n")[:-1]
        assert len(hypotheses) == count and "▁" not in "".join(hypotheses)
        assert result["scores"][split] == scoring.score(hypotheses, references, "en")


def test_a_second_run_of_all_has_nothing_to_do(work):
    before = {path: path.stat().st_mtime_ns for name in RUNS for path in (work.folder / name).rglob("*.*")}
    again = run("encourage-mt", "run", work.recipe, "--work-dir", work.folder, "--seeds", 2, 1, "--arms", "el", "ce")
    for name in RUNS:
        assert f"{name}: trained already" in again.stdout and f"{name}: scored already" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"run.json"}
    assert (work.folder / "report-el-ce" / "report.html").exists()


def test_a_run_whose_data_was_made_anew_from_other_options_is_not_taken_for_done(work, tmp_path, capsys):
    shutil.copytree(work.folder, tmp_path / "work", symlinks=True)
    data = tmp_path / "work" / "data"
    manifest = read_json(data / "manifest.json")
    manifest["checksums"]["dict.en.txt"] = "0" * 64
    write_json(data / "manifest.json", manifest)
    record = read_json(tmp_path / "work" / "ce.seed1" / "run.json")
    write_json(tmp_path / "work" / "ce.seed1" / "run.json", {**record, "data": str(data)})
    error = refused(capsys, "run", work.recipe, "--work-dir", tmp_path / "work", "--arms", "ce")
    assert "ce.seed1: already contains a training with different data" in error
    error = refused(capsys, "evaluate", tmp_path / "work" / "ce.seed1")
    assert "not the data that ce.seed1 was trained on, its checksum differs" in error


# --- evaluate.sh


@pytest.fixture
def evaluate_script(tmp_path):
    """evaluate_script(*options): scripts/evaluate.sh with an environment that it takes for installed."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "encourage-mt").symlink_to(Path(sys.executable).parent / "encourage-mt")
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes() + (ROOT / "scripts/constraints.txt").read_bytes())
    (venv / "installed").write_text(f"{ROOT} {digest.hexdigest()}  -\n")
    environment = {**os.environ, "VENV": str(venv)}
    return lambda *options, **kwargs: run("bash", ROOT / "scripts/evaluate.sh", *options, env=environment, **kwargs)


def test_a_folder_of_plain_fairseq_train_is_evaluated(el_run, tiny, evaluate_script, tmp_path):
    folder = tmp_path / "by hand"
    shutil.copytree(el_run, folder)
    error = evaluate_script(folder, code=2).stderr
    assert error == f"encourage-mt: error: {folder}: 2 epoch checkpoints found, 10 asked for\n"

    done = evaluate_script(folder, "--average", 2, "--beam", 1)
    result = read_json(folder / "scores.json")
    assert (result["arm"], result["seed"]) == ("label_smoothed_encouraging_loss", 1)
    assert {"average": 2, "beam": 1, "lenpen": 1.0}.items() <= result["evaluation"].items()
    assert result["training"]["tokens per update"] == 1000 and result["training"]["lr"] == [0.003]
    assert result["criterion"]["log_end"] == 0.5
    assert f"| by hand | test | {result['scores']['test']['sacreBLEU']['score']:.2f} |" in done.stdout
    reference = tiny[1] / "text" / "test.en"
    told = json.loads(run("sacrebleu", reference, "-i", folder / "test.en", "-m", "bleu", "-w", 10).stdout)
    assert told["score"] == pytest.approx(result["scores"]["test"]["sacreBLEU"]["score"], abs=1e-9)
    assert not list(folder.glob("*.tmp"))
    assert "by hand: scored already" in evaluate_script(folder, "--average", 2, "--beam", 1).stdout


# --- bad input


@pytest.fixture
def copy(work, tmp_path):
    """A copy of ce.seed1 and of its data."""
    shutil.copytree(work.folder / "data", tmp_path / "data")
    folder = tmp_path / "ce.seed1"
    shutil.copytree(work.folder / "ce.seed1", folder)
    write_json(folder / "run.json", {**read_json(folder / "run.json"), "data": str(tmp_path / "data")})
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_checkpoints(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()


def nan_parameters(folder):
    path = folder / "checkpoints" / "checkpoint2.pt"
    state = load_checkpoint(path)
    state["model"]["decoder.embed_tokens.weight"][5, 3] = math.nan
    torch.save(state, path)


def half_a_checkpoint(folder):
    path = folder / "checkpoints" / "checkpoint3.pt"
    path.write_bytes(path.read_bytes()[:5000])


def another_dictionary(folder):
    """Of data that tells no checksum, as where fairseq-train was run by hand."""
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", {**record, "provenance": {}})
    with open(folder.parent / "data" / "data-bin" / "dict.en.txt", "a") as dictionary:
        dictionary.write("word 1\n")
    (folder / "scores.json").unlink()


def data_gone(folder):
    shutil.rmtree(folder.parent / "data")


@pytest.mark.parametrize(
    "spoil, options, expected",
    [
        (no_checkpoints, [], "checkpoints: 0 epoch checkpoints found, 2 asked for"),
        (None, ["--average", 10], "checkpoints: 3 epoch checkpoints found, 10 asked for"),
        (None, ["--average", 0], "--average must be at least 1, got 0"),
        (None, ["--beam", 0], "--beam must be at least 1, got 0"),
        (nan_parameters, [], "checkpoint2.pt: encoder.embed_tokens.weight holds values that are no numbers"),
        (half_a_checkpoint, [], "checkpoint3.pt: not a checkpoint that can be loaded safely"),
        (another_dictionary, [], "dict.en.txt: "),
        (data_gone, [], "no data of `encourage-mt prepare` there (manifest.json); give its folder with --data"),
        (None, ["--data", "none"], "none: no data of `encourage-mt prepare` there"),
        (None, ["--comet", "none.ckpt"], "error: "),
    ],
    ids="no checkpoints,few,zero,beam,nan,half,dictionary,no data,other data,comet".split(","),
)
def test_evaluate_refuses_in_one_line_and_writes_nothing(spoil, options, expected, copy, capsys):
    if spoil:
        spoil(copy)
    before = content(copy)
    assert expected in refused(capsys, "evaluate", copy, *options)
    assert content(copy) == before


def test_a_folder_without_a_training_is_refused(tmp_path, capsys):
    assert "none: no such run directory" in refused(capsys, "evaluate", tmp_path / "none")
    assert f"{tmp_path}: no checkpoints there, so this is not the folder" in refused(capsys, "evaluate", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def translated(monkeypatch):
    """translated(change): translations are the references after `change`, without fairseq-generate."""

    def with_change(change):
        def translate(run, checkpoint, split, subset, text):
            lines = change((run.data / "text" / f"{split}.en").read_text(encoding="utf-8").split("\n")[:-1])
            evaluate.write_lines(run.folder / f"{split}.en", lines)
            return lines

        monkeypatch.setattr(evaluate, "translate", translate)

    return with_change


def reference_with_unknown_words(folder):
    path = folder.parent / "data" / "text" / "test.en"
    path.write_text(path.read_text(encoding="utf-8").replace(" the ", " <<unk>> "), encoding="utf-8")


@pytest.mark.parametrize(
    "change, spoil, expected",
    [
        (lambda lines: [], None, "valid.en: empty file"),
        (lambda lines: [""] * len(lines), None, "the hypotheses are empty"),
        (lambda lines: lines[:-1], None, "19 hypotheses for 20 references: they must pair line by line"),
        (lambda lines: lines, reference_with_unknown_words, "holds <<unk>>: it comes from fairseq-generate's T- lines"),
    ],
    ids=["empty", "blank", "unequal", "unk"],
)
def test_translations_that_cannot_be_scored_leave_no_scores(change, spoil, expected, copy, translated, capsys):
    translated(change)
    if spoil:
        spoil(copy)
    assert expected in refused(capsys, "evaluate", copy, "--beam", 1)
    assert not (copy / "scores.json").exists(), "not even those of the translations before"
    assert not [path for path in copy.rglob("*") if path.suffix in (".tmp", ".partial")]


def test_a_score_that_is_no_number_leaves_no_scores(copy, translated, capsys, monkeypatch):
    class Broken(scoring.CHRF):
        def corpus_score(self, hypotheses, references):
            result = super().corpus_score(hypotheses, references)
            result.score = math.nan
            return result

    translated(lambda lines: lines)
    monkeypatch.setattr(scoring, "CHRF", Broken)
    assert "chrF2++ is not a number" in refused(capsys, "evaluate", copy, "--beam", 1)
    assert not (copy / "scores.json").exists()


def test_another_beam_is_another_score_and_the_same_is_none(copy, translated, capsys):
    translated(lambda lines: lines)
    main(["evaluate", str(copy)])
    assert "ce.seed1: scored already" in capsys.readouterr().out
    main(["evaluate", str(copy), "--beam", "1"])
    assert "scored already" not in capsys.readouterr().out
    result = read_json(copy / "scores.json")
    assert result["evaluation"]["beam"] == 1
    assert result["scores"]["test"]["sacreBLEU"]["score"] == pytest.approx(100)


def test_when_fairseq_generate_fails_its_last_words_are_told(copy, capsys):
    for path in (copy.parent / "data" / "data-bin").glob("valid.*"):
        path.unlink()
    error = refused(capsys, "evaluate", copy, "--beam", 1)
    log = copy / "valid.generate.log"
    assert "fairseq-generate failed with exit code 1: FileNotFoundError" in error and f"(log: {log})" in error
    assert not (copy / "scores.json").exists()
