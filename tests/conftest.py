"""Provide a corpus of a few hundred pairs, prepared once, and one tiny model trained on it by the real command line."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import grammar
import pytest
import torch
import yaml

from encourage_mt import processes
from encourage_mt.cli import main
from encourage_mt.data.prepare import prepare
from encourage_mt.environment import USER_DIR
from encourage_mt.plugin.worker import die_with_parent
from encourage_mt.recipe import load_recipe

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"  # the servers of these tests
if "GPU_KERNELS" not in os.environ:  # the trainings here are those of a CPU: fp32, and any number of processes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

PAIRS = grammar.generate(3, {"train": 300, "valid": 20, "test": 21})
TINY = {
    "name": "tiny",
    "source": "de",
    "target": "en",
    "data": {split: [f"{split}.tsv"] for split in ("train", "valid", "test")},
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
    """Write TINY with `changes` as folder/recipe.yaml, and its data beside it; return the recipe's path."""
    path = folder / "recipe.yaml"
    for split, pairs in PAIRS.items():
        lines = "".join(f"{german}\t{english}\n" for german, english in pairs)
        (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")
    path.write_text(yaml.safe_dump({**TINY, **changes}, allow_unicode=True), encoding="utf-8")
    return path


def run(*argv, code=0, stdin=None, **options):
    """Run a command of this environment, which ends with the tests, and check its exit code.

    Returns the finished process with stdout, stderr and output (both) as text.
    """
    argv = [str(word) for word in argv]
    if (Path(sys.executable).parent / argv[0]).exists():
        argv[0] = processes.program_path(argv[0])
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "preexec_fn": die_with_parent, **options}
    done = subprocess.run(argv, input=stdin, **options)
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
        argv = ["fairseq-train", data / "data-bin", "--user-dir", USER_DIR, "--save-dir", save_dir]
        argv += ["--cpu", "--log-format", "json", "--num-workers", "0", "--required-batch-size-multiple", "1"]
        for name, value in recipe.train.items():
            if f"--{name}" not in options:
                argv += [f"--{name}"] if value is True else [f"--{name}", value]
        return run(*argv, *options, code=code)

    return start


EL = ("--criterion", "label_smoothed_encouraging_loss", "--label-smoothing", "0.1")
CE = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
EVAL_BLEU = (
    *("--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}'),
    *("--eval-bleu-remove-bpe", "sentencepiece"),
    *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
)


@pytest.fixture(scope="session")
def el_run(train, tmp_path_factory):
    """Folder of checkpoints of two epochs, trained with the encouraging loss, --eval-bleu and accuracy."""
    folder = tmp_path_factory.mktemp("el")
    (folder / "log").write_text(train(folder, *EL, *EVAL_BLEU, "--report-accuracy").output, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """The work directory of `encourage-mt run` with two criteria and two seeds; Ctrl-C interrupted the first one once.

    folder: the work directory; recipe: its file; interrupted: the process that was; done: the one that finished.
    """
    folder = tmp_path_factory.mktemp("work")
    published = {"source": "A paper", "metric": "sacreBLEU", "scores": {"ce": [30.0, 0.1], "el": [31.0, 0.1]}}
    recipe = write_recipe(folder, train={**TINY["train"], "max-epoch": 3}, published=published)
    argv = ["encourage-mt", "run", recipe, "--work-dir", folder / "work"]
    interrupted = interrupt([*argv, "--arms", "ce"], folder / "work" / "ce.seed1" / "train.log")
    done = run(*argv, "--seeds", 1, 2, "--parallel", 2)
    return SimpleNamespace(folder=folder / "work", recipe=recipe, interrupted=interrupted, done=done)


def fake_venv(folder, body):
    """Make a virtual environment that counts as installed; its encourage-mt is the shell script `body`."""
    program = folder / "bin" / "encourage-mt"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)
    loss = ("encourage_mt/loss/native.cpp", "encourage_mt/loss/native_vectors.h")
    content = b"".join((ROOT / name).read_bytes() for name in ("setup.py", "scripts/constraints.txt", *loss))
    (folder / "installed").write_text(f"{ROOT} {hashlib.sha256(content).hexdigest()}  -\n")


def with_ctrl_c():
    """Set up a child: it ends with the tests, and Ctrl-C interrupts it even where the tests ignore it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(argv, log):
    """Start a command, press Ctrl-C after `log` has the first epoch; return the finished process."""
    process = subprocess.Popen(
        [processes.program_path(argv[0]), *map(str, argv[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=with_ctrl_c,
    )
    while process.poll() is None and not (log.exists() and "train_loss" in log.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.output = process.communicate(timeout=60)[0]
    return process


def refused(capsys, *argv):
    """Run a command in this process; return its one line of error after checking that the exit code is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert end.value.code == 2 and [line for line in lines if "error:" in line] == lines[-1:]
    assert "Traceback" not in "".join(lines)
    return lines[-1]
