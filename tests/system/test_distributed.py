"""Train on several processes: tokens per update, values and parameters are those of one process."""

import socket
import subprocess

import pytest
import torch
from conftest import TINY, write_recipe

from encourage_mt import processes
from encourage_mt.cli import main
from encourage_mt.plugin import checkpoints
from encourage_mt.training.launch import Cluster, hydra_config, launch_command
from encourage_mt.training.run_folder import open_run, read_log
from encourage_mt.training.schedule import count_batches

# SGD (nag without momentum): Adam magnifies the rounding of gradients whose true value is 0, such as biases of keys
TRAIN = {
    **TINY["train"],
    "optimizer": "nag",
    "momentum": 0.0,
    "lr": 0.1,
    "dropout": 0,
    "max-tokens": 250,
    "update-freq": 4,
}


def train_on(world_size, folder, data, *options, fuse=False, **changes):
    """Return the folder of a run of the tiny corpus by `encourage-mt train`."""
    el = {"criterion": "label_smoothed_encouraging_loss", "label-smoothing": 0.1, "report-accuracy": True}
    el |= {"bonus-schedule": "linear", "bonus-schedule-updates": 20}
    settings = {name: value for name, value in {**TRAIN, **changes}.items() if value is not None}
    recipe = write_recipe(folder, train=settings, arms={"el": {**el, "fuse-projection": fuse}})
    (folder / "work").mkdir()
    (folder / "work" / "data").symlink_to(data)
    argv = ["train", recipe, "--work-dir", folder / "work", "--arm", "el", "--gpus", world_size, *options]
    main([str(word) for word in argv])
    return folder / "work" / "el.seed1"


@pytest.fixture(scope="module")
def data(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    return train_on(1, tmp_path_factory.mktemp("one"), data)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    return train_on(2, tmp_path_factory.mktemp("two"), data)


def model(folder):
    return checkpoints.load_checkpoint(folder / "checkpoints" / "checkpoint_last.pt")["model"]


def assert_same(first, second, **tolerance):
    first, second = model(first), model(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **tolerance, msg=name)


def test_two_processes_train_the_same_parameters_as_one_with_twice_the_update_freq(one, two):
    assert_same(one, two, rtol=1e-3, atol=1e-5)
    assert "training on 2 devices" in (two / "train.log").read_text()


def test_the_log_of_two_processes_has_the_values_of_the_whole_batch(one, two):
    logs = [read_log(folder / "train.log") for folder in (one, two)]
    for kind, batch in (
        ("train", ("wpb", "bsz")),
        ("valid", ()),
    ):  # valid has no update-freq that would even batches out
        epochs = [[r for r in log if f"{kind}_loss" in r] for log in logs]
        assert len(epochs[0]) == len(epochs[1]) == TRAIN["max-epoch"]
        for alone, together in zip(*epochs, strict=True):
            for name in ("loss", "nll_loss", "bonus", "bonus_weight", "accuracy", "num_updates", *batch):
                key = f"{kind}_{name}"
                assert float(together[key]) == pytest.approx(float(alone[key]), abs=2e-3), key


def test_a_process_without_a_batch_does_not_block_the_others(data, tmp_path):
    """An epoch is one batch here: the second process has an empty one in each update."""
    log = read_log(train_on(2, tmp_path, data, **{"max-tokens": 100_000, "update-freq": 2}) / "train.log")
    epochs = [record for record in log if "train_loss" in record]
    assert [int(record["train_num_updates"]) for record in epochs] == [1, 2]
    assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])


def test_an_empty_batch_at_the_end_of_an_update_does_not_hide_the_others(one, data, tmp_path):
    """The last update of an epoch has 3 batches: 2 of the first process, one and an empty one of the second."""
    run = open_run(one)
    tokens = next(tokens for tokens in range(200, 400) if count_batches(run, tokens, None) % 4 == 3)
    folders = [tmp_path / str(gpus) for gpus in (1, 2)]
    for gpus, folder in enumerate(folders, 1):
        folder.mkdir()
        train_on(gpus, folder, data, **{"max-tokens": tokens})
    assert_same(*(folder / "work" / "el.seed1" for folder in folders), rtol=1e-3, atol=1e-5)


def test_the_fused_projection_trains_the_same_on_two_processes(two, data, tmp_path):
    """With tied embeddings and accumulated batches; the rest is float32 rounding."""
    assert_same(two, train_on(2, tmp_path, data, fuse=True), rtol=1e-3, atol=1e-5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_hydra_trains_the_same_from_a_yaml_of_the_recipe(two, tmp_path):
    """Two machines of one process each, started as on two nodes; in fp32, although the YAML was written for bf16."""
    run = open_run(two).model_copy(update={"folder": tmp_path})
    for name in ("train.yaml", "train1.yaml"):
        (tmp_path / name).write_text(hydra_config(run).replace("bf16: true", "bf16: false"))
    port, nodes = free_port(), []
    for node in range(2):
        cluster = Cluster("bf16", gpus=1, nodes=2, node=node, master=f"127.0.0.1:{port}")
        argv = launch_command(run, cluster)
        environment = processes.job_environment(2)  # as in the other run: more threads would add in another order
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        nodes.append(processes.start(argv, **options))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert_same(two, tmp_path, rtol=0, atol=0)


def test_bf16_trains(data, tmp_path):
    changes = {"max-tokens": 100, "update-freq": 200, "validate-after-updates": 9, "max-epoch": 2}
    folder = train_on(1, tmp_path, data, "--precision", "bf16", **changes)
    state = checkpoints.load_checkpoint(folder / "checkpoints" / "checkpoint_last.pt")
    assert state["cfg"]["common"]["bf16"]
    assert state["optimizer_history"][-1]["num_updates"] == 2
