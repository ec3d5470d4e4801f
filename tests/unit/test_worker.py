"""Test what the plugin changes in fairseq's programs, without running them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

from encourage_mt.data.binarize import open_binarized
from encourage_mt.errors import UserError
from encourage_mt.plugin.accumulation import without_empty_batches
from encourage_mt.plugin.worker import add_sizes_exactly


def test_addresses_of_large_merged_data_do_not_overflow(tmp_path, monkeypatch):
    """Six sentences of 2^29 tokens stand for the sentences of 6 GiB; their sizes come from files, in 32 bits."""
    monkeypatch.setattr(MMapIndexedDatasetBuilder, "finalize", MMapIndexedDatasetBuilder.finalize)
    add_sizes_exactly()
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    builder._sizes = list(np.full(6, 2**29, dtype=np.int32))
    builder.finalize(str(tmp_path / "x.idx"))
    index = MMapIndexedDataset.Index(str(tmp_path / "x.idx"))
    assert [int(index[number][0]) for number in range(6)] == [number * 2**30 for number in range(6)]


@pytest.mark.parametrize("killed, code", [(False, 0), (True, 1)])
def test_a_pool_that_lost_a_worker_ends_the_program(killed, code):
    """multiprocessing.Pool would wait for the lost task for ever."""
    script = """if True:
        import os, signal
        from multiprocessing import Pool
        from encourage_mt.plugin.worker import end_if_a_worker_was_killed
        end_if_a_worker_was_killed()
        def work(killed):
            os.kill(os.getpid(), signal.SIGKILL) if killed else None
        pool = Pool(2)
        pool.apply_async(work, [KILLED])
        pool.close()
        pool.join()
    """
    done = run(sys.executable, "-c", script.replace("KILLED", str(killed)), code=code, timeout=60)
    assert ("a worker process was killed" in done.output) == killed


@pytest.mark.parametrize("suffix", ["", ".fasta"])
def test_text_with_which_fairseq_would_start_a_shell_is_not_read(suffix, tmp_path):
    (tmp_path / f"train.de-en.de{suffix}").write_text(">a\nb\n")
    with pytest.raises(UserError, match="not in the format mmap"):
        open_binarized(str(tmp_path / "train.de-en.de"))


@pytest.mark.parametrize(
    "is_fsdp, base_layers, expected", [(False, 0, [1]), (True, 0, [1, None]), (False, 2, [1, None])]
)
def test_empty_batches_are_left_out_unless_processes_need_as_many(is_fsdp, base_layers, expected):
    step = without_empty_batches(lambda trainer, samples: samples)
    cfg = SimpleNamespace(model=SimpleNamespace(base_layers=base_layers))
    trainer = SimpleNamespace(is_fsdp=is_fsdp, cfg=cfg)
    assert step(trainer, [1, None]) == expected and step(trainer, [None]) == [None]
