"""Test children that end with their parent, locks, and the environment of jobs."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from encourage_mt import processes
from encourage_mt.errors import UserError


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid):
    """Process ids of all children, theirs included."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        pids = [int(child) for child in children.read().split()]
    return pids + [below for child in pids for below in descendants(child)]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_child_and_what_it_forks_end_within_a_second_of_their_parent(kill, tmp_path):
    """The program is a package's script that forks, as fairseq-preprocess does."""
    (tmp_path / "forker.py").write_text(
        "import os, time\ndef main():\n    os.fork()\n    open('ready', 'a').write('x')\n    time.sleep(60)\n"
    )
    info = tmp_path / "forker-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forker\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nforker = forker:main\n")
    code = "from encourage_mt import processes; processes.program_path = str; processes.start(['forker']).wait()"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{processes.USER_DIR.parent}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    ready = tmp_path / "ready"
    wait_until(lambda: ready.exists() and len(ready.read_text()) == 2)
    below = descendants(parent.pid)
    assert len(below) == 2
    parent.send_signal(kill)
    parent.wait()
    wait_until(lambda: not any(map(is_alive, below)), seconds=1)


def test_a_lock_names_its_holder_and_is_free_once_the_holder_was_killed(tmp_path, monkeypatch):
    code = "import sys, pathlib, time; from encourage_mt.processes import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])):\n    print(flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(processes.USER_DIR.parent)}
    argv = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment)
    holder.stdout.readline()
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=rf"{tmp_path}: .*process {holder.pid} on .* since 20"):
        with processes.locked(tmp_path):
            pass
    with processes.locked(tmp_path, node=1):
        pass  # another machine has a lock of its own
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with processes.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_waiting_command_gets_the_gpu_of_the_one_that_ended(monkeypatch, tmp_path):
    """The first command ends after the others."""
    started = []

    def start(argv, env, **options):
        started.append((argv[0], env["CUDA_VISIBLE_DEVICES"]))
        return subprocess.Popen(["sh", "-c", argv[1]], env=env, cwd=tmp_path, **options)

    monkeypatch.setattr(processes, "start", start)
    scripts = ["while [ ! -e last ]; do sleep 0.05; done", "sleep 0.1", "exit 2", "touch last"]
    codes = processes.run_on_gpus([[str(number), script] for number, script in enumerate(scripts)], ["4", "7"])
    assert codes == [0, 0, 2, 0]
    assert sorted(started) == [("0", "4"), ("1", "7"), ("2", "7"), ("3", "7")]


def test_a_program_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="fairseq-train is not installed"):
        processes.start(["fairseq-train"])


def test_a_failure_is_the_last_line_of_the_log_or_of_the_process_torchrun_reports_on(tmp_path):
    log = tmp_path / "log"
    log.write_text("all is well\nValueError: no data\n===\n")
    assert "exit code 1: ValueError: no data" in processes.describe_failure("fairseq-train", 1, log)
    log.write_text("ValueError: no data\ntorch.distributed.elastic.errors.ChildFailedError: x\n  time: 1\n")
    assert "exit code 1: ValueError: no data" in processes.describe_failure("fairseq-train", 1, log)
    log.write_text("")
    assert "no output" in processes.describe_failure("fairseq-train", 1, log)


def test_jobs_share_the_cores_and_values_that_the_user_set_stay(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    environment = processes.job_environment(3)
    assert environment["OMP_NUM_THREADS"] == "2" and environment["MALLOC_MMAP_MAX_"] == "7"
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 10**12
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "MALLOC_TRIM_THRESHOLD_" not in processes.job_environment(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several trainings may have been started side by side
    assert processes.job_environment(3)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name", [".lock", "preprocess.log"])
def test_a_link_is_not_written_through(name, tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name}: is a link"):
        with processes.locked(tmp_path / "work"):
            processes.run_quietly(["fairseq-preprocess", "--help"], tmp_path / "work" / name)
    assert (tmp_path / "mine").read_text() == "kept"
