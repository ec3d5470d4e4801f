"""Run fairseq's command lines in the environment of this Python, one process a folder."""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from .environment import cores
from .errors import UserError


def resolve(argv: list[str]) -> list[str]:
    """`argv` with its program as the file beside this Python. Raises UserError if fairseq is not installed there."""
    program = Path(sys.executable).parent / argv[0]
    if not program.exists():
        raise UserError(f"{argv[0]} is not installed beside {sys.executable}; bash scripts/quickstart.sh installs it")
    return [str(program), *argv[1:]]


def run_quietly(argv: list[str], log: Path) -> None:
    """Run to the end with all output in `log`. Raises UserError with the log's last line if it fails."""
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.run(resolve(argv), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code:
        raise UserError(describe_failure(argv[0], code, log))


def describe_failure(program: str, code: int, log: Path) -> str:
    """One line: which program failed, its last words, and where the rest is."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line.strip("=- ")]
    # torchrun ends with a report of its own, after what the process itself had to say
    told = [line for line in lines if _TELLING.search(line) and "torch.distributed.elastic" not in line]
    lines = told if any("ChildFailedError" in line for line in lines) and told else lines
    return f"{program} failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"


_TELLING = re.compile(r"\| ERROR \||^\w*(Error|Exception): ")


def job_environment(jobs: int) -> dict[str, str]:
    """Environment of each of `jobs` processes running side by side: they share the cores.

    On a CPU, glibc is told to keep what is freed: a batch's logits would else go back to the kernel and come again,
    zeroed page by page, in every update. glibc's settings can be given otherwise from outside.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if not torch.cuda.is_available():
        environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)} | environment
    return environment


@contextmanager
def locked(folder: Path, node: int = 0):
    """Keep other processes out of `folder` (made if need be); gives the descriptor that holds the lock.

    Machines that share the folder have a lock each, by their number `node`. A child process that is handed the
    descriptor holds the lock too, until it ends. Raises UserError if another holds it already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock{node or ''}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work there") from None
        _held_locks.append(lock)
        try:
            yield lock.fileno()
        finally:
            _held_locks.remove(lock)


_held_locks = []


def set_up_worker(parent: int) -> None:
    """Set up a worker of a process pool, in the worker: it dies with its `parent` and does not hold its locks."""
    die_with_parent(parent)
    for lock in _held_locks:  # copies that a forked worker inherited; closing them does not unlock
        lock.close()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of process id `parent`, ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


PR_SET_PDEATHSIG = 1  # linux/prctl.h
