"""A corpus of a few hundred pairs, prepared once, and one tiny model trained on it by the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from encourage_mt import commands
from encourage_mt.prepare import prepare
from encourage_mt.recipe import load_recipe

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "2"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


TINY = {
    "name": "tiny",
    "source": "de",
    "target": "en",
    "data": {"generate": {"seed": 3, "train": 300, "valid": 20, "test": 21}},
    "subword": {"vocab_size": 300, "model_type": "bpe"},
    "train": {
        "arch": "transformer",
        "encoder-layers": 1,
        "decoder-layers": 1,
        "encoder-embed-dim": 32,
        "decoder-embed-dim": 32,
        "encoder-ffn-embed-dim": 32,
        "decoder-ffn-embed-dim": 32,
        "encoder-attention-heads": 2,
        "decoder-attention-heads": 2,
        "share-all-embeddings": True,
        "optimizer": "adam",
        "lr": 0.003,
        "max-tokens": 1000,
        "max-epoch": 2,
    },
    "average": 2,
    "beam": 2,
    "arms": {
        "ce": {"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0.1},
        "el": {"criterion": "label_smoothed_encouraging_loss", "label-smoothing": 0.1, "log-end": 0.5},
    },
}


def write_recipe(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, allow_unicode=True), encoding="utf-8")
    return path


def run(*argv, code=0, stdin=None, **options):
    """Run a command of this environment and check its exit code.

    Returns the finished process with stdout, stderr and output (both) as text.
    """
    argv = [str(word) for word in argv]
    if (Path(sys.executable).parent / argv[0]).exists():
        argv = commands.resolve(argv)
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, encoding="utf-8", **options)
    done.output = done.stdout + done.stderr
    assert done.returncode == code, done.output[-6000:]
    return done


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(recipe, folder of its prepared data)."""
    work = tmp_path_factory.mktemp("tiny")
    recipe = load_recipe(write_recipe(work))
    return recipe, prepare(recipe, work)


@pytest.fixture(scope="session")
def train(tiny):
    """train(save_dir, *options, code=0): fairseq-train with the plugin on the tiny corpus."""
    recipe, data = tiny

    def start(save_dir, *options, code=0):
        argv = ["fairseq-train", data / "data-bin", "--user-dir", commands.USER_DIR, "--save-dir", save_dir]
        argv += ["--cpu", "--log-format", "json", "--num-workers", "0", "--required-batch-size-multiple", "1"]
        for name, value in recipe.train.items():
            if f"--{name}" not in options:
                argv += [f"--{name}"] if value is True else [f"--{name}", value]
        return run(*argv, *options, code=code)

    return start


EL = ("--criterion", "label_smoothed_encouraging_loss", "--label-smoothing", "0.1")
CE = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
EVAL_BLEU = (
    *("--eval-bleu", "--eval-bleu-args", '{"beam": 1}', "--eval-bleu-remove-bpe", "sentencepiece"),
    *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
)


@pytest.fixture(scope="session")
def el_run(train, tmp_path_factory):
    """Folder of checkpoints of two epochs, trained with the encouraging loss, --eval-bleu and accuracy."""
    folder = tmp_path_factory.mktemp("el")
    (folder / "log").write_text(train(folder, *EL, *EVAL_BLEU, "--report-accuracy").output, encoding="utf-8")
    return folder
