"""Test the process pool that prepares text: order, memory, workers that die, and a parent that dies."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from encourage_mt import processes
from encourage_mt.data import stages
from encourage_mt.data.stages import drop_reason, hash64, ordered_map
from encourage_mt.errors import UserError
from encourage_mt.recipe import Clean


@pytest.mark.parametrize(
    "lengths, expected",
    [((0, 3), "empty"), ((175, 117), ""), ((176, 170), "too_long"), ((3, 2), ""), ((2, 4), "ratio"), ((1, 1), "")],
)
def test_pairs_strictly_beyond_a_limit_are_dropped(lengths, expected):
    assert drop_reason(*lengths, Clean(max_length=175, max_ratio=1.5)) == expected


def pairs(number):
    return [(str(n), "") for n in range(number)]


def slow_first(chunk):
    time.sleep(0.2 if chunk[0][0] == "0" else 0)
    return [source for source, _ in chunk]


def die(chunk):
    os._exit(9)


def test_pool_keeps_order_and_holds_few_chunks(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 10)
    taken = []
    results = ordered_map(slow_first, (taken.append(pair) or pair for pair in pairs(500)), 2)
    assert next(results)[1] == [str(n) for n in range(10)]
    assert len(taken) <= 10 * (2 * stages.WAITING + 2)
    assert [item for _, result in results for item in result] == [str(n) for n in range(10, 500)]


def test_chunks_are_bounded_in_pairs_and_characters():
    sizes = [1, 2, 10**6, 10**7, 3] + [1] * 2500
    lengths = [len(chunk) for chunk in stages.chunks(("x" * size, "y" * 10) for size in sizes)]
    assert lengths == [4, 1000, 1000, 501] and list(stages.chunks([])) == []


def test_dead_worker_is_reported(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 1)
    with pytest.raises(UserError, match="--workers 1"):
        list(ordered_map(die, pairs(9), 2))


def test_hash_is_the_same_on_every_machine():
    assert hash64("Haus") == 697045299593435607


def write_pid(chunk):
    (stages_folder / str(os.getpid())).touch()
    time.sleep(60)


def work_under_lock(folder):
    global stages_folder
    stages_folder = folder
    with processes.locked(folder):
        list(ordered_map(write_pid, pairs(9), 2))


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux")
def test_killed_parent_leaves_no_worker_and_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 1)
    parent = multiprocessing.get_context("fork").Process(target=work_under_lock, args=(tmp_path,))
    parent.start()
    while len(workers := [path.name for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert parent.is_alive()
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    try:
        with processes.locked(tmp_path):  # at once, because no worker ever held it
            pass
        time.sleep(0.2)
        assert not [pid for pid in workers if Path(f"/proc/{pid}/exe").exists()]  # a zombie has none
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
