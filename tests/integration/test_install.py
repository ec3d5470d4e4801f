"""Build a wheel, install it outside the repository, and use it there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run

ROOT = Path(__file__).parents[2]
EXTRAS = (
    "fairseq matplotlib jinja2 pooch pydantic yaml regex requests sacrebleu sacremoses scipy sentencepiece subword_nmt"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment variables for a process that imports the installed wheel, from a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("wheel")
    target = folder / "site packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    (folder / "source").mkdir()
    for item in ("encourage_mt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):  # build/ stays out of this copy
        subprocess.run(["cp", "-r", ROOT / item, folder / "source"], check=True)
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, *folder.glob("*.whl"))
    return {**os.environ, "PYTHONPATH": str(target)}


WITHOUT_EXTRAS = f"""
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name in {EXTRAS.split()}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from encourage_mt import EncouragingLoss
from encourage_mt.loss.native import unavailable
loss = EncouragingLoss()(torch.zeros(1, 4), torch.tensor([0])).item()
print(loss, unavailable() or "compiled", sys.modules["encourage_mt"].__file__, sep="|")
"""


def test_loss_needs_torch_only(installed, tmp_path):
    output = run(sys.executable, "-c", WITHOUT_EXTRAS, env=installed, cwd=tmp_path).stdout
    loss, native, file = output.split("|")
    assert float(loss) == pytest.approx(1.3862944 - 0.2876821, abs=1e-6)  # log 4 + log(1 - 1/4)
    assert (native == "compiled") == bool(shutil.which("g++"))
    assert file.startswith(installed["PYTHONPATH"])


def test_wheel_has_template_sources_and_types(installed):
    package = Path(installed["PYTHONPATH"]) / "encourage_mt"
    data = {path.relative_to(ROOT / "encourage_mt") for path in (ROOT / "encourage_mt").rglob("*") if path.is_file()}
    data = {path for path in data if path.suffix in (".j2", ".cpp", ".h", ".typed", ".py")}
    assert Path("report/page.html.j2") in data
    assert {path for path in data if not (package / path).exists()} == set()


def test_installed_package_is_a_user_dir(installed, tmp_path):
    package = run("encourage-mt", "user-dir", env=installed, cwd=tmp_path).stdout.rstrip("\n")
    assert package == str(Path(installed["PYTHONPATH"]) / "encourage_mt")
    argv = ("fairseq-train", tmp_path, "--user-dir", package, "--criterion", "label_smoothed_encouraging_loss")
    error = run(*argv, "--arch", "transformer", "--log-end", "2", code=2, env=installed, cwd=tmp_path).stderr
    assert "--log-end" in error
