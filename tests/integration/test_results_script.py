"""Test scripts/results.py: tables of README and docs agree with the runs in results/; new runs are added there."""

import importlib.util
import json
import shutil
import statistics
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from samples import sample_result

from encourage_mt.evaluation.comparison import Comparison, differences
from encourage_mt.evaluation.results import Result, TriedSearch
from encourage_mt.evaluation.tuning import Tuning
from encourage_mt.files import read_json, read_record, write_json, write_record
from encourage_mt.recipe import load_recipe
from encourage_mt.robustness.summary import Summary

PAGES = ("README.md", "docs/results.md", "docs/robustness.md")


ROBUSTNESS = {
    **{"format": 1, "arms": ["ce"], "clean": {"test": {"ce": {"1": 30.0}}}, "comparisons": {}, "signatures": {}},
    "rows": [{"test": "test", "name": "upper case", "values": {"sacreBLEU change": {"ce": {"1": -7.5}}}}],
    "differences": [],
}


def rows_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """A copy of what scripts/results.py reads and writes; project.run(*options) runs it there and returns an error."""
    for folder in ("docs", "results", "scripts", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    spec = importlib.util.spec_from_file_location("results_script", tmp_path / "scripts" / "results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["results.py", *map(str, options)])
        try:
            script.main()
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    script.run, script.folder = run, tmp_path
    return script


def test_tables_of_the_pages_agree_with_the_runs(project):
    assert project.run() == ""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert (project.folder / page).read_text(encoding="utf-8") == text, "run python scripts/results.py"
    rows = rows_of((ROOT / "docs/results.md").read_text(encoding="utf-8"))
    folders = [folder for folder in (ROOT / "results").iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        results = [Result.read(path) for path in folder.glob("*.seed*.json")]
        for arm in {result.arm for result in results}:
            group = [result.scores for result in results if result.arm == arm]
            for split in set(group[0]) - {"valid"}:
                scores = [scores[split]["sacreBLEU"].score for scores in group]
                spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
                expected = [arm, split, str(len(scores)), f"{statistics.mean(scores):.2f}{spread}"]
                assert expected in [row[:4] for row in rows]
        for path in folder.glob("*.comparison.json"):
            comparison = read_record(path, Comparison)
            for split, metrics in comparison.tests.items():
                for side, arm in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
                    scores = {r.seed: r.scores[split]["sacreBLEU"].score for r in results if r.arm == arm}
                    compared = getattr(metrics["sacreBLEU"], side)
                    assert compared.items() <= scores.items()
                    if path.name == "ce-el.comparison.json":
                        assert compared == scores, "the headline is of all seeds"


def test_runs_of_a_page_differ_by_criterion_and_seed_alone_unless_their_arm_says_so():
    for folder in {path.parent for path in (ROOT / "results").glob("*/*.seed*.json")}:
        results = [Result.read(path) for path in folder.glob("*.seed*.json")]
        recipe = load_recipe(ROOT / "examples" / results[0].recipe / "recipe.yaml")
        results = [result for result in results if not recipe.arm_differences(result.arm)]
        unequal = differences(results)
        if folder.name.endswith(".tuned"):  # each arm has a search of its own
            unequal = [line for line in unequal if not line.startswith(("beam:", "lenpen:", "temperature:"))]
            searches = {(result.arm, result.evaluation.search) for result in results}
            assert len(searches) == len({result.arm for result in results})
        assert not unequal
        shared = set()
        for result in results:
            names = list(result.options)
            kept = names[: names.index("criterion")]
            shared.add(json.dumps({name: result.options[name] for name in kept if name != "seed"}))
        assert len(shared) == 1


def test_an_edited_number_is_corrected(project):
    path = project.folder / "docs" / "results.md"
    page = path.read_text(encoding="utf-8")
    figure = next(row for row in rows_of(page) if row[:2] == ["ce", "test_2016_flickr"])[3]
    path.write_text(page.replace(f"| {figure} |", "| 99.99 |", 1), encoding="utf-8")
    project.run()
    assert path.read_text(encoding="utf-8") == page


def test_a_work_directory_is_added_without_paths_of_the_machine(project, work):
    folder = project.folder / "runs" / "tiny"
    shutil.copytree(work.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "report-*"))
    for report in ("report-ce-el", "report-again"):
        shutil.copytree(work.folder / "report-ce-el", folder / report)
    (project.folder / "examples" / "tiny").mkdir()
    (project.folder / "examples" / "tiny" / "recipe.yaml").write_text(json.dumps(TINY))  # JSON is YAML
    assert "paths outside the project" in project.run("--add", folder)
    for path in folder.glob("*/*.json"):
        text = path.read_text(encoding="utf-8").replace(str(work.folder), str(folder))
        path.write_text(text.replace(f"{ROOT}/", f"{project.folder}/"), encoding="utf-8")
    page = project.folder / "docs" / "results.md"
    tables = "\n<!-- tuning: tiny -->\n<!-- end -->\n\n<!-- arms: tiny ce el -->\n<!-- end -->\n"
    page.write_text(page.read_text(encoding="utf-8") + tables)
    for number, name in enumerate(("ce.seed1", "ce.seed2", "el.seed1", "el.seed2")):
        used = Result.read(folder / name).evaluation
        tried = [TriedSearch(beam=beam, lenpen=1.0, temperature=0.8, bleu=bleu) for beam, bleu in ((2, 9), (4, number))]
        checksums = {name: getattr(used, name) for name in ("data_sha256", "checkpoints_sha256")}
        write_record(folder / name / "tuning.json", Tuning(**checksums, tried=tried, signature="s"))
    assert project.run("--add", folder) == ""
    names = [f"{arm}.seed{seed}.json" for arm in ("ce", "el") for seed in (1, 2)]
    names += ["ce-el.comparison.json", "again.comparison.json"]
    assert {path.name for path in (project.folder / "results/tiny").iterdir()} == set(names)
    assert (project.folder / "docs/pictures/tiny_valid_bleu.svg").exists()
    path = project.folder / "results/tiny/el.seed2.json"
    result = Result.read(path)
    assert set(result.diagnostics) >= {"valid nll (nats)", "calibration error"} and len(result.curve) == 3
    assert str(project.folder) not in path.read_text(encoding="utf-8")
    *_, first, second, _, ce, el = rows_of(page.read_text(encoding="utf-8"))
    assert first == ["2", "1.0", "0.8", "9.00", "9.00"] and second == ["4", "1.0", "0.8", "0.50", "2.50"]
    assert ce[:3] == ["ce", "test", "2"] and el[:3] == ["el", "test", "2"]
    project.run("--add", folder, "--into", "tiny.again")
    assert (project.folder / "results/tiny.again/ce.seed1.json").exists()
    assert "--add" in project.run("--into", "x")
    assert "no evaluated runs" in project.run("--add", project.folder / "docs")

    before = {path: path.read_bytes() for path in (project.folder / "results").rglob("*.json")}
    scores = folder / "ce.seed1" / "scores.json"
    content = read_json(scores)
    content["scores"]["test"]["sacreBLEU"]["score"] += 1
    write_json(scores, content)
    assert "not of the present scores of ce.seed1" in project.run("--add", folder)
    content["scores"]["test"]["sacreBLEU"]["score"] -= 1
    del content["scores"]["test"]["TER"]
    write_json(scores, content)
    assert "not of the present scores of ce.seed1" in project.run("--add", folder)
    shutil.copy(folder / "el.seed1" / "average.pt", folder / "ce.seed1")
    assert "not the model that was scored" in project.run("--add", folder)
    shutil.copy(work.folder / "ce.seed1" / "average.pt", folder / "ce.seed1")
    record = read_json(folder / "ce.seed1" / "tuning.json")
    write_json(folder / "ce.seed1" / "tuning.json", {**record, "checkpoints_sha256": {}})
    assert "of other checkpoints" in project.run("--add", folder)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    "marker",
    [
        *("gains: none", "gains: multi30k_de_en:ce", "gains: multi30k_de_en:ce:none"),
        *("measures: multi30k_de_en words", "measures: multi30k_de_en words no_such_test"),
        "measures: multi30k_de_en:ce words test",
    ],
)
def test_a_marker_that_names_nothing_is_one_line(marker, project, monkeypatch):
    page = project.folder / "README.md"
    page.write_text(f"<!-- {marker} -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(project, "PAGES", (page,))
    error = project.run()
    assert error.count("\n") == 1 and marker in error


def test_noise_of_other_scores_is_not_published(project, tmp_path, monkeypatch):
    write_json(tmp_path / "summary.json", ROBUSTNESS)
    summary = read_record(tmp_path / "summary.json", Summary)
    run, result = SimpleNamespace(folder=tmp_path), sample_result(arm="ce", seed=1)
    assert not project.is_measured(run, result, summary), "there is no robustness.json of these scores"
    assert project.is_measured(run, sample_result(arm="el", seed=1), summary), "it is not in the summary"
    for bleu, expected in ((30.0, True), (31.0, False)):
        measured = SimpleNamespace(noise={"test": {"clean": SimpleNamespace(bleu=bleu)}})
        monkeypatch.setattr(project, "read_measured", lambda run, measured=measured: measured)
        assert project.is_measured(run, result, summary) == expected


def test_a_page_shows_the_summary_of_robustness(project):
    write_json(project.folder / "results" / "multi30k_de_en" / "robustness.json", ROBUSTNESS)
    page = project.folder / "docs" / "robustness.md"
    page.write_text("# Page\n\n<!-- robustness: multi30k_de_en -->\n<!-- end -->\n", encoding="utf-8")
    assert project.run() == ""
    assert ["upper case", "", "-7.50"] in rows_of(page.read_text(encoding="utf-8"))
