"""Run fairseq's command lines, those of the environment this Python belongs to, and what they run on."""

import fcntl
import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import torch

from .errors import UserError

USER_DIR = Path(__file__).parent
PACKAGES = (
    *("encourage-mt", "fairseq", "fairseq-fixed", "torch", "numpy"),
    *("regex", "sacrebleu", "sacremoses", "sentencepiece", "subword-nmt"),
)


def resolve(argv: "list[str]") -> "list[str]":
    """`argv` with its program as the file beside this Python. Raises UserError if fairseq is not installed there."""
    program = Path(sys.executable).parent / argv[0]
    if not program.exists():
        raise UserError(f"{argv[0]} is not installed beside {sys.executable}; bash scripts/quickstart.sh installs it")
    return [str(program), *argv[1:]]


def run_quietly(argv: "list[str]", log: Path) -> None:
    """Run to the end with all output in `log`. Raises UserError with the log's last line if it fails."""
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.run(resolve(argv), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code:
        raise UserError(failure(argv[0], code, log))


def failure(program: str, code: int, log: Path) -> str:
    """One line: which program failed, its last words, and where the rest is."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line.strip("=- ")]
    # torchrun ends with a report of its own, after what the process itself had to say
    told = [line for line in lines if _TELLING.search(line) and "torch.distributed.elastic" not in line]
    lines = told if any("ChildFailedError" in line for line in lines) and told else lines
    return f"{program} failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"


@contextmanager
def without_chatter():
    """What fairseq and hydra say about themselves when they are imported and set up is of no use to the user."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


_TELLING = re.compile(r"\| ERROR \||^\w*(Error|Exception): ")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def job_environment(jobs: int) -> "dict[str, str]":
    """Environment of each of `jobs` processes running side by side: they share the cores.

    On a CPU, glibc is told to keep what is freed: a batch's logits would else go back to the kernel and come again,
    zeroed page by page, in every update. glibc's settings can be given otherwise from outside.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if not torch.cuda.is_available():
        environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**60)} | environment
    return environment


def machine(device: str = "") -> str:
    """What the figures were made on, in words: the GPU if there is one, unless `device` is cpu."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        model = match.group(1) if match else model
    return f"CPU, {cores()} cores ({model})"


def versions() -> "dict[str, str]":
    """Versions of Python and of the packages that figures depend on."""
    found = {package.metadata["Name"]: package.version for package in distributions()}
    return {"python": platform.python_version(), **{name: found[name] for name in PACKAGES if name in found}}


def git_revision() -> "str | None":
    """Commit of this project, with -dirty if files differ from it; None outside a git checkout."""
    argv = ["git", "-C", str(USER_DIR), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
        yield lock.fileno()
