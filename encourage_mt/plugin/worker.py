"""Run one of fairseq's programs as a process that ends with its parent, alone or as one rank of a training.

`worker.py --parent=PID PROGRAM OPTIONS` runs PROGRAM, a command of this Python's packages, for process PID.
`torchrun ... worker.py fairseq-train OPTIONS` runs one rank of a distributed training. This program passes the rank as
options, because fairseq reads it from torchrun's environment only where each node has several GPUs, and never on a CPU.
Without its rank, every process would train alone and overwrite the others' checkpoints.

Run it by path, never as a module: fairseq refuses a --user-dir whose package was imported before.
"""

import ctypes
import os
import signal
import sys
from importlib.metadata import entry_points
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOPPED = 128 + signal.SIGTERM  # exit code of a training that saved and stopped on SIGTERM
SAVED = "saved: run the same command again to continue"  # what it logs then


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends for any reason. Does nothing outside Linux.

    `parent` is the pid the parent had: if it has ended already, this process ends at once.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)


def rank_options(program: str) -> list[str]:
    """Return the words that make fairseq's `program` run as the rank that torchrun assigned; with gloo on a CPU."""
    import torch

    options = {
        "distributed_world_size": os.environ["WORLD_SIZE"],
        "distributed_rank": os.environ["RANK"],
        "device_id": os.environ["LOCAL_RANK"],
        "distributed_init_method": "env://",
    }
    gpu = torch.cuda.is_available()
    if not gpu:
        options |= {"distributed_backend": "gloo", "ddp_backend": "legacy_ddp"}
    if program == "fairseq-hydra-train":
        words = [f"distributed_training.{name}={value}" for name, value in options.items()]
        return [*words, "distributed_training.distributed_no_spawn=True", *([] if gpu else ["common.cpu=true"])]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [*words, "--distributed-no-spawn", *([] if gpu else ["--cpu"])]


def add_sizes_exactly() -> None:
    """Make fairseq-preprocess add up sentence lengths of merged files as Python integers; 32 bits would overflow."""
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    finalize = MMapIndexedDatasetBuilder.finalize

    def finalize_exactly(self, index_file):
        self._sizes = [int(size) for size in self._sizes]
        finalize(self, index_file)

    MMapIndexedDatasetBuilder.finalize = finalize_exactly


def end_if_a_worker_was_killed() -> None:
    """End the program with a line if its pool lost a worker, such as for lack of memory; Pool would wait for ever."""
    from multiprocessing import pool

    class_: Any = pool.Pool
    join = class_._join_exited_workers

    def join_or_end(workers):
        if any((worker.exitcode or 0) < 0 for worker in workers):
            print("a worker process was killed, perhaps because memory ran out; try --workers 1", flush=True)
            os._exit(1)
        return join(workers)

    class_._join_exited_workers = staticmethod(join_or_end)


def main() -> None:
    program, *words = sys.argv[1:]
    if program.startswith("--parent="):
        die_with_parent(int(program.partition("=")[2]))
        program, *words = words
    else:
        die_with_parent()
        words += rank_options(program)
    # fairseq-preprocess forks a pool of workers, which end with it too
    os.register_at_fork(after_in_child=die_with_parent)
    sys.argv = [program, *words]
    if program == "fairseq-preprocess":
        add_sizes_exactly()
        end_if_a_worker_was_killed()
    script = next(iter(entry_points(group="console_scripts", name=program)))
    script.load()()


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose modules belong to a package
    main()
