"""Choose how the runs of an arm translate: the beam, length penalty and temperature with the highest BLEU on valid."""

import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from tqdm import tqdm

from ..data.bitext import read_lines
from ..data.manifest import PreparedData
from ..data.subwords import join_pieces
from ..files import Record, file_hash, read_record, write_record
from ..plugin.checkpoints import last_checkpoints
from ..processes import locked
from ..training.run_folder import Run
from . import scoring
from .averaging import average
from .converted_model import convert_checkpoint, load_model, translate_pieces
from .engines import read_pieces
from .evaluate import check_data, write_translation
from .formatting import markdown_table
from .results import HEADLINE, FiniteScore, describe_search


class Search(NamedTuple):
    """The settings of a search."""

    beam: int
    lenpen: float
    temperature: float

    def __str__(self) -> str:
        return describe_search(*self)


BEAMS, LENPENS, TEMPERATURES = (1, 4, 5, 10), (0.6, 1.0, 1.4), (0.8, 1.0, 1.25)
# greedy search depends on neither length penalty nor temperature
SEARCHES = [Search(*s) for s in product(BEAMS, LENPENS, TEMPERATURES) if s[0] > 1 or s[1:] == (1.0, 1.0)]


class Tuning(Record):
    """The content of tuning.json: sacreBLEU on valid by search, of the mean of these checkpoints."""

    remedy: ClassVar[str] = "remove it"

    format: Literal[2] = 2
    data_sha256: str
    checkpoints_sha256: dict[str, str]
    bleu: dict[str, FiniteScore]
    signature: str


def tune(runs: list[Run]) -> list[Run]:
    """Return the runs with the search that has the highest mean BLEU on valid over the runs of their arm.

    Prints BLEU of all searches. Raises UserError if CTranslate2 is missing, or a run cannot be translated.
    """
    tunings = [measure(run) for run in runs]
    pairs = [(run.arm, tuning.bleu) for run, tuning in zip(runs, tunings, strict=True)]
    print(f"\nsacreBLEU on valid (mean over the runs of an arm)\n\n{tuning_table(pairs)}\n")
    print(f"sacreBLEU signature: {tunings[0].signature}\n")
    means = mean_by_arm(pairs)
    best = {arm: max(SEARCHES, key=lambda search: bleu[str(search)]) for arm, bleu in means.items()}
    return [run.model_copy(update=best[run.arm]._asdict()) for run in runs]


def mean_by_arm(pairs: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return {arm: {search: mean BLEU}}, from (arm, {search: BLEU}) of each run."""
    arms: dict[str, list[dict[str, float]]] = {}
    for arm, bleu in pairs:
        arms.setdefault(arm, []).append(bleu)
    return {
        arm: {str(search): statistics.mean(bleu[str(search)] for bleu in group) for search in SEARCHES}
        for arm, group in arms.items()
    }


def tuning_table(pairs: list[tuple[str, dict[str, float]]]) -> str:
    """Return the means of `mean_by_arm`: a row for each search, a column for each arm, its highest BLEU bold."""
    means = mean_by_arm(pairs)
    rows = []
    for search in SEARCHES:
        cells = [f"{bleu[str(search)]:.2f}" for bleu in means.values()]
        best = [bleu[str(search)] == max(bleu.values()) for bleu in means.values()]
        rows.append([*map(str, search), *(f"**{c}**" if b else c for c, b in zip(cells, best, strict=True))])
    return markdown_table(["beam", "length penalty", "temperature", *means], rows)


def measure(run: Run) -> Tuning:
    """Return BLEU on valid of each of SEARCHES, translated with CTranslate2; kept in the run's tuning.json."""
    path, data = run.folder / "tuning.json", run.prepared()
    with locked(run.folder):
        check_data(run, data)
        checkpoints = last_checkpoints(run.checkpoints, run.average)
        scorer = scoring.metrics(data.target, data.lowercase)[HEADLINE]
        references = data.read_text("valid", data.target)
        checksums = {checkpoint.name: file_hash(checkpoint) for checkpoint in checkpoints}
        if path.exists():
            found = read_record(path, Tuning)
            is_present = (found.data_sha256, found.checkpoints_sha256) == (data.checksum, checksums)
            if is_present and list(found.bleu) == list(map(str, SEARCHES)):
                print(f"{run.name}: tuned already")
                return found
        bleu = {}
        with tqdm(total=len(SEARCHES), desc=f"{run.name} tuning", unit="search") as bar:
            for temperature in TEMPERATURES:
                searches = [search for search in SEARCHES if search.temperature == temperature]
                for search, lines in translate_valid(run, data, checkpoints, temperature, searches):
                    bleu[str(search)] = scorer.corpus_score(lines, [references]).score
                    bar.update()
        tuning = Tuning(
            data_sha256=data.checksum,
            checkpoints_sha256=checksums,
            bleu={str(search): bleu[str(search)] for search in SEARCHES},
            signature=str(scorer.get_signature()),
        )
        write_record(path, tuning)
    return tuning


def translate_valid(run: Run, data: PreparedData, checkpoints: list[Path], temperature: float, searches: list[Search]):
    """Yield (search, detokenized translation of valid) for `searches`, which have this temperature."""
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        averaged = Path(folder) / "average.pt"
        average(checkpoints, averaged, temperature)
        convert_checkpoint(averaged, data, Path(folder) / "model", run.folder / "convert.log")
        model, sources = load_model(Path(folder) / "model"), read_pieces(data, "valid")
        for search in searches:
            found = translate_pieces(model, sources, search.beam, search.lenpen)
            lines = [join_pieces(best.pieces, data.remove_bpe) for (best,) in found]
            write_translation(lines, data, "valid", Path(folder))
            yield search, read_lines(Path(folder) / f"valid.{data.target}")
