"""Convert a checkpoint to CTranslate2, and translate pieces with it, without torch, as fairseq-generate does."""

import ctypes
import logging
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..atomic import temporary_folder
from ..data.manifest import PreparedData
from ..environment import USER_DIR, cores
from ..errors import UserError, as_user_error, first_line
from ..processes import run_quietly

if TYPE_CHECKING:
    import ctranslate2

logger = logging.getLogger(__name__)

CUBLAS = "libcublas.so.12"  # the one that CTranslate2 loads; torch may bring that of another CUDA
MAX_PIECES = 200  # of a translation: the default --max-len-b of fairseq-generate
BATCH_TOKENS = 2000  # of a batch of CTranslate2, padding included


class Translation(NamedTuple):
    """The pieces of a translation, and its score as fairseq-generate prints it: log2 p / (pieces + 1) ** lenpen."""

    pieces: list[str]
    score: float


def convert_checkpoint(
    checkpoint: Path, data: PreparedData, output: Path, log: Path, quantization: str = "float32"
) -> None:
    """Write the model of a fairseq checkpoint to a new folder `output`, as CTranslate2 reads it.

    quantization: the type of the weights, such as float32, float16 or int8. Raises UserError, naming `log`, if the
    conversion fails, or if the checkpoint is damaged or CTranslate2 missing.
    """
    import_ctranslate2()
    with temporary_folder(output.with_name(f"{output.name}.flat")) as folder:
        options = {
            "model_path": _with_flat_options(checkpoint, folder),
            "data_dir": data.data_bin,
            "source_lang": data.source,
            "target_lang": data.target,
            "output_dir": output,
            "quantization": quantization,
            "user_dir": USER_DIR,  # allow-lists types for torch; last, because fairseq imports the last --user-dir
        }
        run_quietly(["ct2-fairseq-converter", *(f"--{name}={value}" for name, value in options.items())], log)


def _with_flat_options(checkpoint, folder):
    """Return `checkpoint` or, if fairseq-hydra-train wrote it, a copy in `folder` with options as fairseq-train's."""
    import torch

    from ..plugin.checkpoints import load_checkpoint
    from ..training.run_folder import flat_options

    state = load_checkpoint(checkpoint)
    with as_user_error(f"{checkpoint}: cannot be converted"):
        model, task = state["cfg"]["model"], state["cfg"]["task"]
        options = model if isinstance(model, dict) else vars(model)
        if options.get("cross_self_attention"):  # the converter would leave out the attention to the source
            raise ValueError("CTranslate2 does not support cross-self-attention; use fairseq")
        if not isinstance(model, dict):
            return checkpoint
        options = {**task, **flat_options(model), "task": task["_name"], "arch": model["_name"]}
        torch.save({**state, "cfg": {**state["cfg"], "model": Namespace(**options)}}, folder / checkpoint.name)
    return folder / checkpoint.name


def load_model(folder: Path, device: str = "auto", threads: int | None = None) -> "ctranslate2.Translator":
    """Return the CTranslate2 model in `folder`, on the GPU if there is one, unless `device` is cpu.

    threads: CPU threads (default: OMP_NUM_THREADS, otherwise one per core). Raises UserError if the model cannot be
    loaded or CTranslate2 is missing.
    """
    ctranslate2 = import_ctranslate2()
    has_gpu = device != "cpu" and ctranslate2.get_cuda_device_count() > 0
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: no GPU was found")
    if has_gpu and not can_load(CUBLAS):
        problem = f"CTranslate2 needs {CUBLAS} (CUDA 12) for the GPU, and it cannot be loaded"
        if device == "cuda":
            raise UserError(f"--device cuda: {problem}")
        logger.warning("%s; it translates on the CPU", problem)
        device = "cpu"
    default = 0 if "OMP_NUM_THREADS" in os.environ else cores()  # 0: as that variable says
    with as_user_error(f"{folder}: not a model that CTranslate2 can load"):
        return ctranslate2.Translator(str(folder), device=device, intra_threads=threads or default)


def can_load(library: str) -> bool:
    """Return whether a shared library can be loaded."""
    with suppress(OSError):
        return bool(ctypes.CDLL(library))
    return False


def translate_pieces(
    model: "ctranslate2.Translator", sources: Iterable[list[str]], beam: int, lenpen: float, nbest: int = 1
) -> Iterator[list[Translation]]:
    """Yield the `nbest` translations of each list of pieces, best first, in the order of the sources.

    The search is that of fairseq-generate with its defaults: up to MAX_PIECES pieces, scores divided by
    (pieces + 1) ** lenpen. An empty source has an empty translation. Only a few batches are in memory at a time. Raises
    UserError if a source is longer than the model's positions, or memory is short.
    """
    results = model.translate_iterable(
        sources,
        max_batch_size=BATCH_TOKENS,
        batch_type="tokens",
        beam_size=beam,
        length_penalty=lenpen,
        num_hypotheses=nbest,
        return_scores=True,
        max_input_length=0,  # otherwise it would cut long sentences
        max_decoding_length=MAX_PIECES + 1,
        return_end_token=True,  # so that the end counts as a piece when scores are normalized, as in fairseq
    )
    try:
        for result in results:
            # without the last piece: the end of the sentence, or the piece after MAX_PIECES
            yield [
                Translation(pieces[:-1], score / math.log(2))
                for pieces, score in zip(result.hypotheses, result.scores, strict=True)
            ]
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # as its C++ exceptions arrive in Python
        raise UserError(f"CTranslate2: {first_line(error)}") from None


def import_ctranslate2():
    """Return the package. Raises UserError, which says how to install it, if it is missing."""
    try:
        import ctranslate2
    except ImportError:
        raise UserError("CTranslate2 is not installed (extra serving): pip install ctranslate2") from None
    return ctranslate2
