"""What today's torch breaks in stock fairseq 0.12.2, mended from outside."""


def switch_encoder_fast_path_off() -> None:
    """Keep fairseq 0.12.2 from torch's fused encoder layer, whose arguments changed with torch 2 ("Mask Type should
    be defined"); generation then takes the ordinary path, as training always does. fairseq-fixed has no fast path.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)
