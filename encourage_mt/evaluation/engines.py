"""Translate with one of two engines: fairseq-generate, or CTranslate2 with a converted model."""

import logging
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ..atomic import temporary_folder
from ..data.binarize import open_binarized
from ..data.manifest import DATASET, PreparedData
from ..data.subwords import join_pieces
from ..environment import USER_DIR, quiet_imports
from ..errors import UserError, as_user_error
from ..processes import describe_failure, not_through_a_link, start
from ..training.run_folder import Run
from .converted_model import Translation, convert_checkpoint, load_model, translate_pieces


def translate_sets(
    run: Run, data: PreparedData, checkpoint: Path, engine: str, splits: list[str] | None = None
) -> dict[str, list[str]]:
    """Return {split: lines}: translations with joined subwords, in the order of the source.

    splits: by default valid and all test sets. Writes logs into the run's folder: SPLIT.generate.log with fairseq,
    convert.log with CTranslate2. Raises UserError if the engine fails or leaves sentences out.
    """
    translate = _with_fairseq if engine == "fairseq" else _with_ctranslate2
    return translate(run, data, checkpoint, splits or list(data.subsets))


def _bar(run, data, split, translations=None):
    return tqdm(translations, total=data.lines[split], desc=f"{run.name} {split}", unit="sentence", mininterval=1)


def _with_fairseq(run, data, checkpoint, splits):
    command = generate_command(run, data, checkpoint, splits)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}  # output and errors in order
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=environment) as process:
        return {split: _read_set(process, run, data, split) for split in splits}


def generate_command(run: Run, data: PreparedData, checkpoint: Path, splits: list[str]) -> list[str]:
    """Return the words of the fairseq-generate that translates `splits` one after the other."""
    options = {
        "path": checkpoint,
        "source-lang": data.source,
        "target-lang": data.target,
        "gen-subset": ",".join(data.subsets[split] for split in splits),  # our plugin allows several
        "beam": run.beam,
        "lenpen": run.lenpen,
        "max-tokens": 8000,
        "remove-bpe": data.remove_bpe,
        "num-workers": 0,
        # with its default of 8, fairseq drops the last batch unless its size is a multiple of 8
        "required-batch-size-multiple": 1,
        "dataset-impl": DATASET,
        "user-dir": USER_DIR,  # last, because fairseq imports the last one on the line
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return ["fairseq-generate", str(data.data_bin), "--no-progress-bar", *words]


def _read_set(process, run, data, split):
    """Return the translations of a set, from what fairseq-generate prints until its line with the set's BLEU."""
    log, expected = run.folder / f"{split}.generate.log", data.lines[split]
    hypotheses = {}
    with open(log, "w", encoding="utf-8", opener=not_through_a_link) as out, _bar(run, data, split) as bar:
        for line in process.stdout:
            out.write(line)
            if match := re.match(r"D-(\d+)\t[^\t]+\t(.*)", line):
                hypotheses[int(match.group(1))] = match.group(2)
                bar.update()
            elif line.startswith(f"Generate {data.subsets[split]} with "):
                break
        else:
            if process.wait():
                out.flush()
                raise UserError(describe_failure("fairseq-generate", process.returncode, log))
    if sorted(hypotheses) != list(range(expected)):
        raise UserError(f"{split}: {len(hypotheses)} of {expected} sentences were translated (log: {log})")
    return [hypotheses[index] for index in range(expected)]


def _with_ctranslate2(run, data, checkpoint, splits):
    with temporary_folder(checkpoint.with_name("converted")) as folder:
        convert_checkpoint(checkpoint, data, folder / "model", run.folder / "convert.log")
        model = load_model(folder / "model")
        lines = {}
        for split in splits:
            translations = translate_pieces(model, read_pieces(data, split), run.beam, run.lenpen)
            lines[split] = best_lines(_bar(run, data, split, translations), data)
        return lines


def best_lines(translations: Iterable[list[Translation]], data: PreparedData) -> list[str]:
    """Return the best of each list of translations, as text with joined subwords."""
    return [join_pieces(best.pieces, data.remove_bpe) for best, *_ in translations]


def read_pieces(data: PreparedData, split: str) -> list[list[str]]:
    """Return the source of a binarized set as pieces, <unk> for those that the dictionary lacks."""
    logging.basicConfig(level=logging.WARNING)  # because one of fairseq's models sets DEBUG for all when imported
    path = data.data_bin / f"{data.subsets[split]}.{data.source}-{data.target}.{data.source}"
    with quiet_imports(), as_user_error(f"{path}: fairseq cannot read it"):
        from fairseq.data import Dictionary

        types = Dictionary.load(str(data.data_bin / f"dict.{data.source}.txt"))
        return [[types[i] for i in line[:-1]] for line in open_binarized(str(path), types)]
