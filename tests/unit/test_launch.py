"""Test the commands that train a run on one GPU, several GPUs, and several machines."""

import shlex
from pathlib import Path

import pytest
from conftest import ROOT, TINY, refused, write_recipe

from encourage_mt.cli import main
from encourage_mt.environment import USER_DIR
from encourage_mt.errors import UserError
from encourage_mt.processes import WORKER
from encourage_mt.recipe import load_recipe
from encourage_mt.training.launch import Cluster, launch_command, update_freq
from encourage_mt.training.train import make_run

TRAIN = {**TINY["train"], "max-tokens": 100, "update-freq": 8}


@pytest.fixture
def run(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, train=TRAIN))
    return make_run(recipe, "el", 3, Path("/w/data"), Path("/w"), "fp32")


def test_a_command_has_one_word_an_option_the_criterion_last_and_our_plugin_at_the_end(run):
    words = run.command_line()
    assert words[:3] == ["fairseq-train", "/w/data/data-bin", "--save-dir=/w/el.seed3/checkpoints"]
    assert words[-4:] == [
        "--criterion=label_smoothed_encouraging_loss",
        "--label-smoothing=0.1",
        "--log-end=0.5",
        f"--user-dir={USER_DIR}",
    ]
    assert {"--seed=3", "--source-lang=de", "--share-all-embeddings", '--eval-bleu-args={"beam": 1}'} <= set(words)
    assert all(word.startswith("--") for word in words[2:])


@pytest.mark.parametrize(
    "machines, frequency, launcher",
    [
        ({}, 8, []),
        ({"gpus": 4}, 2, ["torchrun", "--nproc-per-node", "4", "--standalone", str(WORKER)]),
        (
            {"gpus": 2, "nodes": 4, "node": 3, "master": "n0:29500"},
            1,
            ["torchrun", "--nproc-per-node", "2", "--nnodes", "4", "--node-rank", "3"]
            + ["--master-addr", "n0", "--master-port", "29500", str(WORKER)],
        ),
    ],
    ids=["one", "four GPUs", "four machines"],
)
def test_the_processes_share_the_tokens_per_update(run, machines, frequency, launcher):
    words = launch_command(run, Cluster("fp16", **machines))
    place = len(launcher)
    assert words[:place] == launcher and words[place] == "fairseq-train"
    assert f"--update-freq={frequency}" in words and "--fp16" in words
    assert ("--distributed-world-size=1" in words) == (not launcher), "fairseq would take all GPUs it sees"
    assert words[-1] == f"--user-dir={USER_DIR}"


def test_bf16_goes_through_hydra_with_a_file_for_each_machine(run):
    words = launch_command(run, Cluster("bf16", gpus=2, nodes=2, node=1, master="n0:1"))
    assert words[words.index("fairseq-hydra-train") :][1:4] == [
        "--config-dir=/w/el.seed3",
        "--config-name=train1",
        "optimization.update_freq=[2]",
    ]


def test_a_dry_run_prints_the_command_and_writes_nothing(tmp_path, capsys):
    recipe, work = write_recipe(tmp_path, train=TRAIN), tmp_path / "work"
    main(
        [
            "train",
            str(recipe),
            "--arm=ce",
            "--seed=3",
            "--gpus=4",
            "--precision=fp16",
            f"--work-dir={work}",
            "--dry-run",
        ]
    )
    line, command = capsys.readouterr().out.splitlines()
    assert line.startswith("800 tokens per update: 4 x 100 ") and line.endswith("update-freq 2, fp16")
    assert "--criterion=label_smoothed_cross_entropy" in shlex.split(command)
    assert not work.exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--gpus", 3), "update-freq 8"),
        (("--gpus", 0), "--gpus"),
        (("--gpus", 2, "--nodes", 2), "--master"),
        (("--nodes", 2, "--node", 2, "--master", "h:1"), "--node"),
        (("--seed", "x"), "--seed"),
        (("--arm", "fl"), "ce, el"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, expected, tmp_path, capsys):
    recipe = write_recipe(tmp_path, train=TRAIN)
    line = refused(capsys, "train", recipe, "--work-dir", tmp_path / "work", "--arm", "el", "--dry-run", *options)
    assert expected in line
    assert not (tmp_path / "work").exists()


def test_the_old_names_of_options_still_work(tmp_path, capsys):
    recipe = write_recipe(tmp_path, train=TRAIN)
    assert "ce, el" in refused(capsys, "train", recipe, "--criterion", "fl")
    assert "ce, el" in refused(capsys, "run", recipe, "--criteria", "ce", "fl")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_every_recipe_keeps_its_tokens_per_update(path):
    recipe = load_recipe(path, bitext=["a.de", "a.en"] if path.parent.name == "own" else None)
    whole = recipe.train.get("update-freq", 1)
    for processes in range(1, whole + 1):
        if whole % processes == 0:
            assert update_freq(recipe.train, processes) * processes == whole
        else:
            with pytest.raises(UserError, match="update-freq"):
                update_freq(recipe.train, processes)
