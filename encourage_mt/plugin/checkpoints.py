"""Lets fairseq load its own checkpoints on today's torch without running code that a checkpoint carries.

torch 2.6 and later load weights only and refuse every type that is not allow-listed; fairseq checkpoints hold a few.
Importing the plugin lists exactly those. On an older torch fairseq loads with full pickle, which can run anything:
that cannot be mended from here, so the first load warns.
"""

import argparse
import collections
import functools
import logging
import typing

import numpy
import torch

logger = logging.getLogger(__name__)

UNSAFE = (
    "torch %s runs whatever code a checkpoint carries: load %s only if you trust its source, or use torch 2.6 or newer"
)


def install() -> None:
    """In a fairseq process: allow-list what its checkpoints need, or, on torch before 2.6, warn at the first load."""
    if torch_version() >= (2, 6):
        torch.serialization.add_safe_globals(types_in_files() + types_in_broadcasts())
    else:
        warn_at_first_load()


def torch_version() -> "tuple[int, int]":
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
