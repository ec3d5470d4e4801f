"""Measure how confident a model is of translations, in one pass with teacher forcing.

Definitions per piece of a translation (its end of sentence included), with logits z, p = softmax(z) and the piece y:
- log-probability: log p_y, in nats;
- maximum probability: max_k p_k (Hendrycks and Gimpel 2017);
- entropy: -sum_k p_k log p_k, in nats (Fomicheva et al. 2020);
- maximum logit: max_k z_k (Hendrycks et al. 2022), the score of the paper's own experiments;
- energy: -log sum_k exp z_k (Liu et al. 2020, at temperature 1).
The score of a sentence is the mean over its pieces, with the sign that makes a higher score more confident.
A piece is correct if it is matched in an alignment with the fewest edits to the pieces of the reference. Wang et al.
(2020, "On the inference calibration of neural machine translation") take the alignment of TER; ours leaves out its
shifts, so a piece at a wrong place is an error.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator
from sacrebleu.metrics.lib_ter import BeamEditDistance
from torch import Tensor

from ..data import subwords
from ..data.bitext import read_lines
from ..data.manifest import PreparedData
from ..files import Record, file_hash, read_record, write_json
from ..training.run_folder import Run
from .diagnostics import force_decode, load
from .evaluate import evaluated_checkpoint, hash_translations
from .results import FiniteScore

FIRST_PIECES = 5
TokenValues = dict[str, np.ndarray]  # {name: values [pieces]} of one translation
SCORES: dict[str, Callable[[TokenValues], float]] = {
    "mean log-probability": lambda values: values["log_probability"].mean(),
    f"log-probability of {FIRST_PIECES} pieces": lambda values: values["log_probability"][:FIRST_PIECES].mean(),
    "maximum probability": lambda values: values["maximum_probability"].mean(),
    "negative entropy": lambda values: -values["entropy"].mean(),
    "maximum logit": lambda values: values["maximum_logit"].mean(),
    "negative energy": lambda values: -values["energy"].mean(),
    "fewest pieces": lambda values: -float(len(values["energy"])),  # a control: does a score measure only length?
}


class SetConfidence(Record):
    """One test set: {score: value of each sentence}, and for each sentence p of its pieces and which are correct."""

    scores: dict[str, list[float]]
    probability: list[list[FiniteScore]]
    correct: list[list[bool]]

    @model_validator(mode="after")
    def _check_lengths(self):
        if set(self.scores) != set(SCORES):
            raise ValueError(f"scores: must be {', '.join(SCORES)}")
        if {len(values) for values in (*self.scores.values(), self.correct)} != {len(self.probability)}:
            raise ValueError("scores: every sentence needs one of each")
        if list(map(len, self.probability)) != list(map(len, self.correct)):
            raise ValueError("correct: every piece needs one value")
        return self


class Confidence(Record):
    """The content of confidence.json: the averaged checkpoint's confidence in the translations beside it."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[2] = 2
    checkpoint_sha256: str
    translations_sha256: dict[str, str]
    sets: dict[str, SetConfidence]


def measure_confidence(run: Run) -> Confidence:
    """Return how confident the model of an evaluated run is of its translations; kept in its confidence.json.

    The model sees the translation's text in the pieces of the subword model. It may have generated other pieces that
    make the same text; those are not kept. Raises UserError if the run is not evaluated or a file is damaged.
    """
    path, data = run.folder / "confidence.json", run.prepared()
    checkpoint = evaluated_checkpoint(run)
    source = {"checkpoint_sha256": file_hash(checkpoint), "translations_sha256": hash_translations(run.folder, data)}
    if path.exists():
        found = read_record(path, Confidence)
        sizes = {split: len(of_set.correct) for split, of_set in found.sets.items()}
        is_whole = sizes == {split: data.lines[split] for split in data.tests}
        if is_whole and {name: getattr(found, name) for name in source} == source:
            return found
    subsets = {split: data.subsets[split] for split in data.tests}
    model, task = load(checkpoint, run.data, *subsets.values())
    sets = {}
    for split, subset in subsets.items():
        pairs = task.dataset(subset)
        sources, references = ([side[index] for index in range(len(side))] for side in (pairs.src, pairs.tgt))
        hypotheses = encode(translation_pieces(run, data, split), task.target_dictionary)
        values = score_pairs(model, task, sources, hypotheses, f"{run.name} {split} confidence")
        sets[split] = {
            "scores": sentence_scores(values),
            "probability": [np.exp(each["log_probability"][:-1]) for each in values],
            "correct": [
                correct_pieces(hypothesis[:-1].tolist(), reference[:-1].tolist())
                for hypothesis, reference in zip(hypotheses, references, strict=True)
            ],
        }
    write_json(path, {"format": 2, **source, "sets": sets})
    return read_record(path, Confidence)


def translation_pieces(run: Run, data: PreparedData, split: str) -> list[str]:
    """Return a run's translation of a test set, in the pieces of the data's subword model joined by spaces."""
    infix = "tok." if data.is_tokenized else ""
    encode_line = subwords.encoder(data.subword_options, data.folder / "subword")
    return list(map(encode_line, read_lines(run.folder / f"{split}.{infix}{data.target}")))


def encode(lines: list[str], dictionary) -> list[Tensor]:
    """Return the ids of lines of pieces joined by spaces, with the end of sentence, as a fairseq model takes them."""
    return [dictionary.encode_line(line, add_if_not_exist=False, append_eos=True).long() for line in lines]


def score_pairs(model, task, sources: list[Tensor], translations: list[Tensor], description: str) -> list[TokenValues]:
    """Return for each pair the values of the translation's pieces, its end of sentence last, in float64.

    model and task are those of `diagnostics.load`; a source or translation is the ids that `encode` returns. The values
    are log_probability, maximum_probability, entropy, maximum_logit and energy, see this module's docstring.
    """
    from fairseq.data import LanguagePairDataset

    sizes = [np.array([len(line) for line in side]) for side in (sources, translations)]
    dictionaries = task.source_dictionary, task.target_dictionary
    dataset = LanguagePairDataset(
        *(sources, sizes[0], dictionaries[0], translations, sizes[1], dictionaries[1]), shuffle=False
    )
    values: list[TokenValues] = [{}] * len(sources)
    for logits, sample in force_decode(model, task, dataset, description):
        target = sample["target"].to(logits.device)
        of_batch = token_values(logits, target)
        for row, index in enumerate(sample["id"].tolist()):
            values[index] = {name: each[row, : sizes[1][index]].double().numpy() for name, each in of_batch.items()}
    return values


def token_values(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the values of each position, {name: [sentences, longest]}, from logits [sentences, longest, V]."""
    logits = logits.float()
    log_p = torch.log_softmax(logits, dim=-1)
    values = {
        "log_probability": log_p.gather(-1, target[..., None]).squeeze(-1),
        "maximum_probability": log_p.max(dim=-1).values.exp(),
        "entropy": -(log_p.exp() * log_p).sum(dim=-1),
        "maximum_logit": logits.max(dim=-1).values,
        "energy": -logits.logsumexp(dim=-1),
    }
    return {name: each.cpu() for name, each in values.items()}


def sentence_scores(values: list[TokenValues]) -> dict[str, np.ndarray]:
    """Return each of SCORES, [sentences]; a higher score is more confident."""
    return {name: np.array([score(each) for each in values]) for name, score in SCORES.items()}


def correct_pieces(translation: list, reference: list) -> list[bool]:
    """Return for each piece of the translation whether it is correct; see this module's docstring."""
    _, operations = BeamEditDistance(reference)(translation)  # "i": only in the reference, " ": on both sides
    return [operation == " " for operation in operations if operation != "i"]
