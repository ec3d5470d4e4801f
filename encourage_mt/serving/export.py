"""Export a run: one folder that translates raw text without fairseq, checked against fairseq before it is complete."""

import shutil
from pathlib import Path

from tqdm import tqdm

from ..atomic import atomic_folder
from ..data.manifest import PreparedData
from ..environment import versions
from ..errors import UserError
from ..evaluation import scoring
from ..evaluation.comparison import read_translation
from ..evaluation.converted_model import MAX_PIECES, convert_checkpoint
from ..evaluation.engines import translate_sets
from ..evaluation.evaluate import evaluated_checkpoint
from ..evaluation.results import HEADLINE, Result
from ..files import file_hash, read_json
from ..processes import locked
from ..training.run_folder import Run
from .card import model_card
from .model import CARD, RECORD, Agreement, Model, preparation_of
from .translate import Translator, restore_text

SAMPLE = 1000  # sentences of valid whose translations are compared
# float32 differs only where two hypotheses are nearly equal, and where a weak model repeats itself without end. Other
# types change many translations, nearly all of a weak model, for others of the same quality, so their BLEU counts.
LEAST_SHARE = 0.95  # of identical translations, in float32
LARGEST_LOSS = 1.0  # of sacreBLEU, with another type


def export(run: Run, output: Path, quantization: str) -> None:
    """Write the evaluated `run` as a model into the folder `output`, complete or not at all.

    Its translations of a sample of valid are compared with those of fairseq. Raises UserError if they differ too
    much, the run is not evaluated, or `output` contains anything except an earlier export.
    """
    with locked(run.folder):
        _export(run, output, quantization)


def _export(run: Run, output: Path, quantization: str) -> None:
    """Do the work of `export`; the run's folder must be locked."""
    output = output.resolve()
    check_output(output)
    data, result, checkpoint = run.prepared(), Result.read(run.folder), evaluated_checkpoint(run)
    result.check_data(data)
    subwords = [path for name in ("codes", "model") if (path := data.folder / f"subword.{name}").exists()]
    for path in subwords:
        if path.is_symlink():
            raise UserError(f"{path}: is a link, which may lead to any file; put the file itself there")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as partial:
        print(
            f"{run.name}: converting to CTranslate2, then comparing translations of the validation set with fairseq's"
        )
        convert_checkpoint(checkpoint, data, partial, run.folder / "convert.log", quantization)
        for path in subwords:
            shutil.copy(path, partial)
        model = Model(
            folder=partial,
            name=run.name,
            recipe=run.recipe,
            source=data.source,
            target=data.target,
            preparation=preparation_of(data, "valid"),  # until it is verified
            subword=data.subword_options,
            remove_bpe=data.remove_bpe,
            byte_fallback=data.byte_fallback,
            beam=result.evaluation.beam,
            lenpen=result.evaluation.lenpen,
            quantization=quantization,
            checkpoint_sha256=file_hash(checkpoint),
            files={path.name: file_hash(path) for path in sorted(partial.iterdir())},
            versions=versions(),
        )
        model.write()  # because the translator reads it
        agreement = verify(model, run, data, result)
        of_tests = preparation_of(data, data.tests[0])
        model.model_copy(update={"agreement": agreement, "preparation": of_tests}).write()
        (partial / CARD).write_text(model_card(model, agreement, data, result), encoding="utf-8")
    print(f"{output}: {agreement.describe()}")


def verify(model: Model, run: Run, data: PreparedData, result: Result) -> Agreement:
    """Return how well `model` and fairseq agree on a sample of valid, evenly spaced.

    Sentences of more than MAX_PIECES pieces are left out, because only an export translates them in parts. The
    translations of fairseq are those that were scored, or new ones if CTranslate2 made them. Raises UserError if they
    differ too much.
    """
    sources, references = (data.read_text("valid", language) for language in data.languages)
    if result.evaluation.engine == "fairseq":
        theirs = read_translation(run, "valid", data, references)
    else:
        run = run.model_copy(update={"beam": model.beam, "lenpen": model.lenpen})
        lines = translate_sets(run, data, evaluated_checkpoint(run), "fairseq", ["valid"])["valid"]
        theirs = [restore_text(line, model) for line in lines]
    translator, ours = Translator(model.folder), []
    sample = list(zip(sources, references, theirs, strict=True))[:: -(-len(sources) // SAMPLE)]
    sample = [row for row in sample if len(translator.pieces(row[0])) <= MAX_PIECES]
    if not sample:
        raise UserError(f"not exported: every sentence of the validation set has more than {MAX_PIECES} pieces")
    sources, references, theirs = map(list, zip(*sample, strict=True))
    for start in tqdm(range(0, len(sources), 50), desc=f"{run.name} valid", unit="batch", leave=False):
        ours += translator.translate(sources[start : start + 50])
    scores = [scoring.score(lines, references, data.target, data.lowercase)[HEADLINE] for lines in (ours, theirs)]
    is_exact = model.quantization == "float32"
    agreement = Agreement(
        sentences=len(ours),
        identical=sum(a == b for a, b in zip(ours, theirs, strict=True)),
        required=f"{LEAST_SHARE:.0%} identical" if is_exact else f"sacreBLEU at most {LARGEST_LOSS} lower",
        bleu_ctranslate2=scores[0].score,
        bleu_fairseq=scores[1].score,
        signature=scores[0].signature,
    )
    loss = agreement.bleu_fairseq - agreement.bleu_ctranslate2
    differs = agreement.share < LEAST_SHARE if is_exact else loss > LARGEST_LOSS
    if differs:
        raise UserError(f"not exported because the translations differ too much from fairseq's: {agreement.describe()}")
    return agreement


def exported(run: Run) -> Path:
    """Return the run's export/ folder; export to it in float32 first unless it has the model of the present scores."""
    output = run.folder / "export"
    if not _is_exported(run, output):
        with locked(run.folder):
            if not _is_exported(run, output):  # another process may have made it meanwhile, and read it now
                _export(run, output, "float32")
    return output


def _is_exported(run: Run, output: Path) -> bool:
    """Return whether `output` is a complete float32 export of the run's present scores."""
    try:
        model, evaluation = Model.open(output), Result.read(run.folder).evaluation
        wanted = "float32", file_hash(evaluated_checkpoint(run)), evaluation.beam, evaluation.lenpen
    except (UserError, OSError):  # missing, damaged, of another version, or being replaced
        return False
    return (model.quantization, model.checkpoint_sha256, model.beam, model.lenpen) == wanted


def check_output(output: Path) -> None:
    """Raise UserError if `output` contains anything that is not a file of an earlier export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; remove it or choose another --output")
    record = read_json(output / RECORD) if (output / RECORD).exists() else {}  # of any version
    files = record.get("files") if isinstance(record, dict) else None
    known = {RECORD, CARD, *files} if isinstance(files, dict) else set()
    foreign = sorted(path.name for path in output.iterdir() if path.name not in known or path.is_dir())
    if foreign:
        raise UserError(f"{output}: not an earlier export (it has {foreign[0]}); remove it or choose another --output")
