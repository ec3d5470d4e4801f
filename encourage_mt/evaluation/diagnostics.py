"""A look inside a trained model, teacher-forced on held-out text: probabilities, margins, energies, gradients.

Definitions per target token, with logits z, p = softmax(z) and target y:
- margin: z_y - max_{k != y} z_k, in nats; negative where another type is preferred (Zhao et al. 2022, section 4.3);
- energy of a type: -z_k (LeCun et al. 2006; Zhao et al. 2022, section 4.2). Softmax does not see a constant added to
  all logits, so only the gap, mean_{k != y}(-z_k) - (-z_y), compares across models;
- gradient: norm of the derivative of the run's own training loss with respect to the decoder's output, the
  representation that the projection turns into logits. A token is well classified where p_y > 0.5;
- nll: -log p_y, in nats (fairseq logs bits);
- expected calibration error: Guo et al. 2017, equation 3, with 15 bins of equal width;
- accuracy and F1 by frequency of the type in train: as word accuracy of compare-mt (Neubig et al. 2019), on subwords.
"""

import logging
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..environment import quiet_imports
from ..errors import UserError
from ..files import file_hash, read_json, write_json
from ..loss.functional import loss_terms
from ..loss.options import LossOptions
from ..plugin import register
from ..training.run_folder import Run
from .evaluate import evaluated_checkpoint

SPLIT = "valid"
PROBABILITY_EDGES = np.linspace(0, 1, 21)
CALIBRATION_EDGES = np.linspace(0, 1, 16)
MARGIN_EDGES = np.arange(-20, 20.5, 0.5)
ENERGY_EDGES = np.arange(-30, 30.5, 0.5)
FREQUENCY_EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)
MAX_TOKENS = 2000


def analyse(run: Run) -> dict:
    """`measure` of the averaged checkpoint of `run` on valid, kept in its analysis.json.

    Raises UserError if the run is not evaluated or its checkpoint is gone.
    """
    path = run.folder / "analysis.json"
    checkpoint = evaluated_checkpoint(run)
    source = {"split": SPLIT, "checkpoint_sha256": file_hash(checkpoint)}
    if path.exists():
        found = read_json(path)
        if found.get("source") == source:
            return found
    model, task = load(checkpoint, run.data)
    if not isinstance(getattr(getattr(model, "decoder", None), "output_projection", None), torch.nn.Linear):
        raise UserError(f"{run.folder}: a look inside is for fairseq's Transformers, not {type(model).__name__}")
    options = loss_options(read_json(run.folder / "scores.json")["criterion"])
    weight = model.decoder.output_projection.weight.detach()
    found = {"source": source, **measure(batches(model, task, run.name), frequencies(task), options, weight)}
    write_json(path, found)
    return found


def load(checkpoint: Path, data: Path):
    """(model in evaluation mode, its task with valid and train loaded), on the GPU if there is one."""
    logging.basicConfig(level=logging.WARNING)  # else a model of fairseq's sets DEBUG for all as it is imported
    with quiet_imports():
        from fairseq import checkpoint_utils

        register()
        overrides = {"data": str(data / "data-bin")}
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
        model = models[0].eval()
        for split in (SPLIT, "train"):
            task.load_dataset(split)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    return (model.cuda() if torch.cuda.is_available() else model), task


def loss_options(criterion: dict) -> LossOptions:
    """Return the loss a run was trained with, from its checkpoint's options; fairseq's cross entropies have no bonus.

    Raises UserError for a bonus outside this package: somebody else's run must not choose which module is imported.
    """
    names = {each.name for each in fields(LossOptions)}
    known = {name: value for name, value in criterion.items() if name in names}
    if ":" in known.get("bonus", ""):
        raise UserError(f"bonus {known['bonus']}: runs with a bonus from outside encourage_mt cannot be analysed")
    return LossOptions(**{"bonus": "none", "smoothing_convention": "fairseq", **known})


def batches(model, task, name: str) -> Iterable[tuple[Tensor, Tensor]]:
    """(logits [tokens, V], target [tokens]) without padding, batch by batch, the model given the true prefix."""
    iterator = task.get_batch_iterator(task.dataset(SPLIT), max_tokens=MAX_TOKENS, required_batch_size_multiple=1)
    device = next(model.parameters()).device
    warnings.filterwarnings("ignore", "'pin_memory'")  # fairseq asks for it on every machine
    warnings.filterwarnings("ignore", "Support for mismatched")  # of fairseq's masks, which differ in type
    for sample in tqdm(iterator.next_epoch_itr(shuffle=False), desc=f"{name} inside", unit="batch", leave=False):
        inputs = {key: value.to(device) for key, value in sample["net_input"].items()}
        with torch.no_grad():
            logits = model(**inputs)[0]
        target = sample["target"].to(device)
        kept = target.ne(task.target_dictionary.pad())
        yield logits[kept], target[kept]


def frequencies(task) -> np.ndarray:
    """Occurrences in train of each type of the target dictionary, [V]."""
    target, size = task.dataset("train").tgt, len(task.target_dictionary)
    counts = np.zeros(size, dtype=np.int64)
    for index in range(len(target)):
        counts += np.bincount(target[index].numpy(), minlength=size)
    return counts


def measure(batches: Iterable[tuple[Tensor, Tensor]], counts: np.ndarray, options: LossOptions, weight: Tensor) -> dict:
    """The figures of this module's docstring.

    batches: (logits [tokens, V], target [tokens]); counts: occurrences of each type in train [V]; options: the loss the
    model was trained with; weight: output projection [V, D]. Histograms are shares of all tokens, over edges that are
    given with them; what lies outside counts in the outermost bin.
    """
    tokens = {
        name: [] for name in ("target", "guess", "p", "nll", "confidence", "margin", "energy", "others", "gradient")
    }
    for logits, target in batches:
        for name, values in per_token(logits, target, options, weight).items():
            tokens[name].append(values.cpu().numpy())
    t = {name: np.concatenate(values) for name, values in tokens.items()}
    correct, well = t["guess"] == t["target"], t["p"] > 0.5
    gradient = t["gradient"].sum()
    bins = np.clip(np.digitize(t["p"], PROBABILITY_EDGES) - 1, 0, len(PROBABILITY_EDGES) - 2)
    by_p = np.bincount(bins, t["gradient"], minlength=len(PROBABILITY_EDGES) - 1)
    calibration = calibrate(t["confidence"], correct)
    return {
        "tokens": len(correct),
        "accuracy": correct.mean(),
        "nll": t["nll"].mean(),
        "probability": {"mean": t["p"].mean(), **histogram(t["p"], PROBABILITY_EDGES)},
        "margin": {"mean": t["margin"].mean(), **histogram(t["margin"], MARGIN_EDGES)},
        "energy": {
            "gap": (t["others"] - t["energy"]).mean(),
            "target": {"mean": t["energy"].mean(), **histogram(t["energy"], ENERGY_EDGES)},
            "others": {"mean": t["others"].mean(), **histogram(t["others"], ENERGY_EDGES)},
        },
        "gradient": {
            "edges": PROBABILITY_EDGES,
            "share": by_p / gradient if gradient else by_p,
            "well_classified": t["gradient"][well].sum() / gradient if gradient else 0.0,
            "well_classified_tokens": well.mean(),
        },
        "calibration": calibration,
        "frequency": by_frequency(t["target"], t["guess"], counts),
    }


def per_token(logits: Tensor, target: Tensor, options: LossOptions, weight: Tensor) -> dict[str, Tensor]:
    """Values of each token, [tokens] each; see this module's docstring. Computed in float64."""
    z = logits.detach().double().requires_grad_()
    loss = loss_terms(z, target, options, backend="reference").loss
    (slope,) = torch.autograd.grad(loss, z)
    with torch.no_grad():
        at_target = z.gather(1, target[:, None]).squeeze(1)
        others = z.scatter(1, target[:, None], -torch.inf)
        log_p = torch.log_softmax(z, dim=1)
        nll, p = -log_p.gather(1, target[:, None]).squeeze(1), log_p.exp()
        confidence, guess = p.max(dim=1)
        return {
            "target": target,
            "guess": guess,
            "p": (-nll).exp(),
            "nll": nll,
            "confidence": confidence,
            "margin": at_target - others.max(dim=1).values,
            "energy": -at_target,
            "others": -(z.sum(dim=1) - at_target) / (z.size(1) - 1),
            "gradient": (slope @ weight.double()).norm(dim=1),
        }


def histogram(values: np.ndarray, edges: np.ndarray) -> dict:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return {"edges": edges, "share": counts / len(values)}


def calibrate(confidence: np.ndarray, correct: np.ndarray) -> dict:
    """Expected calibration error, and per bin of confidence the tokens, their mean confidence and accuracy."""
    bins = np.clip(np.digitize(confidence, CALIBRATION_EDGES, right=True) - 1, 0, len(CALIBRATION_EDGES) - 2)
    size = len(CALIBRATION_EDGES) - 1
    tokens = np.bincount(bins, minlength=size)
    filled = np.maximum(tokens, 1)
    mean_confidence = np.bincount(bins, confidence, minlength=size) / filled
    accuracy = np.bincount(bins, correct, minlength=size) / filled
    error = (tokens * np.abs(accuracy - mean_confidence)).sum() / len(correct)
    return {"error": error, "tokens": tokens, "confidence": mean_confidence, "accuracy": accuracy}


def by_frequency(target: np.ndarray, guess: np.ndarray, counts: np.ndarray) -> list[dict]:
    """Per range of frequency in train: target tokens, the share guessed right (accuracy), and F1 of guesses."""
    rows = []
    for low, high in zip(FREQUENCY_EDGES, (*FREQUENCY_EDGES[1:], np.inf), strict=True):
        of_range = (counts >= low) & (counts < high)
        wanted, offered = of_range[target], of_range[guess]
        hits = (wanted & (target == guess)).sum()
        row = {"from": low, "below": None if high == np.inf else high, "tokens": wanted.sum()}
        row["accuracy"] = hits / wanted.sum() if wanted.any() else None
        row["f1"] = 2 * hits / (wanted.sum() + offered.sum()) if wanted.any() else None
        rows.append(row)
    return rows
