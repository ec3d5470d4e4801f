"""Test `encourage-mt run` and `evaluate`: seeds, interruptions, runs of plain fairseq-train, and bad input."""

import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import CE, refused, run

from encourage_mt import processes
from encourage_mt.cli import main
from encourage_mt.environment import USER_DIR
from encourage_mt.evaluation import evaluate, scoring
from encourage_mt.evaluation.results import Result
from encourage_mt.files import read_json, write_json
from encourage_mt.plugin.checkpoints import find_corruption, load_checkpoint
from encourage_mt.training.run_folder import open_run, read_log

RUNS = ("ce.seed1", "el.seed1", "ce.seed2", "el.seed2")


def epochs(log):
    return [record["epoch"] for record in read_log(log) if "train_loss" in record]


# --- seeds in one command


def test_an_interrupted_run_says_so_and_the_next_resumes_it(work):
    assert work.interrupted.returncode == 130
    last = work.interrupted.output.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("encourage-mt: interrupted")
    assert "Stopped and saved: ce.seed1." in work.interrupted.output
    log = work.folder / "ce.seed1" / "train.log"
    assert epochs(log) == [1, 2, 3], "each epoch once, over both processes"
    assert "Loaded checkpoint" in log.read_text()
    assert "Loaded checkpoint" not in (work.folder / "el.seed1" / "train.log").read_text()


def test_all_arms_and_seeds_are_trained_scored_and_compared(work):
    assert {path.parent.name for path in work.folder.glob("*/scores.json")} == set(RUNS)
    for name in RUNS:
        folder = work.folder / name
        assert (folder / "train.done").exists() and epochs(folder / "train.log") == [1, 2, 3]
        result = Result.read(folder)
        assert f"{result.arm}.seed{result.seed}" == name and int(result.options["seed"]) == result.seed
        assert set(result.evaluation.checkpoints_sha256) == {"checkpoint2.pt", "checkpoint3.pt"}
        assert result.provenance["data_sha256"] == result.evaluation.data_sha256
        commands = [start["command"] for start in result.provenance["starts"]]
        assert commands and all(re.match(r"OMP_NUM_THREADS=1 fairseq-train ", command) for command in commands)
        assert set(result.translations_sha256) == {"valid.en", "test.en"}
        assert {"torch", "sacrebleu", "encourage-mt"} <= set(result.versions)
        assert load_checkpoint(folder / "average.pt")["cfg"]["common"]["seed"] == result.seed
        assert [alarm[:11] for alarm in result.alarms] == ["not trained"], "BLEU is below 1 after 3 epochs"
        assert 10_000 < result.parameters < 30_000
        assert f"**{name}: not trained" in work.done.stdout
    assert len({Result.read(work.folder / name).weights_sha256 for name in RUNS}) == 4
    assert "**No verdict: ce.seed1: not trained" in work.done.stdout and "t-test" not in work.done.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in work.done.stdout.splitlines()]
    assert ["el", "test", "2"] in [row[:3] for row in rows], "the table over arms"
    assert ["A paper", "30.00 ± 0.10", "31.00 ± 0.10", "+1.00"] in rows
    for words in ("ce.seed1 valid", "el.seed2 test", "valid BLEU", "/3 epochs", "all trainings"):
        assert words in work.done.stderr, "the progress"
    assert "DEBUG" not in work.done.output and "Warning" not in work.done.output


def test_scores_are_those_of_the_whole_translations(work):
    result = Result.read(work.folder / "el.seed2")
    for split, count in (("valid", 20), ("test", 21)):
        hypotheses = (work.folder / "el.seed2" / f"{split}.en").read_text(encoding="utf-8").split("\n")[:-1]
        references = (work.folder / "data" / "text" / f"{split}.en").read_text(encoding="utf-8").split("\n")[:-1]
        assert len(hypotheses) == count and "▁" not in "".join(hypotheses)
        assert result.scores[split] == scoring.score(hypotheses, references, "en")
    command = run(
        "sacrebleu", work.folder / "data/text/test.en", "-i", work.folder / "el.seed2/test.en", "-m", "bleu", "-w", 10
    )
    assert json.loads(command.stdout)["score"] == pytest.approx(result.scores["test"]["sacreBLEU"].score, abs=1e-9)


def test_a_second_run_skips_all_steps(work, capsys):
    before = {path: path.stat().st_mtime_ns for name in RUNS for path in (work.folder / name).rglob("*.*")}
    argv = ["run", work.recipe, "--work-dir", work.folder, "--seeds", 2, 1, "--arms", "el", "ce"]
    main([str(word) for word in argv])
    output = capsys.readouterr().out
    for name in RUNS:
        assert f"{name}: trained already" in output and f"{name}: scored already" in output
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"run.json", ".lock"}
    assert (work.folder / "report-el-ce" / "report.html").exists()


def test_a_run_of_other_data_does_not_count_as_done(work, tmp_path, capsys):
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


def test_a_folder_of_plain_fairseq_train_is_evaluated(el_run, tiny, tmp_path, capsys):
    folder = tmp_path / "by hand"
    shutil.copytree(el_run, folder)
    error = refused(capsys, "evaluate", folder)
    assert f"{folder}: has 2 epoch checkpoints, 10" in error

    argv = ["evaluate", str(folder), "--average", "2", "--beam", "1"]
    main(argv)
    result = Result.read(folder)
    assert (result.arm, result.seed) == ("label_smoothed_encouraging_loss", 1)
    assert (result.evaluation.average, result.evaluation.beam, result.evaluation.lenpen) == (2, 1, 1.0)
    assert result.training["tokens per update"] == 1000 and result.training["lr"] == [0.003]
    assert result.criterion["log_end"] == 0.5
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert ["by hand", "test", f"{result.scores['test']['sacreBLEU'].score:.2f}"] in rows
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == evaluate.UNFINISHED]
    main(argv)
    assert "by hand: scored already" in capsys.readouterr().out
    (folder / "average.pt").unlink()
    main(argv)
    assert (folder / "average.pt").exists() and Result.read(folder) == result


def test_an_lstm_with_an_old_optimizer_is_evaluated_and_reported_without_diagnostics(tiny, tmp_path, capsys):
    dims = [f"--{part}-{name}=16" for part in ("encoder", "decoder") for name in ("embed-dim", "hidden-size")]
    options = ["--arch=lstm", *dims, "--decoder-out-embed-dim=16", "--optimizer=adafactor", "--lr=0.01", *CE]
    folders = [str(tmp_path / name) for name in ("a", "b")]
    argv = ["fairseq-train", tiny[1] / "data-bin", "--save-dir", folders[0], "--max-tokens=1000", "--cpu"]
    run(*argv, *options, "--max-epoch=1", "--user-dir", USER_DIR)
    main(["evaluate", folders[0], "--average", "1", "--beam", "1"])
    shutil.copytree(*folders)
    training = Result.read(tmp_path / "a").training
    assert (training["optimizer"], training["arch"], training["encoder_hidden_size"]) == ("adafactor", "lstm", 16)
    assert not {"seed", "save_dir", "data", "label_smoothing"} & set(training)
    report = str(tmp_path / "report")
    main(["report", "--allow-differences", "--baseline", folders[0], "--candidate", folders[1], "--output", report])
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Where does it help?" in page and "Diagnostics" not in page


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
    """All files except the lock, which names its holder, and the logs, which describe failures."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log" and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


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


def flipped_bit(folder):
    path = folder / "checkpoints" / "checkpoint2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_dictionary(folder):
    """For data without a recorded checksum, as if fairseq-train was run by hand."""
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", {**record, "provenance": {}})
    with open(folder.parent / "data" / "data-bin" / "dict.en.txt", "a") as dictionary:
        dictionary.write("word 1\n")
    (folder / "scores.json").unlink()


def data_gone(folder):
    shutil.rmtree(folder.parent / "data")


REFUSED = {
    "no checkpoints": (no_checkpoints, [], "checkpoints: has 0 epoch checkpoints, 2"),
    "few": (None, ["--average", 10], "checkpoints: has 3 epoch checkpoints, 10"),
    "zero": (None, ["--average", 0], "--average"),
    "lenpen": (None, ["--lenpen", "nan"], "--lenpen"),
    "nan": (nan_parameters, [], "checkpoint2.pt: encoder.embed_tokens.weight"),
    "half": (half_a_checkpoint, [], "checkpoint3.pt"),
    "flipped bit": (flipped_bit, [], "checkpoint2.pt"),
    "dictionary": (another_dictionary, [], "dict.en.txt: "),
    "no data": (data_gone, [], f"{os.sep}data does not exist"),
    "other data": (None, ["--data", "none"], "none does not exist"),
    "comet": (None, ["--comet", "none.ckpt"], "comet"),
}


@pytest.mark.parametrize("spoil, options, expected", REFUSED.values(), ids=REFUSED)
def test_evaluate_refuses_in_one_line_and_changes_nothing(spoil, options, expected, copy, capsys):
    if spoil:
        spoil(copy)
    before = content(copy)
    assert expected in refused(capsys, "evaluate", copy, *options)
    assert content(copy) == before


def test_a_folder_without_a_training_is_refused(tmp_path, capsys):
    assert "none: no such run directory" in refused(capsys, "evaluate", tmp_path / "none")
    assert f"{tmp_path}: " in refused(capsys, "evaluate", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def translated(monkeypatch):
    """translated(change): translations are the references after `change`, without fairseq-generate."""

    def with_change(change):
        def translate(run, data, checkpoint, engine):
            lines = {split: data.read_text(split, data.target) for split in data.subsets}
            return {split: change(lines[split]) for split in lines}

        monkeypatch.setattr(evaluate, "translate_sets", translate)

    return with_change


def reference_with_unknown_words(folder):
    path = folder.parent / "data" / "text" / "test.en"
    path.write_text(path.read_text(encoding="utf-8").replace(" the ", " <<unk>> "), encoding="utf-8")


@pytest.mark.parametrize(
    "change, spoil, expected",
    [
        (lambda lines: [], None, "valid.en: empty file"),
        (lambda lines: [""] * len(lines), None, "the hypotheses are empty"),
        (lambda lines: lines[:-1], None, "19 hypotheses for 20 references"),
        (lambda lines: lines, reference_with_unknown_words, "<<unk>>: it comes from fairseq-generate's T- lines"),
    ],
    ids=["empty", "blank", "unequal", "unk"],
)
def test_translations_that_cannot_be_scored_leave_earlier_scores_as_they_are(
    change, spoil, expected, copy, translated, capsys
):
    translated(change)
    if spoil:
        spoil(copy)
    before = content(copy)
    assert expected in refused(capsys, "evaluate", copy, "--beam", 1)
    assert content(copy) == before and not (copy / evaluate.UNFINISHED).exists()


def test_a_score_that_is_not_a_number_leaves_earlier_scores_as_they_are(copy, translated, capsys, monkeypatch):
    class Broken(scoring.CHRF):
        def corpus_score(self, hypotheses, references):
            result = super().corpus_score(hypotheses, references)
            result.score = math.nan
            return result

    translated(lambda lines: lines)
    monkeypatch.setattr(scoring, "CHRF", Broken)
    before = content(copy)
    assert "chrF2++ is not a number" in refused(capsys, "evaluate", copy, "--beam", 1)
    assert content(copy) == before


def test_a_damaged_average_is_made_again(copy, translated, capsys):
    translated(lambda lines: lines)
    whole = (copy / "average.pt").stat().st_size
    os.truncate(copy / "average.pt", whole // 2)
    main(["evaluate", str(copy)])
    assert "scored already" not in capsys.readouterr().out
    assert find_corruption(copy / "average.pt") is None


def test_comet_gets_sources_translations_and_references(copy, translated, monkeypatch, tmp_path):
    """Each in its place: COMET does not notice if two are swapped. With two GPUs, it would start the command twice."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def comet(model, *texts, gpus):
        asked.append((*texts, gpus))
        return scoring.Score(score=0.5, signature="s", length_ratio=None)

    monkeypatch.setattr(scoring, "comet", comet)
    monkeypatch.setattr(scoring, "comet_signature", lambda model: "s")
    translated(lambda lines: [line.upper() for line in lines])
    main(["evaluate", str(copy), "--comet", str(tmp_path / "model.ckpt")])
    source, target = (
        (tmp_path / "data/text" / f"test.{x}").read_text(encoding="utf-8").splitlines() for x in ("de", "en")
    )
    assert asked[-1] == (source, [line.upper() for line in target], target, 1)
    assert Result.read(copy).scores["test"]["COMET"].score == 0.5


def test_a_run_is_scored_again_after_another_beam_or_if_a_translation_was_replaced(copy, translated, capsys):
    translated(lambda lines: lines)

    def scored_already(*options):
        main(["evaluate", str(copy), *options])
        return "ce.seed1: scored already" in capsys.readouterr().out

    assert scored_already()
    assert not scored_already("--beam", "1")
    result = Result.read(copy)
    assert result.evaluation.beam == 1 and result.scores["test"]["sacreBLEU"].score == pytest.approx(100)
    assert scored_already("--beam", "1")
    (copy / "test.en").write_text("another\n" * 21, encoding="utf-8")
    assert not scored_already("--beam", "1") and Result.read(copy) == result
    (copy / "valid.en").unlink()
    assert not scored_already("--beam", "1")
    shutil.copy(copy / "checkpoints" / "checkpoint3.pt", copy / "checkpoints" / "checkpoint2.pt")
    assert not scored_already("--beam", "1")


def test_another_average_than_the_scored_one_is_refused_and_scored_again(copy, translated, capsys):
    """scripts/average_checkpoints.py may have written it."""
    translated(lambda lines: lines)
    scored = Result.read(copy)
    shutil.copy(copy / "checkpoints" / "checkpoint1.pt", copy / "average.pt")
    assert "average.pt: is not the model that was scored" in refused(capsys, "export", copy, "--output", copy / "out")
    main(["evaluate", str(copy)])
    assert "scored already" not in capsys.readouterr().out
    assert Result.read(copy).weights_sha256 == scored.weights_sha256
    assert evaluate.evaluated_checkpoint(open_run(copy)).exists()


def test_a_run_that_was_scored_before_its_training_ended_has_an_alarm(copy, translated, capsys):
    translated(lambda lines: lines)
    (copy / "train.done").rename(copy / "later")
    for is_unfinished in (True, False):
        main(["evaluate", str(copy)])
        assert ("scored before the training ended" in Result.read(copy).alarms) == is_unfinished
        assert "scored already" not in capsys.readouterr().out
        if is_unfinished:
            (copy / "later").rename(copy / "train.done")


def test_parameters_that_layers_share_count_once(copy):
    model = load_checkpoint(copy / "checkpoints" / "checkpoint3.pt")["model"]
    copies = {name: value.half() for name, value in model.items()}  # as fairseq saves them in half precision
    assert evaluate.count_parameters(copies) == evaluate.count_parameters(model) == Result.read(copy).parameters


def test_scores_of_version_0_1_are_read_and_replaced(copy, translated, capsys):
    result = read_json(copy / "scores.json")
    options = " ".join(f"--{name} '{value}'" for name, value in result["options"].items())
    for name in ("format", "options", "translations_sha256", "weights_sha256", "diagnostics", "curve"):
        del result[name]
    write_json(copy / "scores.json", {**result, "command": f"fairseq-train data {options}"})
    before = Result.read(copy)
    assert before.options["criterion"] == "label_smoothed_cross_entropy" and not before.translations_sha256
    translated(lambda lines: lines)
    main(["evaluate", str(copy)])
    assert Result.read(copy).translations_sha256


def test_if_fairseq_generate_fails_its_last_line_is_shown(copy, capsys):
    for path in (copy.parent / "data" / "data-bin").glob("valid.*"):
        path.unlink()
    before = content(copy)
    error = refused(capsys, "evaluate", copy, "--beam", 1)
    log = copy / "valid.generate.log"
    assert "fairseq-generate failed with exit code 1: FileNotFoundError" in error and f"(log: {log})" in error
    assert content(copy) == before


def test_a_run_in_use_by_another_process_is_refused(copy, capsys, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    with processes.locked(copy):
        assert f"{copy}: in use" in refused(capsys, "evaluate", copy, "--beam", 1)
