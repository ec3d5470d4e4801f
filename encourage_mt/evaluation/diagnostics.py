"""Measure a trained model on held-out text, with teacher forcing: probabilities, margins, energies, gradients.

Definitions per target token, with logits z, p = softmax(z) and target y:
- margin: z_y - max_{k != y} z_k, in nats; negative if another type is preferred (Zhao et al. 2022, section 4.3);
- energy of a type: -z_k (LeCun et al. 2006; Zhao et al. 2022, section 4.2). A constant added to all logits does not
  change softmax, so only the gap, mean_{k != y}(-z_k) - (-z_y), can be compared between models;
- gradient: norm of the derivative of the run's own training loss, without R-Drop's divergence, with respect to the
  decoder's output, the representation that the projection turns into logits. A token is well classified if p_y > 0.5.
  It is not measured for a bonus of a module that the user does not trust;
- nll: -log p_y, in nats (fairseq logs bits);
- expected calibration error: Guo et al. 2017, equation 3, with 15 bins of equal width;
- accuracy and F1 by frequency of the type in train: as word accuracy of compare-mt (Neubig et al. 2019), on subwords.
"""

import logging
import warnings
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor
from tqdm import tqdm

from ..data.manifest import DATASET
from ..environment import quiet_imports
from ..errors import UserError, as_user_error
from ..fields import Count
from ..files import Record, file_hash, read_record, write_json
from ..loss.functional import loss_terms
from ..loss.options import LossOptions
from ..plugin import register
from ..recipe_parts import check_trusted_bonus
from ..training.run_folder import Run
from .evaluate import evaluated_checkpoint
from .results import FiniteScore, Result

SPLIT = "valid"
PROBABILITY_EDGES = np.linspace(0, 1, 21)
CALIBRATION_EDGES = np.linspace(0, 1, 16)
MARGIN_EDGES = np.arange(-20, 20.5, 0.5)
ENERGY_EDGES = np.arange(-30, 30.5, 0.5)
FREQUENCY_EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)
HISTOGRAMS = {
    **{"probability": PROBABILITY_EDGES, "gradient": PROBABILITY_EDGES, "margin": MARGIN_EDGES},
    **{"energy.target": ENERGY_EDGES, "energy.others": ENERGY_EDGES},
}
BLOCK_ELEMENTS = 2**24  # of logits that are measured together: 128 MiB in float64
MAX_TOKENS = 2000


class Histogram(Record):
    """Shares of all tokens over `edges`; values outside are counted in the outermost bin."""

    mean: float
    edges: list[float]
    share: list[FiniteScore]


class Energy(Record):
    gap: float
    target: Histogram
    others: Histogram


class Gradient(Record):
    """Shares of the gradient over `edges` of p; shares of the gradient and of the tokens that have p > 0.5."""

    edges: list[float]
    share: list[FiniteScore]
    well_classified: float
    well_classified_tokens: float


class Calibration(Record):
    """Expected calibration error, and for each bin of confidence its tokens, their mean confidence and accuracy."""

    error: float
    tokens: list[Count]
    confidence: list[FiniteScore]
    accuracy: list[FiniteScore]


class FrequencyRange(Record):
    """Target types that occur `start` to `below` - 1 times in train: their tokens, share predicted correctly, F1."""

    model_config = ConfigDict(serialize_by_alias=True)

    start: int = Field(alias="from")
    below: int | None
    tokens: Count
    accuracy: FiniteScore | None
    f1: FiniteScore | None


class Analysis(Record):
    """The content of analysis.json: the measurements of the averaged checkpoint on the split of `source`."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[2] = 2
    source: dict[str, str]  # split, checkpoint_sha256 and data_sha256
    tokens: int
    accuracy: float
    nll: float
    probability: Histogram
    margin: Histogram
    energy: Energy
    gradient: Gradient | None
    calibration: Calibration
    frequency: list[FrequencyRange]

    @model_validator(mode="after")
    def _check_bins(self):
        for name, edges in HISTOGRAMS.items():
            histogram = attrgetter(name)(self)
            if histogram is None:
                continue
            if histogram.edges != edges.tolist() or len(histogram.share) != len(edges) - 1:
                raise ValueError(f"{name}: must have the edges of this version and a share for each bin")
            if name != "gradient" and abs(sum(histogram.share) - 1) > 1e-6:
                raise ValueError(f"{name}: the shares must sum to 1")
        bins = self.calibration
        if {len(bins.tokens), len(bins.confidence), len(bins.accuracy)} != {len(CALIBRATION_EDGES) - 1}:
            raise ValueError(f"calibration: must have {len(CALIBRATION_EDGES) - 1} bins")
        if [row.start for row in self.frequency] != list(FREQUENCY_EDGES):
            raise ValueError(f"frequency: the ranges must start at {', '.join(map(str, FREQUENCY_EDGES))}")
        return self

    @classmethod
    def upgrade(cls, content: dict) -> dict:
        """Return an analysis of version 0.1, which differs only in having no `format`."""
        return {"format": 2, **content}


def analyse(run: Run) -> Analysis:
    """Return the measurements of the averaged checkpoint of `run` on valid; they are kept in its analysis.json.

    Raises UserError if the run is not evaluated, its checkpoint or the binarized data is missing, its analysis.json is
    damaged, or the model has no linear output projection.
    """
    path = run.folder / "analysis.json"
    checkpoint = evaluated_checkpoint(run)
    checksum = run.prepared().checksum
    source = {"split": SPLIT, "checkpoint_sha256": file_hash(checkpoint), "data_sha256": checksum}
    options = loss_options(Result.read(run.folder).criterion)
    if path.exists():
        analysis = read_record(path, Analysis)
        if analysis.source == source and (analysis.gradient or not options):
            return analysis
    model, task = load(checkpoint, run.data, SPLIT, "train")
    if not isinstance(getattr(getattr(model, "decoder", None), "output_projection", None), torch.nn.Linear):
        raise UserError(f"{run.folder}: diagnostics support only fairseq's Transformers, not {type(model).__name__}")
    weight = model.decoder.output_projection.weight.detach()
    values = measure(batches(model, task, run.name), frequencies(task), options, weight)
    write_json(path, {"format": 2, "source": source, **values})
    return read_record(path, Analysis)


def load(checkpoint: Path, data: Path, *subsets: str):
    """Return (model in evaluation mode, its task with `subsets` of the data loaded), on the GPU if there is one.

    Raises UserError if fairseq cannot load them.
    """
    logging.basicConfig(level=logging.WARNING)  # because one of fairseq's models sets DEBUG for all when imported
    with quiet_imports(), as_user_error(f"{checkpoint}: fairseq cannot load it with the data in {data}"):
        from fairseq import checkpoint_utils
        from fairseq.tasks.translation import TranslationTask

        register()
        overrides = {"data": str(data / "data-bin"), "dataset_impl": DATASET}
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
        if not isinstance(task, TranslationTask):  # others may read other files
            raise UserError(f"{checkpoint}: its task is not translation")
        model = models[0].eval()
        for subset in subsets:
            task.load_dataset(subset)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    return (model.cuda() if torch.cuda.is_available() else model), task


def loss_options(criterion: dict[str, Any]) -> LossOptions | None:
    """Return the loss options of a criterion's settings in scores.json; fairseq's cross entropies have no bonus.

    Returns None for a bonus from outside that the user does not trust: a run must not choose which module is imported.
    """
    names = {each.name for each in fields(LossOptions)}
    known = {name: value for name, value in criterion.items() if name in names}
    if ":" in str(known.get("bonus")):
        try:
            check_trusted_bonus(str(known["bonus"]))
        except ValueError:
            return None
    try:
        return LossOptions(**{"bonus": "none", "smoothing_convention": "fairseq", **known})
    except (TypeError, ValueError) as error:
        raise UserError(f"scores.json: criterion: {error}") from None


def batches(model, task, name: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (logits [tokens, V], target [tokens]) of each batch without padding; the model is given the true prefix."""
    for logits, sample in force_decode(model, task, task.dataset(SPLIT), f"{name} diagnostics"):
        target = sample["target"].to(logits.device)
        kept = target.ne(task.target_dictionary.pad())
        yield logits[kept], target[kept]


def force_decode(model, task, dataset, description: str) -> Iterable[tuple[Tensor, dict]]:
    """Yield (logits [sentences, longest, V], fairseq's batch) for a dataset of pairs; each target is its own prefix."""
    max_tokens = max(MAX_TOKENS, int(np.max(dataset.sizes)))  # of one long sentence, which fairseq would refuse
    iterator = task.get_batch_iterator(dataset, max_tokens=max_tokens, required_batch_size_multiple=1)
    device = next(model.parameters()).device
    warnings.filterwarnings("ignore", "'pin_memory'")  # fairseq asks for it on every machine
    warnings.filterwarnings("ignore", "Support for mismatched")  # because fairseq's masks differ in type
    for sample in tqdm(iterator.next_epoch_itr(shuffle=False), desc=description, unit="batch", leave=False):
        inputs = {key: value.to(device) for key, value in sample["net_input"].items()}
        with torch.no_grad(), as_user_error(f"{description}: the model cannot be run"):  # such as without memory
            logits = model(**inputs)[0]
        yield logits, sample


def frequencies(task) -> np.ndarray:
    """Return how often each type of the target dictionary occurs in train, [V]."""
    target, size = task.dataset("train").tgt, len(task.target_dictionary)
    counts = np.zeros(size, dtype=np.int64)
    for start in tqdm(range(0, len(target), 10_000), desc="types of train", leave=False):
        rows = [target[index].numpy() for index in range(start, min(start + 10_000, len(target)))]
        counts += np.bincount(np.concatenate(rows), minlength=size)
    return counts


def measure(
    batches: Iterable[tuple[Tensor, Tensor]], counts: np.ndarray, options: LossOptions | None, weight: Tensor
) -> dict[str, Any]:
    """Return the fields of Analysis except its source, as numpy values.

    batches: (logits [tokens, V], target [tokens]); counts: occurrences of each type in train [V]; options: the loss the
    model was trained with, None to leave the gradient out; weight: output projection [V, D].
    """
    tokens: dict[str, list[np.ndarray]] = {}
    rows = max(1, BLOCK_ELEMENTS // weight.size(0))
    weight = weight.double()  # once
    for logits, target in batches:
        for part in zip(logits.split(rows), target.split(rows), strict=True):
            for name, values in per_token(*part, options, weight).items():
                tokens.setdefault(name, []).append(values.cpu().numpy())
    t = {name: np.concatenate(values) for name, values in tokens.items()}
    correct = t["guess"] == t["target"]
    return {
        "tokens": len(correct),
        "accuracy": correct.mean(),
        "nll": t["nll"].mean(),
        "probability": histogram(t["p"], PROBABILITY_EDGES),
        "margin": histogram(t["margin"], MARGIN_EDGES),
        "energy": {
            "gap": (t["others"] - t["energy"]).mean(),
            "target": histogram(t["energy"], ENERGY_EDGES),
            "others": histogram(t["others"], ENERGY_EDGES),
        },
        "gradient": gradient_by_probability(t["p"], t["gradient"]) if options else None,
        "calibration": calibrate(t["confidence"], correct),
        "frequency": by_frequency(t["target"], t["guess"], counts),
    }


def per_token(logits: Tensor, target: Tensor, options: LossOptions | None, weight: Tensor) -> dict[str, Tensor]:
    """Return the values of each token, [tokens] each, in float64; see this module's docstring."""
    z = logits.detach().double().requires_grad_()
    gradient = {}
    if options:
        (slope,) = torch.autograd.grad(loss_terms(z, target, options, backend="reference").loss, z)
        gradient = {"gradient": (slope @ weight.double()).norm(dim=1)}
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
            **gradient,
        }


def gradient_by_probability(p: np.ndarray, norms: np.ndarray) -> dict[str, Any]:
    """Return the fields of Gradient, from p of the target and the norm of the gradient of each token."""
    bins = np.clip(np.digitize(p, PROBABILITY_EDGES) - 1, 0, len(PROBABILITY_EDGES) - 2)
    share = np.bincount(bins, norms, minlength=len(PROBABILITY_EDGES) - 1) / (norms.sum() or 1)
    return {
        "edges": PROBABILITY_EDGES,
        "share": share,
        "well_classified": norms[p > 0.5].sum() / (norms.sum() or 1),
        "well_classified_tokens": (p > 0.5).mean(),
    }


def histogram(values: np.ndarray, edges: np.ndarray) -> dict:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return {"mean": values.mean(), "edges": edges, "share": counts / len(values)}


def calibrate(confidence: np.ndarray, correct: np.ndarray) -> dict:
    """Return the fields of Calibration."""
    tokens, *sums = bin_by_confidence(confidence, correct)
    mean_confidence, accuracy = sums / np.maximum(tokens, 1)
    error = (tokens * np.abs(accuracy - mean_confidence)).sum() / len(correct)
    return {"error": error, "tokens": tokens.astype(int), "confidence": mean_confidence, "accuracy": accuracy}


def bin_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return number, summed confidence and summed correctness in each bin of calibration: [3, bins]."""
    size = len(CALIBRATION_EDGES) - 1
    bins = np.clip(np.digitize(confidence, CALIBRATION_EDGES, right=True) - 1, 0, size - 1)
    return np.stack([np.bincount(bins, weights, minlength=size) for weights in (None, confidence, correct)])


def by_frequency(target: np.ndarray, guess: np.ndarray, counts: np.ndarray) -> list[dict]:
    """Return the fields of each FrequencyRange."""
    rows = []
    for low, high in zip(FREQUENCY_EDGES, (*FREQUENCY_EDGES[1:], np.inf), strict=True):
        in_range = (counts >= low) & (counts < high)
        wanted, guessed = in_range[target], in_range[guess]
        hits = (wanted & (target == guess)).sum()
        row = {"from": low, "below": None if high == np.inf else high, "tokens": wanted.sum()}
        row["accuracy"] = hits / wanted.sum() if wanted.any() else None
        row["f1"] = 2 * hits / (wanted.sum() + guessed.sum()) if wanted.any() else None
        rows.append(row)
    return rows
