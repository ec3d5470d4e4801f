"""Register bonuses b(p): the package's own (none, log, power, cosine) and those of users.

A bonus is one elementwise function b(p, one_minus_p, options) with b(0) = 0, registered by name. `one_minus_p` is 1 - p
with full precision, even if p is so close to 1 that computing 1 - p would lose all digits: use it. Write, in a file of
your own, my_bonus.py:

    from encourage_mt.loss import register_bonus

    @register_bonus("square", linear=0.0)
    def square(p, one_minus_p, options):
        return -p**2

and train with `--bonus my_bonus:square`, or use `EncouragingLoss(bonus="my_bonus:square")`.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import LossOptions

LOG_BONUS_FLOOR = 1e-5  # least 1 - p that log_end 1 distinguishes, as in the paper's implementation

BonusFunction = Callable[[Tensor, Tensor, LossOptions], Tensor]
LinearForm = float | Callable[[LossOptions], float | None] | None


@dataclass(frozen=True)
class Bonus:
    """A registered bonus; see `register_bonus`."""

    name: str
    value: BonusFunction
    scaled_slope: BonusFunction | None = None
    linear: LinearForm = None


_registry: dict[str, Bonus] = {}


def register_bonus(
    name: str, *, linear: LinearForm = None, scaled_slope: BonusFunction | None = None
) -> Callable[[BonusFunction], BonusFunction]:
    """Return a decorator that registers the function b(p, one_minus_p, options) as bonus `name`.

    b is elementwise on tensors of any shape in float32 or float64, and 0 at p = 0; b and p b'(p) are finite on
    0 <= p <= 1. Use one_minus_p for 1 - p, because it is precise near p = 1.
    `linear` is c where b(p) = -c p + O(p^2) near p = 0: a number, or a function of the options that may return None.
    Without it only the reference backend computes the bonus. `scaled_slope` is -p b'(p) as a function of the same
    arguments; without it autograd differentiates b. Raises ValueError if the name is taken or contains a colon.
    """
    if ":" in name or name in _registry:
        raise ValueError(f"bonus {name}: the name is already registered or contains a colon; choose another name")

    def register(function: BonusFunction) -> BonusFunction:
        _registry[name] = Bonus(name, function, scaled_slope, linear)
        return function

    return register


def registered_bonuses() -> list[str]:
    """Return the names of all registered bonuses, and MODULE:NAME of those imported so far."""
    return list(_registry)


def find_bonus(name: str) -> Bonus:
    """Return the bonus of this name; import MODULE for MODULE:NAME. Raises ValueError if there is no such bonus."""
    if name not in _registry:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(name)):
            raise ValueError(f"bonus must be one of {', '.join(_registry)} or MODULE:NAME, got {name}")
        _registry[name] = _import_bonus(name)
    return _registry[name]


def _import_bonus(name: str) -> Bonus:
    module_name, attribute = name.split(":")
    # a console script such as fairseq-train has only its own folder in sys.path. PWD comes first, because hydra changes
    # the current folder to that of the run, whose files may be somebody else's, and leaves PWD
    here = dict.fromkeys((os.environ.get("PWD", os.getcwd()), os.getcwd()))
    folders = [folder for folder in here if folder not in sys.path]
    sys.path += folders
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"bonus {name}: no module {module_name} in the current directory or on PYTHONPATH"
            ) from None
        raise ValueError(f"bonus {name}: cannot import {module_name}: {error}") from error
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"bonus {name}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in folders]
    for bonus in list(_registry.values()):
        if bonus.value.__module__ == module_name and attribute in (bonus.name, bonus.value.__name__):
            return Bonus(name, bonus.value, bonus.scaled_slope, bonus.linear)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"bonus {name}: {module_name} has no function {attribute}")
    return Bonus(name, function)


def bonus_of(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return b(p), elementwise and without the weight; with bonus_start s, b(p) - b(s) from s on and 0 below."""
    value = find_bonus(options.bonus).value
    if not options.bonus_start:
        return value(p, one_minus_p, options)
    start = p.new_tensor(options.bonus_start)
    return torch.where(p >= start, value(p, one_minus_p, options) - value(start, 1.0 - start, options), 0.0)


def scaled_slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return -p b'(p), elementwise and without the weight; for the log bonus it is p / (1 - min(p, log_end))."""
    bonus = find_bonus(options.bonus)
    slope = (bonus.scaled_slope or _slope_by_autograd(bonus.value))(p, one_minus_p, options)
    return torch.where(p >= options.bonus_start, slope, 0.0) if options.bonus_start else slope


def linear_coefficient(options: LossOptions) -> float | None:
    """Return c of b(p) = -c p + O(p^2) near p = 0, or None if b does not have this form or c is not known."""
    if options.bonus_start:  # b is 0 below it
        return 0.0
    linear = find_bonus(options.bonus).linear
    return linear(options) if callable(linear) else linear


def _slope_by_autograd(value: BonusFunction) -> BonusFunction:
    def slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
        with torch.enable_grad():
            leaves = p.detach().requires_grad_(), one_minus_p.detach().requires_grad_()
            bonus = value(*leaves, options)
            if not bonus.requires_grad:  # constant
                return torch.zeros_like(p)
            by_p, by_rest = torch.autograd.grad(bonus.sum(), leaves, allow_unused=True, materialize_grads=True)
        return -p * (by_p - by_rest)

    return slope


@torch.inference_mode(False)  # where autograd would give slopes of 0
def check_bonus(options: LossOptions) -> None:
    """Raise ValueError unless the bonus of `options` is as `register_bonus` requires; checks in float64, takes 1 ms."""
    bonus = find_bonus(options.bonus)
    with torch.device("cpu"):  # whatever the default device is
        p = torch.cat([torch.zeros(1), torch.logspace(-7, -2, 11), torch.linspace(0.02, 1.0, 50)]).double()
    rest = 1.0 - p
    with torch.no_grad():
        try:
            value = bonus.value(p, rest, options)
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"bonus {bonus.name}: its function raised {type(error).__name__}: {error}") from error
        if not isinstance(value, Tensor) or value.shape != p.shape or value.dtype != p.dtype:
            raise ValueError(f"bonus {bonus.name}: its function must return a tensor of the shape and type of p")
        if not value.isfinite().all() or value[0] != 0:
            raise ValueError(f"bonus {bonus.name}: b(p) must be finite for p from 0 to 1, and 0 at p = 0")
        by_autograd = _slope_by_autograd(bonus.value)
        slope = (bonus.scaled_slope or by_autograd)(p, rest, options)
        if not slope.isfinite().all():
            raise ValueError(f"bonus {bonus.name}: p b'(p) must be finite for p from 0 to 1")
        if bonus.scaled_slope:
            inner = (p > 0) & (p < 1)
            expected = by_autograd(p, rest, options)[inner]
            if not torch.allclose(slope[inner], expected, rtol=1e-6, atol=1e-12):
                raise ValueError(f"bonus {bonus.name}: scaled_slope is not -p times the derivative of its function")
        linear = bonus.linear(options) if callable(bonus.linear) else bonus.linear
        small = p < 0.01
        if linear is not None and ((value + linear * p).abs() > 10 * p**2 + 1e-15)[small].any():
            raise ValueError(
                f"bonus {bonus.name}: its linear form is wrong: near p = 0 it is not within 10 p^2 of -{linear} p "
                "(a steeper bonus must leave `linear` out)"
            )


# The bonuses of the package. Paper: the "normal" bonus is log with log_end 1, the "conservative" one log_end < 1.


@register_bonus("none", linear=0.0, scaled_slope=lambda p, one_minus_p, options: torch.zeros_like(p))
def no_bonus(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return 0: the loss is label-smoothed cross entropy."""
    return torch.zeros_like(p)


def _log_slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    if options.log_end == 1:
        return torch.where(one_minus_p < LOG_BONUS_FLOOR, 0.0, p / one_minus_p.clamp(min=LOG_BONUS_FLOOR))
    return p / one_minus_p.clamp(min=1.0 - options.log_end)


@register_bonus("log", linear=1.0, scaled_slope=_log_slope)
def log_bonus(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return log(1 - p) up to p = log_end and its tangent beyond; for log_end 1, log(1 - p) floored at log(1e-5)."""
    if options.log_end == 1:
        return one_minus_p.clamp(min=LOG_BONUS_FLOOR).log()
    least = 1.0 - options.log_end
    clamped = one_minus_p.clamp(min=least)
    return clamped.log() - (clamped - one_minus_p) / least


def _power_linear(options: LossOptions) -> float | None:
    if options.bonus_exponent == 1:
        return 1.0
    return 0.0 if options.bonus_exponent >= 2 else None


def _power_slope(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    return options.bonus_exponent * p**options.bonus_exponent


@register_bonus("power", linear=_power_linear, scaled_slope=_power_slope)
def power_bonus(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return -p ** bonus_exponent."""
    return -(p**options.bonus_exponent)


@register_bonus("cosine", linear=0.0, scaled_slope=lambda p, one_minus_p, options: math.pi * p * (math.pi * p).sin())
def cosine_bonus(p: Tensor, one_minus_p: Tensor, options: LossOptions) -> Tensor:
    """Return cos(pi p) - 1, computed without cancellation near p = 0."""
    return -2.0 * torch.sin(0.5 * math.pi * p) ** 2
