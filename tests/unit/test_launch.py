"""Test the commands that train a run on one GPU, several GPUs, and several machines."""

import shlex
from pathlib import Path

import pytest
from conftest import ROOT, TINY, refused, write_recipe

from encourage_mt.cli import main
from encourage_mt.data.sizing import choose
from encourage_mt.environment import USER_DIR
from encourage_mt.errors import UserError
from encourage_mt.processes import WORKER
from encourage_mt.recipe import load_recipe
from encourage_mt.training import launch
from encourage_mt.training.launch import Cluster, hydra_config, launch_command, share_batch
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
    assert {"--seed=3", "--source-lang=de", "--share-all-embeddings", "--dataset-impl=mmap"} <= set(words)
    assert '--eval-bleu-args={"beam": 1, "max_len_a": 1.2, "max_len_b": 10}' in words, "validation ends soon"
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


def test_tensorboard_writes_into_the_folder_of_the_run(tmp_path):
    for name in ("tensorboard", ".."):
        recipe = load_recipe(write_recipe(tmp_path, train={**TRAIN, "tensorboard-logdir": name, "wandb-project": "mt"}))
        words = make_run(recipe, "el", 3, Path("/w/data"), Path("/w"), "fp32").command_line()
        assert f"--tensorboard-logdir=/w/el.seed3/{name}" in words and "--wandb-project=mt" in words


def test_bf16_goes_through_hydra_with_a_file_for_each_machine(run):
    words = launch_command(run, Cluster("bf16", gpus=2, nodes=2, node=1, master="n0:1"))
    assert words[words.index("fairseq-hydra-train") :][1:4] == [
        "--config-dir=/w/el.seed3",
        "--config-name=train1",
        "optimization.update_freq=[2]",
    ]


@pytest.mark.parametrize("name", ["a,b ~(1)#=", "d'Été", r"a\b\'c", "Übung: {x}[1]"])
def test_hydra_reads_the_folder_of_a_run_whatever_its_name(run, name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    folder = Path("/w") / name / "el.seed3"
    words = launch_command(run.model_copy(update={"folder": folder}), Cluster("bf16"))
    (override,) = OverridesParser.create().parse_overrides([word for word in words if "hydra.run.dir" in word])
    assert override.value() == str(folder) and f"--config-dir={folder}" in words


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"arch": "lstm"}, "works for Transformers only, not for lstm"),
        ({"optimizer": "adafactor"}, "cannot set the optimizer adafactor"),
        ({"arch": "no-such"}, "fairseq-train refuses the options of el.seed3"),
    ],
    ids=["lstm", "adafactor", "unknown"],
)
def test_bf16_is_refused_where_hydra_cannot_train(run, changes, expected):
    lacking = TRAIN if changes.get("arch") == "lstm" else {}  # an LSTM has not the options of a Transformer
    options = {name: run.options[name] for name in run.options if name not in lacking}
    with pytest.raises(UserError, match=expected):
        hydra_config(run.model_copy(update={"options": {**options, "max-tokens": 100, **changes}}))


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "visible_gpus", lambda: ["0", "1", "2"])
    Cluster("fp16", gpus=3).check_machine()
    with pytest.raises(UserError, match="--gpus 2: 2 runs at a time need 4 GPUs, there are 3"):
        Cluster("fp16", gpus=2).check_machine(2)
    one = Cluster("fp16")
    one.check_machine(4)
    assert [one.devices(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "2", "0"], "they share a GPU"


@pytest.mark.parametrize(
    "option, word", [("--reverse", "--source-lang=en"), ("--modern", "--eval-bleu-remove-bpe=sentencepiece")]
)
def test_the_other_direction_and_the_modern_pipeline_are_in_the_commands(option, word, tmp_path, capsys):
    recipe = write_recipe(tmp_path, subword={"merges": 300})
    for options in ([], [option]):
        main(["run", str(recipe), f"--work-dir={tmp_path / 'work'}", "--dry-run", *options])
        command = capsys.readouterr().out.splitlines()[-1]
        assert (word in shlex.split(command)) == bool(options)


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


def test_settings_and_added_arms_are_in_the_commands(tmp_path, capsys):
    recipe, changes = write_recipe(tmp_path), ["--set", "lr=0.009", "--add-arm", "soft=el,log-end=0.25"]
    main(["run", str(recipe), f"--work-dir={tmp_path / 'work'}", "--dry-run", *changes])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("fairseq-train")]
    assert all("--lr=0.009" in command for command in commands)
    ends = [[word for word in command if "log-end" in word] for command in commands]
    assert ends == [[], ["--log-end=0.5"], ["--log-end=0.25"]], "the new arm is trained with the others"


def test_settings_change_what_was_chosen_for_own_text(tmp_path, capsys):
    (tmp_path / "a.de").write_text("eins\n" * 5000)
    argv = ["run", str(ROOT / "examples/own/recipe.yaml"), "--bitext", str(tmp_path / "a.de"), "a.en", "--dry-run"]
    main([*argv, f"--work-dir={tmp_path / 'work'}", "--set", "max-update=7"])
    first, _, *commands = capsys.readouterr().out.splitlines()
    assert "5,000 pairs" in first and all("--max-update=7" in command for command in commands)
    assert not any("--max-epoch" in command for command in commands) and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--gpus", 900), "--gpus"),  # for 800 tokens
        (("--gpus", 0), "--gpus"),
        (("--gpus", 2, "--nodes", 2), "--master"),
        (("--nodes", 2, "--node", 2, "--master", "h:1"), "--node"),
        (("--nodes", 2, "--master", "h:1", "--overwrite"), "--overwrite: use it with `encourage-mt prepare`"),
        (("--seed", "x"), "--seed"),
        (("--arm", "fl"), "ce, el"),
        (("--work-dir", "a:b"), "--work-dir: fairseq cannot use a path with a colon or a comma"),
        (("--work-dir", "a,b"), "--work-dir: fairseq cannot use a path with a colon or a comma"),
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


@pytest.mark.parametrize(
    "options, processes, expected",
    [
        ({"max-tokens": 4096, "update-freq": 4}, 4, {"update-freq": 1, "max-tokens": 4096}),
        ({"max-tokens": 4096, "update-freq": 4}, 3, {"update-freq": 2, "max-tokens": 2730}),
        ({"max-tokens": 4096, "update-freq": 4}, 8, {"update-freq": 1, "max-tokens": 2048}),
        ({"max-tokens": 4096}, 2, {"update-freq": 1, "max-tokens": 2048}),
        ({"max-tokens": 900, "batch-size": 30}, 3, {"update-freq": 1, "max-tokens": 300, "batch-size": 10}),
    ],
)
def test_batches_become_smaller_where_update_freq_cannot_be_divided(options, processes, expected):
    assert share_batch(options, processes) == expected


@pytest.mark.parametrize("precision, prefix", [("fp32", "--max-tokens"), ("bf16", "dataset.max_tokens")])
def test_smaller_batches_are_on_the_command_line_and_validation_keeps_its_own(run, precision, prefix):
    words = launch_command(run, Cluster(precision, gpus=3))
    valid = prefix + ("-valid" if precision == "fp32" else "_valid")
    assert f"{prefix}=88" in words and f"{valid}=100" in words  # 3 x 88 x 3 of 8 x 100


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
@pytest.mark.parametrize("processes", [1, 2, 3, 8, 12])
def test_every_recipe_keeps_its_tokens_per_update_on_any_number_of_gpus(path, processes):
    own = {"bitext": ["a.de", "a.en"], "chosen": choose(10**7, 8)} if path.parent.name == "own" else {}
    options = load_recipe(path, **own).train
    whole = options["max-tokens"] * options.get("update-freq", 1)
    share = share_batch(options, processes)
    kept = processes * share["max-tokens"] * share["update-freq"]
    assert whole - processes * share["update-freq"] < kept <= whole
