"""Count every batch of an update if several processes accumulate gradients."""

import functools


def install() -> None:
    """Install the hook of this module in a fairseq-train or fairseq-hydra-train process."""
    from fairseq.trainer import Trainer

    Trainer.train_step = without_empty_batches(Trainer.train_step)


def without_empty_batches(train_step):
    """Wrap Trainer.train_step: leave out the empty batches of this process, unless it has no others.

    At the end of an epoch, fairseq gives some processes an empty batch. If it is the last of an update, fairseq forgets
    the tokens of this process's other batches but keeps their gradient, so that the update becomes too large.
    """

    @functools.wraps(train_step)
    def step(trainer, samples, *args, **options):
        # FSDP and BASE layers communicate in each forward pass, so every process needs as many; see docs/cluster.md
        needs_all = trainer.is_fsdp or getattr(trainer.cfg.model, "base_layers", 0)
        kept = samples if needs_all else [sample for sample in samples if sample]
        return train_step(trainer, kept or samples, *args, **options)

    return step
