"""One training on one GPU, many, or many machines: the same tokens per update, and the command that starts it."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from ..environment import USER_DIR, quiet_imports
from ..errors import UserError
from ..plugin import register
from ..recipe import Recipe

WORKER = USER_DIR / "plugin" / "worker.py"
PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass
class Cluster:
    """Where one training runs: `gpus` processes on each of `nodes` machines (on a CPU, gpus counts processes).

    node is the number of this machine, from 0; master is HOST:PORT of the first. Raises UserError if the numbers do
    not fit together.
    """

    precision: str
    gpus: int = 1
    nodes: int = 1
    node: int = 0
    master: str | None = None

    def __post_init__(self):
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.node < self.nodes:
            raise UserError(f"--node must be between 0 and {self.nodes - 1}, got {self.node}")
        host, _, port = (self.master or "").rpartition(":")
        if self.nodes > 1 and not (host and port.isdigit()):
            raise UserError(f"several nodes need --master HOST:PORT of the first, got {self.master}")

    def check_machine(self, parallel: int = 1) -> None:
        """Raises UserError if this machine has not the GPUs for `parallel` such trainings."""
        here = torch.cuda.device_count()
        if here and self.gpus * parallel > here and self.gpus > 1:
            raise UserError(f"{parallel} x --gpus {self.gpus}: this machine has {here}")

    def devices(self, place: int) -> dict[str, str]:
        """Environment that gives the training at `place` (from 0) its share of the machine's GPUs, in turn."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        here = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if not here:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(here[(place * self.gpus + k) % len(here)] for k in range(self.gpus))}

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    def launcher(self) -> list[str]:
        """The words before those of fairseq-train: none for one process, else torchrun with one worker a GPU."""
        if self.processes == 1:
            return []
        words = ["torchrun", "--nproc-per-node", str(self.gpus)]
        if self.nodes == 1:
            words += ["--standalone"]
        else:
            host, _, port = self.master.rpartition(":")
            words += ["--nnodes", str(self.nodes), "--node-rank", str(self.node)]
            words += ["--master-addr", host, "--master-port", port]
        return [*words, str(WORKER)]


def update_freq(recipe: Recipe, processes: int) -> int:
    """Batches each process accumulates, so that `processes` see the tokens per update that the recipe sets for one.

    Raises UserError if `processes` does not divide the recipe's update-freq.
    """
    whole = recipe.train.get("update-freq", 1)
    if whole % processes:
        fitting = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise UserError(
            f"{recipe.name} has {tokens_per_update(recipe):,} tokens per update ({recipe.train['max-tokens']:,} x "
            f"update-freq {whole}), which {processes} processes cannot share evenly; possible: {fitting}"
        )
    return whole // processes


def tokens_per_update(recipe: Recipe) -> int:
    """The effective batch, at most: max-tokens x update-freq of one process."""
    return recipe.train["max-tokens"] * recipe.train.get("update-freq", 1)


def launch_command(recipe: Recipe, command: list[str], cluster: Cluster, folder: Path) -> list[str]:
    """`command`, a fairseq-train of one process, as it is started on `cluster`.

    bf16 goes by way of fairseq-hydra-train and `folder`/train.yaml (see hydra_config), for `--bf16` does not work on
    fairseq-train's command line.
    """
    frequency = str(update_freq(recipe, cluster.processes))
    if cluster.precision == "bf16":
        words = ["fairseq-hydra-train", "--config-dir", str(folder), "--config-name", "train"]
        words += [f"optimization.update_freq=[{frequency}]", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        # else fairseq takes all GPUs it sees
        words += ["distributed_training.distributed_world_size=1"] if cluster.processes == 1 else []
        return [*cluster.launcher(), *words]
    place = command.index("--update-freq") + 1
    words = [*command[:place], frequency, *command[place + 1 :]]
    words += ["--fp16"] if cluster.precision == "fp16" else []
    words += ["--distributed-world-size", "1"] if cluster.processes == 1 else []
    return [*cluster.launcher(), *words]


def hydra_config(command: list[str]) -> str:
    """The YAML with which fairseq-hydra-train does what the fairseq-train `command` does, in bf16.

    Options are sorted into their sections by fairseq itself. Raises UserError for architectures other than
    Transformers, or options fairseq-train would refuse.
    """
    place = command.index("--user-dir")
    words = command[1:place] + command[place + 2 :]  # registered below
    with quiet_imports():
        from fairseq import options
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.models.transformer import TransformerConfig
        from omegaconf import OmegaConf

        register()
        try:
            arguments = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
        except SystemExit:
            raise UserError(f"fairseq-train refuses the options of the recipe: {shlex.join(words)}") from None
        whole = convert_namespace_to_omegaconf(arguments)
    if not arguments.arch.startswith("transformer"):
        raise UserError(f"bf16 is for Transformers, not {arguments.arch}")
    model = OmegaConf.to_container(OmegaConf.structured(TransformerConfig.from_namespace(arguments)), enum_to_str=True)
    model["_name"] = "transformer"
    sections = {"model": model}
    for name in ("common", "task", "criterion", "optimizer", "lr_scheduler", "optimization", "dataset", "checkpoint"):
        if not OmegaConf.is_config(whole[name]):  # an old part of fairseq that only its command line can set
            raise UserError(f"bf16: fairseq-hydra-train cannot be given the {name} {getattr(arguments, name)}")
        sections[name] = OmegaConf.to_container(whole[name], enum_to_str=True)
    sections["common"].update(user_dir=command[place + 1], bf16=True, fp16=False)
    return "# @package _group_\n" + yaml.safe_dump(sections)
