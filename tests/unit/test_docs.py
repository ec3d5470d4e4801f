"""Check that the documentation is true: links, commands and the example in PyTorch."""

import re
import shlex
from pathlib import Path

import pytest

from encourage_mt.arguments import parse_arguments
from encourage_mt.loss.options import OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = (page.parent / file) if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def commands(page: Path):
    """Yield the words after `encourage-mt` of each command of a page; replace scripts/run.sh etc. by their command."""
    text = "\n".join(blocks(page.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        words = words[words.index("&&") + 1 :] if "&&" in words else words
        words = words[: min((words.index(end) for end in ("|", ">", "<") if end in words), default=len(words))]
        if words[:1] == ["bash"] and words[1].startswith("scripts/"):
            script = ROOT / words[1]
            assert script.exists(), line
            if script.stem in ("run", "prepare"):
                yield [script.stem, f"examples/{words[2]}/recipe.yaml", *words[3:]]
            elif script.stem == "quickstart":
                yield ["run", "examples/bundled_de_en/recipe.yaml", *words[2:]]
        elif words and Path(words[0]).name == "encourage-mt":
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_options_that_exist(page):
    for words in commands(page):
        parse_arguments(words)  # raises UserError for an unknown option
        recipe = words[1] if words[0] in ("run", "prepare", "train") else ""
        assert not recipe.startswith("examples/") or (ROOT / recipe).exists(), words


def test_the_example_in_pytorch_runs():
    (example,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    names = {}
    exec(example, names)
    assert names["loss"].requires_grad and names["logits"].grad.abs().sum() > 0


def test_every_option_of_the_loss_is_documented_with_its_default():
    section = (ROOT / "docs/loss.md").read_text(encoding="utf-8").partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `--([\w-]+)` \| [^|]* \| ([^|;]*)", section, re.MULTILINE)
    documented = {option.replace("-", "_"): default.strip() for option, default in rows}
    assert documented == {name: str(option.default) for name, option in OPTIONS.items()}


def test_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    modules = {str(path.relative_to(ROOT / "encourage_mt")) for path in (ROOT / "encourage_mt").rglob("*.py")}
    assert not {module for module in modules if f"`{module}`" not in text and not module.endswith("__init__.py")}
