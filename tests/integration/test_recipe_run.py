"""`encourage-mt run` and the scripts around it, as a user drives them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run, write_recipe


def table_rows(output):
    return [line for line in output.splitlines() if line.startswith(("| ce.seed", "| el.seed"))]


def test_a_recipe_runs_to_a_report_and_a_second_run_has_nothing_to_do(tmp_path):
    recipe, work = write_recipe(tmp_path), tmp_path / "work"
    first = run("encourage-mt", "run", recipe, "--work-dir", work)
    table = table_rows(first.stdout)
    assert [row.split(" | ")[:2] for row in table] == [
        [f"| {arm}.seed1", split] for arm in ("ce", "el") for split in ("valid", "test")
    ]
    assert "sacreBLEU signature: `nrefs:1|case:mixed|" in first.stdout and str(work) in first.stdout
    assert "Not enough evidence" in first.stdout and (work / "report-ce-el" / "report.html").exists()

    second = run("encourage-mt", "run", recipe, "--work-dir", work)
    for words in ("is prepared already", "ce.seed1: trained already", "el.seed1: scored already"):
        assert words in second.stdout
    assert table_rows(second.stdout) == table

    results = [json.loads((work / f"{arm}.seed1" / "scores.json").read_text()) for arm in ("ce", "el")]
    options = [json.loads((work / f"{arm}.seed1" / "run.json").read_text())["options"] for arm in ("ce", "el")]
    assert options[1]["criterion"] == "label_smoothed_encouraging_loss" and options[1]["log-end"] == 0.5
    changed = {name: options[1][name] for name in options[1] if options[0].get(name) != options[1][name]}
    assert list(changed) == ["criterion", "log-end"], "the arms differ by criterion alone"
    assert results[0]["evaluation"]["data_sha256"] == results[1]["evaluation"]["data_sha256"]

    hypothesis, reference = work / "el.seed1/test.en", work / "data/text/test.en"
    for options, name in (
        (("-m", "bleu"), "sacreBLEU"),
        (("-m", "chrf", "--chrf-word-order", "2"), "chrF++"),
        (("-m", "ter"), "TER"),
    ):
        told = json.loads(run("sacrebleu", reference, "-i", hypothesis, *options, "-w", "10").stdout)
        ours = results[1]["scores"]["test"][name]
        assert told["score"] == pytest.approx(ours["score"], abs=1e-9)
        assert told["signature"] == ours["signature"]

    again = run("encourage-mt", "run", write_recipe(tmp_path, beam=1), "--work-dir", work).stdout
    assert "trained already" in again and "scored already" not in again, "another beam is another score"

    other = write_recipe(tmp_path, subword={"vocab_size": 250, "model_type": "bpe"})
    error = run("encourage-mt", "run", other, "--work-dir", work, code=2).stderr
    assert "prepared with other options" in error
    other = write_recipe(tmp_path, train={**TINY["train"], "lr": 0.001})
    error = run("encourage-mt", "run", other, "--work-dir", work, code=2).stderr
    assert "ce.seed1: already contains a training with different lr" in error


def test_command_line_mistakes_are_refused_in_one_line(tmp_path):
    recipe = write_recipe(tmp_path)
    for options, expected in (
        (["--arms", "ce", "fl"], "--arms: the recipe has no arm fl; it has ce, el"),
        (["--parallel", "0"], "argument --parallel: must be a whole number from 1 on, got '0'"),
        (["--seeds=-1"], "argument --seeds: must be a whole number from 0 on, got '-1'"),
    ):
        error = run("encourage-mt", "run", recipe, "--work-dir", tmp_path / "work", *options, code=2).stderr
        assert expected in error and error.count("\n") == 1
    assert "No such file" in run("encourage-mt", "run", tmp_path / "none.yaml", code=2).stderr


def test_without_fairseq_one_line_tells(tmp_path):
    """A Python beside which fairseq's commands are missing: the same interpreter, linked into an empty folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    code = (
        f"import sys; sys.executable = {str(tmp_path / 'bin' / 'python')!r}; from encourage_mt.cli import main; main()"
    )
    argv = [sys.executable, "-c", code, "run", write_recipe(tmp_path), "--work-dir", tmp_path / "work"]
    error = run(*argv, code=2).stderr
    assert "fairseq-preprocess is not installed" in error and error.strip().count("\n") == 0
    assert not (tmp_path / "work" / "data").exists()


# --- the scripts


def with_tools(folder, *left_out):
    """A folder for PATH with what the scripts need, without `left_out`."""
    folder.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "python3", "g++", "gcc"):
        found = shutil.which(tool)
        if tool not in left_out and found:
            (folder / tool).symlink_to(os.path.realpath(found))
    return folder


def quickstart(tmp_path, path, python):
    environment = {"PATH": str(path), "VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
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
    "body, left_out, expected",
    [
        ('echo "3.9"', (), "Python 3.9 is not supported"),
        (f'case "$2" in *venv*) exit 1;; esac; exec {sys.executable} "$@"', (), "apt-get install python3-venv"),
        ('case "$2" in *version*) echo 3.11;; esac', ("g++",), "apt-get install g++"),
        ('case "$2" in *version*) echo 3.11;; *Python.h*) exit 1;; esac', (), "apt-get install python3-dev"),
    ],
    ids=["unsupported Python", "no venv", "no compiler", "no headers"],
)
def test_what_the_machine_lacks_is_told_in_one_line(body, left_out, expected, tmp_path):
    done = quickstart(tmp_path, with_tools(tmp_path / "bin", *left_out), stub(tmp_path, body))
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.count("\n") == 1


def test_no_python_at_all_is_told(tmp_path):
    done = quickstart(tmp_path, with_tools(tmp_path / "bin"), "python-that-is-not-there")
    assert done.returncode == 2 and "not found; install Python" in done.stderr
