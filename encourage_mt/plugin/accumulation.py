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
        kept = samples if trainer.is_fsdp else [sample for sample in samples if sample]  # FSDP needs as many on each
        return train_step(trainer, kept or samples, *args, **options)

    return step
