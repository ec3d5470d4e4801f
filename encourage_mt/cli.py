"""The command `encourage-mt`: run a recipe from raw data to a table of scores."""

import argparse
import time
from pathlib import Path

import torch

from .errors import UserError, exit_on_user_error
from .prepare import prepare
from .recipe import load_recipe
from .scoring import evaluate, table
from .training import make_run, train


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="encourage-mt", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="prepare, train all arms, average, translate, score",
        description="Prepare data, train all arms of a recipe, average, translate and score. Done steps are kept, "
        "an interrupted training resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("recipe", type=Path, help="a recipe.yaml")
    run.add_argument("--raw-dir", type=Path, help="folder that has the recipe's files; else they are downloaded")
    run.add_argument("--work-dir", type=Path, help="where everything goes; without it, runs/<recipe name>")
    run.add_argument("--seed", type=int, default=1, help="of initialization, order and dropout; the same for all arms")
    run.add_argument("--arms", nargs="+", help="arms of the recipe to run; all if not given")
    run.add_argument(
        "--jobs", type=int, help="trainings side by side; without it, 1 on a GPU, else all arms, one core each at least"
    )
    return main


def main(argv=None) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_user_error("encourage-mt"):
        run_recipe(arguments)


def run_recipe(arguments) -> None:
    """The steps of `encourage-mt run`. Raises UserError on what the user can mend."""
    started = time.monotonic()
    recipe = load_recipe(arguments.recipe)
    unknown = set(arguments.arms or []) - set(recipe.arms)
    if unknown:
        raise UserError(f"--arms: the recipe has {', '.join(recipe.arms)}, not {', '.join(sorted(unknown))}")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    arms = arguments.arms or list(recipe.arms)
    work_dir = (arguments.work_dir or Path("runs") / recipe.name).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    jobs = arguments.jobs or (1 if gpu else min(len(arms), torch.get_num_threads()))
    print(f"{recipe.name} on {torch.cuda.get_device_name() if gpu else f'CPU, {jobs} trainings side by side'}")

    data = prepare(recipe, work_dir, arguments.raw_dir)
    runs = [make_run(recipe, arm, arguments.seed, data, work_dir, fp16=gpu) for arm in arms]
    train(runs, jobs, recipe.train["max-epoch"])
    results = [evaluate(run, recipe, data) for run in runs]
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\n{table(results)}\n\nOne seed is a smoke test, not evidence.")
    print(
        f"Everything lies in {work_dir}: data, logs, checkpoints, translations, scores.json. {minutes}:{seconds:02d} min."
    )
