"""The command `encourage-mt`: from raw data to scores, comparisons and a report."""

import argparse
import shlex
import time
from pathlib import Path

import torch

from .data.prepare import DOWNLOADS, prepare
from .environment import cores
from .errors import UserError, exit_on_user_error
from .evaluation.comparison import compare
from .evaluation.evaluate import evaluate
from .recipe import Recipe, load_recipe
from .report.page import write_report
from .report.tables import arms_table, published_table, runs_table
from .training.launch import PRECISIONS, Cluster, hydra_config, launch_command, tokens_per_update, update_freq
from .training.run_folder import Run, open_run
from .training.train import make_run, train


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="encourage-mt", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    def add(name, action, help):
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(action=action)
        return command

    command = add(
        "prepare", prepare_recipe, "raw text to binarized data: check, learn joint subwords, encode, binarize"
    )
    add_recipe(command)

    command = add(
        "run",
        run_recipe,
        "prepare, train all criteria and seeds, average, translate, score, compare, report; what is done is kept, an "
        "interrupted training resumes",
    )
    add_recipe(command)
    add_cluster(command)
    command.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        help="of initialization, order and dropout; each is one training of each criterion (default: 1)",
    )
    command.add_argument(
        "--criteria",
        nargs="+",
        help="arms of the recipe; the others are compared with the first (default: ce el)",
    )
    command.add_argument("--parallel", type=int, help="trainings side by side (default: 1 on a GPU, else one a core)")

    command = add(
        "train",
        train_one,
        "one training on the GPUs of this machine or, started on each, of several; the tokens per update stay those of "
        "the recipe; an interrupted training resumes",
    )
    add_recipe(command)
    add_cluster(command)
    command.add_argument("--criterion", required=True, help="arm of the recipe")
    command.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    command.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    command.add_argument("--node", type=int, default=0, help="number of this machine, from 0 (default: %(default)s)")
    command.add_argument("--master", metavar="HOST:PORT", help="address of machine 0, for several (default: none)")

    command = add("evaluate", evaluate_runs, "average the last checkpoints of runs, translate, score: RUN/scores.json")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a training")
    command.add_argument("--data", type=Path, help="folder made by prepare (default: the one it was trained on)")
    for name, kind, what in (
        ("average", int, "number of last epoch checkpoints to average"),
        ("beam", int, "beam size"),
        ("lenpen", float, "length penalty"),
    ):
        default = f"the recipe's; without one {getattr(Recipe, name)}"
        command.add_argument(f"--{name}", type=kind, help=f"{what} (default: {default})")
    command.add_argument("--comet", type=Path, metavar="CKPT", help="also COMET, with this model on disk (default: no)")

    for name, action, help in (
        ("compare", compare_runs, "per-seed table, paired tests over sentences, test over seeds, verdict"),
        ("report", report_runs, "comparison, learning curves, a look inside the models, translations: one HTML page"),
    ):
        command = add(name, action, help)
        for side in ("baseline", "candidate"):
            command.add_argument(
                f"--{side}", type=Path, nargs="+", required=True, metavar="RUN", help="evaluated runs, one a seed"
            )
        command.add_argument(
            "--allow-differences",
            action="store_true",
            help="compare runs although they differ in more than the criterion (default: refuse, naming what)",
        )
    command.add_argument("--output", type=Path, default=Path("report"), help="folder to make (default: %(default)s)")
    return main


def add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gpus", type=int, default=1, help="of this machine, for each training (default: %(default)s)"
    )
    command.add_argument(
        "--precision", choices=PRECISIONS, help="of the arithmetic in training (default: fp16 on a GPU, fp32 on a CPU)"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print the commands of the trainings and do nothing (default: no)"
    )


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The recipe, and the options that decide its data, and where that comes from and goes to."""
    command.add_argument("recipe", type=Path, help="a recipe.yaml")
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


def open_recipe(arguments) -> tuple[Recipe, Path]:
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
    arms = list(dict.fromkeys(arguments.criteria or ["ce", "el"]))
    seeds = list(dict.fromkeys(arguments.seeds))
    unknown = set(arms) - set(recipe.arms)
    if unknown:
        raise UserError(f"--criteria: the recipe has {', '.join(recipe.arms)}, not {', '.join(sorted(unknown))}")
    if min(seeds) < 0:
        raise UserError(f"--seeds must be 0 or more, got {min(seeds)}")
    if arguments.parallel is not None and arguments.parallel < 1:
        raise UserError(f"--parallel must be at least 1, got {arguments.parallel}")
    gpu = torch.cuda.is_available()
    parallel = min(arguments.parallel or (1 if gpu else max(1, cores() // arguments.gpus)), len(arms) * len(seeds))
    cluster = Cluster(precision_here(arguments), arguments.gpus)
    data = work_dir / "data"
    runs = [make_run(recipe, arm, seed, data, work_dir, cluster.precision) for seed in seeds for arm in arms]
    if arguments.dry_run:
        show_commands(recipe, runs, cluster)
        return
    cluster.check_machine(parallel)
    check_lot(recipe, cluster)
    print(f"{recipe.name} on {torch.cuda.get_device_name() if gpu else 'CPU'}, {parallel} trainings side by side")
    prepare_data(arguments, recipe, work_dir)
    train(runs, recipe, cluster, parallel)
    results = [evaluate(run) for run in runs]
    print(f"\n{runs_table(results)}\n")
    groups = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    comparisons = []
    for arm in arms[1:]:
        comparisons.append(compare(groups[arms[0]], groups[arm]))
        output = work_dir / f"report-{arms[0]}-{arm}"
        write_report(comparisons[-1], groups[arms[0]], groups[arm], output)
        print(f"\n{comparisons[-1].markdown()}\nReport: {output / 'report.html'}")
    if len(seeds) > 1 or len(arms) > 2:  # else the comparison says it all
        print(f"\n{arms_table(results, comparisons)}")
    if recipe.published:
        print(f"\n{published_table(recipe, results)}")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nEverything lies in {work_dir}: data, logs, checkpoints, translations, scores.json, reports.")
    print(f"Took {minutes}:{seconds:02d} minutes.")


def train_one(arguments) -> None:
    """`encourage-mt train`. Raises UserError on what the user can mend."""
    recipe, work_dir = open_recipe(arguments)
    if arguments.criterion not in recipe.arms:
        raise UserError(f"--criterion: the recipe has {', '.join(recipe.arms)}, not {arguments.criterion}")
    cluster = Cluster(precision_here(arguments), arguments.gpus, arguments.nodes, arguments.node, arguments.master)
    data = work_dir / "data"
    run = make_run(recipe, arguments.criterion, arguments.seed, data, work_dir, cluster.precision)
    if arguments.dry_run:
        show_commands(recipe, [run], cluster)
        return
    cluster.check_machine()
    check_lot(recipe, cluster)
    if cluster.nodes == 1:
        prepare_data(arguments, recipe, work_dir)
    elif not data.exists():
        raise UserError(f"{data}: prepare the data once before several machines train on it (encourage-mt prepare)")
    train([run], recipe, cluster, 1)
    print(f"Trained: {run.folder}. Score it: bash scripts/evaluate.sh {run.folder}")


def precision_here(arguments) -> str:
    return arguments.precision or ("fp16" if torch.cuda.is_available() else "fp32")


def check_lot(recipe: Recipe, cluster: Cluster) -> None:
    """Say what each process does. Raises UserError if the processes cannot share the tokens per update."""
    frequency = update_freq(recipe, cluster.processes)
    lot = f"{cluster.processes} x {recipe.train['max-tokens']:,} max-tokens x update-freq {frequency}"
    print(f"{tokens_per_update(recipe):,} tokens per update: {lot}, {cluster.precision}")


def show_commands(recipe: Recipe, runs: list[Run], cluster: Cluster) -> None:
    check_lot(recipe, cluster)
    for run in runs:
        command = shlex.split(run.command)
        print(shlex.join(launch_command(recipe, command, cluster, run.folder)))
        if cluster.precision == "bf16":
            print(f"with {run.folder / 'train.yaml'}:\n{hydra_config(command)}")


def evaluate_runs(arguments) -> None:
    """`encourage-mt evaluate`. Raises UserError on what the user can mend."""
    for name in ("average", "beam"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    changes = {name: getattr(arguments, name) for name in ("data", "average", "beam", "lenpen")}
    runs = [open_run(folder, **changes) for folder in arguments.runs]
    results = [evaluate(run, arguments.comet) for run in runs]
    print(f"\n{runs_table(results)}")


def compare_runs(arguments) -> None:
    """`encourage-mt compare`. Raises UserError on what the user can mend."""
    print(compare(*sides(arguments), arguments.allow_differences).markdown())


def report_runs(arguments) -> None:
    """`encourage-mt report`. Raises UserError on what the user can mend."""
    baseline, candidate = sides(arguments)
    comparison = compare(baseline, candidate, arguments.allow_differences)
    write_report(comparison, baseline, candidate, arguments.output)
    print(f"\n{comparison.markdown()}\nReport: {arguments.output / 'report.html'}")


def sides(arguments):
    return [[open_run(folder) for folder in side] for side in (arguments.baseline, arguments.candidate)]
