"""Describe what the program runs on: hardware, package versions, git revision."""

import logging
import os
import platform
import re
import subprocess
import warnings
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

USER_DIR = Path(__file__).parent  # fairseq's --user-dir
DOWNLOADS = Path("runs/downloads")  # where downloads are kept, for all recipes
Precision = Literal["fp16", "bf16", "fp32"]  # of the arithmetic in training
Engine = Literal["fairseq", "ctranslate2"]  # what translates
PACKAGES = (
    *("encourage-mt", "fairseq", "fairseq-fixed", "torch", "numpy"),
    *("ctranslate2", "regex", "sacrebleu", "sacremoses", "sentencepiece", "subword-nmt"),
    *("torch-geometric", "torch_geometric"),  # the name depends on its version
)


@contextmanager
def quiet_imports():
    """Silence the messages that fairseq and hydra log when they are imported and set up."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; empty without a GPU."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named else map(str, range(torch.cuda.device_count()))
    return [name.strip() for name in names][: torch.cuda.device_count()]


def describe_hardware(device: str = "") -> str:
    """Return the machine in words: the GPU if there is one, unless `device` is cpu, otherwise the CPU."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"CPU, {cores()} cores ({match.group(1) if match else platform.machine()})"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    installed = {package.metadata["Name"]: package.version for package in distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in PACKAGES if name in installed}}


def git_revision() -> str | None:
    """Return the commit of this project, with -dirty if files differ from it; None outside a git checkout."""
    if not (USER_DIR.parent / ".git").exists():  # installed, perhaps inside another project
        return None
    argv = ["git", "-C", str(USER_DIR), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
