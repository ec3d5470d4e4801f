"""Extend fairseq, inside its processes: the criterion, safe checkpoints, fault tolerance."""

import sys


def register() -> None:
    """Register the criterion and install the checkpoint and training hooks in this fairseq process."""
    from . import checkpoints, criterion, fault_tolerance  # noqa: F401 (importing criterion registers it)

    checkpoints.install()
    switch_encoder_fast_path_off()
    if "fairseq_cli.train" in sys.modules:
        fault_tolerance.install()


def switch_encoder_fast_path_off() -> None:
    """Switch off the fused encoder layer that fairseq 0.12.2 uses in generation.

    Its arguments changed with torch 2 ("Mask Type should be defined"). Generation then takes the ordinary path, as
    training always does. fairseq-fixed has no fast path.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)
