"""Run the command `encourage-mt`: from raw text to scores, comparisons and a report."""

# Modules that do the work are imported when it begins, so that --help answers at once.

import logging
import shlex
import sys
import time
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .arguments import parse_arguments
from .environment import USER_DIR, Precision, cores, describe_hardware, visible_gpus
from .errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from .recipe import Recipe
    from .training.launch import Cluster
    from .training.run_folder import Run


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: that of this process)."""
    with exit_on_user_error("encourage-mt"):
        words = sys.argv[1:] if argv is None else argv
        for word in words:
            if any("\ud800" <= char <= "\udfff" for char in word):  # in no JSON file of ours
                raise UserError(f"{ascii(word)}: is not UTF-8; rename the file or folder")
        arguments = parse_arguments(words)
        with log_to_console(sys.stderr if arguments.command == "translate" else sys.stdout):
            try:
                COMMANDS[arguments.command](arguments)
            except ModuleNotFoundError as error:
                raise UserError(f"{error.name} is not installed; docs/install.md says which extra has it") from None


@contextmanager
def log_to_console(stream: TextIO):
    """Print what this package logs in the block on `stream`, without dates or levels."""
    logger = logging.getLogger(__package__)
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # fairseq gives the root logger a handler of its own
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def open_recipe(arguments) -> tuple["Recipe", Path]:
    """Return the checked recipe and its work directory, which need not exist yet.

    The options that a recipe for the user's own text leaves out are chosen for the size of the text. If the work
    directory already has a recipe.yaml with chosen options, that file is used instead.
    """
    from .data.sizing import KEPT, choose, count_characters, count_pairs, describe, describe_kept
    from .recipe import load_recipe

    def load(path: Path, chosen: dict | None) -> "Recipe":
        text = arguments.source, arguments.target, arguments.bitext
        recipe = load_recipe(path, *text, chosen, arguments.set, arguments.add_arm)
        recipe = recipe.reversed() if arguments.reverse else recipe
        return recipe.modern() if arguments.modern else recipe

    recipe = load(arguments.recipe, choose(0, 0))
    work_dir = (arguments.work_dir or Path("runs") / recipe.name).resolve()
    if set(":,") & set(str(work_dir)):  # at which fairseq splits the paths of data and of test sets
        raise UserError(f"--work-dir: fairseq cannot use a path with a colon or a comma, got {work_dir}")
    if recipe.filled is None:
        return recipe, work_dir
    kept = work_dir / KEPT
    if kept.exists():
        print(f"recipe: {describe_kept(kept, arguments.recipe, gpus_of(arguments))}")
        return load(kept, None), work_dir
    gpus, pairs = gpus_of(arguments), count_pairs(recipe, arguments.raw_dir)
    chosen = choose(pairs, gpus, count_characters(recipe, arguments.raw_dir))
    recipe = load(arguments.recipe, chosen)
    print(f"recipe: {describe(recipe, chosen, pairs, gpus)}")
    return recipe, work_dir


def gpus_of(arguments) -> int:
    """Return the GPUs of a training on this machine, 0 if it is a CPU."""
    import torch

    return arguments.gpus if torch.cuda.is_available() else 0


def prepare_data(arguments, recipe: "Recipe", work_dir: Path) -> None:
    """Prepare the data of `recipe` in `work_dir` unless that is done, and write chosen options to its recipe.yaml."""
    from .data.prepare import prepare
    from .data.sizing import KEPT, keep

    options = {name: getattr(arguments, name) for name in ("raw_dir", "download_dir", "workers", "overwrite")}
    prepare(recipe, work_dir, **options)
    if recipe.filled:
        keep(recipe.filled, work_dir, gpus_of(arguments))
        print(f"recipe: wrote the chosen options to {work_dir / KEPT}; later commands use it, so you can edit it")


def run_recipe(arguments) -> None:
    """Carry out `encourage-mt run`."""
    from .evaluation.converted_model import import_ctranslate2
    from .evaluation.evaluate import evaluate_all
    from .evaluation.scoring import metrics
    from .report.page import check_output, write_report
    from .report.tables import arms_table, published_table, runs_table
    from .training.launch import Cluster
    from .training.run_folder import open_run
    from .training.train import make_run, train

    started = time.monotonic()
    recipe, work_dir = open_recipe(arguments)
    added = [text.partition("=")[0] for text in arguments.add_arm]
    arms, seeds = list(dict.fromkeys([*arguments.arms, *added])), list(dict.fromkeys(arguments.seeds))
    check_arms("--arms", arms, recipe)
    gpus = visible_gpus()
    at_a_time = arguments.parallel or max(1, (len(gpus) or cores()) // arguments.gpus)
    parallel = min(at_a_time, len(arms) * len(seeds))
    cluster = Cluster(choose_precision(arguments), arguments.gpus)
    data = work_dir / "data"
    runs = [make_run(recipe, arm, seed, data, work_dir, cluster.precision) for seed in seeds for arm in arms]
    if not start_trainings(arguments, recipe, runs, cluster, parallel):
        return
    # what fails below would fail after the trainings otherwise
    metrics(recipe.target)
    reports = {arm: work_dir / f"report-{arms[0]}-{arm}" for arm in arms[1:]}
    for folder in reports.values():
        check_output(folder)
    if arguments.engine == "ctranslate2":
        import_ctranslate2()
    print(f"{recipe.name} on {describe_hardware()}, {parallel} runs at a time")
    prepare_data(arguments, recipe, work_dir)
    print_schedules(runs, cluster)
    train(runs, cluster, parallel)
    runs = [open_run(run.folder) for run in runs]  # with the provenance that was recorded
    results = evaluate_all(runs, engine=arguments.engine)
    print(f"\n{runs_table(results)}\n")
    groups = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    comparisons = []
    for arm, output in reports.items():
        # an arm may have its own training options, which the comparison lists
        own_options = bool(recipe.arm_differences(arms[0]) or recipe.arm_differences(arm))
        comparisons.append(write_report(groups[arms[0]], groups[arm], output, allow_differences=own_options))
        print(f"\n{comparisons[-1].markdown()}\nReport: {output / 'report.html'}")
    if len(seeds) > 1 or len(arms) > 2:  # otherwise the comparison says it all
        print(f"\n{arms_table(results, comparisons)}")
    if recipe.published:
        print(f"\n{published_table(recipe, results)}")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nData, logs, checkpoints, translations, scores.json and reports are in {work_dir}.")
    print(f"Took {minutes}:{seconds:02d} minutes.")


def train_one(arguments) -> None:
    """Carry out `encourage-mt train`."""
    from .data.prepare import check_prepared
    from .training.launch import Cluster
    from .training.train import make_run, train

    recipe, work_dir = open_recipe(arguments)
    check_arms("--arm", [arguments.arm], recipe)
    cluster = Cluster(choose_precision(arguments), arguments.gpus, arguments.nodes, arguments.node, arguments.master)
    if cluster.nodes > 1 and arguments.overwrite:  # which prepare nothing: one would replace what the others read
        raise UserError("--overwrite: use it with `encourage-mt prepare`, once before training on several machines")
    data = work_dir / "data"
    run = make_run(recipe, arguments.arm, arguments.seed, data, work_dir, cluster.precision)
    if not start_trainings(arguments, recipe, [run], cluster, 1):
        return
    if cluster.nodes == 1:
        prepare_data(arguments, recipe, work_dir)
    else:
        check_prepared(recipe, work_dir, arguments.raw_dir, arguments.download_dir)
    print_schedules([run], cluster)
    train([run], cluster, 1)
    print(f"Trained: {run.folder}. To score it: encourage-mt evaluate {run.folder}")


def check_arms(option: str, arms: list[str], recipe: "Recipe") -> None:
    """Raise UserError if the recipe lacks one of the arms."""
    for arm in arms:
        if arm not in recipe.arms:
            raise UserError(f"{option}: the recipe has no arm {arm}; it has {', '.join(recipe.arms)}")


def choose_precision(arguments) -> Precision:
    """Return the precision asked for, otherwise the default of this machine."""
    import torch

    return arguments.precision or ("fp16" if torch.cuda.is_available() else "fp32")


def start_trainings(arguments, recipe: "Recipe", runs: list["Run"], cluster: "Cluster", parallel: int) -> bool:
    """Print the tokens per update. Return whether to train; with --dry-run print the commands instead.

    Raises UserError if the recipe's options or this machine do not allow the trainings.
    """
    from .recipe import check_train_options
    from .training.launch import hydra_config, launch_command, report_effective_batch

    for line in dict.fromkeys(report_effective_batch(run.options, cluster) for run in runs):
        print(line)
    check_train_options(recipe)
    if not arguments.dry_run:
        cluster.check_machine(parallel)
        return True
    for run in runs:
        print(shlex.join(launch_command(run, cluster)))
        if cluster.precision == "bf16":
            print(f"with {cluster.hydra_file(run.folder)}:\n{hydra_config(run)}")
    return False


def print_schedules(runs: list["Run"], cluster: "Cluster") -> None:
    """Print the updates of the runs that are not trained yet. Raises UserError if their batches are too small."""
    from .training.schedule import describe_schedules

    for line in describe_schedules([run for run in runs if not run.is_done], cluster.processes):
        print(line, flush=True)


def evaluate_runs(arguments) -> None:
    """Carry out `encourage-mt evaluate`."""
    from .evaluation.evaluate import evaluate_all
    from .evaluation.scoring import comet_signature
    from .evaluation.tuning import tune
    from .report.tables import runs_table
    from .training.run_folder import open_run

    search = {name: getattr(arguments, name) for name in ("beam", "lenpen", "temperature")}
    given = [f"--{name}" for name, value in search.items() if value is not None]
    if arguments.tune and given:
        raise UserError(f"{given[0]} cannot be used with --tune, which chooses it")
    runs = [open_run(folder, data=arguments.data, average=arguments.average, **search) for folder in arguments.runs]
    if arguments.comet:
        comet_signature(arguments.comet)  # raises an error now rather than after tuning
    if arguments.tune:
        runs = tune(runs)
    print(f"\n{runs_table(evaluate_all(runs, arguments.comet, arguments.engine))}")


def export_run(arguments) -> None:
    """Carry out `encourage-mt export`."""
    from .serving.export import export
    from .training.run_folder import open_run

    export(open_run(arguments.run, data=arguments.data), arguments.output, arguments.quantization)


def translate_text(arguments) -> None:
    """Carry out `encourage-mt translate`: standard output has the translations only."""
    from .serving.translate import Translator, translate_stream

    with redirect_stdout(sys.stderr):
        folder = arguments.model
        if folder.is_dir() and not any((folder / name).exists() for name in ("model.json", "model.bin")):
            from .serving.export import exported
            from .training.run_folder import open_run

            folder = exported(open_run(folder, data=arguments.data))
        translator = Translator(folder, arguments.device, arguments.threads)
    lines = 1 if sys.stdin.isatty() else arguments.batch_size
    options = (arguments.beam, arguments.nbest, arguments.scores)
    translate_stream(translator, sys.stdin.buffer, sys.stdout.buffer, lines, *options)


def measure_robustness(arguments) -> None:
    """Carry out `encourage-mt robustness`."""
    from .files import write_record
    from .robustness.measure import choose, measure
    from .robustness.summary import group, summarize
    from .robustness.tables import markdown
    from .training.run_folder import open_run

    runs = [open_run(folder, data=arguments.data) for folder in arguments.runs]
    arms, differences = group(runs, arguments.allow_differences)
    options = (arguments.tests, arguments.strength, arguments.seed, arguments.ood)
    choices = {run.folder: choose(run.prepared(), *options) for run in runs}
    measured = {
        arm: {seed: measure(run, choices[run.folder]) for seed, run in side.items()} for arm, side in arms.items()
    }
    summary = summarize(measured, differences)
    if arguments.output:
        write_record(arguments.output, summary)
    print(f"\n{markdown(summary)}")


def compare_runs(arguments) -> None:
    """Carry out `encourage-mt compare`."""
    from .evaluation.comparison import compare
    from .evaluation.significance import correct, describe_correction, measures_table
    from .evaluation.words import compare_words

    baseline, candidate = open_sides(arguments)
    comparison = compare(baseline, candidate, arguments.allow_differences)
    print(comparison.markdown())
    words = compare_words([baseline, candidate], list(comparison.tests))
    compared = [each for rows in words.values() for each in rows]
    correct(compared)
    for split, rows in words.items():
        table = measures_table(f"words_{split}", rows, comparison.baseline, comparison.candidate)
        print(f"\n### Words of {split}\n\n{table.markdown()}")
    if compared:
        print(f"\n{describe_correction(compared)}")


def report_runs(arguments) -> None:
    """Carry out `encourage-mt report`."""
    from .report.page import write_report

    baseline, candidate = open_sides(arguments)
    comparison = write_report(baseline, candidate, arguments.output, arguments.allow_differences)
    print(f"\n{comparison.markdown()}\nReport: {arguments.output / 'report.html'}")


def open_sides(arguments) -> list[list["Run"]]:
    """Return the runs of the baseline and those of the candidate. Raises UserError if not all are of --engine."""
    from .evaluation.results import Result
    from .training.run_folder import open_run

    sides = [
        [open_run(folder, data=arguments.data) for folder in side] for side in (arguments.baseline, arguments.candidate)
    ]
    for run in chain(*sides) if arguments.engine else ():
        if (engine := Result.read(run.folder).evaluation.engine) != arguments.engine:
            remedy = f"use `encourage-mt evaluate --engine {arguments.engine} {run.folder}`"
            raise UserError(f"{run.folder}: was translated by {engine}; {remedy}")
    return sides


COMMANDS = {
    "prepare": lambda arguments: prepare_data(arguments, *open_recipe(arguments)),
    "run": run_recipe,
    "train": train_one,
    "evaluate": evaluate_runs,
    "export": export_run,
    "translate": translate_text,
    "robustness": measure_robustness,
    "compare": compare_runs,
    "report": report_runs,
    "user-dir": lambda arguments: print(USER_DIR),
}
