"""Make fairseq models, criteria and a batch of random text for benchmarks of training steps."""

import argparse

import torch

from encourage_mt.environment import quiet_imports

SMALL = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
         {"layers": 4, "embed_dim": 128, "ffn_embed_dim": 256, "attention_heads": 4}.items()}  # fmt: skip
MODELS = {
    "transformer_iwslt_de_en": ("transformer_iwslt_de_en", 10000, {}),
    "4+4 layers, 128 wide": ("transformer", 32000, SMALL),
}


SENTENCES = {"cpu": 80, "cuda": 320}  # of 25 tokens, in the batch


def build(architecture, vocabulary, options, device, dtype):
    """Return (model, sample, {name: criterion}) for training steps on random text, all made by fairseq."""
    with quiet_imports():
        import fairseq.criterions
        from fairseq.data import Dictionary
        from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

        from encourage_mt.plugin import criterion

    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{index}")
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    arguments = argparse.Namespace(
        **options, share_all_embeddings=True, max_source_positions=256, max_target_positions=256
    )
    ARCH_CONFIG_REGISTRY[architecture](arguments)
    torch.manual_seed(0)
    model = ARCH_MODEL_REGISTRY[architecture].build_model(arguments, task).train()
    model = model.to(device, dtype)
    sentences = SENTENCES[device]
    source, target = (torch.randint(4, vocabulary, (sentences, 25), device=device) for _ in range(2))
    sample = {
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.full((sentences,), 25, device=device),
            "prev_output_tokens": target.roll(1, dims=1),
        },
        "target": target,
        "ntokens": target.numel(),
    }

    def ours(**options):
        config = criterion.LabelSmoothedEncouragingLossConfig(label_smoothing=0.1, sentence_avg=False, **options)
        return criterion.LabelSmoothedEncouragingLossCriterion(config, task)

    lsce = fairseq.criterions.label_smoothed_cross_entropy.LabelSmoothedCrossEntropyCriterion(task, False, 0.1)
    criteria = {"fairseq LSCE": lsce, "EL": ours(), "EL chunked": ours(loss_backend="chunked")}
    return model, sample, criteria | {"EL, fused projection": ours(fuse_projection=True)}
