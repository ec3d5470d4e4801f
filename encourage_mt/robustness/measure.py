"""Measure a run: translate its test sets under noise, and compute its confidence in them and in foreign text.

Everything is kept in the run's folder, in robustness.json and robustness/, and measured again only if the checkpoint,
the search or the text has changed.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from tqdm import tqdm

from ..data import subwords
from ..data.bitext import read_lines
from ..data.manifest import POSITIONS, PreparedData, hash_text
from ..errors import UserError, as_user_error
from ..evaluation import scoring
from ..evaluation.confidence import SCORES, encode, score_pairs, sentence_scores
from ..evaluation.converted_model import Translation, translate_pieces
from ..evaluation.diagnostics import load
from ..evaluation.evaluate import evaluated_checkpoint, write_lines
from ..evaluation.results import HEADLINE, FiniteScore, Result
from ..fields import Split
from ..files import Record, file_hash, read_record, write_record
from ..processes import locked
from ..serving.export import exported
from ..serving.translate import Translator
from ..training.run_folder import Run
from .perturbations import perturb, perturbations, shuffle_words

logger = logging.getLogger(__name__)

FOLDER, RECORD = "robustness", "robustness.json"
CLEAN, SEGMENTATION = "clean", "other segmentation"
SHUFFLED, REVERSED = "shuffled words", "wrong direction"  # foreign sets that are made from the test set
LENGTH = "source length"
Pieces = tuple[str, ...]


@dataclass
class Choice:
    """What to measure: the test sets, with noise in these percentages of the words, and {name: foreign sentences}."""

    tests: list[str]
    percentages: list[int]
    seed: int
    foreign: dict[str, list[str]]


class Noise(Record):
    """The translation of one perturbed test set. Consistency: chrF++ of it against the translation of the clean text.

    changed is the share of sentences whose pieces differ from the clean ones. chrf and consistency have a value for
    each sentence; sacreBLEU is of the whole set.
    """

    source_sha256: str
    changed: float
    bleu: FiniteScore
    chrf: list[FiniteScore]
    consistency: list[FiniteScore]

    @property
    def sentences(self) -> int:
        return len(self.chrf)


class Foreign(Record):
    """The confidence in the translations of a set: {score: value of each sentence}, LENGTH among them."""

    source_sha256: str
    scores: dict[str, list[float]]

    @model_validator(mode="after")
    def _check_scores(self):
        if set(self.scores) != {*SCORES, LENGTH} or len(set(map(len, self.scores.values()))) > 1:
            raise ValueError(f"scores: must have {', '.join(SCORES)}, {LENGTH}, each with one value a sentence")
        return self

    @property
    def sentences(self) -> int:
        return len(self.scores[LENGTH])


class Robustness(Record):
    """The content of robustness.json: {test set: {name: values}}; CLEAN is the test set as it is."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[1] = 1
    checkpoint_sha256: str
    beam: int
    lenpen: float
    signatures: dict[str, str]
    noise: dict[Split, dict[str, Noise]]
    foreign: dict[Split, dict[str, Foreign]]

    @model_validator(mode="after")
    def _check_sentences(self):
        for test in {*self.noise, *self.foreign}:
            noise, foreign = self.noise.get(test, {}), self.foreign.get(test, {})
            sizes = {len(values) for each in noise.values() for values in (each.chrf, each.consistency)}
            sizes |= {foreign[name].sentences for name in (CLEAN, SHUFFLED, REVERSED) if name in foreign}
            if len(sizes) > 1 or not all(CLEAN in sets for sets in (noise, foreign) if sets):
                raise ValueError(f"{test}: must have {CLEAN}, and a value for each of its sentences everywhere")
            if not all((*sizes, *(each.sentences for each in foreign.values()))):
                raise ValueError(f"{test}: must have sentences")
        return self


class Measurement:
    """Measures one evaluated run, whose folder must be locked, with the model that it was exported to."""

    def __init__(self, run: Run, translator: Translator, choice: Choice):
        self.run, self.translator, self.choice, self.data = run, translator, choice, run.prepared()
        self.model = translator.model
        self.metrics = scoring.metrics(self.data.target, self.data.lowercase)
        self.record = self._open()
        self.fairseq: tuple[Any, Any] | None = None  # model and task
        self.has_worked = False

    def _open(self) -> Robustness:
        """Return what was measured before with this checkpoint and search, otherwise an empty record."""
        settings: dict[str, Any] = {name: getattr(self.model, name) for name in ("checkpoint_sha256", "beam", "lenpen")}
        signatures = Result.read(self.run.folder).signatures
        settings["signatures"] = {name: signatures[name] for name in (HEADLINE, "chrF++") if name in signatures}
        if (self.run.folder / RECORD).exists():
            record = read_record(self.run.folder / RECORD, Robustness)
            if all(getattr(record, name) == value for name, value in settings.items()):
                return record
            # what follows replaces the translations of the clean text, which this record would take for its own
            (self.run.folder / RECORD).unlink()
        return Robustness(**settings, noise={}, foreign={})

    def measure(self, test: str) -> None:
        """Measure noise and foreign text on one test set."""
        source, references = (self.data.read_text(test, language) for language in self.data.languages)
        clean: dict[Pieces, str] = {}
        original: list[Pieces] = []
        translation: list[str] = []
        for name, pieces in self._noisy(source):
            original = original or pieces  # the clean set comes first
            changed = share_changed(original, pieces)
            if name != CLEAN and not changed:
                continue  # for example upper case where the data is lowercased
            longest = max(POSITIONS - 1, *map(len, original))
            if max(map(len, pieces)) > longest:  # upper case may be split into characters
                logger.warning("%s %s, %s: left out, a sentence is too long for the model", self.run.name, test, name)
                continue
            lines = self._measure_noise(test, name, pieces, changed, references, clean, translation)
            if name == CLEAN:
                clean, translation = dict(zip(pieces, lines, strict=True)), lines
        shuffled = perturb(source, shuffle_words, SHUFFLED, self.choice.seed)
        sets = {CLEAN: source, SHUFFLED: shuffled, REVERSED: references, **self.choice.foreign}
        for name, lines in sets.items():
            self._measure_foreign(test, name, list(map(self._pieces, lines)))

    def _noisy(self, source: list[str]) -> Iterator[tuple[str, list[Pieces]]]:
        """Yield (name, source in pieces) of the clean test set and of each perturbation."""
        yield CLEAN, list(map(self._pieces, source))
        for name, perturbation in perturbations(self.choice.percentages).items():
            yield name, list(map(self._pieces, perturb(source, perturbation, name, self.choice.seed)))
        prefix = self.model.folder / "subword"
        sampled = subwords.sample(list(map(self.translator.prepare, source)), prefix, self.choice.seed)
        if sampled:
            yield SEGMENTATION, [tuple(line.split()) for line in sampled]

    def _pieces(self, line: str) -> Pieces:
        return tuple(self.translator.pieces(line))

    def chosen(self) -> Robustness:
        """Return what was chosen from the record, which may have more, measured by earlier commands."""
        noise = {CLEAN, SEGMENTATION, *perturbations(self.choice.percentages)}
        foreign = {CLEAN, SHUFFLED, REVERSED, *self.choice.foreign}

        def pick(sets: dict[str, dict[str, Any]], names: set[str]) -> dict[str, dict[str, Any]]:
            tests = self.choice.tests
            return {test: {name: sets[test][name] for name in sets[test] if name in names} for test in tests}

        changes = {"noise": pick(self.record.noise, noise), "foreign": pick(self.record.foreign, foreign)}
        return self.record.model_copy(update=changes)

    def _measure_noise(self, test, name, pieces, changed, references, clean, translation) -> list[str]:
        """Return the translation of a noisy set. clean: {pieces: translation}; translation: that of the clean set."""
        noise, checksum = self.record.noise.setdefault(test, {}), hash_text([pieces, references])
        file = f"{test}.{name.replace(' ', '_').replace('%', '')}.{self.data.target}"
        path = self.run.folder / FOLDER / file
        if name in noise and noise[name].source_sha256 == checksum and path.exists():
            lines = read_lines(path)
            if len(lines) == len(pieces):
                return lines
        new = list(dict.fromkeys(line for line in pieces if line not in clean))
        found = self._translate(new, f"{self.run.name} {test}, {name}")
        known = clean | {line: self.translator.text(best.pieces) for line, best in zip(new, found, strict=True)}
        lines = [known[line] for line in pieces]
        path.parent.mkdir(exist_ok=True)
        write_lines(path, lines)
        chrf, bleu = self.metrics["chrF++"], self.metrics[HEADLINE]
        scores = [chrf_of_sentences(chrf, lines, side) for side in (references, translation or lines)]
        if name == CLEAN:  # what was measured before is of another text
            noise.clear()
            self.record.foreign[test] = {}
        noise[name] = Noise(
            source_sha256=checksum,
            changed=changed,
            bleu=bleu.corpus_score(lines, [references]).score,
            chrf=scores[0],
            consistency=scores[1],
        )
        self._save()
        return lines

    def _measure_foreign(self, test: str, name: str, pieces: list[Pieces]) -> None:
        foreign, checksum = self.record.foreign.setdefault(test, {}), hash_text(pieces)
        if name in foreign and foreign[name].source_sha256 == checksum:
            return
        for known in self.record.foreign.values():  # a file of --ood, measured for another test set
            if name in known and known[name].source_sha256 == checksum:
                foreign[name] = known[name]
                return self._save()
        description = f"{self.run.name} {test}, {name} for detection"
        translations = [found.pieces for found in self._translate(pieces, description)]
        self.fairseq = self.fairseq or load(evaluated_checkpoint(self.run), self.run.data)
        model, task = self.fairseq
        sources = encode([" ".join(line) for line in pieces], task.source_dictionary)
        targets = encode([" ".join(line) for line in translations], task.target_dictionary)
        values = sentence_scores(score_pairs(model, task, sources, targets, description))
        scores = {score: of_score.round(6).tolist() for score, of_score in values.items()}
        scores[LENGTH] = [-float(len(line)) for line in pieces]
        with as_user_error(f"{description}: the scores of the model cannot be kept"):  # they are not finite
            foreign[name] = Foreign(source_sha256=checksum, scores=scores)
        self._save()

    def _translate(self, sources: list[Pieces], description: str) -> Iterable[Translation]:
        found = translate_pieces(self.translator.engine, map(list, sources), self.model.beam, self.model.lenpen)
        try:
            for (best,) in tqdm(found, desc=description, total=len(sources), unit="sentence", leave=False):
                yield best
        except UserError as error:  # such as a sentence that is too long
            raise UserError(f"{description}: {error}") from None

    def _save(self) -> None:
        self.has_worked = True
        write_record(self.run.folder / RECORD, self.record)


def chrf_of_sentences(metric: Any, lines: list[str], others: list[str]) -> list[float]:
    """Return chrF++ of each line against the other; equal lines have 100, also two empty ones (sacreBLEU: 0)."""
    pairs = zip(lines, others, strict=True)
    return [100.0 if a == b else round(metric.sentence_score(a, [b]).score, 2) for a, b in pairs]


def share_changed(clean: list[Pieces], noisy: list[Pieces]) -> float:
    """Return the share of sentences whose pieces differ from those of the same sentence in the clean set."""
    return sum(a != b for a, b in zip(clean, noisy, strict=True)) / len(clean)


def read_measured(run: Run) -> Robustness | None:
    """Return what was measured with the checkpoint and search of the run's present scores, None if nothing was.

    Raises UserError if the record is damaged, or the run is not evaluated.
    """
    path = run.folder / RECORD
    if not path.exists():
        return None
    record, search = read_record(path, Robustness), Result.read(run.folder).evaluation
    present = file_hash(evaluated_checkpoint(run)), search.beam, search.lenpen
    return record if (record.checkpoint_sha256, record.beam, record.lenpen) == present else None


def choose(
    data: PreparedData, tests: list[str], percentages: list[int], seed: int, files: list[tuple[str, Path]]
) -> Choice:
    """Return what to measure on runs with this data: by default all its test sets. files: (name, foreign text).

    Raises UserError if the data has no such test set, a name is taken, or a file has fewer than two sentences or is a
    test set.
    """
    for test in tests:
        if test not in data.tests:
            raise UserError(f"--tests {test}: the data has no such test set; it has {', '.join(data.tests)}")
    tests = tests or data.tests
    foreign: dict[str, list[str]] = {}
    for name, path in files:
        if name in (CLEAN, SHUFFLED, REVERSED, *foreign):
            raise UserError(f"--ood {name}: the name is taken by another set; choose another name")
        foreign[name] = [line for line in read_lines(path) if line.strip()]
        if len(foreign[name]) < 2:
            raise UserError(f"--ood {name}: {path} has {len(foreign[name])} sentences; at least 2 are needed")
        for test in tests:
            if foreign[name] == [line for line in data.read_text(test, data.source) if line.strip()]:
                raise UserError(f"--ood {name}: {path} is the source of {test} itself; choose text from elsewhere")
    return Choice(tests, percentages, seed, foreign)


def measure(run: Run, choice: Choice) -> Robustness:
    """Return what was chosen, measured on an evaluated run; other measurements in its robustness.json are kept.

    Raises UserError if the run is not evaluated, a file is missing or damaged, or CTranslate2 is not installed.
    """
    translator = Translator(exported(run))  # `exported` locks the run itself
    with locked(run.folder):
        measurement = Measurement(run, translator, choice)
        for test in choice.tests:
            measurement.measure(test)
    if not measurement.has_worked:
        print(f"{run.name}: measured already")
    return measurement.chosen()
