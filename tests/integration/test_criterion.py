"""The criterion as fairseq calls it: what it logs, how logs add up, what it inherits."""

import argparse
import math

import fairseq.criterions  # noqa: F401  # before the plugin, as in a fairseq command
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models.transformer import TransformerModel, base_architecture

from encourage_mt.plugin import checkpoints
from encourage_mt.plugin.criterion import (
    LabelSmoothedEncouragingLossConfig,
    LabelSmoothedEncouragingLossCriterion,
)

TYPES = 40


@pytest.fixture(scope="module")
def task():
    dictionary = Dictionary()
    for index in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{index}")
    return argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)


def build_model(task, **options):
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
    arguments = argparse.Namespace(**sizes, dropout=0.0, max_source_positions=50, max_target_positions=50, **options)
    base_architecture(arguments)
    torch.manual_seed(0)
    return TransformerModel.build_model(arguments, task)


SIZES = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2}


@pytest.fixture(scope="module")
def model(task):
    return build_model(task)


def make_sample(lengths):
    """Random sentences of these lengths, padded on the right (fairseq's pad is type 1)."""
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    longest = max(lengths)
    source, target = (torch.randint(4, TYPES, (len(lengths), longest), generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        source[row, length:] = target[row, length:] = 1
    net_input = {"src_tokens": source, "src_lengths": torch.tensor(lengths), "prev_output_tokens": target}
    return {"net_input": net_input, "target": target, "ntokens": sum(lengths)}


def make_criterion(task, **options):
    cfg = LabelSmoothedEncouragingLossConfig(**{"sentence_avg": False, **options})
    return LabelSmoothedEncouragingLossCriterion(cfg, task)


def half(sample, rows):
    net_input = {name: value[rows] for name, value in sample["net_input"].items()}
    target = sample["target"][rows]
    return {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum())}


def logged(criterion, logging_outputs):
    with metrics.aggregate(new_root=True) as aggregate:
        type(criterion).reduce_metrics(logging_outputs)
    return aggregate.get_smoothed_values()


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_logs_of_parts_add_up_to_the_log_of_the_whole(sentence_avg, task, model):
    """As over workers or accumulated batches; the parts are of different size, and one has more padding."""
    criterion = make_criterion(task, sentence_avg=sentence_avg, label_smoothing=0.1, report_accuracy=True)
    sample = make_sample([9, 7, 2, 8, 3])
    loss, sample_size, whole = criterion(model, sample)
    parts = [criterion(model, half(sample, rows)) for rows in (slice(0, 3), slice(3, 5))]
    assert sum(part[0] for part in parts).item() == pytest.approx(loss.item(), rel=1e-5)
    assert sum(part[1] for part in parts) == sample_size == (5 if sentence_avg else 29)
    together, apart = logged(criterion, [whole]), logged(criterion, [part[2] for part in parts])
    assert set(together) == set(apart) >= {"loss", "nll_loss", "ppl", "bonus", "accuracy"}
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, abs=2e-3), name
    assert criterion.logging_outputs_can_be_summed(), "fairseq may then add them before it calls reduce_metrics"
    summed = {name: sum(part[2][name] for part in parts) for name in whole}
    assert logged(criterion, [summed])["bonus"] == pytest.approx(together["bonus"], abs=2e-3)


def test_the_log_splits_loss_into_cross_entropy_and_bonus(task, model):
    sample = make_sample([6, 4])
    el = make_criterion(task, label_smoothing=0.1)
    lsce = LabelSmoothedCrossEntropyCriterion(task, False, 0.1)
    ours, theirs = logged(el, [el(model, sample)[2]]), logged(lsce, [lsce(model, sample)[2]])
    assert ours["bonus"] < 0
    assert ours["loss"] - ours["bonus"] == pytest.approx(theirs["loss"], abs=2e-3)
    assert (ours["nll_loss"], ours["ppl"]) == (theirs["nll_loss"], theirs["ppl"])
    assert ours["ppl"] == pytest.approx(2 ** ours["nll_loss"], rel=1e-2)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_without_bonus_it_is_fairseqs_criterion(prefix, backend, task, model):
    options = {"ignore_prefix_size": prefix, "report_accuracy": True}
    ours = make_criterion(task, label_smoothing=0.1, **options, bonus="none", loss_backend=backend)
    theirs = LabelSmoothedCrossEntropyCriterion(task, False, 0.1, **options)
    sample = make_sample([8, 5, 6])
    outcomes = []
    for criterion in (ours, theirs):
        model.zero_grad()
        loss, sample_size, log = criterion(model, sample)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outcomes.append((loss.item(), sample_size, log, gradient))
    (loss, size, log, gradient), (their_loss, their_size, their_log, their_gradient) = outcomes
    assert size == their_size
    assert {name: log[name] for name in ("n_correct", "total", "ntokens", "nsentences")} == {
        name: their_log[name] for name in ("n_correct", "total", "ntokens", "nsentences")
    }
    if backend == "reference":
        assert loss == their_loss and torch.equal(gradient, their_gradient)
    else:  # another order of float32 sums
        assert loss == pytest.approx(their_loss, rel=1e-6)
        assert torch.allclose(gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_reduce_false_gives_one_value_per_position(task, model):
    criterion = make_criterion(task, label_smoothing=0.1)
    sample = make_sample([6, 4])
    per_position, _, _ = criterion(model, sample, reduce=False)
    assert per_position.shape == (12,)
    assert (per_position.view(2, 6)[1, 4:] == 0).all(), "padding"
    assert per_position.sum().item() == pytest.approx(criterion(model, sample)[0].item(), rel=1e-6)


def test_a_model_that_normalizes_itself_is_asked_for_log_probabilities(task):
    """An adaptive softmax: its net_output holds features, not logits."""
    model = build_model(task, adaptive_softmax_cutoff="10,20", criterion="adaptive_loss").eval()
    criterion = make_criterion(task, label_smoothing=0.0)
    sample = make_sample([5, 3])
    nll_loss = criterion(model, sample)[2]["nll_loss"].item()
    log_probs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True, sample=None)
    expected = -sum(
        log_probs[row, column, sample["target"][row, column]].item()
        for row, length in enumerate((5, 3))
        for column in range(length)
    )
    assert nll_loss == pytest.approx(expected, rel=1e-5) and math.isfinite(nll_loss)


def test_on_an_older_torch_the_first_load_warns(monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", lambda path: {"path": path})
    monkeypatch.setattr(checkpoints, "torch_version", lambda: (2, 5))
    checkpoints.install()
    for path in ("a.pt", "b.pt"):
        assert checkpoint_utils.load_checkpoint_to_cpu(path) == {"path": path}
    (record,) = caplog.records
    assert "runs whatever code a checkpoint carries: load a.pt only if you trust its source" in record.getMessage()
