"""Score a trained run: average its checkpoints, translate with beam search, detokenize, score, write scores.json."""

import json
import os
from pathlib import Path

import torch

from ..atomic import temporary_folder
from ..data.bitext import read_lines
from ..data.manifest import PreparedData
from ..data.subwords import restore_bytes
from ..data.tokenization import detokenize
from ..environment import Engine, describe_hardware, versions, visible_gpus
from ..errors import UserError, as_user_error
from ..files import atomic_write, file_hash
from ..plugin.checkpoints import last_checkpoints, load_checkpoint
from ..processes import locked, run_on_gpus
from ..recipe_parts import TOKENIZED_BLEU
from ..training.alarms import final_alarms
from ..training.run_folder import Run, checkpoint_folder, mapping, read_log, rows_by_epoch, training_settings
from . import scoring
from .averaging import average, digest
from .engines import translate_sets
from .results import HEADLINE, Evaluation, Result, Score

UNFINISHED = ".evaluate"  # a folder in the run's; its files replace earlier translations when all are scored
UNFINISHED_TRAINING = "scored before the training ended"


def evaluate_all(runs: list[Run], comet: Path | None = None, engine: Engine = "fairseq") -> list[Result]:
    """Score runs as `evaluate` does, one after the other, or on a machine with several GPUs one on each at a time."""
    gpus = visible_gpus()[: len(runs)]
    if len(gpus) > 1:
        codes = run_on_gpus([evaluate_command(run, comet, engine) for run in runs], gpus)
        failed = [run.name for run, code in zip(runs, codes, strict=True) if code]
        if failed:
            raise UserError(f"{', '.join(failed)}: could not be scored; the reasons are above")
        return [Result.read(run.folder) for run in runs]
    return [evaluate(run, comet, engine) for run in runs]


def evaluate_command(run: Run, comet: Path | None, engine: Engine) -> list[str]:
    """Return the command that scores a run as `evaluate` does."""
    settings = [f"--{name}={getattr(run, name)}" for name in ("data", "average", "beam", "lenpen", "temperature")]
    settings += [f"--engine={engine}", *([f"--comet={comet}"] if comet else [])]
    return ["encourage-mt", "evaluate", str(run.folder), *settings]


def evaluate(run: Run, comet: Path | None = None, engine: Engine = "fairseq") -> Result:
    """Score `run` on valid and the test sets and return its scores.json; nothing is done if that is up to date.

    Writes average.pt and one detokenized translation per set (SPLIT.LANG) into the run's folder. Earlier scores and
    translations stay as they are until new ones are complete. Raises UserError if checkpoints are missing or damaged,
    or the data is not what the model was trained on.
    """
    with locked(run.folder):
        data = run.prepared()
        paths = last_checkpoints(checkpoint_folder(run.folder), run.average)
        settings = Evaluation(
            average=run.average,
            beam=run.beam,
            lenpen=run.lenpen,
            temperature=run.temperature,
            engine=engine,
            comet=scoring.comet_signature(comet) if comet else None,
            data_sha256=data.checksum,
            checkpoints_sha256={path.name: file_hash(path) for path in paths},
        )
        check_data(run, data)
        if (run.folder / "scores.json").exists() and (run.folder / "average.pt").exists():
            result = Result.read(run.folder)
            if (
                result.evaluation == settings
                and result.translations_sha256  # those of version 0.1 have none
                and result.translations_sha256.items() <= hash_translations(run.folder, data).items()
                and is_scored_model(run.folder / "average.pt", result)
                and (UNFINISHED_TRAINING in result.alarms) == is_unfinished(run)
            ):
                print(f"{run.name}: scored already")
                return result
        scoring.metrics(data.target)  # raises an error now rather than after the translation
        with temporary_folder(run.folder / UNFINISHED) as output:
            result = _evaluate(run, data, settings, paths, comet, output)
            # scores.json goes first and comes last: if this is interrupted, the run counts as not scored
            (run.folder / "scores.json").unlink(missing_ok=True)
            for path in sorted(output.iterdir()):
                os.replace(path, run.folder / path.name)
            result.write(run.folder)
    return result


def _evaluate(run, data, settings, paths, comet, output):
    print(f"{run.name}: averaging the last checkpoints")
    state = load_checkpoint(paths[-1])
    check_dictionary(data, state)
    with as_user_error(f"{paths[-1]}: its training options cannot be read"):
        training, criterion = map(as_json, (training_settings(state), mapping(state["cfg"]["criterion"])))
    parameters = count_parameters(state["model"])
    del state  # keep one checkpoint at a time in memory
    weights = average(paths, output / "average.pt", run.temperature)
    scores = {}
    for split, lines in translate_sets(run, data, output / "average.pt", settings.engine).items():
        scores[split] = score(write_translation(lines, data, split, output), data, split, output, comet)
    bleu = max(of_set[HEADLINE].score for of_set in scores.values())
    return Result(
        name=run.name,
        recipe=run.recipe,
        arm=run.arm,
        seed=run.seed,
        options=run.options,
        criterion=criterion,
        evaluation=settings,
        scores=scores,
        training=training,
        **speed(run.log),
        machine=describe_hardware(),
        versions=versions(),
        provenance=run.provenance,
        translations_sha256=hash_translations(output, data),
        weights_sha256=weights,
        parameters=parameters,
        alarms=[*final_alarms(read_log(run.log), bleu), *[UNFINISHED_TRAINING] * is_unfinished(run)],
    )


def is_unfinished(run: Run) -> bool:
    """Return whether the training of a run has not ended; False if it was started by hand and this is not recorded."""
    return bool(run.provenance.get("starts")) and not run.is_done


def is_scored_model(path: Path, result: Result) -> bool:
    """Return whether a checkpoint has the parameters that were scored; versions before 0.2 did not record them."""
    try:
        model = load_checkpoint(path)["model"]
    except UserError:  # damaged
        return False
    return result.weights_sha256 in (None, digest(model))


def count_parameters(model: dict[str, torch.Tensor]) -> int:
    """Return the number of parameters of a model; a matrix that layers share counts once.

    A shared matrix is found by its values, because fairseq saves copies of it on a GPU and in half precision.
    """
    sizes = {digest({"": v}) if v.dim() > 1 else name: v.numel() for name, v in model.items() if v.numel() > 1}
    return sum(sizes.values())


def as_json(settings: dict) -> dict:
    """Return a checkpoint's settings as they are read back from JSON; types that JSON lacks become text."""
    return json.loads(json.dumps(settings, default=str), parse_constant=str)


def hash_translations(folder: Path, data: PreparedData) -> dict[str, str]:
    """Return {file name: sha256} of the translations, detokenized and tokenized, that are in `folder`."""
    paths = [folder / f"{split}{kind}.{data.target}" for split in data.subsets for kind in ("", ".tok")]
    return {path.name: file_hash(path) for path in paths if path.is_file()}


def check_data(run: Run, data: PreparedData) -> None:
    """Raise UserError if the data is not what the run records as its training data."""
    if run.provenance.get("data_sha256") not in (None, data.checksum):
        raise UserError(
            f"{run.data}: not the data that {run.name} was trained on, its checksum differs; name the right folder "
            "with --data"
        )


def check_dictionary(data: PreparedData, state: dict) -> None:
    """Raise UserError if the data's dictionaries do not have the sizes of the model's embeddings."""
    for side, language in (("encoder", data.source), ("decoder", data.target)):
        path = data.data_bin / f"dict.{language}.txt"
        with open(path, "rb") as lines:
            types = sum(1 for _ in lines) + 4  # fairseq adds <s>, <pad>, </s>, <unk>
        embedded = state["model"].get(f"{side}.embed_tokens.weight")
        if embedded is not None and embedded.shape[:1] != (types,):
            found = embedded.size(0) if embedded.dim() else "none"
            raise UserError(f"{path}: has {types} types, the model has {found}: the model was trained on other data")


def write_translation(lines: list[str], data: PreparedData, split: str, output: Path) -> list[str]:
    """Write output/SPLIT.LANG, detokenized and, if the data is tokenized, SPLIT.tok.LANG; return the latter's lines."""
    if data.byte_fallback:
        lines = list(map(restore_bytes, lines))
    if data.is_tokenized:
        write_lines(output / f"{split}.tok.{data.target}", lines)
    write_lines(output / f"{split}.{data.target}", detokenize(lines, data.target) if data.is_tokenized else lines)
    return lines


def score(lines: list[str], data: PreparedData, split: str, output: Path, comet: Path | None) -> dict[str, Score]:
    """Return all scores of a set: of its detokenized translation against the raw references, and of `lines`."""
    references = data.read_text(split, data.target)
    hypotheses = read_lines(output / f"{split}.{data.target}")
    scores = scoring.score(hypotheses, references, data.target, data.lowercase)
    if data.is_tokenized:
        scores[TOKENIZED_BLEU] = scoring.tokenized_bleu(lines, data.read_text(split, data.target, "tokenized"))
    if comet:
        sources = data.read_text(split, data.source)
        if data.lowercase:
            sources, references = ([line.lower() for line in side] for side in (sources, references))
        gpus = min(1, torch.cuda.device_count())  # with more, Lightning would start this command again for each
        scores["COMET"] = scoring.comet(comet, sources, hypotheses, references, gpus=gpus)
    return scores


def write_lines(path: Path, lines: list[str]) -> None:
    with atomic_write(path) as out:
        out.writelines(line + "\n" for line in lines)


def speed(log: Path) -> dict[str, float]:
    """Return {"train_seconds": time in updates, "target_tokens_per_second": tokens by this time}; empty without a log.

    fairseq rounds the time of an epoch to seconds, so there is no speed if epochs take less than 10 seconds.
    """
    rows = list(rows_by_epoch(read_log(log), "train_num_updates", "train_wpb", "train_train_wall").values())
    updates, tokens, seconds = 0.0, 0.0, 0.0
    for number, per_update, time in rows:
        tokens += (number - updates) * per_update
        updates, seconds = number, seconds + time
    rate = {"target_tokens_per_second": round(tokens / seconds, 1)} if rows and seconds >= 10 * len(rows) else {}
    return {"train_seconds": seconds, **rate} if rows else {}


def evaluated_checkpoint(run: Run) -> Path:
    """Return the averaged checkpoint that was scored. Raises UserError if it is missing or the run is not scored."""
    path, remedy = run.folder / "average.pt", f"run `encourage-mt evaluate {run.folder}`"
    if not (path.exists() and (run.folder / "scores.json").exists()):
        raise UserError(f"{run.folder}: has no average.pt with scores.json; {remedy}")
    if not is_scored_model(path, Result.read(run.folder)):
        raise UserError(f"{path}: is not the model that was scored; {remedy}")
    return path
