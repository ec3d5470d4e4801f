"""Test the command line: quick help, mistakes in one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, refused, run

from encourage_mt import __version__, processes
from encourage_mt.arguments import build_parser
from encourage_mt.cli import main
from encourage_mt.environment import USER_DIR

COMMANDS = ["prepare", "run", "train", "evaluate", "export", "translate", "robustness", "compare", "report"]
HEAVY = ["torch", "fairseq", "matplotlib", "sacrebleu", "pydantic", "numpy", "yaml", "scipy", "sentencepiece"]


def test_help_imports_nothing_heavy():
    code = "import sys; from encourage_mt.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--arms" in done.stdout and done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_user_dir_is_printed_at_once_from_any_folder(tmp_path):
    """Without heavy imports, in the package that is imported."""
    code = "import sys; from encourage_mt.cli import main; main(['user-dir'])\n"
    code += f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(USER_DIR), "HEAVY []"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"encourage-mt {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_with_its_default(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = [word for word in text.split(" options: ")[1].split() if word.startswith("--")]
    assert text.count("(default: ") + text.count("(required)") >= len(set(options)) - 1, "all but --help"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["run"], "recipe"),
        (["run", "r.yaml", "--seeds=-1"], "--seeds"),
        (["run", "r.yaml", "--parallel", "0"], "--parallel"),
        (["run", "r.yaml", "--workers", "1.5"], "--workers"),
        (["evaluate", "x", "--beam", "0"], "--beam"),
        (["evaluate", "x", "--average", "-1"], "--average"),
        (["evaluate", "x", "--lenpen", "nan"], "--lenpen"),
        (["export", "x"], "--output"),
        (["export", "x", "--output", "y", "--quantization", "int4"], "--quantization"),
        (["translate", "x", "--nbest", "0"], "--nbest"),
        (["translate", "x", "--device", "tpu"], "--device"),
        (["translate", "x", "--batch-size", "0"], "--batch-size"),
        (["translate", "x", "--beam", "9" * 20], "--beam"),
        (["robustness", "x", "--seed", "9" * 5000], "--seed"),
        (["robustness", "x", "--strength", "abc"], "--strength"),
        (["robustness", "x", "--ood", "\udcff=file"], "UTF-8"),
        (["robustness", "x", "--output", "/"], "--output"),
        (["robustness", "x", "--output", "nowhere/file"], "--output"),
        (["evaluate", "x", "--lenpen", "--user-dir=evil"], "--lenpen"),
        (["compare", "--baseline", "x"], "--candidate"),
        (["launch"], "launch"),
    ],
)
def test_a_mistake_is_one_line(words, expected, capsys):
    assert expected in refused(capsys, *words)


@pytest.mark.parametrize(
    "streams, code, expected", [("<&-", 0, ""), (">&-", 0, ""), ("<&- >&- 2>&-", 0, ""), (">/dev/full", 2, "No space")]
)
def test_streams_that_are_closed_or_full_end_without_a_traceback(streams, code, expected):
    done = run("sh", "-c", f"exec {processes.program_path('encourage-mt')} user-dir {streams}", code=code)
    assert expected in done.stderr and done.stderr.count("\n") == bool(expected)


def test_output_in_another_encoding_is_not_a_traceback():
    code = "from encourage_mt.errors import exit_on_user_error\nwith exit_on_user_error('x'): print('±')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert run(sys.executable, "-c", code, env=environment, cwd=ROOT).stdout == "\\xb1\n"
