"""Check the rules that keep the code easy to find and to read: layers, dependencies, length, wording."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "encourage_mt"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL_MODULES = sorted(
    path
    for folder in ("encourage_mt", "benchmarks", "examples", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
# Modules and sub-packages import from the lines below their own, never from above or beside.
LAYERS = re.findall(r"```\n(.+?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.DOTALL)[0]
LEVELS = {unit: level for level, line in enumerate(reversed(LAYERS.splitlines())) for unit in line.split()}
REQUIREMENTS = {"fairseq_cli": "fairseq", "omegaconf": "fairseq", "yaml": "pyyaml", "comet": "unbabel-comet"}
AVOIDED = re.compile(
    r"\b(told|at hand|goes on|gone on|stands|of which|of those that|but for|to mend|turned round|by far|thereof)\b"
    r"|(?<!thing )(?<!one )(?<!where )\belse\b(?! if)",
    re.IGNORECASE,
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """Yield (line, dotted name) of each import; a relative one as its absolute name."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def test_every_unit_has_a_layer():
    assert {unit_of(path) for path in MODULES} - {"__init__"} <= set(LEVELS)


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent != PACKAGE or path.stem != "__init__"], ids=name
)
def test_imports_go_down_only(path):
    own = unit_of(path)
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "encourage_mt" and len(parts) > 1 and parts[1] in LEVELS:
            assert parts[1] == own or LEVELS[parts[1]] < LEVELS[own], f"{name(path)}:{line} imports {module}"


def test_loss_imports_torch_only():
    allowed = {"torch", "triton", "encourage_mt"} | sys.stdlib_module_names
    for path in (PACKAGE / "loss").rglob("*.py"):
        for line, module in imports(path):
            assert module.split(".")[0] in allowed, f"{name(path)}:{line} imports {module}"


def test_every_dependency_is_declared_and_pinned():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    setup = setup[setup.index("install_requires") :].lower().replace("_", "-")
    declared = set(re.findall(r'"([\w-]+)[^"]*"', setup))
    pins = (ROOT / "scripts/constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.MULTILINE)) | {"fairseq", "liger-kernel", "unbabel-comet"}
    for path in MODULES:
        for line, module in imports(path):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "encourage_mt":
                requirement = REQUIREMENTS.get(top, top.replace("_", "-"))
                assert requirement in declared, f"{name(path)}:{line} imports {module}, which setup.py does not name"
                assert requirement in pinned, f"{requirement} has no line in scripts/constraints.txt"


@pytest.mark.parametrize("path", ALL_MODULES, ids=name)
def test_modules_are_short_and_say_what_they_do(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert len(first) > 20 and first[-1] in ".:", f"{name(path)} begins with {first!r}"


def plain_text(path: Path):
    """Yield (line, text) of the messages of a module and of the first line of each docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstrings.add(node.body[0].value)
            yield node.body[0].lineno, ast.get_docstring(node).split("\n")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", MODULES + sorted((ROOT / "scripts").glob("*.py")), ids=name)
def test_messages_and_first_lines_are_plain_english(path):
    for line, text in plain_text(path):
        found = AVOIDED.search(text)
        assert not found, f"{name(path)}:{line}: write {text!r} without {found[0]!r}"


def test_file_names_of_tests_are_unique():  # pytest imports them all as top-level modules
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
