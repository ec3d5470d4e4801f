"""Average the parameters of the last checkpoints of a run (Vaswani et al. 2017, section 6.1), with a temperature."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_write
from ..plugin.checkpoints import load_checkpoint
from ..training.run_folder import flat_options


def average(paths: list[Path], output: Path, temperature: float = 1.0) -> str:
    """Write the mean of the models in `paths` to `output`, completely or not at all; return a sha256 of its parameters.

    The model's logits are divided by `temperature`, as by fairseq-generate --temperature: the weight and bias of its
    last normalization are divided.

    Sums in float32 (float64 stays) and keeps only the sum and one checkpoint in memory. Values that are not floating
    point, the options and the training state come from the last of `paths`; the optimizer's state is left out because
    it does not fit the mean. Raises UserError if a file is missing, damaged, not finite, or of another model, or if the
    model has no normalization before its output and `temperature` is not 1.
    """
    total: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for path in paths:
        state.clear()  # free the last checkpoint before the next one is read
        state = load_checkpoint(path)
        if total and _shapes(total) != _shapes(state["model"]):
            raise UserError(f"{path}: its parameters differ in name or shape from those of {paths[0]}")
        _add(total, state["model"], path)
    for name, value in total.items():
        if value.is_floating_point():
            total[name] = (value / len(paths)).to(state["model"][name].dtype)
    if temperature != 1:
        for name in last_normalization(state, paths[-1]):
            total[name] /= temperature
    state["model"] = total
    state.pop("last_optimizer_state", None)
    try:
        with atomic_write(output, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{output}: {' '.join(str(error).split())}") from None
    return digest(total)


def last_normalization(state: dict, path: Path) -> list[str]:
    """Return the names of weight and bias of the decoder's last normalization, to which the logits are proportional.

    Raises UserError if the decoder has none behind its last layer.
    """
    if flat_options(state["cfg"]["model"]).get("decoder_normalize_before"):
        prefix = "decoder.layer_norm"
    else:
        layers = [
            int(match[1]) for match in map(re.compile(r"decoder\.layers\.(\d+)\.").match, state["model"]) if match
        ]
        prefix = f"decoder.layers.{max(layers, default=0)}.final_layer_norm"
    names = [f"{prefix}.{name}" for name in ("weight", "bias")]
    if not set(names) <= set(state["model"]):
        raise UserError(
            f"{path}: its decoder does not end with a layer normalization, so its logits cannot be divided by a "
            "temperature (--tune, --temperature)"
        )
    return names


def digest(model: dict[str, Tensor]) -> str:
    """Return a sha256 of the names and values of a model's parameters."""
    total = hashlib.sha256()
    for name, value in sorted(model.items()):
        total.update(name.encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _add(total, model, path):
    for name, value in model.items():
        if not value.is_floating_point():
            total[name] = value
        elif not value.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite: the training has diverged")
        elif name in total:
            total[name] += value
        else:
            total[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _shapes(model):
    return {name: value.shape for name, value in model.items()}
