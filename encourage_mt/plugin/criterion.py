"""Train with the encouraging loss in fairseq: `--criterion label_smoothed_encouraging_loss`."""

import argparse
import functools
import inspect
import logging
import math
import sys
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass, replace

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase
from torch import nn

from ..loss.bonuses import check_bonus, registered_bonuses
from ..loss.functional import loss_terms, missing_backend
from ..loss.fused_projection import projected_loss_terms
from ..loss.options import OPTIONS, BonusSchedule, CriterionOptions, LossOptions, check_option
from ..loss.rdrop import rdrop_terms

logger = logging.getLogger(__name__)

DEFAULTS = {"smoothing_convention": "fairseq"}  # where the criterion keeps fairseq's default, not that of the loss


def config_field(option):
    """Return (name, type, field) of an option of the loss, as fairseq's configuration dataclasses have it."""
    choices, between = option.metadata["choices"], option.metadata["between"]
    default = DEFAULTS.get(option.name, option.default)
    allowed = f"{between[0]} to {between[1]}; " if between else ""
    text = f"{option.metadata['help']} ({allowed}default: {default})"
    return option.name, ChoiceEnum(choices) if choices else option.type, field(default=default, metadata={"help": text})


# What LabelSmoothedCrossEntropyCriterionConfig declares (label_smoothing among it) stays as it is.
LabelSmoothedEncouragingLossConfig = make_dataclass(
    "LabelSmoothedEncouragingLossConfig",
    [
        config_field(option)
        for name, option in OPTIONS.items()
        if name not in {each.name for each in fields(LabelSmoothedCrossEntropyCriterionConfig)}
    ],
    bases=(LabelSmoothedCrossEntropyCriterionConfig,),
)
LabelSmoothedEncouragingLossConfig.__module__ = __name__  # for pickle


def read_options(kind, cfg):
    """Return the options of dataclass `kind` from a configuration, in which choices are enumerations."""
    values = {each.name: getattr(cfg, each.name) for each in fields(kind)}
    return kind(**{name: str(value) if OPTIONS[name].metadata["choices"] else value for name, value in values.items()})


def parser_type(name, parse):
    """Return an argparse type for option `name`: parse the text, then check the value as the loss does."""

    def parse_and_check(text):
        value = parse(text)
        try:
            check_option(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None
        return value

    parse_and_check.__name__ = parse.__name__  # argparse names it if the text cannot be parsed
    return parse_and_check


@contextmanager
def exit_if_refused(is_training):
    """End a training with one line in the log and exit code 2 if the block raises ValueError, before fairseq sees it.

    Otherwise fairseq would save a crash.pt and print a traceback. Every process refuses the same options.
    """
    try:
        yield
    except ValueError as error:
        if not is_training:
            raise
        logger.error("criterion: %s", error)
        sys.exit(2)


def output_weight(model):
    """Return the weight [V, D] of the output projection of `model`; ValueError if it is not a plain Transformer's."""
    bare, finds_unused = model, False
    while hasattr(bare, "module"):  # as wrapped for data parallel training
        finds_unused |= bool(getattr(bare, "find_unused_parameters", False))
        bare = bare.module
    decoder = getattr(bare, "decoder", None)
    projection = getattr(decoder, "output_projection", None)
    if (
        not isinstance(decoder, TransformerDecoderBase)
        or type(decoder).output_layer is not TransformerDecoderBase.output_layer
        or decoder.adaptive_softmax is not None
        or type(projection) is not nn.Linear
        or projection.bias is not None
        or not (isinstance(bare, FairseqLanguageModel) or "features_only" in inspect.signature(bare.forward).parameters)
    ):
        raise ValueError(
            f"{type(bare).__name__} does not end in the plain output projection of fairseq's Transformers; "
            "drop --fuse-projection"
        )
    if finds_unused and projection.weight is not decoder.embed_tokens.weight:
        raise ValueError(  # torch would take the weight for unused, because the model's forward pass leaves it out
            "--fuse-projection and --find-unused-parameters need --share-decoder-input-output-embed; drop one of them"
        )
    return projection.weight


def training_device(backend):
    """Return the device type to check `backend` for: cuda for triton if there is a GPU, otherwise cpu."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@register_criterion("label_smoothed_encouraging_loss", dataclass=LabelSmoothedEncouragingLossConfig)
class LabelSmoothedEncouragingLossCriterion(LabelSmoothedCrossEntropyCriterion):
    """Train with the label-smoothed encouraging loss; log `bonus` beside loss, nll_loss and ppl.

    With a schedule, bonus_weight is logged too; with R-Drop, `divergence`, which is part of the training loss only.
    nll_loss and ppl are defined as in a cross-entropy run. bonus is the part of loss that the bonus contributes (base
    2, divided by sample_size like loss), so loss - bonus is label-smoothed cross entropy.
    """

    def __init__(self, cfg, task):
        FairseqCriterion.__init__(self, task)
        self.sentence_avg = cfg.sentence_avg
        self.ignore_prefix_size = cfg.ignore_prefix_size
        self.report_accuracy = cfg.report_accuracy
        self.is_training = "fairseq_cli.train" in sys.modules
        if not self.is_training and ":" in cfg.bonus and cfg.bonus not in registered_bonuses():
            # a checkpoint must not choose what is imported
            raise ValueError(
                f"the checkpoint was trained with the bonus {cfg.bonus}; if you trust that module, add "
                f"--criterion label_smoothed_encouraging_loss --bonus {cfg.bonus} to this command"
            )
        with exit_if_refused(self.is_training):  # values from a YAML file, and options that do not fit each other
            self.options = read_options(LossOptions, cfg)
            self.schedule = read_options(BonusSchedule, cfg)
            extra = read_options(CriterionOptions, cfg)
            check_bonus(self.options)
            missing = missing_backend(extra.loss_backend, training_device(extra.loss_backend))
            if missing and self.is_training:
                raise ValueError(f"loss_backend {extra.loss_backend} cannot run here: {missing}; use auto")
        self.loss_backend = extra.loss_backend
        self.full_weight = self.options.bonus_weight
        self.fuse_projection, self.rdrop_alpha = extra.fuse_projection, extra.rdrop_alpha
        if self.schedule.varies:
            self.follow_updates(task)

    @classmethod
    def add_args(cls, parser):
        """Add the options of the configuration; a value that is not allowed is a usage error, exit code 2."""
        super().add_args(parser)
        for action in parser._actions:
            if action.dest in OPTIONS and action.type and not action.choices:
                action.type = parser_type(action.dest, action.type)

    def follow_updates(self, task):
        """Set the weight of the bonus before each training step of `task`, from the updates made so far.

        The trainer passes that number, and resuming restores it, so every process has the same weight as in an
        undisturbed run. Validation takes the weight of the last training step, fairseq-validate the full one.
        """
        train_step = task.train_step

        @functools.wraps(train_step)
        def set_weight_and_train(sample, model, criterion, optimizer, update_num, *args, **kwargs):
            self.set_weight(update_num)
            return train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)

        task.train_step = set_weight_and_train

    def set_weight(self, updates):
        """Set the weight of the bonus to that of the update that follows the first `updates` ones."""
        self.options = replace(self.options, bonus_weight=self.full_weight * self.schedule.factor(updates))

    def forward(self, model, sample, reduce=True):
        """Return (loss, sample_size, logging_output) of a batch, as LabelSmoothedCrossEntropyCriterion does.

        The loss is a sum over tokens, or with reduce=False one value per target position [batch * length].
        """
        correct = divergence = None
        if self.fuse_projection and model.training and reduce:
            terms, correct = self.fused_terms(model, sample)
        elif self.rdrop_alpha and model.training:
            # the whole batch, then the whole batch again
            twice = {k: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for k, x in sample["net_input"].items()}
            net_output = model(**twice)
            logits, target = self.get_lprobs_and_target(model, net_output, sample)
            with exit_if_refused(self.is_training):
                terms, divergence = rdrop_terms(
                    logits, target, self.options, self.rdrop_alpha, self.padding_idx, reduce, self.loss_backend
                )
            logits = logits[: target.size(0)]
        else:
            net_output = model(**sample["net_input"])
            logits, target = self.get_lprobs_and_target(model, net_output, sample)
            terms = self.terms(logits, target, reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": terms.loss.data,
            "nll_loss": terms.nll_loss.data,
            "bonus": terms.bonus.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if divergence is not None:
            logging_output["divergence"] = divergence.data
        if self.schedule.varies:
            logging_output["bonus_weight"] = self.options.bonus_weight * sample_size
        if self.report_accuracy:
            if correct is None:
                correct = (logits.argmax(dim=1).eq(target) & target.ne(self.padding_idx)).sum()
            logging_output["n_correct"] = correct.item()
            logging_output["total"] = self.without_prefix(sample["target"]).ne(self.padding_idx).sum().item()
        return terms.loss, sample_size, logging_output

    def compute_loss(self, model, net_output, sample, reduce=True):
        """Return (loss, nll_loss), which subclasses and tasks may ask for; `forward` does not use it."""
        terms = self.terms(*self.get_lprobs_and_target(model, net_output, sample), reduce)
        return terms.loss, terms.nll_loss

    def terms(self, logits, target, reduce):
        backend = self.loss_backend
        if not self.is_training and missing_backend(backend, logits.device.type):
            backend = "auto"  # a checkpoint that is validated may have been trained on other hardware
        with exit_if_refused(self.is_training):
            return loss_terms(logits, target, self.options, self.padding_idx, reduce, backend)

    def fused_terms(self, model, sample):
        """Return (LossTerms, number of correct predictions) without logits of the whole batch."""
        with exit_if_refused(self.is_training):
            weight = output_weight(model)
        net_output = model(**sample["net_input"], features_only=True)
        features = self.without_prefix(net_output[0]).reshape(-1, weight.size(1))
        target = self.without_prefix(model.get_targets(sample, net_output)).reshape(-1)
        with exit_if_refused(self.is_training):
            return projected_loss_terms(
                features, weight, target, self.options, self.padding_idx, self.loss_backend, self.report_accuracy
            )

    def without_prefix(self, positions):
        """Return `positions` [batch, length, ...] without the first --ignore-prefix-size of each sentence."""
        return positions[:, self.ignore_prefix_size :]

    def get_lprobs_and_target(self, model, net_output, sample):
        """Return logits [tokens, V], which the loss normalizes itself, and target [tokens]."""
        decoder = getattr(model, "decoder", None)
        if (
            isinstance(decoder, FairseqDecoder)
            and type(decoder).get_normalized_probs is FairseqDecoder.get_normalized_probs
            and type(decoder).get_normalized_probs_scriptable is FairseqDecoder.get_normalized_probs_scriptable
            and getattr(decoder, "adaptive_softmax", None) is None
        ):
            logits = net_output[0]
        else:  # it has its own normalization; log-probabilities are logits too
            logits = model.get_normalized_probs(net_output, log_probs=True)
        target = model.get_targets(sample, net_output)
        return self.without_prefix(logits).reshape(-1, logits.size(-1)), self.without_prefix(target).reshape(-1)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        for name, unit, digits in (("bonus", math.log(2), 3), ("divergence", math.log(2), 3), ("bonus_weight", 1, 4)):
            if any(name in log for log in logging_outputs):
                total = sum(log.get(name, 0) for log in logging_outputs)
                metrics.log_scalar(name, total / sample_size / unit, sample_size, round=digits)
