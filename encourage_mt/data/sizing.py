"""Choose vocabulary, model and training for a corpus of any size, on a CPU, one GPU or many."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..atomic import atomic_write
from ..recipe import COVERAGE, Recipe, modern_subword
from .bitext import iterate_lines
from .sources import Sources

KEPT = "recipe.yaml"  # in the work directory
CHOSEN_FOR = "# Chosen for "  # its first line, which then names the machine
HELD_OUT = 1000  # pairs for validation, and for testing, if the corpus has eight times as many


class Size(NamedTuple):
    """The choice for corpora of up to `pairs` pairs (0: of any size)."""

    pairs: int
    vocabulary: int
    layers: int  # of encoder and of decoder
    width: int  # of the embeddings
    inner: int  # width of the feed-forward layers
    heads: int
    dropout: float
    max_tokens: int
    update_freq: int
    lr: float
    warmup: int  # updates, at most; see WARMUP_SHARE
    seen: int  # pairs in a training, with repetitions; see EPOCHS


# docs/own_data.md says what was measured. On a CPU small batches learn faster; on a GPU large ones fill it.
#    pairs     vocab layers width inner heads dropout tokens freq lr warmup seen
CPU = (
    Size(3_000, 1_000, 2, 128, 256, 4, 0.3, 500, 1, 0.002, 400, 320_000),
    Size(10_000, 2_000, 2, 128, 256, 4, 0.3, 1000, 1, 0.002, 400, 320_000),
    Size(50_000, 6_000, 4, 128, 256, 4, 0.2, 1000, 1, 0.0015, 1000, 300_000),
    Size(200_000, 8_000, 4, 128, 256, 4, 0.2, 2000, 1, 0.002, 1500, 1_000_000),
    Size(1_000_000, 16_000, 4, 256, 1024, 4, 0.1, 4096, 1, 0.001, 2000, 3_000_000),
    Size(0, 32_000, 4, 256, 1024, 4, 0.1, 4096, 2, 0.001, 4000, 10_000_000),
)
ONE_GPU = (
    Size(3_000, 1_000, 3, 256, 512, 4, 0.4, 1000, 1, 0.001, 400, 800_000),
    Size(10_000, 2_000, 4, 256, 1024, 4, 0.4, 2048, 1, 0.001, 400, 800_000),
    Size(50_000, 6_000, 5, 512, 1024, 4, 0.3, 4096, 1, 0.0007, 1000, 2_500_000),
    Size(200_000, 10_000, 6, 512, 1024, 4, 0.3, 4096, 2, 0.0007, 1500, 10_000_000),
    Size(1_000_000, 16_000, 6, 512, 2048, 8, 0.2, 4096, 4, 0.0007, 4000, 30_000_000),
    Size(0, 32_000, 6, 512, 2048, 8, 0.1, 4096, 8, 0.0007, 4000, 60_000_000),
)
MANY_GPUS = (*ONE_GPU[:-1], Size(0, 32_000, 6, 1024, 4096, 16, 0.1, 4096, 16, 0.0007, 3000, 60_000_000))
EPOCHS = 8, 100  # at least, at most
SAMPLED_LINES = 100_000  # of a file, whose characters are counted
WARMUP_SHARE = 20  # pairs for each update of the warm-up, so that it stays short with few pairs


def choose(pairs: int, gpus: int, characters: int = 0) -> dict[str, Any]:
    """Return the keys of a recipe for own text that depend on its number of pairs and the GPUs of a training (0: CPU).

    They are held_out, subword, train and average, as in a recipe.yaml. The vocabulary has room for all bytes, the
    `characters` of `count_characters`, and as many longer pieces.
    """
    rows = (CPU, ONE_GPU, MANY_GPUS)[min(gpus, 2)]
    size = next(row for row in rows if pairs <= row.pairs or not row.pairs)
    pairs = max(1, pairs)
    held_out = max(1, min(HELD_OUT, pairs // 8))
    low, high = EPOCHS
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}-layers": size.layers, f"{side}-embed-dim": size.width}
        sides |= {f"{side}-ffn-embed-dim": size.inner, f"{side}-attention-heads": size.heads}
    return {
        "held_out": {"valid": held_out, "test": held_out},
        # a small corpus may have fewer pieces
        "subword": {**modern_subword(max(size.vocabulary, 256 + 2 * characters)).options, "hard_vocab_limit": False},
        "train": {
            "arch": "transformer",
            **sides,
            "share-all-embeddings": True,
            "dropout": size.dropout,
            "weight-decay": 0.0001,
            "optimizer": "adam",
            "adam-betas": "(0.9, 0.98)",
            "clip-norm": 0.0,
            "lr": size.lr,
            "lr-scheduler": "inverse_sqrt",
            "warmup-updates": max(10, min(size.warmup, pairs // WARMUP_SHARE)),
            "max-tokens": size.max_tokens,
            "max-tokens-valid": 4096,  # held-out pairs may be longer than those of train, which are cleaned
            "update-freq": size.update_freq,
            "max-epoch": max(low, min(high, round(size.seen / pairs))),
        },
        "average": 5,
    }


def describe(recipe: Recipe, chosen: dict[str, Any], pairs: int, gpus: int) -> str:
    """Return in one line what was `chosen` for `pairs` pairs and a training on `gpus` GPUs; the recipe has the rest."""
    machine = {0: "a CPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs")
    train = chosen["train"]
    texts = {
        "subword": f"{chosen['subword']['vocab_size']:,} pieces",
        "train": f"{train['encoder-layers']}+{train['decoder-layers']} layers, {train['encoder-embed-dim']} wide, "
        f"dropout {train['dropout']}, {train['max-epoch']} epochs",
    }
    used = [text for key, text in texts.items() if (recipe.filled or {})[key] == chosen[key]]
    return f"for {pairs:,} pairs and {machine}: {', '.join(used)}"


def describe_kept(path: Path, recipe: Path, gpus: int) -> str:
    """Return in one line that `path` replaces `recipe`, with a warning if it was chosen for the other machine."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    line = f"using {path} of an earlier command, not {recipe}; edit it, or delete it to choose the sizes again"
    ours, other = ("a GPU", "a CPU") if gpus else ("a CPU", "a GPU")
    if first != CHOSEN_FOR + other:
        return line
    return f"{line} with --overwrite. WARNING: its sizes were chosen for {other}, but this machine trains on {ours}"


def keep(content: dict[str, Any], work_dir: Path, gpus: int) -> None:
    """Write the content of a recipe that was chosen into the work directory."""
    with atomic_write(work_dir / KEPT) as file:
        file.write(f"{CHOSEN_FOR}{'a GPU' if gpus else 'a CPU'}\n")
        file.write("# and the size of your text (docs/own_data.md). Edit it: the next command uses it.\n")
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)


def count_pairs(recipe: Recipe, raw_dir: Path | None) -> int:
    """Return the number of lines of the first file of own text. Raises UserError if it is missing or not UTF-8."""
    name = recipe.data[0].splits["train"][0][0]
    path = Sources(recipe, raw_dir, Path()).find_local(name) or (raw_dir or recipe.folder) / name
    return sum(1 for _ in iterate_lines(path))


def count_characters(recipe: Recipe, raw_dir: Path | None) -> int:
    """Return how many of the most frequent characters cover COVERAGE of the first SAMPLED_LINES lines of each file."""
    sources, counts = Sources(recipe, raw_dir, Path()), Counter[str]()
    for path in filter(None, map(sources.find_local, recipe.data[0].splits["train"][0])):
        for line in islice(iterate_lines(path), SAMPLED_LINES):
            counts.update(line)
    covered = np.cumsum(sorted(counts.values(), reverse=True))
    return int((covered < COVERAGE * counts.total()).sum()) + 1
