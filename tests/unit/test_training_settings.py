"""Test the settings of a training that are read from its checkpoint."""

from argparse import Namespace

import pytest

from encourage_mt.training.run_folder import training_settings


def checkpoint_state(**changes):
    sections = {
        "common": {"fp16": False, "bf16": False, "amp": False, "seed": 1, "log_interval": 20},
        "distributed_training": {"distributed_world_size": 1},
        "dataset": {"max_tokens": 1000, "batch_size": None},
        "optimization": {"_name": None, "update_freq": [1], "lr": [0.002], "clip_norm": 0.0},
        "optimizer": {"_name": "adam", "adam_betas": [0.9, 0.98], "lr": [0.002]},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 100},
        "criterion": {"_name": "cross_entropy", "label_smoothing": 0.1},
        "model": Namespace(arch="transformer", dropout=0.2, seed=1, label_smoothing=0.1, criterion="cross_entropy"),
    }
    for path, value in changes.items():
        section, name = path.split("__")
        if section == "model":
            setattr(sections["model"], name, value)
        else:
            sections[section][name] = value
    return {"cfg": sections, "optimizer_history": [{"num_updates": 77}]}


def differing(**changes):
    """Return the settings of a training that differ after `changes` to its options."""
    before, after = (training_settings(state) for state in (checkpoint_state(), checkpoint_state(**changes)))
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def test_the_effective_batch_is_tokens_times_updates_times_processes():
    changes = {
        "dataset__max_tokens": 500,
        "optimization__update_freq": [4],
        "distributed_training__distributed_world_size": 3,
    }
    assert training_settings(checkpoint_state(**changes))["tokens per update"] == 6000
    same = {
        "dataset__max_tokens": 250,
        "optimization__update_freq": [2],
        "distributed_training__distributed_world_size": 2,
    }
    assert differing(**same) == []
    assert differing(optimization__update_freq=[2]) == ["tokens per update"]
    assert differing(dataset__batch_size=64) == ["sentences per update"]
    assert differing(optimization__update_freq=[1, 4])[:1] == ["tokens per update"]


def test_the_options_of_a_part_that_only_the_command_line_can_set():
    state = checkpoint_state()
    options = {"weight_decay": 0.1, "dropout": 0.2, "seed": 1, "label_smoothing": 0.1, "optimizer": "adafactor"}
    state["cfg"]["optimizer"] = Namespace(_name="adafactor", **options)
    settings = training_settings(state)
    assert (settings["optimizer"], settings["weight_decay"], settings["dropout"]) == ("adafactor", 0.1, 0.2)
    assert not {"seed", "label_smoothing"} & set(settings)


def test_nested_options_of_the_model_replace_flat_ones_with_defaults():
    state = checkpoint_state()
    flat = {"_name": "transformer", "encoder_layers": 6, "dropout": 0.2}
    state["cfg"]["model"] = {**flat, "encoder": {"layers": 2}, "decoder": {"layers": 3}}
    settings = training_settings(state)
    assert (settings["encoder_layers"], settings["decoder_layers"], settings["dropout"]) == (2, 3, 0.2)
    assert settings["arch"] == "transformer" and not {"encoder", "_name"} & set(settings)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"optimization__lr": [0.1], "optimizer__lr": [0.1]}, ["lr"]),
        ({"optimizer___name": "adagrad"}, ["optimizer"]),
        ({"lr_scheduler__warmup_updates": 4000}, ["warmup_updates"]),
        ({"model__dropout": 0.3}, ["dropout"]),
        ({"model__arch": "transformer_iwslt_de_en"}, ["arch"]),
        ({"common__fp16": True}, ["precision"]),
        ({"common__seed": 2, "model__seed": 2}, []),
        ({"criterion___name": "el", "model__criterion": "el", "criterion__label_smoothing": 0.0}, []),
        ({"common__log_interval": 100}, []),
    ],
)
def test_settings_of_a_training_are_all_except_criterion_seed_and_logging(changes, expected):
    assert differing(**changes) == expected


def test_the_batch_in_sentences_and_a_schedule_of_update_freq_are_kept():
    settings = training_settings(checkpoint_state(dataset__max_tokens=None, dataset__batch_size=32))
    assert settings["tokens per update"] == 0 and settings["sentences per update"] == 32
    assert settings["updates"] == 77 and settings["precision"] == "fp32"
