"""Lets fairseq load its own checkpoints on today's torch without running code that a checkpoint carries.

torch 2.6 and later load weights only and refuse every type that is not allow-listed; fairseq checkpoints hold a few.
Importing the plugin lists exactly those. On an older torch fairseq loads with full pickle, which can run anything:
that cannot be mended from here, so the first load warns.
"""

import argparse
import collections
import functools
import logging
import re
import typing
from pathlib import Path

import numpy
import torch

from ..errors import UserError, first_line

logger = logging.getLogger(__name__)

PATTERNS = {"epoch": r"checkpoint(\d+)\.pt", "update": r"checkpoint_\d+_(\d+)\.pt"}
UNSAFE = (
    "torch %s runs whatever code a checkpoint carries: load %s only if you trust its source, or use torch 2.6 or newer"
)


def install() -> None:
    """In a fairseq process: allow-list what its checkpoints need, or, on torch before 2.6, warn at the first load."""
    if torch_version() >= (2, 6):
        torch.serialization.add_safe_globals(types_in_files() + types_in_broadcasts())
    else:
        warn_at_first_load()


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def types_in_files() -> list:
    """Types, or (type, name it is pickled under), that a checkpoint file of fairseq-train needs.

    argparse.Namespace holds the options; --eval-bleu adds its counts as numpy arrays, int64 or, where several processes
    summed theirs, float64, pickled under the module name of numpy 1 or 2.
    """
    reconstruct = numpy.array(0).__reduce__()[0]
    return [
        argparse.Namespace,
        numpy.ndarray,
        numpy.dtype,
        type(numpy.dtype(numpy.int64)),
        type(numpy.dtype(numpy.float64)),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
    ]


def types_in_broadcasts() -> list:
    """What resuming on several processes needs besides: rank 0 sends the others the state with omegaconf's options."""
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    return [
        DictConfig,
        ListConfig,
        AnyNode,
        ContainerMetadata,
        Metadata,
        _TensorPlaceholder,
        (typing.Any, "typing.Any"),
        collections.defaultdict,
        dict,
        list,
        int,
    ]


def warn_at_first_load() -> None:
    from fairseq import checkpoint_utils

    load_to_cpu = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load_to_cpu)
    def warn_and_load(path, *args, **kwargs):
        checkpoint_utils.load_checkpoint_to_cpu = load_to_cpu
        logger.warning(UNSAFE, torch.__version__, path)
        return load_to_cpu(path, *args, **kwargs)

    checkpoint_utils.load_checkpoint_to_cpu = warn_and_load


def load(path) -> dict:
    """The state in checkpoint file `path`, on the CPU.

    Raises what torch.load raises for a damaged file and pickle.UnpicklingError for a type that is not listed.
    """
    if torch_version() < (2, 6):
        logger.warning(UNSAFE, torch.__version__, path)
        return torch.load(path, map_location="cpu")
    with torch.serialization.safe_globals(types_in_files()):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path) -> dict:
    """The state in a checkpoint file. Raises UserError if it is missing, damaged, or not to be loaded safely."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = load(path)
        state["model"].items()
    except Exception as error:  # what a damaged pickle raises is without end
        raise UserError(f"{path}: not a checkpoint that can be loaded safely ({first_line(error)})") from None
    return state


def last_checkpoints(run_dir: Path, count: int, kind: str = "epoch") -> list[Path]:
    """The `count` newest epoch or update checkpoints in `run_dir`, oldest first; UserError if there are fewer."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory")
    numbered = {}
    for path in run_dir.iterdir():
        match = re.fullmatch(PATTERNS[kind], path.name)
        if match:
            numbered[int(match.group(1))] = path
    if len(numbered) < count:
        raise UserError(f"{run_dir}: {len(numbered)} {kind} checkpoints found, {count} asked for")
    return [numbered[number] for number in sorted(numbered)[-count:]]


def newest_checkpoint(run_dir: Path) -> Path:
    """checkpoint_last.pt or else the newest numbered checkpoint in `run_dir`; UserError if there is none."""
    last = run_dir / "checkpoint_last.pt"
    if last.exists():
        return last
    for kind in PATTERNS:
        try:
            return last_checkpoints(run_dir, 1, kind)[0]
        except UserError:
            continue
    raise UserError(f"{run_dir}: no checkpoints there, so this is not the folder of a training")
