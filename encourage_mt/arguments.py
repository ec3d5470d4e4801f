"""Define the options of the command `encourage-mt`."""

import argparse
import math
from pathlib import Path
from typing import NoReturn, get_args

from .environment import DOWNLOADS, Engine, Precision
from .errors import UserError

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float16", "int8_bfloat16")  # of CTranslate2
LARGEST = 2**31 - 1  # of a whole number: what libraries take as seed, beam or number of threads
OLD_SPELLINGS = {"--criteria": "--arms", "--criterion": "--arm"}  # of version 0.1


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises UserError if it has a mistake."""
    return build_parser().parse_args([modern_spelling(word) for word in words])


def modern_spelling(word: str) -> str:
    """Return the present name of an option in place of its name in version 0.1."""
    name, equals, value = word.partition("=")
    return OLD_SPELLINGS.get(name, name) + equals + value


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def count(text: str) -> int:
    """Parse a number from 1 on."""
    return whole_number(text, 1)


def index(text: str) -> int:
    """Parse a number from 0 on."""
    return whole_number(text, 0)


def whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
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


def finite_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; heavy modules stay out, so that --help answers at once."""
    parser = Parser(prog="encourage-mt", description="Train, compare and use translation models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, help):
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    command = add("prepare", "turn raw text into the binarized data that fairseq trains on")
    add_recipe_options(command)
    command.set_defaults(set=[], add_arm=[], gpus=1)

    command = add(
        "run",
        "prepare the data, train all arms and seeds, translate, score, compare and report; finished steps are skipped "
        "and interrupted trainings resume",
    )
    add_recipe_options(command)
    add_changes(command)
    add_cluster_options(command)
    command.add_argument(
        "--seeds",
        type=index,
        nargs="+",
        default=[1],
        metavar="SEED",
        help="random seeds; each arm is trained once with each seed (default: 1)",
    )
    command.add_argument(
        "--arms",
        nargs="+",
        default=["ce", "el"],
        metavar="ARM",
        help="arms of the recipe; the others, and added ones, are compared with the first (default: ce el)",
    )
    command.add_argument(
        "--parallel",
        type=count,
        metavar="N",
        help="trainings at a time (default: as many as fit on the GPUs, or cores, with --gpus each)",
    )
    add_engine(command)

    command = add(
        "train",
        "train one arm with one seed, on one machine or on several (start it on each); the tokens per update are those "
        "of the recipe on any number of GPUs; an interrupted training resumes",
    )
    add_recipe_options(command)
    add_changes(command)
    add_cluster_options(command)
    command.add_argument("--arm", required=True, help="arm of the recipe (required)")
    command.add_argument("--seed", type=index, default=1, help="random seed (default: %(default)s)")
    command.add_argument(
        "--nodes", type=count, default=1, metavar="N", help="number of machines (default: %(default)s)"
    )
    command.add_argument(
        "--node", type=index, default=0, metavar="N", help="number of this machine, from 0 (default: %(default)s)"
    )
    command.add_argument(
        "--master", metavar="HOST:PORT", help="address of machine 0; needed for several machines (default: none)"
    )

    command = add("evaluate", "average the last checkpoints of each run, translate and score; writes scores.json")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a training")
    add_data_option(command)
    for name, kind, meaning in (
        ("average", count, "number of last epoch checkpoints to average"),
        ("beam", count, "beam size"),
        ("lenpen", finite_number, "length penalty"),
    ):
        command.add_argument(f"--{name}", type=kind, metavar="N", help=f"{meaning} (default: as the recipe says)")
    add_engine(command)
    command.add_argument(
        "--comet", type=Path, metavar="CKPT", help="also score with the COMET model in this file (default: none)"
    )

    command = add(
        "export", "write one folder that translates without fairseq, after checking that it translates as the run does"
    )
    command.add_argument("run", type=Path, metavar="RUN", help="folder of an evaluated training")
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="MODEL",
        help="folder to make; an earlier export there is replaced (required)",
    )
    command.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="float32",
        help="type of the stored weights; int8 is smaller and faster and changes some translations "
        "(default: %(default)s)",
    )

    add_translate(add("translate", "translate standard input, line by line, to standard output"))

    add_robustness(
        add(
            "robustness",
            "measure how translations change under noise, and whether a model's confidence shows that a text is "
            "foreign to it; runs are grouped by arm and compared with the first; finished steps are skipped",
        )
    )

    for name, help in (
        ("compare", "compare runs: scores of each seed, tests over sentences and over seeds, a verdict"),
        ("report", "compare runs and write one HTML page with charts, diagnostics and translations"),
    ):
        command = add(name, help)
        for side in ("baseline", "candidate"):
            command.add_argument(
                f"--{side}",
                type=Path,
                nargs="+",
                required=True,
                metavar="RUN",
                help=f"evaluated runs of the {side}, one per seed (required)",
            )
        add_data_option(command)
        add_allow_differences(command)
    command.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="folder to make; an earlier report there is replaced (default: %(default)s)",
    )

    add("user-dir", 'print the folder for the --user-dir of fairseq\'s commands: --user-dir "$(encourage-mt user-dir)"')
    return parser


def add_translate(command: argparse.ArgumentParser) -> None:
    """Add the options of `encourage-mt translate`."""
    command.add_argument(
        "model", type=Path, metavar="MODEL|RUN", help="folder of an export, or of an evaluated run, which is exported"
    )
    command.add_argument("--beam", type=count, metavar="N", help="beam size (default: as the run was scored)")
    command.add_argument(
        "--nbest",
        type=count,
        default=1,
        metavar="N",
        help="translations of each line, best first (default: %(default)s)",
    )
    command.add_argument(
        "--scores",
        action="store_true",
        help="write the score, as fairseq-generate does, and a tab before each translation (default: no)",
    )
    command.add_argument(
        "--batch-size",
        type=count,
        default=256,
        metavar="N",
        help="lines to read and translate together; 1 answers each line at once (default: %(default)s)",
    )
    command.add_argument("--threads", type=count, metavar="N", help="threads on a CPU (default: one per core)")
    command.add_argument(
        "--device",
        choices=["cpu", "cuda", "auto"],
        default="auto",
        help="auto is a GPU if there is one (default: auto)",
    )


def add_engine(command: argparse.ArgumentParser) -> None:
    """Add the choice of the engine that translates."""
    command.add_argument(
        "--engine",
        choices=get_args(Engine),
        default="fairseq",
        help="program that translates; ctranslate2 is faster and needs the extra serving (default: %(default)s)",
    )


def add_data_option(command: argparse.ArgumentParser) -> None:
    """Add --data, for runs whose data is not where it was when they were trained."""
    command.add_argument("--data", type=Path, help="folder of the prepared data (default: the data of the training)")


def add_allow_differences(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare even if the runs differ in more than the criterion (default: refuse, naming them)",
    )


def add_robustness(command: argparse.ArgumentParser) -> None:
    """Add the options of `encourage-mt robustness`."""
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of an evaluated training")
    add_data_option(command)
    command.add_argument(
        "--strength",
        type=percentage,
        nargs="+",
        default=[10, 20],
        metavar="PERCENT",
        help="percentages of the words with an error, each measured (default: 10 20)",
    )
    command.add_argument("--seed", type=index, default=1, help="seed of the noise (default: %(default)s)")
    command.add_argument("--tests", nargs="+", default=[], metavar="SET", help="test sets to measure (default: all)")
    command.add_argument(
        "--ood",
        type=named_file,
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="foreign text in place of the source, one sentence a line (default: only shuffled words and text in the "
        "target language, both made from the test set)",
    )
    command.add_argument(
        "--output", type=new_file, metavar="FILE", help="write the summary as JSON (default: print only)"
    )
    add_allow_differences(command)


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    """Add the recipe, and the options for its data: where the files are, how to prepare them, and where to write."""
    command.add_argument("recipe", type=Path, help="a recipe.yaml")
    data = command.add_argument_group("data")
    data.add_argument(
        "--raw-dir",
        type=Path,
        metavar="DIR",
        help="folder with the recipe's files or archives (default: download them)",
    )
    data.add_argument(
        "--download-dir",
        type=Path,
        default=DOWNLOADS,
        metavar="DIR",
        help="folder where downloads are kept for all recipes (default: %(default)s)",
    )
    data.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="folder for everything that is made (default: runs/NAME OF RECIPE)"
    )
    data.add_argument(
        "--overwrite", action="store_true", help="prepare again and replace the prepared data (default: keep it)"
    )
    data.add_argument("--reverse", action="store_true", help="swap source and target language (default: no)")
    data.add_argument(
        "--modern",
        action="store_true",
        help="prepare cased text with SentencePiece, NFKC and byte fallback, without a tokenizer (default: as the "
        "recipe says)",
    )
    data.add_argument(
        "--bitext",
        nargs="+",
        metavar="FILE",
        help="your own text for examples/own: two files or a tab-separated one, plain or .gz (default: none)",
    )
    for option, side in (("--source", "first"), ("--target", "second")):
        data.add_argument(
            option, metavar="LANG", help=f"language of the {side} side of --bitext (default: suffix of its file)"
        )
    data.add_argument(
        "--workers", type=count, metavar="N", help="processes that share the preparation (default: one per core)"
    )


def add_changes(command: argparse.ArgumentParser) -> None:
    """Add the options that change a recipe."""
    changes = command.add_argument_group("changes of the recipe")
    changes.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of fairseq-train or of the criterion, for all arms, or average, beam or lenpen; for example "
        "lr=0.001 max-epoch=20 (default: as the recipe says)",
    )
    changes.add_argument(
        "--add-arm",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=ARM,OPTION=VALUE",
        help="arms made from another one; for example el_025=el,log-end=0.25 (default: none)",
    )


def add_cluster_options(command: argparse.ArgumentParser) -> None:
    """Add the options for the GPUs and the precision of each training."""
    command.add_argument(
        "--gpus", type=count, default=1, metavar="N", help="GPUs per training on each machine (default: %(default)s)"
    )
    command.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="arithmetic in training (default: fp16 on a GPU, fp32 on a CPU)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only print the commands of the trainings (default: no)"
    )
