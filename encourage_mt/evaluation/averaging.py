"""Average the parameters of the last checkpoints of a run (Vaswani et al. 2017, section 6.1)."""

import os
from pathlib import Path

import torch

from ..errors import UserError
from ..plugin.checkpoints import load_checkpoint


def average(paths: list[Path], output: Path) -> None:
    """Write the mean of the models in `paths` to `output`, complete or not at all.

    Sums in float32 (float64 stays) and holds the sum and one checkpoint at a time. What is not floating point, the
    options and the training state come from the last of `paths`; the optimizer's state is left out, for it does not
    fit the mean. Raises UserError on a file that is missing, damaged, not finite, or of
    another model.
    """
    total = {}
    for path in paths:
        state = model = value = None  # let go of the last checkpoint before the next is read
        state = load_checkpoint(path)
        model = state["model"]
        if total and _shapes(total) != _shapes(model):
            raise UserError(f"{path}: its parameters differ in name or shape from those of {paths[0]}")
        for name, value in model.items():
            if not value.is_floating_point():
                total[name] = value
            elif not value.isfinite().all():
                raise UserError(f"{path}: {name} holds values that are no numbers; the training has diverged")
            elif name in total:
                total[name] += value
            else:
                total[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for name, value in total.items():
        if value.is_floating_point():
            total[name] = (value / len(paths)).to(model[name].dtype)
    state["model"] = total
    state.pop("last_optimizer_state", None)
    partial = output.with_name(output.name + ".tmp")
    try:
        torch.save(state, partial)
        os.replace(partial, output)
    except (OSError, RuntimeError) as error:  # torch.save reports a missing folder as RuntimeError
        partial.unlink(missing_ok=True)
        raise UserError(f"{output}: {' '.join(str(error).split())}") from None


def _shapes(model):
    return {name: value.shape for name, value in model.items()}
