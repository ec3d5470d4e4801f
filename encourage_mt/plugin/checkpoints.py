"""Load checkpoints without running code in them, and refuse those whose bytes changed.

torch loads weights only and refuses every type that is not allow-listed. fairseq's checkpoints contain a few such
types, and importing the plugin lists exactly those. fairseq evaluates some options, such as the layers of a
convolutional model, as Python code, so text that is more than a plain value is refused. torch does not check the
checksums in its files, so a flipped bit would become a wrong parameter: every load compares them first.
"""

import argparse
import ast
import collections
import functools
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import UserError, as_user_error, first_line

# ends of the names of options that fairseq does not evaluate
PATHS = ("data", "dir", "file", "path", "project", "_model", "_from", "_checkpoint", "_yaml")
# parts of expressions: no calls, subscripts, comprehensions or f-strings, each of which can run code, and no %, which
# gets items of any object
HARMLESS = (
    *(ast.Expression, ast.expr_context, ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.List, ast.Set, ast.Dict),
    *(ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop),
)
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of files of torch before 1.6
PATTERNS = {"epoch": r"checkpoint\d+\.pt", "update": r"checkpoint_\d+_\d+\.pt"}


def install() -> None:
    """Make a fairseq process check each checkpoint before it loads it, and allow-list the types checkpoints need."""
    from fairseq import checkpoint_utils

    torch.serialization.add_safe_globals(types_in_files() + types_of_fairseq())
    load_to_cpu = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load_to_cpu)
    def check_and_load(path, *args, **kwargs):
        check(path)
        state = load_to_cpu(path, *args, **kwargs)
        refuse_code(path, state)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = check_and_load


def types_in_files() -> list:
    """Return the types, or (type, its name in the pickle), that a checkpoint file of fairseq-train needs.

    argparse.Namespace contains the options; --eval-bleu adds its counts as numpy arrays, int64 or, where several
    processes summed theirs, float64, pickled under the module name of numpy 1 or 2.
    """
    reconstruct = numpy.array(0).__reduce__()[0]
    named = [(reconstruct, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")]
    numbers = [type(numpy.dtype(kind)) for kind in (numpy.int64, numpy.float64)]
    return [argparse.Namespace, numpy.ndarray, numpy.dtype, *numbers, *named]


def types_of_fairseq() -> list:
    """Return the types that only fairseq's processes need.

    Some tasks save their dictionary. On several processes, rank 0 sends the others omegaconf's options.
    """
    from fairseq.data import Dictionary
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    options = [DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata]
    return [Dictionary, *options, _TensorPlaceholder, (Any, "typing.Any"), collections.defaultdict, dict, list, int]


def check(path) -> None:
    """Raise UserError if a checkpoint file is damaged. Files that are not on this disk are not checked."""
    path = Path(path)
    if path.is_file() and (reason := find_corruption(path)):
        raise UserError(f"{path}: damaged checkpoint ({reason}); resume the training to replace it, or use another")


def find_corruption(path: Path) -> str | None:
    """Return the problem of a checkpoint file, None if it is intact: torch writes zip archives with checksums.

    Files of torch before 1.6 have none, so they are not checked.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
                return None
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        return first_line(error)
    return f"{broken} does not match its checksum" if broken else None


def refuse_code(path, state: Mapping[str, Any]) -> None:
    """Raise UserError if an option in a checkpoint's state is code."""
    from omegaconf import OmegaConf

    cfg: Any = state.get("cfg") or {}
    with as_user_error(f"{path}: its options cannot be read"):
        # resolved, because an interpolation may name code elsewhere in the file
        cfg = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    for section in (*cfg.values(), state.get("args")):
        if name := find_code(section):
            raise UserError(f"{path}: its option {name} is code, which fairseq would run")


def find_code(options: Any, name: str = "") -> str:
    """Return the name of an option whose text is a Python expression that may run code, or ""."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    if isinstance(options, Mapping):
        return next(filter(None, (find_code(value, str(key)) for key, value in options.items())), "")
    if isinstance(options, (list, tuple)):
        return next(filter(None, (find_code(value, name) for value in options)), "")
    if isinstance(options, (bytes, bytearray, numpy.ndarray)):  # evaluated like text; no option of fairseq is one
        return name
    if not isinstance(options, str) or name.endswith(PATHS):
        return ""
    if "${" in options:  # omegaconf would put other text there after this check; fairseq saves options without it
        return name
    try:
        tree = ast.parse(options.strip(), mode="eval")
    except (RecursionError, MemoryError):  # evaluating it may succeed
        return name
    except (SyntaxError, ValueError):  # evaluating it fails too
        return ""
    harmless = (isinstance(node, HARMLESS) and not isinstance(node, ast.Mod) for node in ast.walk(tree))
    return "" if all(harmless) else name


def load_checkpoint(path: Path) -> dict:
    """Return the state in a checkpoint file, on the CPU.

    Raises UserError if it is missing or damaged, cannot be loaded safely, or has no model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    with as_user_error(f"{path}: not a checkpoint that can be loaded safely"):
        check(path)
        # for the whole process: the context manager safe_globals would remove those of `install` at its end
        torch.serialization.add_safe_globals(types_in_files())
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_code(path, state)
        sane = bool(state["model"]) and all(map(is_plain_tensor, state["model"].values()))
    if not sane:
        raise UserError(f"{path}: its model contains values that are not plain tensors; was it saved by fairseq-train?")
    return state


def is_plain_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def last_checkpoints(run_dir: Path, count: int, kind: str = "epoch") -> list[Path]:
    """Return the `count` newest epoch or update checkpoints in `run_dir`, oldest first.

    Raises UserError if there are fewer.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory")
    paths = [path for path in reversed(saved_checkpoints(run_dir)) if re.fullmatch(PATTERNS[kind], path.name)]
    if len(paths) < count:
        raise UserError(
            f"{run_dir}: has {len(paths)} {kind} checkpoints, {count} are needed; average fewer, or train for longer"
        )
    return paths[-count:]


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the first of `saved_checkpoints`. Raises UserError if there is none."""
    paths = saved_checkpoints(run_dir)
    if not paths:
        raise UserError(f"{run_dir}: has no checkpoints, so it is not the folder of a training")
    return paths[0]


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint_last.pt, then epoch and update checkpoints, newest first, then checkpoint_best.pt."""
    order: dict[Path, tuple[float, float]] = {}
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(r"checkpoint(_last|_best|_?(\d+)(?:_(\d+))?)\.pt", path.name)
        if match:
            kind, epoch, updates = match.groups()
            number = math.inf if kind == "_last" else int(epoch or -1)
            order[path] = number, int(updates) if updates else math.inf
    return sorted(order, key=order.__getitem__, reverse=True)
