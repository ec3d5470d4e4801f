"""Test `encourage-mt run` and the scripts around it, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, fake_venv, refused, run, write_recipe

from encourage_mt.errors import UserError
from encourage_mt.evaluation import scoring
from encourage_mt.training.run_folder import open_run, read_log
from encourage_mt.training.schedule import describe_schedules, schedule
from encourage_mt.training.train import make_run


def test_arms_of_a_run_differ_by_criterion_alone(work):
    options = [json.loads((work.folder / f"{arm}.seed1" / "run.json").read_text())["options"] for arm in ("ce", "el")]
    assert options[1]["criterion"] == "label_smoothed_encouraging_loss" and options[1]["log-end"] == 0.5
    changed = {name: options[1][name] for name in options[1] if options[0].get(name) != options[1][name]}
    assert list(changed) == ["criterion", "log-end"]
    assert (work.folder / "report-ce-el" / "report.html").exists()


LONGER = {"train": {**TINY["train"], "max-epoch": 3}}


@pytest.mark.parametrize(
    "changes, options, expected",
    [
        ({"subword": {"vocab_size": 250, "model_type": "bpe"}}, (), "subword"),
        (LONGER, ("--set", "lr=0.001"), "ce.seed1: already contains a training with different lr"),
        (LONGER, ("--set", "log-end=0.25"), "el.seed1: already contains a training with different log-end"),
    ],
    ids=["other data", "other training", "other criterion"],
)
def test_a_work_directory_of_other_options_is_refused_and_unchanged(changes, options, expected, work, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.*")}
    assert expected in refused(capsys, "run", write_recipe(tmp_path, **changes), "--work-dir", work.folder, *options)
    assert {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.*")} == before


def test_what_would_fail_after_the_trainings_fails_before(tmp_path, capsys, monkeypatch):
    command = ("run", write_recipe(tmp_path), "--work-dir", tmp_path / "work")
    folder = tmp_path / "work" / "report-ce-el"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert str(folder) in refused(capsys, *command)

    def missing(language):
        raise UserError(f"BLEU for {language} needs a tokenizer")

    monkeypatch.setattr(scoring, "metrics", missing)
    assert "needs a tokenizer" in refused(capsys, *command)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["report-ce-el"]


def test_the_updates_announced_are_those_of_the_training(work):
    run = open_run(work.folder / "el.seed1")
    epoch, whole, warmup = schedule(run, 1)
    made = [int(record["train_num_updates"]) for record in read_log(run.log) if "train_loss" in record]
    assert made == [epoch, 2 * epoch, 3 * epoch] and whole == made[-1] and warmup == 0
    assert f"ce, el: {epoch} updates per epoch, {whole} in all, 0 of them in warm-up" in work.done.stdout
    assert schedule(run, 2)[0] <= epoch + 2, "two processes with half the batch"
    with pytest.raises(UserError, match="max-tokens"):
        schedule(run, 200)  # 5 tokens each


def test_a_validation_sentence_that_is_longer_than_a_batch_is_refused_before_training(tiny, tmp_path):
    run = make_run(tiny[0], "el", 1, tiny[1], tmp_path, "fp32")
    longest = 1 + max(side.longest for side in run.prepared().lengths_in_pieces["valid"].values())
    fits, exceeds = (
        run.model_copy(update={"options": {**run.options, "max-tokens-valid": limit}})
        for limit in (longest, longest - 1)
    )
    assert schedule(fits, 1) == schedule(run, 1)
    with pytest.raises(UserError, match=f"--set max-tokens-valid={longest}"):
        schedule(exceeds, 1)


@pytest.mark.parametrize("side, language", [("source", "de"), ("target", "en")])
def test_a_validation_sentence_that_is_longer_than_the_positions_is_refused(side, language, tiny, tmp_path):
    run = make_run(tiny[0], "el", 1, tiny[1], tmp_path, "fp32")
    longest = run.prepared().lengths_in_pieces["valid"][language].longest

    def with_options(**options):
        return run.model_copy(update={"options": {**run.options, **options}})

    option = f"max-{side}-positions"
    with pytest.raises(UserError, match=f"has {longest} pieces, .* at most {longest - 1}; .* --set {option}=N"):
        schedule(with_options(**{option: longest}), 1)
    for options in ({option: longest + 1}, {option: longest, "skip-invalid-size-inputs-valid-test": True}):
        assert schedule(with_options(**options), 1) == schedule(run, 1)


@pytest.mark.parametrize("warmup, warns", [(6, False), (7, True)])
def test_a_long_warm_up_is_announced(warmup, warns, work):
    run = open_run(work.folder / "el.seed1")
    options = {name: value for name, value in run.options.items() if name != "max-epoch"}
    run = run.model_copy(update={"options": {**options, "max-update": 20, "warmup-updates": warmup}})
    (line,) = describe_schedules([run], 1)
    assert ("warmup-updates=3" in line) == warns


def test_a_training_that_ends_before_the_checkpoints_that_are_averaged_is_refused(work):
    run = open_run(work.folder / "el.seed1")
    epoch, _, _ = schedule(run, 1)
    options = {name: value for name, value in run.options.items() if name != "max-epoch"}
    enough, short = (run.model_copy(update={"options": {**options, "max-update": 2 * epoch - n}}) for n in (0, 1))
    assert describe_schedules([enough], 1)
    with pytest.raises(UserError, match=f"2 epochs are averaged, .* --set max-update={2 * epoch} or more"):
        describe_schedules([short], 1)


def test_training_data_that_was_removed_is_one_line(work, tmp_path):
    shutil.copytree(work.folder / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "data-bin").glob("train.*"):
        path.unlink()
    run = open_run(work.folder / "el.seed1", data=tmp_path / "data")
    with pytest.raises(UserError, match="fairseq cannot read it"):
        schedule(run, 1)


def test_an_architecture_fairseq_does_not_know_is_refused_before_anything_is_made(tmp_path, capsys):
    recipe = write_recipe(tmp_path, train={**TINY["train"], "arch": "transfromer"})
    assert "transfromer" in refused(capsys, "run", recipe, "--work-dir", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_without_the_engine_a_run_ends_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    argv = ("run", write_recipe(tmp_path), "--work-dir", tmp_path / "work", "--engine", "ctranslate2")
    assert "pip install ctranslate2" in refused(capsys, *argv)
    assert not (tmp_path / "work").exists()


def test_without_fairseqs_programs_a_run_ends_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "fairseq-preprocess is not installed" in refused(
        capsys, "run", write_recipe(tmp_path), "--work-dir", tmp_path / "work"
    )
    assert not (tmp_path / "work" / "data").exists()


# --- the scripts


def with_tools(folder, *left_out):
    """A folder for PATH with what the scripts need, without `left_out`."""
    folder.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "python3"):
        (folder / tool).symlink_to(os.path.realpath(shutil.which(tool)))
    if "g++" not in left_out:  # the scripts only look whether it is there
        (folder / "g++").symlink_to(os.path.realpath(shutil.which("true")))
    return folder


def quickstart(tmp_path, path, python):
    environment = {**os.environ, "PATH": str(path), "VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert not (tmp_path / "venv").exists()
    return done


def stub(tmp_path, body):
    path = tmp_path / "stub-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "words, command, corpus",
    [
        (["run.sh", "multi30k_de_en", "--seeds", "1", "2"], "run", "multi30k_de_en"),
        (["prepare.sh", "own", "--bitext", "a b.de", "b.en"], "prepare", "own"),
        (["quickstart.sh", "--parallel", "2"], "run", "bundled_de_en"),
    ],
)
def test_a_script_passes_the_recipe_and_the_options_and_ends_with_the_same_code(words, command, corpus, tmp_path):
    fake_venv(tmp_path / "venv", 'printf "%s\\n" "$@"; exit 3')
    script, *options = words
    options = options if script == "quickstart.sh" else options[1:]
    environment = {**os.environ, "VENV": str(tmp_path / "venv")}
    lines = run("bash", ROOT / "scripts" / script, *words[1:], code=3, env=environment).stdout.splitlines()
    assert lines == [command, str(ROOT / "examples" / corpus / "recipe.yaml"), *options]


@pytest.mark.parametrize(
    "body, left_out, expected",
    [
        ('echo "3.9"', (), "Python 3.9 is not supported"),
        (f'case "$2" in *venv*) exit 1;; esac; exec {sys.executable} "$@"', (), "apt-get install python3-venv"),
        ('case "$2" in *version*) echo 3.11;; esac', ("g++",), "apt-get install g++"),
        ('case "$2" in *version*) echo 3.11;; *Python.h*) exit 1;; esac', (), "apt-get install python3-dev"),
    ],
    ids=["unsupported Python", "no venv", "no compiler", "no headers"],
)
def test_script_names_a_missing_tool_in_one_line(body, left_out, expected, tmp_path):
    done = quickstart(tmp_path, with_tools(tmp_path / "bin", *left_out), stub(tmp_path, body))
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.count("\n") == 1


def test_script_names_a_missing_python(tmp_path):
    done = quickstart(tmp_path, with_tools(tmp_path / "bin"), "python-that-is-not-there")
    assert done.returncode == 2 and "not found; install Python" in done.stderr
