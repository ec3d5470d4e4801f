"""Translate with one of two engines: fairseq-generate, or CTranslate2 with a converted model."""

import logging
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from ..data.manifest import PreparedData
from ..data.subwords import join_pieces
from ..environment import USER_DIR, quiet_imports
from ..errors import UserError, first_line
from ..processes import describe_failure, run_quietly, start
from ..training.run_folder import Run

if TYPE_CHECKING:
    import ctranslate2

MAX_PIECES = 200  # of a translation: the default --max-len-b of fairseq-generate
BATCH_TOKENS = 2000  # of a batch of CTranslate2, padding included


class Translation(NamedTuple):
    """The pieces of a translation, and its score as fairseq-generate prints it: log2 p / (pieces + 1) ** lenpen."""

    pieces: list[str]
    score: float


def translate_sets(run: Run, data: PreparedData, checkpoint: Path, engine: str) -> dict[str, list[str]]:
    """Return {split: lines} for valid and the test sets: translations with joined subwords, in the order of the source.

    Writes a log for each set into the run's folder, or convert.log. Raises UserError if the engine fails or leaves
    sentences out.
    """
    return (_with_fairseq if engine == "fairseq" else _with_ctranslate2)(run, data, checkpoint)


def _bar(run, data, split, translations=None):
    return tqdm(translations, total=data.lines[split], desc=f"{run.name} {split}", unit="sentence", mininterval=1)


def _with_fairseq(run, data, checkpoint):
    options = {
        "path": checkpoint,
        "source-lang": data.source,
        "target-lang": data.target,
        "gen-subset": ",".join(data.subsets.values()),  # our plugin translates one after the other
        "beam": run.beam,
        "lenpen": run.lenpen,
        "max-tokens": 8000,
        "remove-bpe": data.remove_bpe,
        "num-workers": 0,
        # with its default of 8, fairseq drops the last batch unless its size is a multiple of 8
        "required-batch-size-multiple": 1,
        "user-dir": USER_DIR,  # last, because fairseq imports the last one on the line
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = ["fairseq-generate", str(data.data_bin), "--no-progress-bar", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that output and errors arrive in order
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=environment) as process:
        return {split: _read_set(process, run, data, split) for split in data.subsets}


def _read_set(process, run, data, split):
    """Return the translations of a set, from what fairseq-generate prints until its line with the set's BLEU."""
    log, expected = run.folder / f"{split}.generate.log", data.lines[split]
    hypotheses = {}
    with open(log, "w", encoding="utf-8") as out, _bar(run, data, split) as bar:
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


def _with_ctranslate2(run, data, checkpoint):
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        convert_checkpoint(checkpoint, data, Path(folder) / "model", run.folder / "convert.log")
        model = load_model(Path(folder) / "model")
        lines = {}
        for split in data.subsets:
            translations = translate_pieces(model, read_pieces(data, split), run.beam, run.lenpen)
            best = (translation.pieces for (translation,) in _bar(run, data, split, translations))
            lines[split] = [join_pieces(pieces, data.remove_bpe) for pieces in best]
        return lines


def read_pieces(data: PreparedData, split: str) -> list[list[str]]:
    """Return the source of a binarized set as pieces, <unk> for those that the dictionary lacks."""
    logging.basicConfig(level=logging.WARNING)  # because one of fairseq's models sets DEBUG for all when imported
    with quiet_imports():
        from fairseq.data import Dictionary, data_utils
    types = Dictionary.load(str(data.data_bin / f"dict.{data.source}.txt"))
    name = f"{data.subsets[split]}.{data.source}-{data.target}.{data.source}"
    return [[types[i] for i in line[:-1]] for line in data_utils.load_indexed_dataset(str(data.data_bin / name), types)]


# --- CTranslate2


def convert_checkpoint(
    checkpoint: Path, data: PreparedData, output: Path, log: Path, quantization: str = "float32"
) -> None:
    """Write the model of a fairseq checkpoint to a new folder `output`, as CTranslate2 reads it.

    quantization: the type of the weights, such as float32, float16 or int8. Raises UserError, naming `log`, if the
    conversion fails, or if CTranslate2 is missing.
    """
    _import_ctranslate2()
    options = {
        "model_path": checkpoint,
        "data_dir": data.data_bin,
        "source_lang": data.source,
        "target_lang": data.target,
        "output_dir": output,
        "quantization": quantization,
        "user_dir": USER_DIR,  # it lists the types that torch may load; fairseq imports the last one on the line
    }
    run_quietly(["ct2-fairseq-converter", *(f"--{name}={value}" for name, value in options.items())], log)


def load_model(folder: Path, device: str = "auto", threads: int | None = None) -> "ctranslate2.Translator":
    """Return the CTranslate2 model in `folder`, on the GPU if there is one, unless `device` is cpu.

    threads: CPU threads (default: as torch uses). Raises UserError if the model cannot be loaded or CTranslate2 is
    missing.
    """
    try:
        return _import_ctranslate2().Translator(
            str(folder), device=device, intra_threads=threads or torch.get_num_threads()
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: not a model that CTranslate2 can load ({first_line(error)})") from None


def translate_pieces(
    model: "ctranslate2.Translator",
    sources: Iterable[list[str]],
    beam: int,
    lenpen: float,
    nbest: int = 1,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[list[Translation]]:
    """Yield the `nbest` translations of each list of pieces, best first, in the order of the sources.

    The search is that of fairseq-generate with its defaults: up to MAX_PIECES pieces, scores divided by
    (pieces + 1) ** lenpen. Only a few batches are in memory at a time.
    """
    results = model.translate_iterable(
        sources,
        max_batch_size=batch_tokens,
        batch_type="tokens",
        beam_size=beam,
        length_penalty=lenpen,
        num_hypotheses=nbest,
        return_scores=True,
        max_input_length=0,  # otherwise it would cut long sentences
        max_decoding_length=MAX_PIECES + 1,
        return_end_token=True,  # so that the end counts as a piece when scores are normalized, as in fairseq
    )
    for result in results:
        # the last piece is the end, or one too many
        yield [
            Translation(pieces[:-1], score / math.log(2))
            for pieces, score in zip(result.hypotheses, result.scores, strict=True)
        ]


def _import_ctranslate2():
    try:
        import ctranslate2
    except ImportError:
        raise UserError("CTranslate2 is not installed: pip install 'encourage-mt[serving]'") from None
    return ctranslate2
