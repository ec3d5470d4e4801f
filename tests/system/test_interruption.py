"""Stop trainings and commands, kill them, and let them run out of disk.

KILLS=20 in the environment sets how often the tests at random moments kill (default: 1).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import EL, EVAL_BLEU, TINY, refused, run, write_recipe

from encourage_mt import processes
from encourage_mt.environment import USER_DIR
from encourage_mt.plugin import checkpoints, fault_tolerance
from encourage_mt.plugin.worker import die_with_parent
from encourage_mt.training.run_folder import read_log

KILLS = int(os.environ.get("KILLS", "1"))


def command(data, folder, *options):
    """fairseq-train on the tiny corpus: four short epochs, a validation of seconds after each second one."""
    argv = ["fairseq-train", data / "data-bin", "--user-dir", USER_DIR, "--save-dir", folder, *EL, "--cpu"]
    for name, value in {**TINY["train"], "max-epoch": 4}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", value]
    argv += [*EVAL_BLEU, "--validate-interval", "2", "--batch-size-valid", "1"]
    argv += ["--eval-bleu-args", '{"beam": 1, "max_len_a": 0, "max_len_b": 60}']
    argv += ["--log-format", "json", "--log-interval", "1", "--num-workers", "0"]
    argv += ["--required-batch-size-multiple", "1", *options]
    return [processes.program_path(argv[0]), *map(str, argv[1:])]


def start(argv, log):
    with open(log, "a") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out, preexec_fn=die_with_parent)


def wait_for(condition, process, seconds=500):
    """Wait until `condition()` holds or the process ends."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def updates_in(log):
    return sum("num_updates" in record for record in read_log(log))


def model(folder):
    return checkpoints.load_checkpoint(folder / "checkpoint_last.pt")["model"]


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(tiny[1], folder), check=True, capture_output=True)
    return folder


def test_sigterm_while_training_and_while_validating_changes_nothing(undisturbed, tiny, tmp_path):
    """Stopped in epoch 1, then in the validation after epoch 2; then its last checkpoint is cut in two."""
    argv, log = command(tiny[1], tmp_path), tmp_path / "log"
    process = start(argv, log)
    wait_for(lambda: updates_in(log) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == fault_tolerance.STOPPED == 143

    process = start(argv, log)
    wait_for(lambda: "begin validation on" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert log.read_text().count("stopped after") == 2
    assert log.read_text().count("run the same command again") == 2
    assert not [record for record in read_log(log) if "valid_loss" in record], "it did not wait for the end"
    assert (tmp_path / "checkpoint2.pt").exists()

    last = tmp_path / "checkpoint_last.pt"
    os.truncate(last, last.stat().st_size // 2)
    process = start(argv, log)
    assert process.wait(500) == 0, log.read_text()[-3000:]
    assert "checkpoint_last.pt is damaged" in log.read_text() and "checkpoint2.pt, the newest intact" in log.read_text()
    validated = [int(record["epoch"]) for record in read_log(log) if "valid_loss" in record]
    assert validated == [2, 4], "the validation that was left is made up for"
    assert_identical(model(undisturbed), model(tmp_path))


def test_kills_at_random_moments_change_nothing(undisturbed, tiny, tmp_path):
    """Half of them while a checkpoint is being written, the others anywhere."""
    dice = random.Random(1)
    argv, log = (
        command(tiny[1], tmp_path, "--save-interval-updates", "3", "--keep-interval-updates", "2"),
        tmp_path / "log",
    )
    argv += ["--validate-after-updates", "1000000"]
    while_saving = 0
    for kill in range(KILLS):
        process = start(argv, log)
        if kill % 2:
            wait_for(lambda: any(tmp_path.glob("*.tmp")), process)
        else:
            before = updates_in(log)
            wait_for(lambda before=before: updates_in(log) > before, process)
            time.sleep(dice.uniform(0, 1.2))
        process.kill()
        process.wait()
        while_saving += any(tmp_path.glob("*.tmp"))
    assert while_saving > 3 or KILLS < 10, "kills hit files being written"
    subprocess.run(argv, check=True, capture_output=True)
    assert_identical(model(undisturbed), model(tmp_path))


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of 1 MB, room for a few checkpoints, or of the size that a test sets."""
    folder, size = tmp_path / "disk", getattr(request, "param", "1m")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_training_with_the_last_checkpoint_intact(small_disk, tiny):
    argv = command(tiny[1], small_disk, "--save-interval-updates", "2", "--validate-after-updates", "1000000")
    done = subprocess.run([*argv, "--save-interval", "1"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert said.count("cannot save") == 1 and "no space left" in said
    assert checkpoints.find_corruption(small_disk / "checkpoint_last.pt") is None
    assert not list(small_disk.glob("*.tmp"))


@pytest.mark.parametrize("small_disk", ["16k", "256k", "400k"], indirect=True, ids=["text", "model", "binarized"])
def test_a_full_disk_ends_preparing_in_one_line(small_disk, tmp_path, capsys):
    line = refused(capsys, "prepare", write_recipe(tmp_path), "--work-dir", small_disk)
    assert "no space left" in line.lower() and str(small_disk) in line
    assert not [path for path in small_disk.iterdir() if path.is_dir()]


# --- encourage-mt around it


def descendants(pid):
    """Return the process ids of all children of `pid`, theirs included."""
    try:
        pids = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return pids + [below for child in pids for below in descendants(child)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def kill_and_look_for_children(process):
    """SIGKILL a command; assert that a second later none of its children runs.

    A child that was just started ends as its first act, so the second begins after the time Python takes to start.
    """
    below = descendants(process.pid)
    process.kill()
    process.wait()
    subprocess.run([sys.executable, "-c", "import ctypes"], check=True)
    end = time.monotonic() + 1
    while any(map(is_running, below)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [command_of(pid) for pid in below if is_running(pid)] == []
    return below


def test_a_training_stopped_and_killed_through_encourage_mt_resumes_without_help(tmp_path):
    """On two processes, which torchrun starts."""
    train = {**TINY["train"], "max-tokens": 500, "update-freq": 2, "max-epoch": 1000, "validate-interval": 1000}
    recipe = write_recipe(tmp_path, train=train)
    work, out = tmp_path / "work", tmp_path / "out"
    folder, log = work / "el.seed1", work / "el.seed1" / "train.log"
    argv = [processes.program_path("encourage-mt"), "train", str(recipe), "--work-dir", str(work), "--arm", "el"]
    argv += ["--gpus", "2"]

    def start_and_wait():
        before = updates_in(log)
        process = start(argv, out)
        wait_for(lambda: updates_in(log) > before + 2, process)
        assert process.poll() is None, out.read_text()[-3000:]
        return process

    process = start_and_wait()
    process.terminate()
    assert process.wait(120) == 143
    assert "stopped after" in log.read_text()
    assert "saved: el.seed1" in out.read_text() and "Run the same command again" in out.read_text()
    assert checkpoints.find_corruption(folder / "checkpoints" / "checkpoint_last.pt") is None
    record = json.loads((folder / "run.json").read_text())
    (first,) = record["provenance"]["starts"]
    assert record["provenance"]["data_sha256"] and first["versions"]["torch"] == torch.__version__
    assert "--update-freq=1" in first["command"] and first["processes"] == 2

    process = start_and_wait()
    second = subprocess.run(argv, capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("error:") == 1
    assert f"in use by process {process.pid} on" in second.stderr
    assert len(json.loads((folder / "run.json").read_text())["provenance"]["starts"]) == 2, "none of the refused start"
    assert len(kill_and_look_for_children(process)) >= 3, "torchrun and its two workers"

    process = start_and_wait()
    process.terminate()
    assert process.wait(120) == 143


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The recipe and the work directory of a run that nothing disturbed, and how many seconds it took."""
    folder, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    recipe = write_recipe(folder)
    run("encourage-mt", "run", recipe, "--work-dir", folder / "work")
    return recipe, folder / "work", time.monotonic() - started


RUNS = ["--baseline", "{work}/ce.seed1", "--candidate", "{work}/el.seed1", "--output", "{work}/report-ce-el"]
COMMANDS = {  # options; about which share of a whole run it takes; what it makes; the record of its result
    "prepare": (["{recipe}", "--work-dir", "{work}"], 0.15, ["data"], "data/manifest.json"),
    "run": (["{recipe}", "--work-dir", "{work}"], 1, ["data", "ce.seed1", "el.seed1"], "el.seed1/scores.json"),
    "evaluate": (["{work}/el.seed1"], 0.3, ["el.seed1/scores.json", "el.seed1/average.pt"], "el.seed1/scores.json"),
    "report": (RUNS, 0.25, ["report-ce-el", "el.seed1/analysis.json"], "report-ce-el/comparison.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_kills_of_a_command_do_not_change_its_result(command, whole, tmp_path):
    """SIGKILL at random moments; each start finds what the one before left, except after one that reached its end."""
    options, share, made, result = COMMANDS[command]
    recipe, undisturbed, seconds = whole
    work, log, dice, kills = tmp_path / "work", tmp_path / "log", random.Random(2), 0
    argv = [processes.program_path("encourage-mt"), command]
    argv += [word.format(recipe=recipe, work=work) for word in options]

    def remove_what_it_makes():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(undisturbed, work)
        subprocess.run(["rm", "-r", *(work / name for name in made)], check=True)

    remove_what_it_makes()
    while kills < KILLS:
        process = start(argv, log)
        time.sleep(dice.uniform(0, share * seconds))
        if process.poll() is None:
            kill_and_look_for_children(process)
            kills += 1
        else:
            assert process.returncode == 0, log.read_text()[-3000:]
            remove_what_it_makes()
    run(*argv)
    before, after = (json.loads((folder / result).read_text()) for folder in (undisturbed, work))
    for key in {"scores", "weights_sha256", "tests", "measures", "checksums", "counts"} & set(before):
        assert before[key] == after[key]
