"""Compare the criterion with --fuse-projection and without it."""

import sys

import pytest
import torch
from fairseq.models import FairseqLanguageModel
from test_criterion import build_model, make_criterion, make_sample, task  # noqa: F401

from encourage_mt.loss import fused_projection
from encourage_mt.loss.options import CriterionOptions


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make blocks so small that a few tokens need several, the last one short; outside fairseq-train."""
    monkeypatch.setattr(fused_projection, "ROWS", 8)
    monkeypatch.delitem(sys.modules, "fairseq_cli.train", raising=False)


@pytest.mark.parametrize("share", [False, True], ids=["own output embedding", "tied embeddings"])
def test_the_criterion_fused_trains_as_unfused(share, task):  # noqa: F811
    """Two accumulated batches, accuracy and a prefix to ignore included."""
    outcomes = []
    for fuse_projection in (False, True):
        model = build_model(task, share_decoder_input_output_embed=share).train()
        options = {"ignore_prefix_size": 1, "report_accuracy": True, "fuse_projection": fuse_projection}
        criterion = make_criterion(task, label_smoothing=0.1, **options)
        logs = []
        for lengths in ([7, 5, 9, 4], [6, 8]):
            loss, _, log = criterion(model, make_sample(lengths))
            loss.backward()
            logs.append({name: float(value) for name, value in log.items()})
        outcomes.append((logs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (logs, gradients), (fused_logs, fused_gradients) = outcomes
    for log, fused_log in zip(logs, fused_logs, strict=True):
        assert fused_log == pytest.approx(log, rel=1e-5)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():  # float32 sums in another order
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=2e-5)


def test_in_training_the_model_is_asked_for_features_only(task, monkeypatch):  # noqa: F811
    """In training the model is asked for features only; in validation for logits, as usual."""
    model = build_model(task)
    asked = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, src_tokens, src_lengths, prev_output_tokens, features_only=False: (
            asked.append(features_only)
            or forward(self, src_tokens, src_lengths, prev_output_tokens, features_only=features_only)
        ),
    )
    criterion = make_criterion(task, label_smoothing=0.1, fuse_projection=True)
    for mode in (True, False):
        criterion(model.train(mode), make_sample([5, 3]))
    assert asked == [True, False]


def test_a_language_model_can_be_fused(task):  # noqa: F811
    language_model = FairseqLanguageModel(build_model(task).decoder).train()
    sample = make_sample([5, 3])
    sample["net_input"] = {"src_tokens": sample["net_input"]["src_tokens"]}
    fused, plain = (make_criterion(task, fuse_projection=fuse)(language_model, sample)[0] for fuse in (True, False))
    torch.testing.assert_close(fused, plain)


def test_parameters_that_torch_would_take_for_unused_are_refused(task):  # noqa: F811
    criterion = make_criterion(task, fuse_projection=True)
    for share in (False, True):
        wrapped = Wrapped(build_model(task, share_decoder_input_output_embed=share).train())
        if share:
            assert criterion(wrapped, make_sample([5, 3]))[0].isfinite()
            continue
        with pytest.raises(ValueError, match="--share-decoder-input-output-embed"):
            criterion(wrapped, make_sample([5, 3]))


class Wrapped(torch.nn.Module):
    """As fairseq wraps torch's DistributedDataParallel."""

    find_unused_parameters = True

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def get_targets(self, sample, net_output):
        return self.module.get_targets(sample, net_output)


def test_a_model_without_a_plain_projection_is_refused_with_the_remedy(task):  # noqa: F811
    model = build_model(task, adaptive_softmax_cutoff="10,20", criterion="adaptive_loss").train()
    criterion = make_criterion(task, label_smoothing=0.1, fuse_projection=True)
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        criterion(model, make_sample([5, 3]))
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        criterion(torch.nn.Linear(2, 2), make_sample([5, 3]))


def test_the_reference_backend_cannot_be_fused():
    with pytest.raises(ValueError, match="drop --fuse-projection"):
        CriterionOptions(fuse_projection=True, loss_backend="reference")
