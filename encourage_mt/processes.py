"""Run other programs of this Python as children that end with their parent, and lock folders."""

import fcntl
import os
import queue
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import IO

from .environment import USER_DIR, cores
from .errors import UserError
from .plugin.worker import die_with_parent

WORKER = USER_DIR / "plugin" / "worker.py"
PATIENCE = 5.0  # seconds to wait for a lock: the children of a killed process need a moment to end
ERROR_LINE = re.compile(r"\| ERROR \||^\w*(Error|Exception): ")
_held_locks: list[IO[str]] = []


def program_path(name: str) -> str:
    """Return the path of a program beside this Python. Raises UserError if it is not installed there."""
    program = Path(sys.executable).parent / name
    if not program.exists():
        raise UserError(f"{name} is not installed beside {sys.executable}; bash scripts/quickstart.sh installs it")
    return str(program)


def start(argv: list[str], **options) -> subprocess.Popen:
    """Start a program of this Python's packages, such as fairseq-train, as a child that ends with this process.

    `options` are those of subprocess.Popen; standard input is empty. Raises UserError if it is not installed.
    """
    program_path(argv[0])
    argv = [sys.executable, str(WORKER), f"--parent={os.getpid()}", *argv]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, **options)


def run_on_gpus(commands: list[list[str]], gpus: list[str]) -> list[int]:
    """Run each command on the next GPU that is free, without its standard output; return their exit codes in order."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def run(argv: list[str]) -> int:
        gpu = free.get()
        try:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            return start(argv, stdout=subprocess.DEVNULL, env=environment).wait()
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as threads:
        return list(threads.map(run, commands))


def not_through_a_link(path: str, flags: int) -> int:
    """Open a file, as `opener` of `open`. Raises UserError if a link is there, which may lead anywhere."""
    if Path(path).is_symlink():
        raise UserError(f"{path}: is a link, and this program would write through it; remove it")
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def run_quietly(argv: list[str], log: Path) -> None:
    """Run a program to its end with all output in `log`. Raises UserError with its last line if it fails."""
    with (
        open(log, "w", encoding="utf-8", opener=not_through_a_link) as out,
        start(argv, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        code = process.wait()
    if code:
        raise UserError(describe_failure(argv[0], code, log))


def describe_failure(program: str, code: int, log: Path) -> str:
    """Return one line: which program failed, the signal that ended it or the last line it printed, and its log."""
    if code < 0:
        reason = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
        return f"{program} was ended by {signal.Signals(-code).name}{reason} (log: {log})"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line.strip("=- ")]
    if any("ChildFailedError" in line for line in lines):  # torchrun's own report follows the error of the process
        errors = [line for line in lines if ERROR_LINE.search(line) and "torch.distributed.elastic" not in line]
        lines = errors or lines
    return f"{program} failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"


def job_environment(jobs: int) -> dict[str, str]:
    """Return the environment for each of `jobs` processes that run side by side: they share the cores.

    On a CPU, glibc is set to keep freed memory: otherwise the logits of each batch are given back to the kernel and
    fetched again, zeroed page by page, in every update. Values set outside take precedence.
    """
    import torch

    environment = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if not torch.cuda.is_available():
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)}
    return environment | os.environ


@contextmanager
def locked(folder: Path, node: int = 0):
    """Keep other processes out of `folder`, which is made if it is missing; yield the descriptor of the lock.

    Each machine that shares the folder has its own lock, by its number `node`. A child that inherits the descriptor
    keeps the lock too, until it ends. Raises UserError, which names the other process, if another one has the lock, or
    if the lock is a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".lock{node or ''}"
    end = time.monotonic() + PATIENCE
    with open(path, "a+", encoding="utf-8", opener=not_through_a_link) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    lock.seek(0)
                    holder = lock.read(200).strip() or "another process"
                    raise UserError(f"{folder}: in use by {holder}; wait until it ends, or stop it") from None
                time.sleep(0.1)
            except OSError as error:
                raise UserError(f"{folder}: its file system has no locks ({error.strerror}); choose another") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        _held_locks.append(lock)
        try:
            yield lock.fileno()
        finally:
            _held_locks.remove(lock)


def set_up_worker(parent: int) -> None:
    """Set up a worker of a process pool, in the worker: it dies with its `parent` and does not keep its locks."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the pool
    for lock in _held_locks:  # copies that a forked worker inherited; closing them does not unlock
        lock.close()
