"""Test saving, restoring and checking of checkpoints, and the stop on SIGTERM, without a training."""

import errno
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from encourage_mt.errors import UserError
from encourage_mt.plugin import checkpoints, fault_tolerance
from encourage_mt.plugin.checkpoints import find_corruption, saved_checkpoints
from encourage_mt.plugin.fault_tolerance import restore_last_checkpoint


def save(path, value=0.0):
    torch.save({"model": {"w": torch.full((100,), value)}}, path)
    return path


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def fill_with_garbage(path):
    path.write_bytes(os.urandom(2000))


def flip_a_byte(path):
    """In the tensor's data: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[content.index(b"\0\0\x80\x3f" * 4) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, fill_with_garbage, flip_a_byte, Path.unlink])
def test_a_damaged_last_checkpoint_is_named_and_replaced_by_the_newest_intact_one(harm, tmp_path, caplog):
    for epoch in range(1, 5):
        save(tmp_path / f"checkpoint{epoch}.pt", float(epoch))
    last = save(tmp_path / "checkpoint_last.pt", 1.0)
    harm(last)
    truncate(tmp_path / "checkpoint4.pt")
    assert restore_last_checkpoint(tmp_path) and not restore_last_checkpoint(tmp_path)
    assert last.read_bytes() == (tmp_path / "checkpoint3.pt").read_bytes()
    assert "checkpoint4.pt is damaged" in caplog.text and "checkpoint3.pt, the newest intact" in caplog.text
    kept = harm is not Path.unlink
    assert ("checkpoint_last.pt is damaged" in caplog.text) == kept
    assert (tmp_path / "checkpoint_last.pt.damaged").exists() == kept


CALL = "__import__('os').getpid()"


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_layers": CALL},
        {"encoder_layers": f"[[0 for torch.nn.Module.__class_getitem__ in [eval]], torch.nn.Module[{CALL!r}]]"},
        {"encoder_layers": "f'{torch!r}'"},
        {"encoder_layers": "'%(evil.so)s' % torch.ctypes.cdll"},
        {"nested": Namespace(encoder_layers="${common.x}")},
        {"encoder_layers": [("64", CALL)]},
        {"encoder_layers": CALL.encode()},
        {"encoder_layers": bytearray(CALL, "ascii")},
        {"encoder_layers": numpy.array(CALL)},
        {"encoder_layers": "-" * 100_000 + CALL},  # too deep to parse here, perhaps not where it is evaluated
        OmegaConf.create({"model": {"encoder_layers": "${dataset.save_dir}"}, "dataset": {"save_dir": CALL}}),
        OmegaConf.create({"task": {"encoder_layers": CALL}}),
    ],
    ids=[
        "text",
        "no call",
        "f-string",
        "format",
        "namespace",
        "list",
        "bytes",
        "bytearray",
        "array",
        "deep",
        "interpolation",
        "task",
    ],
)
def test_an_option_that_is_code_is_refused_in_any_form(options):
    state = {"cfg": options} if OmegaConf.is_config(options) else {"cfg": {"model": options}}
    with pytest.raises(UserError, match="its option encoder_layers is code"):
        checkpoints.refuse_code("x.pt", state)
    harmless = {
        "encoder_layers": "[(512, 3)] * 20",
        "data": CALL,
        "betas": "(0.9, 0.98)",
        "eval_bleu_args": '{"beam": 1}',
    }
    checkpoints.refuse_code("x.pt", {"cfg": {"model": harmless, "task": Namespace(**harmless)}})


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), 1.0])
def test_a_model_of_anything_but_plain_tensors_is_refused(value, tmp_path):
    torch.save({"model": {"w": value}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: .*(plain tensors|loaded safely)"):
        checkpoints.load_checkpoint(tmp_path / "x.pt")


def test_without_an_intact_checkpoint_training_does_not_start_over_silently(tmp_path, caplog):
    for name in ("checkpoint1.pt", "checkpoint_last.pt"):
        truncate(save(tmp_path / name))
    with pytest.raises(SystemExit) as stop:
        restore_last_checkpoint(tmp_path)
    assert stop.value.code == 2 and str(tmp_path) in caplog.messages[-1]


def test_nothing_is_restored_in_a_new_folder(tmp_path):
    restore_last_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_order_of_checkpoints(tmp_path):
    names = ["checkpoint_best.pt", "checkpoint2.pt", "checkpoint_2_30.pt", "checkpoint_11_90.pt", "checkpoint10.pt"]
    for name in (*names, "checkpoint_last.pt", "checkpoint1.pt.tmp", "other.pt"):
        (tmp_path / name).touch()
    found = [path.name for path in saved_checkpoints(tmp_path)]
    assert found == ["checkpoint_last.pt", names[3], names[4], names[1], names[2], names[0]]


def test_a_flipped_bit_is_refused_wherever_a_checkpoint_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "checkpoint1.pt", 1.0)
    flip_a_byte(path)
    assert torch.load(path)["model"]["w"].ne(1.0).sum() == 1, "torch loads it as if nothing were wrong"
    assert "checksum" in find_corruption(path)
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", checkpoint_utils.load_checkpoint_to_cpu)
    checkpoints.install()
    for load in (checkpoints.load_checkpoint, checkpoint_utils.load_checkpoint_to_cpu):
        with pytest.raises(UserError, match="checkpoint1.pt: damaged checkpoint"):
            load(path if load is not checkpoint_utils.load_checkpoint_to_cpu else str(path))


def test_files_of_torch_before_1_6_are_not_taken_for_damaged(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert find_corruption(tmp_path / "old.pt") is None
    assert checkpoints.load_checkpoint(tmp_path / "old.pt")["model"]["w"].sum() == 3
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="text.pt"):
        checkpoints.load_checkpoint(tmp_path / "text.pt")


def test_a_task_may_keep_its_dictionary_in_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", checkpoint_utils.load_checkpoint_to_cpu)
    checkpoints.install()
    dictionary = Dictionary()
    dictionary.add_symbol("word")
    torch.save({"task_state": {"target_dictionary": dictionary}}, tmp_path / "checkpoint1.pt")
    assert torch.load(tmp_path / "checkpoint1.pt")["task_state"]["target_dictionary"].index("word") == 4


def test_the_best_checkpoints_are_found_by_a_negative_loss_too(tmp_path):
    names = ["checkpoint.best_loss_0.2001.pt", "checkpoint.best_loss_-0.1230.pt", "checkpoint.best_loss_-1.5002.pt"]
    for name in names:
        (tmp_path / name).touch()
    pattern = r"checkpoint\.best_loss_(\d+\.?\d*)\.pt"  # that of checkpoint_utils.save_checkpoint
    find = fault_tolerance.find_negative_too(checkpoint_utils.checkpoint_paths)
    assert find(str(tmp_path), pattern=pattern) == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(
    "sharded, renewed, reusable, expected",
    [(False, False, True, [1]), (False, False, False, [1, 5]), (True, False, True, [5]), (False, True, True, [5])],
)
def test_a_resumed_training_has_the_batches_of_epoch_1_unless_each_epoch_has_its_own(
    sharded, renewed, reusable, expected, monkeypatch
):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    task = SimpleNamespace(
        has_sharded_data=lambda split: sharded, dataset=lambda split: None, can_reuse_epoch_itr=lambda data: reusable
    )
    dataset = SimpleNamespace(update_epoch_batch_itr=renewed, train_subset="train")
    cfg, made = SimpleNamespace(dataset=dataset, optimization=SimpleNamespace(max_update=0)), []
    trainer = SimpleNamespace(task=task, cfg=cfg, get_train_iterator=made.append)
    load = fault_tolerance.resume_from_whole(lambda cfg, trainer: (None, trainer.get_train_iterator(5)))
    load(SimpleNamespace(restore_file="other.pt", no_last_checkpoints=False), trainer)
    assert made == expected


def test_a_failed_save_leaves_the_last_checkpoint_and_ends_in_one_line(tmp_path, monkeypatch, caplog):
    def full(obj, out):
        out.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoint_last.pt").write_bytes(b"whole")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        fault_tolerance.save_whole({}, str(tmp_path / "checkpoint_last.pt"))
    assert stop.value.code == 2 and "no space left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_last.pt"]
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == b"whole"


@pytest.mark.parametrize("at_step", [0, 3, None], ids=["before", "while validating", "never"])
def test_sigterm_stops_at_the_next_batch_of_a_validation(at_step, monkeypatch, caplog):
    """A validation of 10 batches, with a trainer that counts them."""
    monkeypatch.setattr(fault_tolerance, "_stop_requested", at_step == 0)
    saved, steps = [], []

    class Trainer:
        data_parallel_world_size = 1

        def valid_step(self, sample, raise_oom=False):
            steps.append(sample)
            if len(steps) == at_step:
                fault_tolerance.request_stop(signal.SIGTERM, None)

        def get_num_updates(self):
            return 7

    def validate_and_save(cfg, trainer, *_):
        for sample in range(10):
            trainer.valid_step(sample)
        return [1.0], False

    options = SimpleNamespace(no_save=False, no_last_checkpoints=False, save_interval=1)
    trainer, cfg, epoch_itr = Trainer(), SimpleNamespace(checkpoint=options), SimpleNamespace(epoch=1)
    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", lambda *words: saved.append(words[-1]))
    hooked = fault_tolerance.save_and_stop_in_time(validate_and_save)
    if at_step is None:
        assert hooked(cfg, trainer, None, epoch_itr, ["valid"], True) == ([1.0], False)
    else:
        with pytest.raises(SystemExit) as stop:
            hooked(cfg, trainer, None, epoch_itr, ["valid"], True)
        assert stop.value.code == 143 and "after 7 updates" in caplog.text and "run the same command" in caplog.text
    assert len(steps) == (10 if at_step is None else at_step)
    assert saved == ([] if at_step is None else [None])
    assert "valid_step" not in vars(trainer)


def test_a_rank_that_repeats_a_batch_of_the_validation_asks_no_other_rank(monkeypatch):
    """fairseq repeats a batch that ran out of memory, on its rank only."""
    asked, steps = [], []
    monkeypatch.setattr(fault_tolerance, "any_rank", lambda trainer, *values: asked.append(values) or [False, False])

    class Trainer:
        def valid_step(self, sample, raise_oom=False):
            steps.append((sample, raise_oom))
            return None if raise_oom else self.valid_step(sample, raise_oom=True)

    def validate_and_save(cfg, trainer, *_):
        for sample in range(3):
            trainer.valid_step(sample)
        return [1.0], False

    cfg, epoch_itr = SimpleNamespace(checkpoint=SimpleNamespace(save_interval=1)), SimpleNamespace(epoch=1)
    hooked = fault_tolerance.save_and_stop_in_time(validate_and_save)
    hooked(cfg, Trainer(), None, epoch_itr, ["valid"], False)
    assert steps == [(sample, again) for sample in range(3) for again in (False, True)]
    assert len(asked) == 1 + 3  # before the validation, and once for each batch


def test_a_long_epoch_is_saved_every_ten_minutes(monkeypatch):
    """An update takes 300 s; an epoch ends with update 9, and the training with the last one."""
    now, saved = [0], []
    monkeypatch.setattr(fault_tolerance, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(fault_tolerance, "_last_save", 0)
    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", lambda *words: saved.append(words[2:]))
    trainer = type("Trainer", (), {"data_parallel_world_size": 1, "valid_step": None})()
    hooked = fault_tolerance.save_and_stop_in_time(lambda *words: ([1.0], words[3].update == 21))
    cfg = SimpleNamespace(checkpoint=SimpleNamespace(save_interval=1))
    for update in range(22):
        now[0] += 300
        hooked(cfg, trainer, None, SimpleNamespace(update=update, epoch=1), ["valid"], update == 9)
    assert saved == [(SimpleNamespace(update=update, epoch=1), None) for update in (2, 5, 8, 12, 15, 18)]


@pytest.mark.parametrize(
    "changes, owed",
    [
        ({}, True),
        ({"val_loss": 2.0}, False),
        ({"epoch": 1}, False),
        ({"position": 5}, False),
        ({"position": 5, "updates": 9}, True),
        ({"position": 5, "updates": 9, "val_loss": 2.0}, False),
        ({"disabled": True}, False),
        ({"interval": 2}, False),
        ({"interval": 3}, True),
        ({"interval": 2, "updates": 9}, True),
    ],
)
def test_a_resumed_run_repeats_the_validation_of_an_epoch_or_of_the_last_update(changes, owed, monkeypatch):
    from fairseq_cli import train

    state = {"val_loss": None, "epoch": 4, "position": 0, "disabled": False, "updates": 8, "interval": 1, **changes}
    position = {"epoch": state["epoch"], "iterations_in_epoch": state["position"]}
    epoch_itr = SimpleNamespace(epoch=state["epoch"], iterations_in_epoch=state["position"])
    dataset = SimpleNamespace(
        disable_validation=state["disabled"], valid_subset="valid,valid1", validate_interval=state["interval"]
    )
    cfg = SimpleNamespace(dataset=dataset, optimization=SimpleNamespace(max_update=9))
    weights, calls = [], []
    criterion = SimpleNamespace(set_weight=weights.append)
    trainer = SimpleNamespace(
        cfg=cfg, task="task", get_criterion=lambda: criterion, get_num_updates=lambda: state["updates"]
    )
    monkeypatch.setattr(train, "validate_and_save", lambda *words: calls.append(words))
    extra_state = {"val_loss": state["val_loss"], "train_iterator": position}
    fault_tolerance.validate_last_epoch(extra_state, epoch_itr, trainer)
    fault_tolerance.validate_last_epoch(None, epoch_itr, trainer)
    fault_tolerance.validate_last_epoch({"train_iterator": position}, epoch_itr, trainer)  # of a crash.pt
    assert len(calls) == owed
    if owed:
        *_, at_end, subsets, end_of_epoch = calls[0]
        ended = (4, False) if state["position"] else (3, True)
        assert (at_end.epoch, at_end.end_of_epoch(), at_end.state_dict()) == (*ended, position)
        assert subsets == ["valid", "valid1"] and end_of_epoch == ended[1]
        assert weights == [state["updates"] - 1], "validation has the weight of the last update"
