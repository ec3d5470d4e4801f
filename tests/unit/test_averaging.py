"""Average checkpoints that were made by hand."""

import argparse
import runpy
import sys
import weakref

import pytest
import torch
from conftest import ROOT

from encourage_mt.errors import UserError
from encourage_mt.evaluation import averaging
from encourage_mt.evaluation.averaging import average
from encourage_mt.plugin import checkpoints
from encourage_mt.plugin.checkpoints import last_checkpoints


def checkpoint(path, value, dtype=torch.float32, count=0, **parameters):
    state = {
        "args": argparse.Namespace(arch="x"),
        "model": {"w": torch.full((2, 3), value, dtype=dtype), "steps": torch.tensor(count), **parameters},
        "last_optimizer_state": {"m": torch.zeros(2, 3)},
        "extra_state": {"epoch": count},
    }
    torch.save(state, path)
    return path


def test_the_mean_of_three_by_hand(tmp_path):
    paths = [checkpoint(tmp_path / f"{i}.pt", value, count=i) for i, value in enumerate((1.0, 2.0, 6.0))]
    average(paths, tmp_path / "out.pt")
    state = checkpoints.load_checkpoint(tmp_path / "out.pt")
    assert torch.equal(state["model"]["w"], torch.full((2, 3), 3.0))
    assert state["model"]["steps"] == 2 and state["extra_state"]["epoch"] == 2, "the rest is of the last one"
    assert "last_optimizer_state" not in state and state["args"].arch == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.pt", "1.pt", "2.pt", "out.pt"]


def test_half_types_are_summed_in_float32(tmp_path):
    """In float16 the sum of 3 x 30,000 would be infinite, and float16 does not have 2,049."""
    paths = [checkpoint(tmp_path / f"{i}.pt", v, torch.float16) for i, v in enumerate((30000.0, 30000.0, 30000.0))]
    average(paths, tmp_path / "out.pt")
    w = checkpoints.load_checkpoint(tmp_path / "out.pt")["model"]["w"]
    assert w.dtype == torch.float16 and (w == 30000).all()
    paths = [checkpoint(tmp_path / f"{i}.pt", v, torch.float64) for i, v in enumerate((1.0, 1.0 + 2e-16, 1.0))]
    average(paths, tmp_path / "out.pt")
    assert checkpoints.load_checkpoint(tmp_path / "out.pt")["model"]["w"].dtype == torch.float64


def test_the_last_are_chosen_by_number_not_by_name(tmp_path):
    for name in ("checkpoint8.pt", "checkpoint9.pt", "checkpoint10.pt", "checkpoint_1_20.pt", "checkpoint_2_100.pt"):
        checkpoint(tmp_path / name, 0.0)
    for name in ("checkpoint_best.pt", "checkpoint_last.pt", "checkpoint11.pt.tmp"):
        checkpoint(tmp_path / name, 0.0)
    assert [p.name for p in last_checkpoints(tmp_path, 2)] == ["checkpoint9.pt", "checkpoint10.pt"]
    assert [p.name for p in last_checkpoints(tmp_path, 2, "update")] == ["checkpoint_1_20.pt", "checkpoint_2_100.pt"]
    with pytest.raises(UserError, match="3 epoch checkpoints"):
        last_checkpoints(tmp_path, 4)
    with pytest.raises(UserError, match="no such directory"):
        last_checkpoints(tmp_path / "none", 1)


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path, monkeypatch):
    """Only the sum and the checkpoint that was read last are in memory."""
    paths = [checkpoint(tmp_path / f"{i}.pt", 1.0) for i in range(6)]
    read, alive = [], []
    load = averaging.load_checkpoint

    def watched(path):
        state = load(path)
        alive.append(sum(reference() is not None for reference in read))
        read.append(weakref.ref(state["model"]["w"]))
        return state

    monkeypatch.setattr(averaging, "load_checkpoint", watched)
    average(paths, tmp_path / "out.pt")
    assert alive == [0] * 6


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["{a}", "{missing}"], "missing.pt: no such checkpoint"),
        (["{a}", "{garbage}"], "garbage.pt: damaged checkpoint"),
        (["{a}", "{nothing}"], "nothing.pt: damaged checkpoint"),
        (["{a}", "{cut}"], "cut.pt: damaged checkpoint"),
        (["{a}", "{flipped}"], "flipped.pt: damaged checkpoint"),
        (["{a}", "{other}"], "other.pt: its parameters differ in name or shape"),
        (["{dir}", "--num-epoch-checkpoints", "0"], "the number of checkpoints must be at least 1, got 0"),
        (["{dir}", "--num-epoch-checkpoints", "3"], "0 epoch checkpoints"),
        (["{dir}", "{dir}", "--num-update-checkpoints", "3"], "take one run directory"),
        (["{dir}"], "is a directory; choose its checkpoints with --num-epoch-checkpoints"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(arguments, expected, tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "a.pt", 1.0)
    checkpoint(tmp_path / "other.pt", 1.0, extra=torch.zeros(1))
    (tmp_path / "nothing.pt").touch()
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    flipped = bytearray((tmp_path / "a.pt").read_bytes())
    flipped[flipped.index(torch.full((2, 3), 1.0).numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    names = {path.stem: path for path in tmp_path.glob("*.pt")} | {"missing": tmp_path / "missing.pt"}
    arguments = [argument.format(dir=tmp_path, **names) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["average", "--output", str(tmp_path / "out.pt"), "--inputs", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "scripts/average_checkpoints.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind, expected", [("epoch", 5.0), ("update", 3.0)])
def test_the_script_averages_the_last_of_each_kind(kind, expected, tmp_path, monkeypatch):
    values = {"checkpoint1": 0.0, "checkpoint2": 4.0, "checkpoint3": 6.0}
    values |= {"checkpoint_1_10": 0.0, "checkpoint_1_20": 1.0, "checkpoint_2_30": 5.0}
    for name, value in values.items():
        checkpoint(tmp_path / f"{name}.pt", value)
    options = [f"--num-{kind}-checkpoints", "2", "--inputs", str(tmp_path), "--output", str(tmp_path / "out.pt")]
    monkeypatch.setattr(sys, "argv", ["average", *options])
    runpy.run_path(str(ROOT / "scripts/average_checkpoints.py"), run_name="__main__")
    assert (checkpoints.load_checkpoint(tmp_path / "out.pt")["model"]["w"] == expected).all()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="out.pt"):
        average([checkpoint(tmp_path / "a.pt", 1.0)], tmp_path / "none" / "out.pt")


def test_the_digest_is_of_the_averaged_parameters_alone(tmp_path):
    paths = [checkpoint(tmp_path / f"{i}.pt", 1.0, torch.bfloat16, count=7) for i in range(2)]
    digest = average(paths, tmp_path / "out.pt")
    assert digest == average(paths[:1], tmp_path / "again.pt"), "the same mean"
    assert digest != average([checkpoint(tmp_path / "other.pt", 1.5, torch.bfloat16, count=7)], tmp_path / "out.pt")
