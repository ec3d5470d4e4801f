"""Test `EncouragingLoss` and `encouraging_loss` as replacements for torch's cross entropy, and their options."""

import dataclasses
import inspect
import itertools
import math
import subprocess
import sys

import pytest
import torch
from loss_cases import assert_right, each_backend, each_bonus_and_fallback, random_batch, terms_and_gradient

from encourage_mt.loss import EncouragingLoss, LossOptions, encouraging_loss, functional, loss_terms
from encourage_mt.loss.options import OPTION_NAMES, OPTIONS, BonusSchedule, CriterionOptions

RANGES = {field.name: field.metadata["between"] for field in dataclasses.fields(LossOptions)}
RANGES = {name: between for name, between in RANGES.items() if between}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [(), (5,), (3, 2)], ids=str)
def test_is_cross_entropy_without_bonus(more, reduction):
    """Both in float64: 1e-12 is a thousand of its rounding steps."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 7, *more, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (4, *more), generator=generator)
    weights = torch.rand(target.shape, generator=generator, dtype=torch.float64)
    for ignore_index, smoothing in itertools.product((-100, 2), (0.0, 0.1)):
        target[0] = ignore_index
        losses = (
            EncouragingLoss(bonus="none", label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction),
            torch.nn.CrossEntropyLoss(label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction),
        )
        values, gradients = [], []
        for loss in losses:
            leaf = logits.clone().requires_grad_()
            values.append(loss(leaf, target))
            (values[-1] * (weights if reduction == "none" else 1.7)).sum().backward()
            gradients.append(leaf.grad)
        assert values[0].shape == values[1].shape
        torch.testing.assert_close(values[0], values[1], atol=1e-12, rtol=0)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


@each_backend
def test_mean_of_no_target_is_nan_without_gradient(backend):
    """As with torch's: there is nothing to take the mean of, and an optimizer's step must not make the weights NaN."""
    target = torch.full((3,), -100)
    for loss in (torch.nn.CrossEntropyLoss(), EncouragingLoss(backend=backend)):
        logits = random_batch(3, 5)[0].requires_grad_()
        value = loss(logits, target)
        value.backward()
        assert value.isnan() and not logits.grad.any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_target_of_any_integer_type(dtype, backend):
    logits, target = random_batch(6, 9)
    loss = EncouragingLoss(label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(loss(logits, target.to(dtype)), loss(logits, target), atol=0, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_bonus_and_fallback
def test_module_is_the_function(bonus, reduction):
    """Both take the same keywords with the same defaults, and agree with loss_terms."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    target[2] = 3
    keywords = {**bonus, "bonus_weight": 0.4, "label_smoothing": 0.2}
    each = loss_terms(logits, target, LossOptions(**keywords), ignore_index=3, reduce=False, backend="reference").loss
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / target.ne(3).sum()}[reduction]
    keywords |= {"ignore_index": 3, "reduction": reduction}
    for backend in ("auto", "reference"):
        for value in (
            EncouragingLoss(**keywords, backend=backend)(logits, target),
            encouraging_loss(logits, target, **keywords, backend=backend),
        ):
            torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_signatures_show_all_options():
    """As help() and editors do."""
    names = [field.name for field in dataclasses.fields(LossOptions)]
    for function in (EncouragingLoss, encouraging_loss):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[-len(names) :] == names
        assert parameters["log_end"].default == LossOptions.log_end


def test_module_shows_its_options():
    text = repr(EncouragingLoss(log_end=0.625, ignore_index=3, reduction="sum"))
    for part in ("EncouragingLoss", "log_end=0.625", "ignore_index=3", "'sum'"):
        assert part in text


def test_the_bonus_weight_can_be_set_during_the_training():
    logits, target = random_batch(6, 9)
    loss = EncouragingLoss(bonus_start=0.2)
    loss.bonus_weight = 0.25
    assert loss.bonus_weight == 0.25
    assert loss(logits, target) == encouraging_loss(logits, target, bonus_start=0.2, bonus_weight=0.25)
    with pytest.raises(ValueError, match="bonus_weight"):
        loss.bonus_weight = 3


def test_module_keeps_the_order_of_tokens():
    """With shape (N, C, d1, d2) the loss at [n, i, j] is that of logits[n, :, i, j]."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (2, 3, 4), generator=generator)
    loss = EncouragingLoss(label_smoothing=0.1, reduction="none")
    each = loss(logits, target)
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        alone = loss(logits[n, :, i, j][None], target[n, i, j][None])
        torch.testing.assert_close(each[n, i, j], alone[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("logits", "target"),
    [((4,), ()), ((4, 7), (4, 1)), ((4, 7), (7,)), ((4, 7, 3), (4,)), ((4, 7, 3), (4, 7)), ((4, 7, 3, 2), (4, 2, 3))],
)
def test_module_refuses_shapes(logits, target):
    with pytest.raises(ValueError, match="expected logits"):
        EncouragingLoss()(torch.zeros(logits), torch.zeros(target, dtype=torch.long))


def test_logits_and_target_on_different_devices_are_refused():
    with pytest.raises(ValueError, match="logits are on cpu, target is on meta"):
        encouraging_loss(torch.zeros(2, 9), torch.zeros(2, dtype=torch.long, device="meta"))


def test_the_default_device_of_torch_does_not_matter():
    logits, target = random_batch(2, 9)
    expected = encouraging_loss(logits, target, bonus_exponent=1.75)
    with torch.device("meta"):
        assert encouraging_loss(logits, target, bonus_exponent=2.75) == expected  # another option: checked again


@each_backend
def test_forward_mode_derivatives_are_right_or_refused(backend):
    """A derivative of 0 without an error would be silently wrong."""
    logits, target = random_batch(3, 9)
    logits = logits.detach().double()

    def loss(logits):
        return encouraging_loss(logits, target, label_smoothing=0.1, backend=backend)

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    if backend == "reference":
        derivative = torch.func.jvp(loss, (logits,), (logits,))[1]
        torch.testing.assert_close(derivative, (gradient * logits).sum())
        return
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(loss, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="forward"):
        loss(torch.autograd.forward_ad.make_dual(logits, logits))


def test_the_reference_works_with_torch_func():
    logits, target = random_batch(3, 9, dtype=torch.float64)

    def loss(logits):
        return encouraging_loss(logits, target, label_smoothing=0.1, backend="reference")

    leaf = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), gradient)
    both = torch.stack([logits, -logits])
    torch.testing.assert_close(torch.func.vmap(loss)(both), torch.stack([loss(each) for each in both]))
    torch.testing.assert_close(torch.func.hessian(loss)(logits), torch.autograd.functional.hessian(loss, logits))


def test_triton_is_passed_over_without_a_c_compiler(monkeypatch):
    monkeypatch.setattr(functional, "find_spec", lambda name: name)
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(functional.shutil, "which", lambda name: None)
    assert "C compiler" in functional.missing_backend("triton", "cuda")
    monkeypatch.setattr(functional.shutil, "which", lambda name: name)
    assert functional.missing_backend("triton", "cuda") == ""


def test_class_weights_of_none_are_accepted():
    assert EncouragingLoss(weight=None).options == EncouragingLoss().options


def test_unsupported_arguments_are_refused_by_name():
    logits, target = random_batch(2, 9)
    with pytest.raises(ValueError, match="class weights"):
        EncouragingLoss(weight=torch.ones(9))
    with pytest.raises(ValueError, match="torch.bool"):
        encouraging_loss(logits, target.bool())
    with pytest.raises(ValueError, match="soft targets"):
        encouraging_loss(logits, logits.softmax(dim=1))
    with pytest.raises(ValueError, match="reduction .*average"):
        EncouragingLoss(reduction="average")(logits, target)
    with pytest.raises(TypeError, match="logend"):
        EncouragingLoss(logend=0.5)


# Options


@each_backend
@pytest.mark.parametrize(
    ("base", "option", "value"),
    [
        *(({}, "bonus", name) for name in ("none", "power", "cosine")),
        ({}, "log_end", 0.75),
        ({"bonus": "power"}, "bonus_exponent", 3.0),
        ({}, "bonus_weight", 0.9),
        ({}, "bonus_start", 0.05),
        ({}, "label_smoothing", 0.05),
        ({"label_smoothing": 0.1}, "smoothing_convention", "fairseq"),
    ],
)
def test_every_option_changes_loss_and_gradient(base, option, value, backend):
    """The change is far larger than rounding in float64: an option that is not passed on would change nothing."""
    logits, target = random_batch(6, 9, dtype=torch.float64)
    before, gradient_before = terms_and_gradient(logits, target, LossOptions(**base), backend)
    after, gradient_after = terms_and_gradient(logits, target, LossOptions(**{**base, option: value}), backend)
    assert abs(after.loss - before.loss) > 1e-3
    assert (gradient_after - gradient_before).abs().max() > 1e-3
    torch.testing.assert_close(after.nll_loss, before.nll_loss, atol=1e-12, rtol=0)  # plain likelihood, always
    module_before, module_after = EncouragingLoss(**base), EncouragingLoss(**{**base, option: value})
    assert abs(module_after(logits, target) - module_before(logits, target)) > 1e-4


@pytest.mark.parametrize(("option", "between"), RANGES.items())
def test_a_value_out_of_range_is_refused(option, between):
    low, high = between
    for value in (low - 0.01, high + 0.01, math.nan, math.inf, "much", True):
        for make in (LossOptions, EncouragingLoss):
            with pytest.raises(ValueError, match=f"{option} .*between {low} and {high}, got {value}"):
                make(**{option: value})


@pytest.mark.parametrize(
    ("make", "values", "parts"),
    [
        (LossOptions, {"bonus": "logarithm"}, ["bonus", "none, log, power, cosine", "logarithm"]),
        (LossOptions, {"smoothing_convention": "torch"}, ["smoothing_convention", "fairseq, paper", "torch"]),
        (BonusSchedule, {"bonus_schedule": "step"}, ["bonus_schedule", "constant, linear, exp, cosine", "step"]),
        (BonusSchedule, {"bonus_schedule": "linear"}, ["bonus_schedule_updates", "linear", "0"]),
        (BonusSchedule, {"bonus_schedule_updates": 7}, ["bonus_schedule", "constant", "7"]),
        (BonusSchedule, {"bonus_defer_updates": -1}, ["bonus_defer_updates", "-1"]),
        (CriterionOptions, {"rdrop_alpha": -1.0}, ["rdrop_alpha", "-1.0"]),
        (CriterionOptions, {"rdrop_alpha": 1.0, "fuse_projection": True}, ["rdrop_alpha", "fuse_projection"]),
    ],
)
def test_other_values_that_are_refused(make, values, parts):
    with pytest.raises(ValueError) as raised:
        make(**values)
    assert all(part in str(raised.value) for part in parts)


@each_backend
@pytest.mark.parametrize(
    ("option", "value"), [(option, bound) for option, bounds in RANGES.items() for bound in bounds]
)
def test_bounds_of_ranges_are_allowed(option, value, backend):
    logits, target = random_batch(6, 9)
    options = LossOptions(**{"bonus": "power" if option == "bonus_exponent" else "log", option: value})
    assert_right(logits, target, options, backend)


def test_options_are_known_without_torch():
    """The command line lists them without the seconds that importing torch takes."""
    code = "import sys, encourage_mt.loss.options; assert not {'torch', 'fairseq'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"log-end", "label-smoothing", "report-accuracy", "rdrop-alpha", "bonus-schedule"} <= OPTION_NAMES
    assert all(field.metadata["help"] for field in OPTIONS.values())


# Schedules, from the formulas of the paper's code with t / T = updates / bonus_schedule_updates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.0, 25: 0.25, 50: 0.5, 100: 1.0, 500: 1.0}),
        ("exp", {0: math.exp(-5), 50: math.exp(-2.5), 100: 1.0, 500: 1.0}),
        ("cosine", {0: 0.0, 25: (1 - math.sqrt(0.5)) / 2, 50: 0.5, 100: 1.0, 500: 1.0}),
    ],
)
def test_schedules(schedule, expected):
    """The deferred updates come first, without a bonus."""
    for defer in (0, 30):
        options = BonusSchedule(bonus_defer_updates=defer, bonus_schedule=schedule, bonus_schedule_updates=100)
        assert options.varies
        assert {t: options.factor(t + defer) for t in expected} == pytest.approx(expected)
        assert all(options.factor(t) == 0 for t in range(defer))


def test_deferral_without_a_schedule():
    options = BonusSchedule(bonus_defer_updates=3)
    assert [options.factor(updates) for updates in range(5)] == [0, 0, 0, 1, 1]
    assert options.varies and not BonusSchedule().varies
