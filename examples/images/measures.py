"""Measure an image classifier: confidence on unknown inputs, accuracy under attack, and what happens inside.

All measures are percentages, except margins and energies (nats) and nll (nats).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from encourage_mt.evaluation.diagnostics import calibrate, gradient_by_probability, per_token
from encourage_mt.loss import LossOptions
from encourage_mt.robustness.detection import auroc, fpr95

STEPS, QUERIES = 20, 200


def log_odds(logits: Tensor) -> Tensor:
    """Return those of the most probable class, [N]. They rank as its probability, which rounds to 1 above 37 nats."""
    top, label = logits.max(dim=1, keepdim=True)
    return (top - logits.scatter(1, label, -torch.inf).logsumexp(dim=1, keepdim=True)).squeeze(1)


SCORES = {  # of logits [N, C]; higher for inputs that the model knows
    "probability": log_odds,  # Hendrycks and Gimpel 2017
    "logit": lambda logits: logits.amax(dim=1),  # Hendrycks et al. 2022
    "energy": lambda logits: logits.logsumexp(dim=1),  # Liu et al. 2020, negative energy
}


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits [N, C], in float64, of pixels [N, 1, H, W] in 0 to 1.

    Logits that are not finite become 0, so a training that diverged counts as a network that knows nothing.
    """
    model.eval()
    return torch.cat([model(part) for part in pixels.split(1000)]).double().nan_to_num(0, 0, 0)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def unknown_inputs(known: Tensor, unknown: Tensor, name: str) -> dict[str, float]:
    """Return AUROC and FPR95 of each score, for logits of known inputs and of unknown ones."""
    measures = {}
    for score, function in SCORES.items():
        inside, outside = function(known).numpy(), function(unknown).numpy()
        measures[f"AUROC {name}, {score}"] = 100 * float(auroc((inside, outside))[0])
        measures[f"FPR95 {name}, {score}"] = 100 * fpr95((inside, outside))
    return measures


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of the label minus the best other one, [N]."""
    own = logits.gather(1, labels[:, None])
    return own.squeeze(1) - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


OBJECTIVES = {  # what an attack raises, summed over the images
    "cross entropy": lambda logits, labels: cross_entropy(logits, labels, reduction="sum"),
    "margin": lambda logits, labels: -margin(logits, labels).sum(),  # has a gradient however confident the model is
}


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Return the attacked pixels of one step of size eps along the gradient's sign (Goodfellow et al. 2015)."""
    slope = gradient(model, pixels, labels, "cross entropy")
    return (pixels + eps * slope.sign()).clamp(0, 1)


def pgd(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float, objective: str) -> Tensor:
    """Return the attacked pixels of STEPS steps from a random start, each 2.5 eps / STEPS long (Madry et al. 2018)."""
    attacked = (pixels + eps * (2 * torch.rand_like(pixels) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        attacked = attacked + 2.5 * eps / STEPS * gradient(model, attacked, labels, objective).sign()
        attacked = (pixels + (attacked - pixels).clamp(-eps, eps)).clamp(0, 1)
    return attacked


def gradient(model: nn.Module, pixels: Tensor, labels: Tensor, objective: str) -> Tensor:
    model.eval()
    pixels = pixels.clone().requires_grad_()
    (slope,) = torch.autograd.grad(OBJECTIVES[objective](model(pixels), labels), pixels)
    return slope


@torch.no_grad()
def square(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Return the pixels attacked by random squares, kept where they lower the margin: it sees the logits only.

    After the square attack of Andriushchenko et al. 2020, with QUERIES queries: vertical stripes first, then squares
    whose side falls from a half of the image to a few pixels.
    """
    size = pixels.size(-1)
    attacked = (pixels + eps * torch.randn(len(pixels), 1, 1, size).sign()).clamp(0, 1)
    best = margin(model(attacked), labels)
    for query in range(QUERIES):
        side = max(1, round(size * 0.5 * (1 - query / QUERIES) ** 2))
        row, column = (torch.randint(size - side + 1, (len(pixels), 1, 1, 1)) for _ in range(2))
        lines = torch.arange(size)
        inside = (lines[:, None] >= row) & (lines[:, None] < row + side)
        inside = inside & (lines >= column) & (lines < column + side)
        change = eps * torch.randn(len(pixels), 1, 1, 1).sign()
        trial = torch.where(inside, (pixels + change).clamp(0, 1), attacked)
        reached = margin(model(trial), labels)
        better = reached < best
        attacked[better], best[better] = trial[better], reached[better]
    return attacked


def under_attack(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy under each attack and strength; an attack of eps 1 may change every pixel as it likes."""
    attacks = [("FGSM", eps, fgsm(model, pixels, labels, eps)) for eps in (0.02, 0.05, 0.1, 0.2, 0.3)]
    for eps in (0.02, 0.05, 0.1, 0.2, 0.3, 1.0):
        for objective in OBJECTIVES:
            attacks.append((f"PGD {objective}", eps, pgd(model, pixels, labels, eps, objective)))
    attacks += [("square", eps, square(model, pixels, labels, eps)) for eps in (0.02, 0.05, 0.1)]
    return {f"{name} eps {eps:g}": accuracy(predict(model, attacked), labels) for name, eps, attacked in attacks}


def inside(logits: Tensor, labels: Tensor, options: LossOptions, weight: Tensor) -> dict[str, float]:
    """Return margin, energies, share of the gradient, and calibration; weight [C, D] is that of the last layer.

    They are defined in encourage_mt/evaluation/diagnostics.py. A token there is an image here.
    """
    weight = weight.detach().nan_to_num()
    values = {name: tensor.numpy() for name, tensor in per_token(logits, labels, options, weight).items()}
    share = gradient_by_probability(values["p"], values["gradient"])
    error = calibrate(values["confidence"], values["guess"] == values["target"])["error"]
    return {
        "margin (nats)": float(values["margin"].mean()),
        "energy of the own class (nats)": float(values["energy"].mean()),
        "energy gap (nats)": float((values["others"] - values["energy"]).mean()),
        "gradient share of p > 0.5": 100 * float(share["well_classified"]),
        "calibration error": 100 * float(error),
        "nll (nats)": float(values["nll"].mean()),
    }
