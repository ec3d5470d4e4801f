"""One training on several world_size: the tokens per update stay, and so do figures and parameters."""

import json
import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, run, write_recipe

from encourage_mt import processes
from encourage_mt.errors import UserError
from encourage_mt.plugin import checkpoints
from encourage_mt.recipe import load_recipe
from encourage_mt.training.launch import Cluster, hydra_config, launch_command, update_freq
from encourage_mt.training.run_folder import read_log

# SGD (nag without momentum), for Adam blows up the rounding of gradients whose true value is 0: the biases of keys
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
    """Folder of a run of the tiny corpus by `encourage-mt train`."""
    el = {"criterion": "label_smoothed_encouraging_loss", "label-smoothing": 0.1, "report-accuracy": True}
    settings = {name: value for name, value in {**TRAIN, **changes}.items() if value is not None}
    recipe = write_recipe(folder, train=settings, arms={"el": {**el, "fuse-projection": fuse}})
    (folder / "work").mkdir()
    (folder / "work" / "data").symlink_to(data)
    run(
        *("encourage-mt", "train", recipe, "--work-dir", folder / "work", "--criterion", "el"),
        *("--gpus", world_size, *options),
    )
    return folder / "work" / "el.seed1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    work = tmp_path_factory.mktemp("distributed")
    run("encourage-mt", "prepare", write_recipe(work), "--work-dir", work)
    return work / "data"


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    return train_on(1, tmp_path_factory.mktemp("one"), data)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    return train_on(2, tmp_path_factory.mktemp("two"), data)


def model(folder):
    return checkpoints.load(folder / "checkpoints" / "checkpoint_last.pt")["model"]


def assert_same(first, second, **tolerance):
    first, second = model(first), model(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **tolerance, msg=name)


def test_two_processes_train_the_same_parameters_as_one_with_twice_the_update_freq(one, two):
    assert_same(one, two, rtol=1e-3, atol=1e-5)
    assert "training on 2 devices" in (two / "train.log").read_text()


def test_the_log_of_two_processes_has_the_figures_of_the_whole_batch(one, two):
    logs = [read_log(folder / "train.log") for folder in (one, two)]
    for kind, batch in (
        ("train", ("wpb", "bsz")),
        ("valid", ()),
    ):  # valid has no update-freq that would even batches out
        epochs = [[r for r in log if f"{kind}_loss" in r] for log in logs]
        assert len(epochs[0]) == len(epochs[1]) == TRAIN["max-epoch"]
        for alone, together in zip(*epochs, strict=True):
            for name in ("loss", "nll_loss", "bonus", "accuracy", "num_updates", *batch):
                key = f"{kind}_{name}"
                assert float(together[key]) == pytest.approx(float(alone[key]), abs=2e-3), key


def test_a_process_without_a_batch_waits_for_nobody(data, tmp_path):
    """An epoch is one batch here: the second process has an empty one in each update."""
    folders = []
    for world_size in (1, 2):
        (tmp_path / str(world_size)).mkdir()
        folders.append(
            train_on(world_size, tmp_path / str(world_size), data, **{"max-tokens": 100_000, "update-freq": 2})
        )
    assert_same(*folders, rtol=1e-3, atol=1e-5)
    assert max(int(r.get("train_num_updates", 0)) for r in read_log(folders[1] / "train.log")) == TRAIN["max-epoch"]


def test_the_fused_projection_trains_alike_on_two_processes(two, data, tmp_path):
    """With tied embeddings and accumulated batches; the rest is float32 rounding."""
    assert_same(two, train_on(2, tmp_path, data, fuse=True), rtol=1e-3, atol=1e-5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_hydra_trains_the_same_from_a_yaml_of_the_recipe(two, tmp_path):
    """Two machines of one process each, started as on two nodes; in fp32, for the YAML is the one for bf16."""
    recipe = load_recipe(write_recipe(tmp_path, train=TRAIN))
    command = shlex.split(json.loads((two / "run.json").read_text())["command"])
    command[command.index("--save-dir") + 1] = str(tmp_path / "checkpoints")
    (tmp_path / "train.yaml").write_text(hydra_config(command).replace("bf16: true", "bf16: false"))
    port, nodes = free_port(), []
    for node in range(2):
        cluster = Cluster("bf16", gpus=1, nodes=2, node=node, master=f"127.0.0.1:{port}")
        argv = processes.resolve(launch_command(recipe, command, cluster, tmp_path))
        environment = processes.job_environment(2)  # as in the other run: more threads would add in another order
        nodes.append(
            subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert_same(two, tmp_path, rtol=0, atol=0)


def test_bf16_trains(data, tmp_path):
    changes = {"max-tokens": 100, "disable-validation": True, "max-epoch": None, "max-update": 1}
    folder = train_on(1, tmp_path, data, "--precision", "bf16", **changes)
    state = checkpoints.load(folder / "checkpoints" / "checkpoint_last.pt")
    assert state["cfg"]["common"]["bf16"]
    assert state["optimizer_history"][-1]["num_updates"] == 1


# --- the commands, without running them


def dry_run(recipe, *options, code=0):
    done = run("encourage-mt", "train", recipe, "--work-dir", "/w", "--dry-run", *options, code=code)
    return done.stdout.splitlines() if code == 0 else done.stderr


def test_the_commands_of_one_gpu_one_node_and_several(tmp_path):
    recipe = write_recipe(tmp_path, train={"arch": "transformer", "max-tokens": 100, "update-freq": 8, "max-epoch": 9})
    options = (
        f"--user-dir {processes.USER_DIR} --source-lang de --target-lang en --seed 3 --update-freq FREQUENCY "
        "--arch transformer --max-epoch 9 --max-tokens 100 --eval-bleu --eval-bleu-args '{\"beam\": 1}' "
        "--eval-bleu-remove-bpe sentencepiece --best-checkpoint-metric bleu --maximize-best-checkpoint-metric "
        "--keep-last-epochs 10 --save-dir /w/ce.seed3/checkpoints --log-format json --log-interval 20 --num-workers 0 "
        "--required-batch-size-multiple 1 --criterion label_smoothed_cross_entropy --label-smoothing 0.1"
    )
    fairseq = f"fairseq-train /w/data/data-bin {options}"
    worker = processes.USER_DIR / "worker.py"
    several = ("--gpus", 2, "--nodes", 4, "--node", 3, "--master", "n0:29500")
    for machines, frequency, launcher in (
        ((), 8, ""),  # told to be one, or fairseq takes all GPUs it sees
        (("--gpus", 4), 2, f"torchrun --nproc-per-node 4 --standalone {worker} "),
        (
            several,
            1,
            f"torchrun --nproc-per-node 2 --nnodes 4 --node-rank 3 --master-addr n0 --master-port 29500 {worker} ",
        ),
    ):
        told, command = dry_run(recipe, "--criterion", "ce", "--seed", 3, *machines, "--precision", "fp16")
        alone = "" if launcher else " --distributed-world-size 1"
        assert command == launcher + fairseq.replace("FREQUENCY", str(frequency)) + " --fp16" + alone
        assert told.startswith("800 tokens per update: ") and told.endswith(f"update-freq {frequency}, fp16")
    assert not Path("/w").exists()


def test_bf16_is_told_with_its_yaml(tmp_path):
    lines = dry_run(write_recipe(tmp_path, train=TRAIN), "--criterion", "el", "--gpus", 2, "--precision", "bf16")
    assert lines[1].endswith(
        "worker.py fairseq-hydra-train --config-dir /w/el.seed1 --config-name train 'optimization.update_freq=[2]' "
        "hydra.run.dir=/w/el.seed1 hydra.output_subdir=null"
    )
    content = yaml.safe_load("\n".join(lines[3:]))
    assert content["common"]["bf16"] and not content["common"]["fp16"]
    assert content["model"]["encoder"]["embed_dim"] == 32 and content["criterion"]["log_end"] == 0.5
    assert content["optimization"]["lr"] == [0.1] and content["task"]["eval_bleu"]


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--gpus", 3), "1,000 tokens per update (250 x update-freq 4), which 3 world_size cannot share evenly"),
        (("--gpus", 0), "--gpus must be at least 1"),
        (("--gpus", 2, "--nodes", 2), "several nodes need --master HOST:PORT"),
        (("--nodes", 2, "--node", 2, "--master", "h:1"), "--node must be between 0 and 1"),
    ],
)
def test_machines_that_do_not_fit_are_refused(options, expected, tmp_path):
    error = dry_run(write_recipe(tmp_path, train=TRAIN), "--criterion", "el", *options, code=2)
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_every_recipe_keeps_its_tokens_per_update(path):
    recipe = load_recipe(path, bitext=["a.de", "a.en"] if path.parent.name == "own" else None)
    whole = recipe.train.get("update-freq", 1)
    for world_size in range(1, whole + 1):
        if whole % world_size == 0:
            assert update_freq(recipe, world_size) * world_size == whole
        else:
            with pytest.raises(UserError, match="cannot share evenly"):
                update_freq(recipe, world_size)


# --- SLURM


@pytest.mark.parametrize(
    "code, near_the_end, requeued",
    [(143, True, True), (143, False, False), (0, True, False), (0, False, False), (2, False, False)],
)
def test_the_sbatch_script_finds_the_first_node_and_puts_a_job_back_whose_time_is_up(
    code, near_the_end, requeued, tmp_path
):
    """With stand-ins for SLURM's commands and encourage-mt that write down how they are called."""
    for name, body in (
        ("scontrol", 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "scontrol $*" >>"$CALLS"; fi'),
        ("scancel", 'echo "scancel $*" >>"$CALLS"'),
        ("srun", 'shift; [ -z "$NEAR" ] || { kill -USR1 $PPID; sleep 0.5; }; SLURM_NODEID=1 exec "$@"'),
        ("venv/bin/encourage-mt", 'echo "encourage-mt $*" >>"$CALLS"; exit "$CODE"'),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    setup = (ROOT / "setup.py").read_bytes() + (ROOT / "scripts/constraints.txt").read_bytes()
    digest = subprocess.run(["sha256sum"], input=setup, capture_output=True, check=True).stdout.decode().strip()
    (tmp_path / "venv/installed").write_text(f"{ROOT} {digest}\n")
    environment = {
        **os.environ,
        **{
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VENV": str(tmp_path / "venv"),
            "CALLS": str(tmp_path / "calls"),
        },
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "45678"},
        **{"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "CODE": str(code), "NEAR": "yes" if near_the_end else ""},
    }
    argv = ["bash", str(ROOT / "scripts/train.sbatch"), "r.yaml", "--criterion", "el"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert sorted((tmp_path / "calls").read_text().splitlines()) == sorted(
        [
            "encourage-mt train r.yaml --criterion el --gpus 8 --nodes 2 --node 1 --master n7:25678",
            *["scancel --signal=TERM 45678"] * near_the_end,
            *["scontrol requeue 45678"] * requeued,
        ]
    )
