"""`--criterion label_smoothed_encouraging_loss`: the loss of loss.py, as fairseq trains with it."""

import argparse
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

from .loss import BACKENDS, loss_terms
from .reference import BONUSES, RANGES, SMOOTHING_CONVENTIONS, LossOptions, check_range


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
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.options = LossOptions(
            str(bonus), log_end, bonus_exponent, bonus_weight, label_smoothing, str(smoothing_convention)
        )
        self.loss_backend = str(loss_backend)

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
            n_correct, total = self.compute_accuracy(model, net_output, sample)
            logging_output["n_correct"] = n_correct.item()
            logging_output["total"] = total.item()
        return terms.loss, sample_size, logging_output

    def get_lprobs_and_target(self, model, net_output, sample):
        """Logits [tokens, V], which the loss normalizes itself, and target [tokens]."""
        decoder = getattr(model, "decoder", None)
        normalizes_itself = (
            not isinstance(decoder, FairseqDecoder) or getattr(decoder, "adaptive_softmax", None) is not None
        )
        if normalizes_itself:  # its net_output need not be logits; log-probabilities are logits too
            logits = model.get_normalized_probs(net_output, log_probs=True)
        else:
            logits = net_output[0]
        target = model.get_targets(sample, net_output)
        if self.ignore_prefix_size > 0:
            logits = logits[:, self.ignore_prefix_size :]
            target = target[:, self.ignore_prefix_size :]
        return logits.reshape(-1, logits.size(-1)), target.reshape(-1)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        bonus = sum(log.get("bonus", 0) for log in logging_outputs)
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        metrics.log_scalar("bonus", bonus / sample_size / math.log(2), sample_size, round=3)
