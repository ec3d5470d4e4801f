"""The command `encourage-mt`: run a recipe from raw data to a table of scores."""

import argparse
import time
from pathlib import Path

import torch

from .commands import cores
from .errors import UserError, exit_on_user_error
from .prepare import DOWNLOADS, prepare
from .recipe import Recipe, load_recipe
from .scoring import evaluate, table
from .training import make_run, train


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="encourage-mt", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    for name, action, help in (
        ("prepare", prepare_recipe, "raw text to binarized data: check, learn joint subwords, encode, binarize"),
        ("run", run_recipe, "prepare, train all arms, average, translate, score"),
    ):
        command = commands.add_parser(
            name, help=help, description=f"{help}. What is done is kept, an interrupted training resumes."
        )
        command.set_defaults(action=action)
        command.add_argument("recipe", type=Path, help="a recipe.yaml")
        add_data_options(command)
    command.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of initialization, order and dropout in all arms (default: %(default)s)",
    )
    command.add_argument("--arms", nargs="+", help="arms of the recipe to run (default: all)")
    command.add_argument(
        "--jobs",
        type=int,
        help="trainings side by side (default: 1 on a GPU, else one a core)",
    )
    return main


def add_data_options(command) -> None:
    """Options that decide the data, and where it comes from and goes to."""
    data = command.add_argument_group("data")
    data.add_argument("--raw-dir", type=Path, help="folder of the recipe's files or archives (default: download them)")
    data.add_argument(
        "--download-dir",
        type=Path,
        default=DOWNLOADS,
        help="where downloads are kept, for all recipes (default: %(default)s)",
    )
    data.add_argument("--work-dir", type=Path, help="where everything goes (default: runs/NAME OF RECIPE)")
    data.add_argument("--overwrite", action="store_true", help="prepare anew, in place of what is prepared there")
    data.add_argument("--reverse", action="store_true", help="turn source and target round")
    data.add_argument(
        "--modern",
        action="store_true",
        help="in place of the recipe's own preparation: raw cased text into SentencePiece with NFKC and byte fallback",
    )
    data.add_argument(
        "--bitext",
        nargs="+",
        metavar="FILE",
        help="for examples/own: your text, two files or a tab-separated one, plain or .gz",
    )
    data.add_argument("--source", metavar="LANG", help="language of the first side (default: the suffix of its file)")
    data.add_argument("--target", metavar="LANG", help="language of the second side (default: the suffix of its file)")
    data.add_argument("--workers", type=int, help="processes to share the work (default: one a core)")


def prepare_data(arguments, recipe: Recipe, work_dir: Path) -> Path:
    """The prepared data; see `prepare`."""
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, got {arguments.workers}")
    options = {name: getattr(arguments, name) for name in ("raw_dir", "download_dir", "workers", "overwrite")}
    return prepare(recipe, work_dir, **options)


def main(argv=None) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_user_error("encourage-mt"):
        arguments.action(arguments)


def open_recipe(arguments) -> "tuple[Recipe, Path]":
    """The recipe, checked, and its work directory, not made yet."""
    recipe = load_recipe(arguments.recipe, arguments.source, arguments.target, arguments.bitext)
    recipe = recipe.turned_round() if arguments.reverse else recipe
    recipe = recipe.modern() if arguments.modern else recipe
    return recipe, (arguments.work_dir or Path("runs") / recipe.name).resolve()


def prepare_recipe(arguments) -> None:
    """`encourage-mt prepare`. Raises UserError on what the user can mend."""
    prepare_data(arguments, *open_recipe(arguments))


def run_recipe(arguments) -> None:
    """`encourage-mt run`. Raises UserError on what the user can mend."""
    started = time.monotonic()
    recipe, work_dir = open_recipe(arguments)
    unknown = set(arguments.arms or []) - set(recipe.arms)
    if unknown:
        raise UserError(f"--arms: the recipe has {', '.join(recipe.arms)}, not {', '.join(sorted(unknown))}")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    arms = list(dict.fromkeys(arguments.arms or recipe.arms))
    gpu = torch.cuda.is_available()
    jobs = arguments.jobs or (1 if gpu else min(len(arms), cores()))
    print(f"{recipe.name} on {torch.cuda.get_device_name() if gpu else f'CPU, {jobs} trainings side by side'}")

    data = prepare_data(arguments, recipe, work_dir)
    runs = [make_run(recipe, arm, arguments.seed, data, work_dir, fp16=gpu) for arm in arms]
    train(runs, jobs, recipe.train["max-epoch"])
    results = [evaluate(run, recipe, data) for run in runs]
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\n{table(results)}\n\nOne seed is a smoke test, not evidence.")
    print(f"Everything lies in {work_dir}: data, logs, checkpoints, translations, scores.json.")
    print(f"Took {minutes}:{seconds:02d} minutes.")
