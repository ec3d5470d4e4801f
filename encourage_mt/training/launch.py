"""Make the command that starts a training on GPUs and machines, with the same tokens per update on any number."""

import io
import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import USER_DIR, Precision, quiet_imports, visible_gpus
from ..errors import UserError
from ..files import Scalar
from ..processes import WORKER
from .run_folder import Run

# of fairseq's configuration that options of a recipe can change, except the model
SECTIONS = (
    "common task criterion optimizer lr_scheduler optimization dataset checkpoint distributed_training ema".split()
)


@dataclass
class Cluster:
    """The machines of one training: `gpus` processes on each of `nodes` machines (on a CPU, gpus counts processes).

    node is the number of this machine, from 0; master is HOST:PORT of machine 0. Raises UserError if they do not fit
    together.
    """

    precision: Precision
    gpus: int = 1
    nodes: int = 1
    node: int = 0
    master: str | None = None

    def __post_init__(self):
        if not 0 <= self.node < self.nodes:
            raise UserError(f"--node must be between 0 and {self.nodes - 1}, got {self.node}")
        host, _, port = (self.master or "").rpartition(":")
        if self.nodes > 1 and not (host and port.isdigit()):
            raise UserError(f"--nodes {self.nodes} needs --master HOST:PORT of machine 0, got {self.master}")

    def check_machine(self, parallel: int = 1) -> None:
        """Raise UserError if this machine has too few GPUs for `parallel` runs."""
        here = len(visible_gpus())
        if here and self.gpus * parallel > here and self.gpus > 1:
            raise UserError(
                f"--gpus {self.gpus}: {parallel} runs at a time need {self.gpus * parallel} GPUs, there are {here}"
            )

    def devices(self, slot: int) -> dict[str, str]:
        """Return the environment that gives the training in `slot` (from 0) its share of the machine's GPUs."""
        here = visible_gpus()
        if not here:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(here[(slot * self.gpus + k) % len(here)] for k in range(self.gpus))}

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    def hydra_file(self, folder: Path) -> Path:
        """Return the path of fairseq-hydra-train's YAML in a run's folder; each machine that shares it has its own."""
        return folder / f"train{self.node or ''}.yaml"

    def launcher(self) -> list[str]:
        """Return the words that precede fairseq-train's: none for one process, otherwise torchrun."""
        if self.processes == 1:
            return []
        words = ["torchrun", "--nproc-per-node", str(self.gpus)]
        if self.nodes == 1:
            words += ["--standalone"]
        else:
            host, _, port = (self.master or "").rpartition(":")
            words += ["--nnodes", str(self.nodes), "--node-rank", str(self.node)]
            words += ["--master-addr", host, "--master-port", port]
        return [*words, str(WORKER)]


def share_batch(options: dict[str, Scalar], processes: int) -> dict[str, int]:
    """Return update-freq, max-tokens and, if it is set, batch-size of each process, for the same tokens per update.

    `options` are those of one process. update-freq is divided by the number of processes and rounded up; if it does not
    divide evenly, max-tokens and batch-size become smaller to match, rounded down. Raises UserError if one would be 0.
    """
    whole = int(options.get("update-freq", 1))
    frequency = -(-whole // processes)
    share = {"update-freq": frequency}
    for name in ("max-tokens", "batch-size"):
        if name in options:
            share[name] = int(options[name]) * whole // (processes * frequency)
            if not share[name]:
                raise UserError(
                    f"--gpus: {name} {options[name]} cannot be split over {processes} processes; use fewer GPUs"
                )
    return share


def report_effective_batch(options: dict[str, Scalar], cluster: Cluster) -> str:
    """Return one line about the tokens per update. Raises UserError if the processes are too many to share them."""
    processes, share = cluster.processes, share_batch(options, cluster.processes)
    tokens, frequency = share["max-tokens"], share["update-freq"]
    parts = f"{processes} x {tokens:,} max-tokens x update-freq {frequency}, {cluster.precision}"
    return f"{processes * tokens * frequency:,} tokens per update: {parts}"


def launch_command(run: Run, cluster: Cluster) -> list[str]:
    """Return the words of the command that trains `run` on `cluster`.

    bf16 uses fairseq-hydra-train and train.yaml (see hydra_config), because `--bf16` fails on the command line of
    fairseq-train.
    """
    share = share_batch(run.options, cluster.processes)
    changes: dict[str, Scalar] = {n.replace("-", "_"): v for n, v in share.items() if v != run.options.get(n)}
    if "max_tokens" in changes:  # validation keeps its batches
        changes["max_tokens_valid"] = run.options.get("max-tokens-valid", run.options["max-tokens"])
    alone = cluster.processes == 1  # without an explicit world size fairseq takes all GPUs it sees
    if cluster.precision == "bf16":
        config = cluster.hydra_file(run.folder)
        words = ["fairseq-hydra-train", f"--config-dir={run.folder}", f"--config-name={config.stem}"]
        words += [f"optimization.update_freq=[{share['update-freq']}]"]
        words += [f"dataset.{name}={value}" for name, value in changes.items() if name != "update_freq"]
        quoted = re.sub(r"(\\*)'", r"\1\1\\'", str(run.folder))  # as Hydra's grammar for overrides escapes a quote
        words += [f"hydra.run.dir='{quoted}'", "hydra.output_subdir=null"]
        words += ["distributed_training.distributed_world_size=1"] if alone else []
    else:
        changes |= {"fp16": True} if cluster.precision == "fp16" else {}
        words = run.command_line(**changes, **({"distributed_world_size": 1} if alone else {}))
    return [*cluster.launcher(), *words]


def hydra_config(run: Run) -> str:
    """Return the YAML with which fairseq-hydra-train trains `run` in bf16 as fairseq-train would in fp32.

    fairseq itself sorts the options into their sections. Raises UserError for architectures other than Transformers,
    and for options that fairseq-train would refuse.
    """
    import yaml

    from ..plugin import register

    words = run.arguments()
    with quiet_imports(), redirect_stderr(io.StringIO()):  # the usage that argparse prints
        from fairseq import options
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.models.transformer import TransformerConfig
        from omegaconf import OmegaConf

        register()
        try:
            arguments = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
        except (SystemExit, SyntaxError):
            raise UserError(f"fairseq-train refuses the options of {run.name}: {' '.join(words)}") from None
        whole: Any = convert_namespace_to_omegaconf(arguments)
    if not arguments.arch.startswith("transformer"):
        raise UserError(f"--precision bf16 works for Transformers only, not for {arguments.arch}")
    structured = OmegaConf.structured(TransformerConfig.from_namespace(arguments))
    model: Any = OmegaConf.to_container(structured, enum_to_str=True)
    model["_name"] = "transformer"
    sections: dict[str, Any] = {"model": model}
    for name in SECTIONS:
        if not OmegaConf.is_config(whole[name]):  # an old part of fairseq that only its command line can set
            raise UserError(f"--precision bf16: fairseq-hydra-train cannot set the {name} {getattr(arguments, name)}")
        sections[name] = OmegaConf.to_container(whole[name], enum_to_str=True)
    sections["common"].update(user_dir=str(USER_DIR), bf16=True, fp16=False)
    return "# @package _group_\n" + yaml.safe_dump(sections)
