"""Choose how the runs of an arm translate: the beam, length penalty and temperature with the highest BLEU on valid."""

import shutil
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from tqdm import tqdm

from ..atomic import temporary_folder
from ..data.bitext import read_lines
from ..data.manifest import PreparedData
from ..errors import UserError
from ..files import Record, file_hash, read_record, write_record
from ..plugin.checkpoints import last_checkpoints
from ..processes import locked
from ..training.run_folder import Run, checkpoint_folder
from . import scoring
from .averaging import average
from .converted_model import convert_checkpoint, load_model, translate_pieces
from .engines import best_lines, read_pieces
from .evaluate import check_data, write_translation
from .formatting import markdown_table, signature_lines
from .results import HEADLINE, TriedSearch, describe_search

UNFINISHED = ".tune"  # a folder in the run's, removed at the end


class Search(NamedTuple):
    """The settings of a search."""

    beam: int
    lenpen: float
    temperature: float


BEAMS, LENPENS, TEMPERATURES = (1, 4, 5, 10), (0.6, 1.0, 1.4, 1.8), (0.8, 1.0, 1.25, 1.5)
# greedy search depends on neither length penalty nor temperature
SEARCHES = [Search(*s) for s in product(BEAMS, LENPENS, TEMPERATURES) if s[0] > 1 or s[1:] == (1.0, 1.0)]


class Tuning(Record):
    """The content of tuning.json: sacreBLEU on valid of each search, with the mean of these checkpoints."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[1] = 1
    data_sha256: str
    checkpoints_sha256: dict[str, str]
    tried: list[TriedSearch]
    signature: str


def tune(runs: list[Run]) -> list[Run]:
    """Return the runs with the search that has the highest mean BLEU on valid over the runs of their arm.

    Prints BLEU of all searches. Raises UserError if CTranslate2 is missing, runs are not of the same data, those of an
    arm differ in more than the seed or average other numbers of checkpoints, or one cannot be translated.
    """
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.arm, run)
        if run is not other and not run.recipe:
            raise UserError(f"--tune: {run.folder} was trained by hand; tune such runs one by one")
        if {**run.options, "seed": 0} != {**other.options, "seed": 0}:
            raise UserError(f"--tune: {run.folder} and {other.folder} are of one arm but differ in more than the seed")
        if run.average != other.average:
            averages = f"average {run.average} and {other.average} checkpoints; choose one with --average"
            raise UserError(f"--tune: {run.folder} and {other.folder} are of one arm but {averages}")
        if run.prepared().checksum != runs[0].prepared().checksum:
            raise UserError(f"--tune: {run.folder} and {runs[0].folder} are of different data; tune them one by one")
    tunings = [measure(run) for run in runs]
    means = mean_by_arm([(run.arm, tuning.tried) for run, tuning in zip(runs, tunings, strict=True)])
    print(f"\n{tuning_table(means, tunings[0].signature)}\n")
    best = {arm: best_search(bleu) for arm, bleu in means.items()}
    return [run.model_copy(update=best[run.arm]._asdict()) for run in runs]


def mean_by_arm(pairs: list[tuple[str, list[TriedSearch]]]) -> dict[str, dict[Search, float]]:
    """Return {arm: {search: mean BLEU}}, from (arm, searches) of each run; of the searches that all runs tried."""
    by_run = [(arm, {search_of(each): each.bleu for each in tried}) for arm, tried in pairs]
    shared = sorted(set.intersection(*(set(bleu) for _, bleu in by_run)))
    arms: dict[str, list[dict[Search, float]]] = {}
    for arm, bleu in by_run:
        arms.setdefault(arm, []).append(bleu)
    return {arm: {s: statistics.mean(bleu[s] for bleu in group) for s in shared} for arm, group in arms.items()}


def tuning_table(means: dict[str, dict[Search, float]], signature: str) -> str:
    """Return the means of `mean_by_arm`, a row for each search and a column for each arm, and the best of each arm."""
    searches = next(iter(means.values()))
    rows = [[*map(str, search), *(f"{bleu[search]:.2f}" for bleu in means.values())] for search in searches]
    header = ["beam", "length penalty", "temperature", *means]
    best = [f"Best of {arm}: {describe_search(*best_search(bleu))}.  " for arm, bleu in means.items()]
    title = f"{HEADLINE} of valid, for each search and arm:"
    return "\n".join([title, "", markdown_table(header, rows), "", *best, *signature_lines({HEADLINE: signature})])


def best_search(bleu: dict[Search, float]) -> Search:
    return max(bleu, key=bleu.__getitem__)


def search_of(tried: TriedSearch) -> Search:
    return Search(tried.beam, tried.lenpen, tried.temperature)


def measure(run: Run) -> Tuning:
    """Return BLEU on valid of each of SEARCHES, translated with CTranslate2.

    Each is written to the run's tuning.json at once, so an interrupted tuning continues where it stopped.
    """
    path, data = run.folder / "tuning.json", run.prepared()
    with locked(run.folder):
        check_data(run, data)
        checkpoints = last_checkpoints(checkpoint_folder(run.folder), run.average)
        scorer = scoring.metrics(data.target, data.lowercase)[HEADLINE]
        references = data.read_text("valid", data.target)
        scorer.corpus_score(references, [references])  # the signature has the number of references
        tuning = Tuning(
            data_sha256=data.checksum,
            checkpoints_sha256={checkpoint.name: file_hash(checkpoint) for checkpoint in checkpoints},
            tried=[],
            signature=str(scorer.get_signature()),
        )
        if path.exists():
            found = read_record(path, Tuning)
            if found.model_copy(update={"tried": []}) == tuning:
                tuning = found
        missing = [search for search in SEARCHES if search not in map(search_of, tuning.tried)]
        if not missing:
            print(f"{run.name}: tuned already")
            return tuning
        with (
            temporary_folder(run.folder / UNFINISHED) as folder,
            tqdm(total=len(missing), desc=f"{run.name} tuning", unit="search") as bar,
        ):
            for search, lines in translate_valid(run, data, checkpoints, folder, missing):
                bleu = scorer.corpus_score(lines, [references]).score
                tuning.tried.append(TriedSearch(**search._asdict(), bleu=bleu))
                write_record(path, tuning)
                bar.update()
    return tuning


def translate_valid(
    run: Run, data: PreparedData, checkpoints: list[Path], folder: Path, searches: list[Search]
) -> Iterator[tuple[Search, list[str]]]:
    """Yield (search, detokenized translation of valid), by temperature; a model for each of them is in `folder`."""
    average(checkpoints, folder / "mean.pt")
    sources = read_pieces(data, "valid")
    for temperature in dict.fromkeys(search.temperature for search in searches):
        average([folder / "mean.pt"], folder / "average.pt", temperature)
        shutil.rmtree(folder / "model", ignore_errors=True)
        convert_checkpoint(folder / "average.pt", data, folder / "model", run.folder / "convert.log")
        model = load_model(folder / "model")
        for search in searches:
            if search.temperature == temperature:
                translations = translate_pieces(model, sources, search.beam, search.lenpen)
                write_translation(best_lines(translations, data), data, "valid", folder)
                yield search, read_lines(folder / f"valid.{data.target}")
