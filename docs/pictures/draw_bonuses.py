"""Draw the bonuses b(p) and their effect on the gradient: python docs/pictures/draw_bonuses.py writes bonuses.svg."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from encourage_mt.loss import LossOptions, loss_terms

CURVES = {
    "none (cross entropy)": LossOptions(bonus="none"),
    "log, log-end 0.5 (default)": LossOptions(log_end=0.5),
    "log, log-end 0.75": LossOptions(log_end=0.75),
    "log, log-end 1": LossOptions(log_end=1.0),
    "power, exponent 2": LossOptions(bonus="power", bonus_exponent=2.0),
    "cosine": LossOptions(bonus="cosine"),
}


def bonus_and_gradient(p: torch.Tensor, options: LossOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return b(p) and the size of the loss's gradient on the target's logit, for two types and target probability p."""
    logits = torch.stack([p.log(), (1 - p).log()], dim=1).requires_grad_()
    terms = loss_terms(logits, torch.zeros(len(p), dtype=torch.long), options, reduce=False, backend="reference")
    terms.loss.sum().backward()
    return terms.bonus.detach(), logits.grad[:, 0].abs()


def main() -> None:
    p = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, options in CURVES.items():
        bonus, gradient = bonus_and_gradient(p, options)
        style = {"linewidth": 2.4} if "default" in label else {"linewidth": 1.4}
        left.plot(p, bonus, **style)
        right.plot(p, gradient, label=label, **style)
    left.set(ylim=(-5, 0.2), title="bonus b(p)", ylabel="nats")
    right.set(ylim=(0, 1.5), title="size of the gradient on the target's logit")
    for axes in (left, right):
        axes.set(xlim=(0, 1), xlabel="probability p of the target")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    matplotlib.rcParams["svg.hashsalt"] = "bonuses"  # the same file each time
    figure.savefig(Path(__file__).with_name("bonuses.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
