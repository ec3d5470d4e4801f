"""Two processes on one machine, joined by gloo: what data parallel training computes."""

import socket
import subprocess

import pytest
import torch
from conftest import EL

from encourage_mt import commands, safe_checkpoints


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_two(tiny, save_dir, *options):
    """fairseq-train by two ranks, with SGD: Adam would blow up the rounding of gradients whose true value is 0."""
    recipe, data = tiny
    port = free_port()
    argv = ["fairseq-train", data / "data-bin", "--user-dir", commands.USER_DIR, "--save-dir", save_dir, *EL]
    for name, value in recipe.train.items():
        if name not in ("optimizer", "lr", "max-epoch"):
            argv += [f"--{name}"] if value is True else [f"--{name}", value]
    argv += ["--optimizer", "sgd", "--lr", "0.1", "--dropout", "0", "--max-update", "6", "--disable-validation"]
    argv += ["--cpu", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--num-workers", "0"]
    argv += ["--distributed-world-size", "2", "--distributed-no-spawn", "--update-freq", "2"]
    argv += ["--distributed-init-method", f"tcp://127.0.0.1:{port}", *options]
    ranks = []
    for rank in range(2):
        command = commands.resolve([str(word) for word in (*argv, "--distributed-rank", rank)])
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return safe_checkpoints.load(save_dir / "checkpoint_last.pt")["model"]


@pytest.fixture(scope="module")
def unfused(tiny, tmp_path_factory):
    return train_on_two(tiny, tmp_path_factory.mktemp("unfused"))


def test_the_fused_projection_trains_alike_on_two_ranks(unfused, tiny, tmp_path):
    """With tied embeddings and accumulated batches; the rest is float32 rounding of six updates."""
    model = train_on_two(tiny, tmp_path, "--fuse-projection")
    assert model.keys() == unfused.keys()
    for name, value in unfused.items():
        torch.testing.assert_close(model[name], value, rtol=1e-3, atol=1e-5, msg=name)
