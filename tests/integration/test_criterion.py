"""Test the criterion as fairseq calls it: its log, sums of logs, and inherited options."""

import argparse
import math
import sys

import fairseq.criterions  # noqa: F401  # before the plugin, as in a fairseq command
import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models.transformer import TransformerModel, base_architecture
from loss_cases import each_backend

from encourage_mt.loss import bonuses, native
from encourage_mt.loss.options import OPTIONS
from encourage_mt.plugin.criterion import LabelSmoothedEncouragingLossConfig, LabelSmoothedEncouragingLossCriterion

TYPES = 40


@pytest.fixture(scope="module")
def task():
    dictionary = Dictionary()
    for index in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{index}")
    return argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)


def build_model(task, **options):
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
    positions = {"max_source_positions": 50, "max_target_positions": 50}
    arguments = argparse.Namespace(**{**sizes, **positions, "dropout": 0.0, **options})
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
    """fairseq sums logs over workers and accumulated batches; here the parts differ in size and padding."""
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


@each_backend
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


def test_a_model_with_its_own_normalization_is_asked_for_log_probabilities(task):
    """An adaptive softmax: its net_output contains features, not logits."""
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


def parse(*words):
    parser = argparse.ArgumentParser()
    LabelSmoothedEncouragingLossCriterion.add_args(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--log-end", "1.5", "log_end must be a number between 0 and 1, got 1.5"),
        ("--bonus-weight", "-1", "bonus_weight must be a number between 0 and 2, got -1.0"),
        ("--label-smoothing", "2", "label_smoothing must be a number between 0 and 1, got 2.0"),
        ("--bonus-defer-updates", "-1", "bonus_defer_updates"),
        ("--rdrop-alpha", "nan", "rdrop_alpha"),
        ("--log-end", "much", "invalid float value: 'much'"),
        ("--bonus", "tanh", "MODULE:NAME, got tanh"),
        ("--bonus", "no_such_module:tanh", "no module no_such_module"),
        ("--smoothing-convention", "torch", "invalid choice: 'torch'"),
    ],
)
def test_a_value_that_is_not_allowed_is_a_usage_error(option, value, expected, capsys):
    with pytest.raises(SystemExit) as end:
        parse(option, value)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and f"error: argument {option}" in last and expected in last


def test_the_parser_shows_ranges_and_defaults():
    parser = argparse.ArgumentParser()
    LabelSmoothedEncouragingLossCriterion.add_args(parser)
    shown = " ".join(parser.format_help().split())
    for text in ("--bonus BONUS", "0 to 1; default: 0.5", "default: fairseq", "--rdrop-alpha", "--bonus-start"):
        assert text in shown
    arguments = vars(parse())
    for name, option in OPTIONS.items():
        assert arguments[name] == ("fairseq" if name == "smoothing_convention" else option.default), name


def test_options_that_exclude_each_other_end_a_training(task, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", sys)
    with pytest.raises(SystemExit) as end:
        make_criterion(task, rdrop_alpha=1.0, fuse_projection=True)
    assert end.value.code == 2 and "rdrop_alpha" in caplog.text and "fuse_projection" in caplog.text


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"fuse_projection": True, "loss_backend": "reference"}, "drop --fuse-projection"),
        ({"loss_backend": "native"}, "loss_backend native cannot run here: nothing was compiled; use auto"),
        ({"bonus": "broken_bonus:shifted"}, "bonus broken_bonus:shifted: b(p) must be finite for p from 0 to 1, and 0"),
        ({"bonus": "broken_bonus:two"}, "bonus broken_bonus:two: its function raised TypeError"),
    ],
)
def test_what_cannot_work_ends_a_training_before_the_first_batch(
    options, expected, task, tmp_path, monkeypatch, caplog
):
    code = (
        "def shifted(p, one_minus_p, options):\n    return one_minus_p.log1p()\ndef two(p, options):\n    return -p\n"
    )
    (tmp_path / "broken_bonus.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bonuses, "_registry", dict(bonuses._registry))
    monkeypatch.setattr(native, "unavailable", lambda: "nothing was compiled")
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", sys)
    with pytest.raises(SystemExit, match="2"):
        make_criterion(task, **options)
    assert expected in caplog.text


def test_what_cannot_work_ends_a_training_at_the_first_batch_before_fairseq_saves_a_crash(
    task, model, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "fairseq_cli.train", sys)
    monkeypatch.setattr(bonuses, "_registry", dict(bonuses._registry))
    bonuses.register_bonus("line")(lambda p, one_minus_p, options: -p)  # only the reference backend computes it
    criterion = make_criterion(task, bonus="line", fuse_projection=True)
    with pytest.raises(SystemExit, match="2"):
        criterion(model.train(), make_sample([5, 3]))
    assert "drop --fuse-projection" in caplog.text


def test_a_model_is_validated_where_its_backend_cannot_run(task, model, monkeypatch):
    monkeypatch.delitem(sys.modules, "fairseq_cli.train", raising=False)
    monkeypatch.setattr(native, "unavailable", lambda: "nothing was compiled")
    loss, *_ = make_criterion(task, loss_backend="native")(model, make_sample([5, 3]))
    assert loss.isfinite()


def test_a_checkpoint_does_not_choose_what_is_imported(task, tmp_path, monkeypatch):
    """fairseq-validate builds the criterion that a checkpoint names; only a command line may name a module."""
    (tmp_path / "named_by_checkpoint.py").write_text("def square(p, one_minus_p, options):\n    return -(p**2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bonuses, "_registry", dict(bonuses._registry))
    monkeypatch.delitem(sys.modules, "fairseq_cli.train", raising=False)
    with pytest.raises(ValueError, match="--bonus named_by_checkpoint:square"):
        make_criterion(task, bonus="named_by_checkpoint:square")
    assert "named_by_checkpoint" not in sys.modules
    parse("--bonus", "named_by_checkpoint:square")
    assert make_criterion(task, bonus="named_by_checkpoint:square").options.bonus == "named_by_checkpoint:square"


class StepTask(argparse.Namespace):
    """A task whose training step is the criterion alone."""

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        return criterion(model, sample)


def test_the_schedule_follows_the_updates(task, model):
    """The trainer passes their number, also the first after a resume; validation keeps the weight of the last step."""
    task = StepTask(**vars(task))
    options = {"bonus_schedule": "cosine", "bonus_schedule_updates": 8, "bonus_weight": 0.5, "bonus_defer_updates": 2}
    criterion = make_criterion(task, label_smoothing=0.1, **options)
    sample = make_sample([6, 4])
    for updates, weight in ((0, 0.0), (1, 0.0), (6, 0.25), (300, 0.5)):
        step = {"sample": sample, "model": model, "criterion": criterion, "optimizer": None, "update_num": updates}
        loss, _, log = task.train_step(**step, ignore_grad=False)
        expected = make_criterion(task, label_smoothing=0.1, bonus_weight=weight)(model, sample)[0]
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert logged(criterion, [log, log])["bonus_weight"] == pytest.approx(weight)
    assert logged(criterion, [criterion(model, sample)[2]])["bonus_weight"] == 0.5
    assert "bonus_weight" not in make_criterion(task)(model, sample)[2]


def test_a_task_that_asks_for_the_loss_of_an_output_gets_it(task, model):
    criterion, sample = make_criterion(task, label_smoothing=0.1), make_sample([6, 4])
    loss, _, log = criterion(model, sample)
    for reduce in (True, False):
        found = criterion.compute_loss(model, model(**sample["net_input"]), sample, reduce)
        assert [term.sum().item() for term in found] == pytest.approx([loss.item(), log["nll_loss"].item()], rel=1e-5)


def test_rdrop_equals_plain_pytorch(task):
    """One training step of a model with dropout: each sentence twice in one batch, with the same random numbers."""
    model = build_model(task, dropout=0.3).train()
    sample = make_sample([7, 5, 9])
    net_input = {name: torch.cat([value, value]) for name, value in sample["net_input"].items()}
    target = torch.cat([sample["target"]] * 2)
    torch.manual_seed(1)
    log_probs = model(**net_input)[0].log_softmax(dim=-1)
    smoothed = 0.9 * log_probs.gather(2, target[..., None])[..., 0]
    smoothed = smoothed + 0.1 / (TYPES - 1) * (log_probs.sum(dim=2) - log_probs.gather(2, target[..., None])[..., 0])
    first, second = log_probs.chunk(2)
    kl = ((first.exp() - second.exp()) * (first - second)).sum(dim=2)  # of both directions
    mask = sample["target"].ne(1)
    expected = -(smoothed * torch.cat([mask] * 2)).sum() / 2 + 2.0 / 2 * (kl * mask).sum() / 2
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    options = {"label_smoothing": 0.1, "bonus": "none", "report_accuracy": True}
    criterion = make_criterion(task, **options, rdrop_alpha=2.0)
    torch.manual_seed(1)
    loss, sample_size, log = criterion(model, sample)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=2e-5)

    assert (sample_size, log["ntokens"], log["nsentences"], log["total"]) == (21, 21, 3, 21), "counted once"
    nll_loss = -(first.gather(2, sample["target"][..., None])[..., 0] * mask).sum()
    assert log["nll_loss"].item() == pytest.approx(nll_loss.item(), rel=1e-5), "of the first half alone"
    assert log["n_correct"] == (first.argmax(dim=2).eq(sample["target"]) & mask).sum()
    assert log["divergence"].item() == pytest.approx((kl * mask).sum().item() / 2, rel=1e-4)
    summary = logged(criterion, [log])
    assert summary["divergence"] == pytest.approx(log["divergence"].item() / 21 / math.log(2), abs=1e-3)

    model.eval()
    plain = make_criterion(task, **options)
    assert criterion(model, sample)[0] == plain(model, sample)[0], "validation is without R-Drop"
