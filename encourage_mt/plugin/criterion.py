"""`--criterion label_smoothed_encouraging_loss`: the loss of loss.py, as fairseq trains with it."""

import argparse
import inspect
import math
from dataclasses import dataclass, field

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.models import FairseqDecoder
from fairseq.models.transformer import TransformerDecoderBase
from torch import nn

from ..loss.functional import BACKENDS, loss_terms, projected_loss_terms
from ..loss.options import BONUSES, RANGES, SMOOTHING_CONVENTIONS, LossOptions, check_range


def option(default, help):
    return field(default=default, metadata={"help": f"{help} (default: {default})"})


@dataclass
class LabelSmoothedEncouragingLossConfig(LabelSmoothedCrossEntropyCriterionConfig):
    bonus: ChoiceEnum(BONUSES) = option(
        LossOptions.bonus, "what rewards likelihood; none is label-smoothed cross entropy"
    )
    log_end: float = option(
        LossOptions.log_end, "probability from which the log bonus goes on as its tangent, 0 to 1; 1: never"
    )
    bonus_exponent: float = option(LossOptions.bonus_exponent, "exponent of the power bonus, 1 to 10")
    bonus_weight: float = option(LossOptions.bonus_weight, "factor of the bonus, 0 to 2")
    smoothing_convention: ChoiceEnum(SMOOTHING_CONVENTIONS) = option(
        LossOptions.smoothing_convention,
        "smoothing gives each other type eps/(V-1) (fairseq) or each type eps/V (paper)",
    )
    loss_backend: ChoiceEnum(BACKENDS) = option("auto", "code that computes the loss; all give the same figures")
    fuse_projection: bool = option(
        False, "in training, never hold the logits of a batch: output projection and loss in blocks of 1,024 tokens"
    )


def ranged(name):
    def parse(text):
        value = float(text)
        try:
            check_range(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None
        return value

    parse.__name__ = "number"  # what argparse calls it when the text is none
    return parse


def output_weight(model):
    """Weight [V, D] of the output projection of `model`; ValueError if it is not plainly that of a Transformer."""
    bare = model
    while hasattr(bare, "module"):  # as wrapped for data parallel training
        bare = bare.module
    decoder = getattr(bare, "decoder", None)
    projection = getattr(decoder, "output_projection", None)
    if (
        not isinstance(decoder, TransformerDecoderBase)
        or type(decoder).output_layer is not TransformerDecoderBase.output_layer
        or decoder.adaptive_softmax is not None
        or type(projection) is not nn.Linear
        or projection.bias is not None
        or "features_only" not in inspect.signature(bare.forward).parameters
    ):
        raise ValueError(
            f"{type(bare).__name__} does not end in the plain output projection of fairseq's Transformers; "
            "drop --fuse-projection"
        )
    return projection.weight


@register_criterion("label_smoothed_encouraging_loss", dataclass=LabelSmoothedEncouragingLossConfig)
class LabelSmoothedEncouragingLossCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed encouraging loss, with `bonus` beside loss, nll_loss and ppl in the log.

    nll_loss and ppl are those of a cross-entropy run. bonus is the term as it stands in loss (base 2, over
    sample_size, as loss is), so loss - bonus is label-smoothed cross entropy.
    """

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        bonus=LossOptions.bonus,
        log_end=LossOptions.log_end,
        bonus_exponent=LossOptions.bonus_exponent,
        bonus_weight=LossOptions.bonus_weight,
        smoothing_convention=LossOptions.smoothing_convention,
        loss_backend="auto",
        fuse_projection=False,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.options = LossOptions(
            str(bonus), log_end, bonus_exponent, bonus_weight, label_smoothing, str(smoothing_convention)
        )
        self.loss_backend = str(loss_backend)
        self.fuse_projection = fuse_projection

    @classmethod
    def add_args(cls, parser):
        """Options of the dataclass; a value out of range ends as a usage error, exit code 2."""
        super().add_args(parser)
        for action in parser._actions:
            if action.dest in RANGES:
                action.type = ranged(action.dest)

    def forward(self, model, sample, reduce=True):
        """(loss, sample_size, logging_output) of a batch, as LabelSmoothedCrossEntropyCriterion returns them.

        The loss is a sum over tokens, or with reduce=False one value per target position [batch * length].
        """
        correct = None
        if self.fuse_projection and model.training and reduce:
            terms, correct = self.fused_terms(model, sample)
        else:
            net_output = model(**sample["net_input"])
            logits, target = self.get_lprobs_and_target(model, net_output, sample)
            terms = loss_terms(logits, target, self.options, self.padding_idx, reduce, self.loss_backend)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll_loss.data,
            "bonus": terms.bonus.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            if correct is None:
                correct = (logits.argmax(dim=1).eq(target) & target.ne(self.padding_idx)).sum()
            logging_output["n_correct"] = correct.item()
            logging_output["total"] = self.without_prefix(sample["target"]).ne(self.padding_idx).sum().item()
        return terms.loss, sample_size, logging_output

    def fused_terms(self, model, sample):
        """(LossTerms, number of targets predicted right) without logits of the whole batch."""
        weight = output_weight(model)
        net_output = model(**sample["net_input"], features_only=True)
        features = self.without_prefix(net_output[0]).reshape(-1, weight.size(1))
        target = self.without_prefix(model.get_targets(sample, net_output)).reshape(-1)
        return projected_loss_terms(
            features, weight, target, self.options, self.padding_idx, self.loss_backend, self.report_accuracy
        )

    def without_prefix(self, positions):
        """`positions` [batch, length, ...] less the first --ignore-prefix-size of each sentence."""
        return positions[:, self.ignore_prefix_size :]

    def get_lprobs_and_target(self, model, net_output, sample):
        """Logits [tokens, V], which the loss normalizes itself, and target [tokens]."""
        decoder = getattr(model, "decoder", None)
        if (
            isinstance(decoder, FairseqDecoder)
            and type(decoder).get_normalized_probs is FairseqDecoder.get_normalized_probs
            and type(decoder).get_normalized_probs_scriptable is FairseqDecoder.get_normalized_probs_scriptable
            and getattr(decoder, "adaptive_softmax", None) is None
        ):
            logits = net_output[0]
        else:  # it normalizes in its own way; log-probabilities are logits too
            logits = model.get_normalized_probs(net_output, log_probs=True)
        target = model.get_targets(sample, net_output)
        return self.without_prefix(logits).reshape(-1, logits.size(-1)), self.without_prefix(target).reshape(-1)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        bonus = sum(log.get("bonus", 0) for log in logging_outputs)
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        metrics.log_scalar("bonus", bonus / sample_size / math.log(2), sample_size, round=3)
