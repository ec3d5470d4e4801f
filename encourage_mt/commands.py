"""Run fairseq's command lines, those of the environment this Python belongs to, and what they run on."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from .errors import UserError

USER_DIR = Path(__file__).parent


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
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{program} failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_job(jobs: int) -> "dict[str, str]":
    """Environment that shares the cores among `jobs` processes running side by side."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))}


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
