"""Test the registry of bonuses: the contract of every bonus, and bonuses from a user's own file."""

import logging
import sys

import pytest
import torch
from loss_cases import (
    BACKENDS,
    BONUSES,
    FALLBACK,
    assert_right,
    each_bonus_and_fallback,
    name_of,
    options_of,
    random_batch,
)

from encourage_mt.loss import bonuses
from encourage_mt.loss.bonuses import bonus_of, check_bonus, register_bonus, scaled_slope
from encourage_mt.loss.functional import EncouragingLoss, find_backend
from encourage_mt.loss.options import LossOptions

USER_FILE = """
from encourage_mt.loss import register_bonus

@register_bonus("squared", linear=0.0)
def square(p, one_minus_p, options):
    return -(p**2)

def plain(p, one_minus_p, options):
    return -(p**2)

number = 3
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Leave the registry as it was."""
    monkeypatch.setattr(bonuses, "_registry", dict(bonuses._registry))


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """The current directory has my_bonus.py, which nothing has imported."""
    (tmp_path / "my_bonus.py").write_text(USER_FILE)
    (tmp_path / "broken_bonus.py").write_text("1 / 0")
    for name in ("needy_bonus", "no_such_library_bonus"):
        (tmp_path / f"{name}.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    for name in ("my_bonus", "broken_bonus", "needy_bonus"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# b(0.6) with the default options; a new bonus needs one more.
GOLDEN = {
    "none": 0.0,
    "log": -0.8931472,  # log .5 - (.6 - .5) / .5
    "power": -0.36,
    "cosine": -1.3090170,  # cos(.6 pi) - 1
}


@pytest.mark.parametrize("name", bonuses.registered_bonuses())
def test_golden_value(name):
    p = torch.tensor(0.6, dtype=torch.float64)
    assert bonus_of(p, 1 - p, LossOptions(bonus=name)).item() == pytest.approx(GOLDEN[name], abs=1e-7)


@pytest.mark.parametrize(
    "bonus", [*({"bonus": name} for name in bonuses.registered_bonuses()), *BONUSES, FALLBACK], ids=name_of
)
def test_contract(bonus):
    """Finite, b(0) = 0, slope as autograd's, linear form right; every backend agrees with float64."""
    options = options_of(bonus)
    check_bonus(options)
    for backend in BACKENDS:
        for spread in (1.0, 4.0):
            assert_right(*random_batch(4, 300, spread), options, backend)


@each_bonus_and_fallback
def test_slope_equals_that_of_autograd(bonus):
    """-p b'(p), the bonus start included; in float64, a few rounding steps apart."""
    p = torch.cat([torch.logspace(-12, -1, 12, dtype=torch.float64), torch.linspace(0.2, 0.9, 36, dtype=torch.float64)])
    p = torch.cat([p, 1 - torch.tensor([1e-3, 1e-4, 2e-5], dtype=torch.float64)]).requires_grad_()
    options = options_of(bonus)
    value = bonus_of(p, 1 - p, options) + 0 * p  # "none" is constant otherwise
    (slope,) = torch.autograd.grad(value.sum(), p)
    p = p.detach()
    torch.testing.assert_close(scaled_slope(p, 1 - p, options), -p * slope, atol=1e-15, rtol=1e-12)


def test_slope_at_the_floor_of_the_log_bonus():
    one_minus_p = torch.tensor([0.0, 1e-9, 0.9e-5, 1.1e-5], dtype=torch.float64)
    slope = scaled_slope(1 - one_minus_p, one_minus_p, LossOptions(log_end=1.0))
    assert slope.tolist() == pytest.approx([0.0, 0.0, 0.0, 1 / 1.1e-5], rel=1e-4)


BROKEN = {
    "finite": (lambda p, rest, options: p.log(), {}),
    "p b'\\(p\\) must be finite": (lambda p, rest, options: -p.sqrt(), {}),
    "0 at p = 0": (lambda p, rest, options: p - 1, {}),
    "shape": (lambda p, rest, options: p.sum(), {}),
    "scaled_slope": (lambda p, rest, options: -(p**2), {"scaled_slope": lambda p, rest, options: 2 * p}),
    "linear form": (lambda p, rest, options: -(p**1.5), {"linear": 0.0}),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_bonus_that_breaks_the_contract_is_refused(problem):
    """Before it gives any number."""
    function, more = BROKEN[problem]
    register_bonus("broken", **more)(function)
    with pytest.raises(ValueError, match=f"bonus broken: .*{problem}"):
        EncouragingLoss(bonus="broken")(*random_batch(2, 9))


def test_names_are_unique():
    for name in ("log", "a:b"):
        with pytest.raises(ValueError, match=f"bonus {name}"):
            register_bonus(name)


@pytest.mark.parametrize("name", ["my_bonus:square", "my_bonus:squared", "my_bonus:plain"])
def test_a_bonus_in_a_file_of_the_user(name, user_file, caplog):
    """All backends give the values of power 2 and its slope by autograd; without `linear`, the reference is used."""
    logits, target = random_batch(5, 70)
    options = LossOptions(bonus=name, label_smoothing=0.1)
    expected = EncouragingLoss(bonus="power", label_smoothing=0.1, backend="reference")(logits, target)
    for backend in ("auto", *BACKENDS):
        value = EncouragingLoss(bonus=name, label_smoothing=0.1, backend=backend)(logits, target)
        torch.testing.assert_close(value, expected)
    slow = find_backend("chunked", options, "cpu", torch.float32).__name__.endswith("reference")
    assert slow == (name == "my_bonus:plain")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    warnings = [warning for warning in warnings if "loss backend: reference" in warning]
    assert all(name in warning for warning in warnings) and bool(warnings) == slow


def test_a_bonus_is_found_where_the_command_was_started(user_file, tmp_path, monkeypatch):
    """fairseq-hydra-train changes the current folder."""
    (tmp_path / "outputs").mkdir()
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.chdir(tmp_path / "outputs")
    monkeypatch.syspath_prepend(str(tmp_path / "outputs"))
    before = list(sys.path)
    assert LossOptions(bonus="my_bonus:square").bonus == "my_bonus:square" and sys.path == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such", "or MODULE:NAME, got no_such"),
        ("my_bonus:", "MODULE:NAME"),
        ("../my_bonus:square", "MODULE:NAME"),
        ("no_bonus:square", "no module no_bonus in the current directory or on PYTHONPATH"),
        ("my_bonus:cube", "my_bonus has no function cube"),
        ("my_bonus:number", "my_bonus has no function number"),
        ("broken_bonus:square", "cannot import broken_bonus: ZeroDivisionError"),
        ("needy_bonus:square", "no_such_library"),
        ("no_such_library_bonus:square", "cannot import no_such_library_bonus"),
    ],
)
def test_a_bonus_that_cannot_be_found(name, problem, user_file):
    with pytest.raises(ValueError, match=problem) as raised:
        LossOptions(bonus=name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_fallback_has_no_linear_form():
    assert bonuses.linear_coefficient(LossOptions(**FALLBACK)) is None
