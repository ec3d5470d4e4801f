"""Use the encouraging loss in the Trainer of Hugging Face Transformers.

    from encourage_mt.integrations.transformers import EncouragingLossForTrainer

    trainer = Trainer(model, arguments, compute_loss_func=EncouragingLossForTrainer(label_smoothing=0.1), ...)

The module needs torch only.
"""

from typing import Any

import torch
from torch import Tensor

from ..loss import EncouragingLoss
from ..loss.terms import mean_of


class EncouragingLossForTrainer:
    """A `compute_loss_func` for decoder-only and encoder-decoder language models.

    The loss is a sum over tokens divided by `num_items_in_batch`, the number of targets that Trainer counts over all
    accumulated batches and all processes; without it, it is the mean over the targets of the batch.
    Targets of -100 are ignored. `loss` is the `EncouragingLoss` inside, whose `bonus_weight` may be set during the
    training.

    shift_labels: whether the logits at a position predict the label of the next one. Default: yes for outputs of
    decoder-only models (CausalLM), no for encoder-decoder models (Seq2Seq). Decoders of encoder-decoder models, such as
    BartForCausalLM and MarianForCausalLM, expect labels that are shifted already: pass False for these.
    `model.loss_type`, by which Trainer counts the targets, must fit (docs/transformers.md).

    The other keywords are the fields of `LossOptions`; label_smoothing belongs here, because Trainer ignores its own
    label_smoothing_factor beside a compute_loss_func.
    """

    def __init__(self, *, shift_labels: bool | None = None, backend: str = "auto", **options: Any) -> None:
        self.shift_labels = shift_labels
        self.loss = EncouragingLoss(reduction="sum", ignore_index=-100, backend=backend, **options)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of model `outputs` with logits [batch, length, V] for `labels` [batch, length].

        Raises ValueError without labels, and if shift_labels is not given and the kind of model is not known.
        """
        if labels is None:
            raise ValueError("labels: the batch has none; use a data collator that adds them")
        shift = self._shifts(outputs) if self.shift_labels is None else self.shift_labels
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        labels = labels.to(logits.device)
        if shift:  # the last logits predict nothing; moving the labels saves a copy of the logits
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=self.loss.ignore_index)
        total = self.loss(logits.flatten(0, -2), labels.flatten())
        if num_items_in_batch is None:
            num_items_in_batch = labels.ne(self.loss.ignore_index).sum()
        count = torch.as_tensor(num_items_in_batch, device=total.device)
        # Under DataParallel, Trainer passes a number for each of N GPUs: a share of the count, or the whole count, and
        # then it multiplies the loss by N
        return mean_of(total, count.sum())

    @staticmethod
    def _shifts(outputs: Any) -> bool:
        kind = type(outputs).__name__
        if "CausalLM" in kind:
            return True
        if "Seq2Seq" in kind:
            return False
        raise ValueError(
            f"shift_labels: an output of type {kind} does not say whether to shift the labels; pass True for a "
            "decoder-only model, False otherwise"
        )
