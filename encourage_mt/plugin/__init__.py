"""Extend fairseq inside its processes: criterion, safe checkpoints, fault tolerance, generation of several sets."""

import functools
import sys
from argparse import Namespace
from pathlib import Path


def register() -> None:
    """Register the criterion and install the checkpoint and training hooks in this fairseq process."""
    from . import accumulation, checkpoints, criterion, fault_tolerance  # noqa: F401 (importing criterion registers it)

    main = sys.modules["__main__"]
    if Path(getattr(main, "__file__", None) or "").parts[-2:] == ("fairseq_cli", "train.py"):  # with python -m
        sys.modules.setdefault("fairseq_cli.train", main)
    checkpoints.install()
    switch_encoder_fast_path_off()
    if "fairseq_cli.train" in sys.modules:
        fault_tolerance.install()
        accumulation.install()
    if "fairseq_cli.generate" in sys.modules:
        from fairseq_cli import generate

        generate.main = translate_each_subset(generate.main)


def switch_encoder_fast_path_off() -> None:
    """Switch off the fused encoder layer that fairseq 0.12.2 uses in generation.

    Its arguments changed with torch 2 ("Mask Type should be defined"). Generation then takes the ordinary path, as
    training always does. fairseq-fixed has no fast path.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)


def translate_each_subset(main):
    """Wrap fairseq_cli.generate.main: --gen-subset may name several sets, as --valid-subset does in fairseq-train."""

    @functools.wraps(main)
    def main_of_each(options):
        if not isinstance(options, Namespace):  # from a program that calls it with a configuration
            return main(options)
        for subset in options.gen_subset.split(","):
            main(Namespace(**{**vars(options), "gen_subset": subset}))

    return main_of_each
