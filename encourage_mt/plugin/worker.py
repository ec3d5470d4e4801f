"""One process of a distributed training: `torchrun ... encourage_mt/plugin/worker.py fairseq-train OPTIONS`.

fairseq reads its rank from torchrun's environment only where each node has several GPUs, and never on a CPU; elsewhere
every process trains alone and overwrites the others' checkpoints. So each is told here. Run by its path, not as a
module: fairseq refuses a --user-dir whose package was imported before.
"""

import os
import sys

import torch


def placement(environment: dict[str, str], gpu: bool) -> dict:
    """fairseq's distributed options for the process that torchrun's `environment` describes; on a CPU with gloo."""
    options = {
        "distributed_world_size": environment["WORLD_SIZE"],
        "distributed_rank": environment["RANK"],
        "device_id": environment["LOCAL_RANK"],
        "distributed_init_method": "env://",
        "distributed_no_spawn": True,
    }
    if not gpu:
        options.update(distributed_backend="gloo", ddp_backend="legacy_ddp")
    return options


def main() -> None:
    program, *arguments = sys.argv[1:]
    gpu = torch.cuda.is_available()
    options = placement(os.environ, gpu)
    if program == "fairseq-hydra-train":
        from fairseq_cli.hydra_train import cli_main

        words = [f"distributed_training.{name}={value}" for name, value in options.items()]
        words += [] if gpu else ["common.cpu=true"]
    else:
        from fairseq_cli.train import cli_main

        words = [] if gpu else ["--cpu"]
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, value]
    sys.argv = [program, *arguments, *words]
    cli_main()


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose modules belong to a package
    main()
