"""Define the command line of `encourage-mt`."""

import argparse
import math
from pathlib import Path
from typing import NoReturn, get_args

from . import __version__
from .environment import DOWNLOADS, Engine, Precision
from .errors import UserError

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float16", "int8_bfloat16")  # of CTranslate2
LARGEST = 2**31 - 1  # of a whole number: what libraries take as seed, beam or number of threads
OLD_SPELLINGS = {"--criteria": "--arms", "--criterion": "--arm"}  # of version 0.1


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises UserError if it has a mistake."""
    return build_parser().parse_args([modern_spelling(word) for word in words])


def modern_spelling(word: str) -> str:
    """Return an option with its name of version 0.1 replaced by the current one."""
    name, equals, value = word.partition("=")
    return OLD_SPELLINGS.get(name, name) + equals + value


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def index(text: str) -> int:
    """Parse a whole number of at least 0."""
    return count(text, least=0)


def count(text: str, least: int = 1) -> int:
    """Parse a whole number of at least `least`."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST:,}, got {text[:20]!r}")
    return value


def percentage(text: str) -> int:
    """Parse a whole number from 1 to 100."""
    value = count(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"must be a percentage from 1 to 100, got {text!r}")
    return value


def named_file(text: str) -> tuple[str, Path]:
    """Parse NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name.strip() and name.isprintable() and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got {text!r}")
    return name.strip(), Path(path)


def new_file(text: str) -> Path:
    """Parse the path of a file to write."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def finite_number(text: str, above: float = -math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not above < value < math.inf:
        limit = "" if above == -math.inf else f" above {above}"
        raise argparse.ArgumentTypeError(f"must be a number{limit}, got {text!r}")
    return value


def positive_number(text: str) -> float:
    return finite_number(text, above=0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; heavy modules stay out, so that --help answers at once."""
    parser = Parser(prog="encourage-mt", description="Train, compare and use translation models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, help):
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    command = add("prepare", "turn raw text into the binarized data that fairseq trains on")
    add_recipe_options(command)
    text = "GPUs that each training will have; decides the sizes that are chosen for your own text (default: "
    text += "%(default)s; on a machine without a GPU, the sizes for a CPU)"
    command.add_argument("--gpus", type=count, default=1, metavar="N", help=text)
    command.set_defaults(set=[], add_arm=[])

    command = add(
        "run",
        "prepare the data, train every arm with every seed, translate, score, compare and write a report; skip "
        "finished steps and resume interrupted ones",
    )
    add_recipe_options(command)
    add_changes(command)
    add_cluster_options(command)
    text = "random seeds; every arm is trained with every seed (default: 1)"
    command.add_argument("--seeds", type=index, nargs="+", default=[1], metavar="SEED", help=text)
    text = "arms of the recipe to train (an arm is a criterion with its options); the first is the baseline of all "
    text += "comparisons (default: ce el)"
    command.add_argument("--arms", nargs="+", default=["ce", "el"], metavar="ARM", help=text)
    text = "number of runs to train at a time (default: as many as the GPUs allow; without a GPU, one per core)"
    command.add_argument("--parallel", type=count, metavar="N", help=text)
    add_engine(command)

    command = add(
        "train",
        "train one arm with one seed, or resume an interrupted training, on one machine or several (start the command "
        "on each); the number of tokens per update does not depend on the number of GPUs",
    )
    add_recipe_options(command)
    add_changes(command)
    add_cluster_options(command)
    command.add_argument("--arm", required=True, help="arm of the recipe, a criterion with its options (required)")
    command.add_argument("--seed", type=index, default=1, help="random seed (default: %(default)s)")
    text = "number of machines (default: %(default)s)"
    command.add_argument("--nodes", type=count, default=1, metavar="N", help=text)
    text = "index of this machine, from 0 (default: %(default)s)"
    command.add_argument("--node", type=index, default=0, metavar="N", help=text)
    text = "address of machine 0; required for several machines (default: none)"
    command.add_argument("--master", metavar="HOST:PORT", help=text)

    command = add("evaluate", "average the last checkpoints of each run, translate, score and write scores.json")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    add_data_option(command)
    for name, kind, meaning in (
        ("average", count, "number of last epoch checkpoints to average (default: as in the recipe, otherwise 10)"),
        ("beam", count, "beam size (default: as in the recipe, otherwise 5)"),
        ("lenpen", finite_number, "length penalty, as in fairseq-generate (default: as in the recipe, otherwise 1.0)"),
        ("temperature", positive_number, "number that divides the logits of the averaged model (default: 1.0)"),
    ):
        command.add_argument(f"--{name}", type=kind, metavar="N", help=meaning)
    tune = "choose beam, length penalty and temperature of each arm by its mean BLEU on valid (default: no)"
    command.add_argument("--tune", action="store_true", help=tune)
    add_engine(command)
    text = "also compute COMET with this model, a .ckpt file of unbabel-comet (default: no COMET)"
    command.add_argument("--comet", type=Path, metavar="CKPT", help=text)

    command = add(
        "export", "convert a run into a folder that translates without fairseq, and verify that its translations agree"
    )
    command.add_argument("run", type=Path, metavar="RUN", help="folder of an evaluated run")
    add_data_option(command)
    text = "folder to make; an earlier export there is replaced (required)"
    command.add_argument("--output", type=Path, required=True, metavar="MODEL", help=text)
    text = "type of the weights; int8 is smaller and changes many translations (default: %(default)s)"
    command.add_argument("--quantization", choices=QUANTIZATIONS, default="float32", help=text)

    add_translate(add("translate", "translate standard input to standard output, line by line"))

    add_robustness(
        add(
            "robustness",
            "measure how translations change under noise, and how well a model's confidence detects "
            "out-of-distribution text; every arm is compared with the first; finished steps are skipped",
        )
    )

    for name, help in (
        (
            "compare",
            "compare two groups of runs: scores of each seed, significance over sentences and over seeds, a verdict",
        ),
        ("report", "compare two groups of runs and write an HTML page with charts, diagnostics and translations"),
    ):
        command = add(name, help)
        for side in ("baseline", "candidate"):
            text = f"folders of evaluated runs of the {side}, one per seed (required)"
            command.add_argument(f"--{side}", type=Path, nargs="+", required=True, metavar="RUN", help=text)
        add_data_option(command)
        add_allow_differences(command)
        text = "require that this program translated all runs (default: any program, but the same for all runs)"
        command.add_argument("--engine", choices=get_args(Engine), help=text)
    text = "folder to make; an earlier report there is replaced (default: %(default)s)"
    command.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help=text)

    add("user-dir", 'print the folder of the fairseq plugin, for fairseq-train --user-dir "$(encourage-mt user-dir)"')
    return parser


def add_translate(command: argparse.ArgumentParser) -> None:
    """Add the options of `encourage-mt translate`."""
    text = "folder of an export, or of an evaluated run, which is exported (--data is for a run only)"
    command.add_argument("model", type=Path, metavar="MODEL|RUN", help=text)
    add_data_option(command)
    command.add_argument("--beam", type=count, metavar="N", help="beam size (default: that of the evaluation)")
    text = "number of translations per line, best first (default: %(default)s)"
    command.add_argument("--nbest", type=count, default=1, metavar="N", help=text)
    text = "write the score, as in fairseq-generate, and a tab before each translation (default: no)"
    command.add_argument("--scores", action="store_true", help=text)
    text = "number of lines to translate together; 1 translates each line as it arrives (default: %(default)s)"
    command.add_argument("--batch-size", type=count, default=256, metavar="N", help=text)
    threads = "number of CPU threads (default: OMP_NUM_THREADS, otherwise one per core)"
    command.add_argument("--threads", type=count, metavar="N", help=threads)
    text = "auto uses a GPU if there is one (default: auto)"
    command.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto", help=text)


def add_engine(command: argparse.ArgumentParser) -> None:
    """Add the choice of the engine that translates."""
    text = "program that translates; ctranslate2 is faster but needs the extra serving (default: %(default)s)"
    command.add_argument("--engine", choices=get_args(Engine), default="fairseq", help=text)


def add_data_option(command: argparse.ArgumentParser) -> None:
    """Add --data, for runs whose data was moved since they were trained."""
    command.add_argument("--data", type=Path, help="folder of the prepared data (default: the data of the training)")


def add_allow_differences(command: argparse.ArgumentParser) -> None:
    text = "compare even if the runs differ in more than the criterion, or two seeds have the same model (default: "
    text += "stop and name the difference)"
    command.add_argument("--allow-differences", action="store_true", help=text)


def add_robustness(command: argparse.ArgumentParser) -> None:
    """Add the options of `encourage-mt robustness`."""
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of an evaluated run")
    add_data_option(command)
    text = "percentages of the words to change; each is measured (default: 10 20)"
    command.add_argument("--strength", type=percentage, nargs="+", default=[10, 20], metavar="PERCENT", help=text)
    command.add_argument("--seed", type=index, default=1, help="seed of the noise (default: %(default)s)")
    command.add_argument("--tests", nargs="+", default=[], metavar="SET", help="test sets to measure (default: all)")
    text = "out-of-distribution text, one sentence per line, besides the two sets made from each test set: shuffled "
    text += "words, and text in the target language (default: none)"
    command.add_argument("--ood", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help=text)
    text = "also write the summary as JSON (default: only print it)"
    command.add_argument("--output", type=new_file, metavar="FILE", help=text)
    add_allow_differences(command)


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    """Add the recipe, and the options for its data: where the files are, how to prepare them, and where to write."""
    command.add_argument("recipe", type=Path, help="path of a recipe.yaml")
    data = command.add_argument_group("data")
    text = "folder that has the files or archives of the corpus (default: download them; for a recipe without urls, "
    text += "the folder of the recipe)"
    data.add_argument("--raw-dir", type=Path, metavar="DIR", help=text)
    text = "folder for downloads, shared by all recipes (default: %(default)s)"
    data.add_argument("--download-dir", type=Path, default=DOWNLOADS, metavar="DIR", help=text)
    text = "folder for all output (default: runs/NAME, with the name of the recipe)"
    data.add_argument("--work-dir", type=Path, metavar="DIR", help=text)
    data.add_argument("--overwrite", action="store_true", help="replace existing prepared data (default: keep it)")
    data.add_argument("--reverse", action="store_true", help="swap source and target language (default: no)")
    text = "use raw cased text and SentencePiece with NFKC and byte fallback, no Moses (default: as in the recipe)"
    data.add_argument("--modern", action="store_true", help=text)
    text = "your own text, for examples/own: two files, or one tab-separated file, plain or .gz (default: none)"
    data.add_argument("--bitext", nargs="+", metavar="FILE", help=text)
    for option, side in (("--source", "first"), ("--target", "second")):
        text = f"language of the {side} side of --bitext (default: the suffix of its file)"
        data.add_argument(option, metavar="LANG", help=text)
    text = "number of processes for the preparation (default: one per core)"
    data.add_argument("--workers", type=count, metavar="N", help=text)


def add_changes(command: argparse.ArgumentParser) -> None:
    """Add the options that change a recipe."""
    changes = command.add_argument_group("changes to the recipe")
    text = (
        "set options of fairseq-train, of the criterion (in arms whose criterion has them), or average, beam or lenpen"
    )
    text += "; an arm's own training options and its own average take precedence; for example lr=0.001 max-epoch=20 "
    text += "(default: as in the recipe)"
    changes.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=text)
    changes.add_argument(
        "--add-arm",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=ARM,OPTION=VALUE",
        help="add copies of arms with changed options; for example el_030=el,log-end=0.3 (default: none)",
    )


def add_cluster_options(command: argparse.ArgumentParser) -> None:
    """Add the options for the GPUs and the precision of each training."""
    text = "GPUs per run, on each machine (default: %(default)s)"
    command.add_argument("--gpus", type=count, default=1, metavar="N", help=text)
    text = "floating-point format in training (default: fp16 on a GPU, fp32 on a CPU)"
    command.add_argument("--precision", choices=get_args(Precision), help=text)
    command.add_argument("--dry-run", action="store_true", help="only print the training commands (default: no)")
