"""Trainings that are killed, stopped, run twice or run out of disk."""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import EL, TINY, run, write_recipe

from encourage_mt import processes
from encourage_mt.plugin import checkpoints, fault_tolerance
from encourage_mt.training.run_folder import read_log


def command(data, folder, *options):
    """fairseq-train on the tiny corpus, many short epochs."""
    argv = ["fairseq-train", data / "data-bin", "--user-dir", processes.USER_DIR, "--save-dir", folder, *EL, "--cpu"]
    for name, value in {**TINY["train"], "max-tokens": 400, "max-epoch": 20}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", value]
    argv += ["--disable-validation", "--log-format", "json", "--log-interval", "1", "--num-workers", "0"]
    argv += ["--required-batch-size-multiple", "1", *options]
    return [processes.program_path(argv[0]), *map(str, argv[1:])]


def finish(argv):
    """Run to the end; the process with all it said as `said` (fairseq logs to stdout, Python complains to stderr)."""
    done = subprocess.run(argv, capture_output=True, text=True)
    done.said = done.stdout + done.stderr
    return done


def start(argv, log):
    with open(log, "a") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out)


def wait_for(condition, process, seconds=120):
    """Until `condition()` holds or the process ends."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def updates_in(log):
    return sum("num_updates" in record for record in read_log(log))


def model(folder):
    return checkpoints.load(folder / "checkpoint_last.pt")["model"]


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(tiny[1], folder), check=True, capture_output=True)
    return folder


def test_the_same_run_twice_has_the_same_parameters_bit_for_bit(undisturbed, tiny, tmp_path):
    subprocess.run(command(tiny[1], tmp_path), check=True, capture_output=True)
    assert_identical(model(undisturbed), model(tmp_path))


def test_sigterm_saves_and_the_next_run_ends_as_if_nothing_had_been(undisturbed, tiny, tmp_path):
    argv, log = command(tiny[1], tmp_path), tmp_path / "log"
    process = start(argv, log)
    wait_for(lambda: updates_in(log) > 50, process)  # in the third epoch or so
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == fault_tolerance.STOPPED == 143
    assert "stopped by SIGTERM after" in log.read_text()
    subprocess.run(argv, check=True, capture_output=True)
    assert_identical(model(undisturbed), model(tmp_path))


def test_twenty_kills_at_random_moments_change_nothing(undisturbed, tiny, tmp_path):
    """Half of them while a checkpoint is being written, the others anywhere."""
    dice = random.Random(1)
    argv, log = (
        command(tiny[1], tmp_path, "--save-interval-updates", "3", "--keep-interval-updates", "2"),
        tmp_path / "log",
    )
    while_saving, epochs = 0, set()
    for kill in range(20):
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
        epochs.update(int(record["epoch"]) for record in read_log(log)[-1:])
    assert while_saving > 3, "kills hit files being written"
    assert len(epochs) > 3, "kills in many epochs"
    subprocess.run(argv, check=True, capture_output=True)
    assert_identical(model(undisturbed), model(tmp_path))


# --- checkpoints that are not whole


@pytest.fixture
def saved(undisturbed, tmp_path):
    """A copy of the folder of a training, from epoch 5 on to be trained again."""
    folder = tmp_path / "saved"
    shutil.copytree(undisturbed, folder)
    for epoch in range(5, 21):
        (folder / f"checkpoint{epoch}.pt").unlink()
    return folder


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def fill_with_garbage(path):
    path.write_bytes(os.urandom(2000))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, fill_with_garbage, flip_a_byte, Path.unlink])
def test_a_damaged_last_checkpoint_is_named_and_replaced_by_the_newest_whole_one(harm, saved, caplog):
    harm(saved / "checkpoint_last.pt")
    truncate(saved / "checkpoint4.pt")
    fault_tolerance.restore_last_checkpoint(saved)
    assert (saved / "checkpoint_last.pt").read_bytes() == (saved / "checkpoint3.pt").read_bytes()
    assert "checkpoint4.pt is damaged" in caplog.text and "resuming from" in caplog.text
    if harm is not Path.unlink:
        assert "checkpoint_last.pt is damaged" in caplog.text and (saved / "checkpoint_last.pt.damaged").exists()


def test_training_resumes_from_the_newest_whole_checkpoint(undisturbed, saved, tiny):
    truncate(saved / "checkpoint_last.pt")
    said = finish(command(tiny[1], saved)).said
    assert "checkpoint_last.pt is damaged" in said and "checkpoint4.pt, the newest whole" in said
    assert_identical(model(undisturbed), model(saved))


def test_without_a_whole_checkpoint_training_does_not_start_over_silently(saved, tiny):
    for path in saved.glob("checkpoint*.pt"):
        truncate(path)
    done = finish(command(tiny[1], saved))
    assert done.returncode == 2 and "is whole: remove them to start over" in done.said
    assert "Traceback" not in done.said


def test_the_order_of_checkpoints(tmp_path):
    names = ["checkpoint_best.pt", "checkpoint2.pt", "checkpoint_2_30.pt", "checkpoint_11_90.pt", "checkpoint10.pt"]
    for name in (*names, "checkpoint_last.pt", "checkpoint1.pt.tmp", "other.pt"):
        (tmp_path / name).touch()
    found = [path.name for path in fault_tolerance.saved_checkpoints(tmp_path, "")]
    assert found == [
        "checkpoint_11_90.pt",
        "checkpoint10.pt",
        "checkpoint2.pt",
        "checkpoint_2_30.pt",
        "checkpoint_best.pt",
    ]


def test_a_new_folder_needs_no_mending(tmp_path):
    fault_tolerance.restore_last_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


# --- a full disk


def test_what_cannot_be_written_leaves_nothing_and_ends_in_one_line(tmp_path, monkeypatch, caplog):
    def full(obj, out):
        out.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoint_last.pt").write_bytes(b"whole")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        fault_tolerance.save_whole({}, str(tmp_path / "checkpoint_last.pt"))
    assert stop.value.code == 2 and "no space left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_last.pt"]
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == b"whole"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, which is a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_training_with_the_last_checkpoint_whole(small_disk, tiny, tmp_path):
    done = finish(command(tiny[1], small_disk))
    assert done.returncode == 2 and "Traceback" not in done.said
    assert done.said.count("cannot save") == 1 and "no space left" in done.said
    assert checkpoints.find_corruption(small_disk / "checkpoint_last.pt") is None
    assert not list(small_disk.glob("*.tmp"))
    for path in small_disk.glob("checkpoint[0-9].pt"):
        path.unlink()
    subprocess.run(command(tiny[1], small_disk, "--no-epoch-checkpoints"), check=True, capture_output=True)


# --- encourage-mt around it


@pytest.fixture
def long_run(tiny, tmp_path):
    """Arguments of `encourage-mt train` for a training that lasts until it is stopped, and its run folder."""
    recipe = write_recipe(tmp_path, train={**TINY["train"], "max-epoch": 1000, "disable-validation": True})
    work = tmp_path / "work"
    work.mkdir()
    run("encourage-mt", "prepare", recipe, "--work-dir", work)
    argv = ["encourage-mt", "train", str(recipe), "--work-dir", str(work), "--arm", "el"]
    return [processes.program_path(argv[0]), *argv[1:]], work / "el.seed1"


def test_sigterm_to_encourage_mt_stops_its_training_saved(long_run, tmp_path):
    argv, folder = long_run
    process = start(argv, tmp_path / "out")
    wait_for(lambda: (folder / "train.log").exists() and updates_in(folder / "train.log") > 2, process)
    process.terminate()
    assert process.wait(60) == 143
    assert "stopped by SIGTERM after" in (folder / "train.log").read_text()
    assert checkpoints.find_corruption(folder / "checkpoints" / "checkpoint_last.pt") is None
    record = commands_of(folder)
    (first,) = record["provenance"]["starts"]
    assert record["provenance"]["data_sha256"] and first["versions"]["torch"] == torch.__version__
    assert first["command"].endswith("--distributed-world-size 1") and first["processes"] == 1


def commands_of(folder):
    from encourage_mt.files import read_json

    return read_json(folder / "run.json")


def test_a_training_whose_parent_was_killed_keeps_others_out(long_run, tmp_path):
    argv, folder = long_run
    process = start(argv, tmp_path / "out")
    wait_for(lambda: (folder / "train.log").exists() and updates_in(folder / "train.log") > 0, process)
    process.kill()
    process.wait()
    second = subprocess.run(argv, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work there" in second.stderr
    orphan = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if owns(pid, folder)]
    for pid in orphan:
        os.kill(pid, signal.SIGTERM)
    assert orphan
    for _ in itertools.takewhile(lambda _: any(owns(pid, folder) for pid in orphan), range(600)):
        time.sleep(0.1)
    third = start(argv, tmp_path / "out")
    log = folder / "train.log"
    count = updates_in(log)
    wait_for(lambda: updates_in(log) > count, third)
    third.terminate()
    assert third.wait(60) == 143


def owns(pid, folder):
    """Whether process `pid` trains into `folder`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return False
    return str(folder / "checkpoints") in words and any("fairseq-train" in word for word in words)
