"""Train a small convolutional network on Fashion-MNIST with cross entropy and with the encouraging loss.

    python examples/images/train_images.py

trains every arm with every seed in four settings and writes tables and pictures to runs/images/report.md. Finished runs
are kept, so the same command continues after an interruption.

Settings: long_tail_100 and long_tail_10 keep a share of 100^(-k/9) or 10^(-k/9) of the images of class k; balanced
keeps all; without_class trains without class 9, whose test images are then unknown inputs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of experiment.py

try:
    import torch
    from experiment import Experiment, Options, parser
    from fashion_mnist import CLASSES, load, load_digits
    from measures import accuracy, inside, predict, under_attack, unknown_inputs
    from torch import Tensor, nn
    from tqdm import tqdm

    from encourage_mt import EncouragingLoss
    from encourage_mt.arguments import count
    from encourage_mt.errors import exit_on_user_error
    from encourage_mt.loss import LossOptions
except ImportError as error:
    print(f"train_images.py: error: {error}: pip install -e '.[recipes]'", file=sys.stderr)
    sys.exit(2)

ARMS: dict[str, Options] = {
    "ce": {"bonus": "none"},
    "ce_ls": {"bonus": "none", "label_smoothing": 0.1},
    "el_050": {"log_end": 0.5},
    "el_075": {"log_end": 0.75},
    "el_100": {"log_end": 1.0},
    "el_start": {"log_end": 1.0, "bonus_start": 0.5},  # "aggressive" in the paper
}
SETTINGS = ("long_tail_100", "long_tail_10", "balanced", "without_class")
RATES = (0.05, 0.1, 0.2, 0.4)  # a quarter, half, one and twice the best rate of the baseline in a first search
BATCH, MOMENTUM, DECAY, WARM_UP = 128, 0.9, 5e-4, 0.2
HELD_OUT_CLASS, ATTACKED = 9, 500


def pixels(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float() / 255


class Net(nn.Sequential):
    """Two strided convolutions and two linear layers: 106,122 parameters and 0.4 million multiplications an image."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, classes),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes] of pixels [N, 1, 28, 28] in 0 to 1."""
        return super().forward((pixels - 0.286) / 0.353)


def choose(labels: Tensor, setting: str, tuning: bool) -> tuple[Tensor, Tensor]:
    """Return the indices to train on and a held-out tenth, the same in every run; only `tuning` keeps them apart."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = order[: len(labels) // 10]
    order = order[len(held_out) :] if tuning else order
    ratio = int(setting.removeprefix("long_tail_")) if setting.startswith("long_tail") else 1
    parts = []
    for number in range(CLASSES - (setting == "without_class")):
        members = order[labels[order] == number]
        parts.append(members[: max(1, round(len(members) * ratio ** (-number / (CLASSES - 1))))])
    if setting == "without_class":
        held_out = held_out[labels[held_out] != HELD_OUT_CLASS]
    return torch.cat(parts), held_out


def fit(criterion: nn.Module, images: Tensor, labels: Tensor, seed: int, rate: float, epochs: int):
    """Return a trained network and its loss in each step: SGD, the rate rises for a fifth of the steps, then falls.

    OneCycleLR moves the momentum against the rate, from 0.95 to 0.85 and back, whatever MOMENTUM is.
    """
    torch.manual_seed(seed)
    model = Net(int(labels.max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), rate, MOMENTUM, weight_decay=DECAY, nesterov=True)
    batches = max(1, len(images) // BATCH)
    steps = max(6, epochs * batches)  # with 5, the rise would end at step 0, and torch divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=WARM_UP)
    losses = []
    for _ in tqdm(range(epochs), unit="epoch", leave=False):
        for batch in torch.randperm(len(images))[: batches * BATCH].chunk(batches):
            loss = criterion(model(pixels(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return model, losses


def run(data: dict[str, Tensor], epochs: int, setting: str, options: Options, seed: int, rate: float, tuning: bool):
    """Train one network and return its measures; with `tuning`, its accuracy on the held-out images alone."""
    labels, test_labels = data["labels"].long(), data["test labels"].long()
    chosen, held_out = choose(labels, setting, tuning)
    model, _ = fit(EncouragingLoss(**options), data["images"][chosen], labels[chosen], seed, rate, epochs)
    if tuning:
        return {"accuracy": accuracy(predict(model, pixels(data["images"][held_out])), labels[held_out])}
    known = test_labels < (HELD_OUT_CLASS if setting == "without_class" else CLASSES)
    test, test_labels, unknown = data["test images"][known], test_labels[known], data["test images"][~known]
    logits = predict(model, pixels(test))
    measures = {"accuracy": accuracy(logits, test_labels)}
    if setting.startswith("long_tail"):
        for name, low, high in (("many", 0, 2), ("medium", 3, 6), ("few", 7, 9)):
            group = (test_labels >= low) & (test_labels <= high)
            measures[f"accuracy, {name}"] = accuracy(logits[group], test_labels[group])
    measures |= inside(logits, test_labels, LossOptions(**options), model[-1].weight)
    if setting == "without_class":
        measures |= unknown_inputs(logits, predict(model, pixels(unknown)), "held-out class")
    if setting == "balanced":
        torch.manual_seed(0)  # the same noise and the same random starts of attacks for all runs
        noise = torch.rand(len(data["digits"]), 1, 28, 28)
        measures |= unknown_inputs(logits, predict(model, pixels(data["digits"])), "digits")
        measures |= unknown_inputs(logits, predict(model, noise), "noise")
        measures |= under_attack(model, pixels(test[:ATTACKED]), test_labels[:ATTACKED])
    return measures


def main() -> None:
    options = parser(__doc__, ARMS, SETTINGS, "runs/images")
    text = "file (.gz or .npz) of the test images of MNIST, for balanced (default: download it)"
    options.add_argument("--digits", type=Path, metavar="FILE", help=text)
    text = "number of epochs (default: %(default)s)"
    options.add_argument("--epochs", type=count, default=10, metavar="N", help=text)
    with exit_on_user_error("train_images.py"):
        arguments = options.parse_args()
        torch.set_num_threads(1)  # more threads are slower on images this small
        data = {} if arguments.report_only else load(arguments.raw_dir)
        if data and "balanced" in arguments.settings:
            data["digits"] = load_digits(arguments.digits)

        def train(*details):
            return run(data, arguments.epochs, *details)

        fixed = {"epochs": arguments.epochs, "batch": BATCH}
        Experiment("Fashion-MNIST", arguments, ARMS, RATES, "accuracy", fixed, train).run()


if __name__ == "__main__":
    main()
