"""The tables over arms and seeds, and that those of README and docs are those of the runs in results/."""

import json
import shutil
import statistics
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT, TINY, run, write_recipe

from encourage_mt.evaluation.comparison import Comparison, Seeds, differences, read_comparison
from encourage_mt.files import read_json, write_json
from encourage_mt.recipe import load_recipe
from encourage_mt.report.tables import arms_table, curve, curve_table, inside_table, published_table, runs_table

SCORES = {"ce": [30.0, 31.0, 32.0], "el": [31.0, 31.5, 33.5], "ce_ls000": [29.0]}
PUBLISHED = {"source": "Somebody 2020", "metric": "sacreBLEU", "scores": {"ce": [35.09, 0.07], "el": [35.5, 0.11]}}


def a_result(arm, seed, score):
    entry = {"score": score, "signature": "nrefs:1", "length_ratio": 0.95}
    return {
        "name": f"{arm}.seed{seed}",
        "arm": arm,
        "seed": seed,
        "recipe": "tiny",
        "training": {
            **{"arch": "transformer", "encoder_layers": 2, "decoder_layers": 3, "encoder_embed_dim": 32},
            **{"tokens per update": 4000, "updates": 1000 + (seed > 1)},
        },
        "evaluation": {"average": 5, "beam": 4, "lenpen": 1.0},
        "machine": "another, that evaluated",
        "provenance": {
            "starts": [{"machine": "CPU", "versions": {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.13.0"}}]
        },
        "command": f"fairseq-train d --source-lang de --target-lang en --seed {seed} --criterion {arm} --log-end 0.1",
        "scores": {"valid": {"sacreBLEU": {**entry, "score": score + 1}}, "test": {"sacreBLEU": entry}},
        "train_seconds": 61.6,
        "target_tokens_per_second": 3000.4,
        "inside": {"valid nll (nats)": seed / 4},
    }


@pytest.fixture
def results():
    return [a_result(arm, seed, score) for arm, side in SCORES.items() for seed, score in enumerate(side, 1)]


@pytest.fixture
def comparison():
    sides = [dict(enumerate(SCORES[arm], 1)) for arm in ("ce", "el")]
    seeds = Seeds("sacreBLEU", *sides, sentence_p={2: {"bs": 0.01, "ar": 0.02}, 1: {"bs": 0.3, "ar": 0.4}})
    return Comparison("ce", "el", {"test": {"sacreBLEU": seeds}}, {"sacreBLEU": "nrefs:1"}, [])


def rows_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


def test_a_row_for_each_run_and_set(results):
    rows = rows_of(runs_table(results))
    assert rows[0] == ["run", "set", "sacreBLEU", "length ratio", "target tokens/s", "training time"]
    assert rows[1:3] == [
        ["ce.seed1", "valid", "31.00", "0.950", "3,000", "1:02"],
        ["ce.seed1", "test", "30.00", "0.950", "3,000", "1:02"],
    ]
    assert len(rows) == 1 + 2 * 7 and runs_table(results).endswith("sacreBLEU signature: `nrefs:1`  ")


def test_a_row_for_each_arm_with_mean_deviation_gain_and_p(results, comparison):
    table = arms_table(results, [comparison])
    rows = rows_of(table)
    assert rows[1] == ["ce", "test", "3", "31.00 ± 1.00", "", "", ""]
    gain = comparison.tests["test"]["sacreBLEU"]  # gains 1, 0.5, 1.5
    assert gain.p == pytest.approx(0.0742, abs=1e-4)
    low, high = gain.interval
    assert rows[2] == [
        "el",
        "test",
        "3",
        "32.00 ± 1.32",
        f"ce: +1.00 [{low:+.2f}, {high:+.2f}]",
        "0.074",
        "seed 1, 2: 0.400, 0.020",
    ]
    assert rows[3] == ["ce_ls000", "test", "1", "29.00", "ce, seed 1: -1.00", "-", ""]
    assert table.splitlines()[-2:] == [
        "Setting: tiny, de to en; transformer, 2+3 layers, 32 wide; 4,000 tokens per update, 1,000 or 1,001 updates; "
        "last epoch checkpoints averaged: 5, beam 4, length penalty 1.0.  ",
        "Trained on: CPU; python 3.11.7, torch 2.13.0; 0.1 hours in updates, 0.02 a run.  ",
    ]
    assert "el: `--criterion el --log-end 0.1`" in table and table.count("signature") == 1
    assert [row[:2] for row in rows_of(arms_table(results[:1], []))[1:]] == [["ce", "valid"], ["ce", "test"]]


def test_each_comparison_gives_a_gain_with_its_seeds_where_they_are_not_all(results, comparison):
    control = Seeds("sacreBLEU", {1: 29.0}, {1: 31.0}, {1: {"bs": 0.1, "ar": 0.2}})
    fair = Comparison("ce_ls000", "el", {"test": {"sacreBLEU": control}}, {}, [])
    row = rows_of(arms_table(results, [comparison, fair]))[2]
    assert row[4].startswith("ce: +1.00 [") and row[4].endswith("]; ce_ls000, seed 1: +2.00")
    assert row[5:] == ["0.074; -", "seed 1, 2: 0.400, 0.020; 0.200"]
    comparison.tests["test"]["sacreBLEU"].sentence_p[3] = {"bs": 0.1, "ar": 0.3}
    assert rows_of(arms_table(results, [comparison, fair]))[2][6] == "0.400, 0.020, 0.300; 0.200"


def test_arms_that_share_no_seed_are_compared_all_the_same(results):
    others = [{**result, "seed": result["seed"] + 10} for result in results[3:6]]
    row = rows_of(arms_table(results[:3] + others, []))[4]
    welch = Seeds("sacreBLEU", {1: 30.0, 2: 31.0, 3: 32.0}, {11: 31.0, 12: 31.5, 13: 33.5})
    assert row[4:] == [f"ce: {welch.summary()}", f"{welch.p:.3f}", ""] and welch.test.startswith("Welch")


def test_what_is_inside_is_a_mean_over_the_seeds_that_were_looked_into(results, monkeypatch):
    monkeypatch.setattr("encourage_mt.report.tables.INSIDE", {"valid nll (nats)": None})
    del results[-1]["inside"]
    assert rows_of(inside_table(results))[1:] == [["ce", "3", "0.500 ± 0.250"], ["el", "3", "0.500 ± 0.250"]]


def test_a_row_for_each_epoch_with_the_gap_between_the_arms(results):
    record = {"epoch": 1, "valid_num_updates": "1200", "valid_nll_loss": "3.5"}
    for result, bleu in zip(results, ["10", "12", "11", "12", "14", "13"], strict=False):  # the control has no log
        lost = {**record, "valid_bleu": "99"}
        result["curve"] = curve([lost, {"epoch": 1, "loss": "7"}, {**record, "valid_bleu": bleu}])
    results[0]["curve"].append({**results[0]["curve"][0], "epoch": 2.0})
    assert rows_of(curve_table(results)) == [
        ["epoch", "updates", "greedy BLEU ce", "greedy BLEU el", "gap el", "nll ce (bits)", "nll el (bits)"],
        ["1", "1,200", "11.00 ± 1.00", "13.00 ± 1.00", "+2.00", "3.50 ± 0.00", "3.50 ± 0.00"],
    ]
    assert rows_of(curve_table(results[:4]))[1][3:5] == ["12.00", "+2.00"], "of the one seed that both have"


def test_a_paper_stands_beside_what_was_run_or_not_yet(results, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, published=PUBLISHED))
    assert rows_of(published_table(recipe, [])) == [
        ["sacreBLEU", "ce", "el", "gain"],
        ["Somebody 2020", "35.09 ± 0.07", "35.50 ± 0.11", "+0.41"],
        ["test, here", "not yet run", "not yet run", ""],
    ]
    ce, el = "31.00 ± 1.00 (3 seeds)", "32.00 ± 1.32 (3 seeds)"
    assert rows_of(published_table(recipe, results[:3]))[2] == ["test, here", ce, "not yet run", ""]
    assert rows_of(published_table(recipe, results))[2] == ["test, here", ce, el, "+1.00"]
    assert not recipe.reversed().published and not recipe.modern().published, "another task"


def test_a_comparison_is_read_back_as_it_was_written(comparison, tmp_path):
    write_json(tmp_path / "comparison.json", asdict(comparison))
    assert read_comparison(tmp_path / "comparison.json") == comparison


# --- the pages


@pytest.fixture
def project(tmp_path):
    """A copy of what scripts/results.py reads and writes."""
    for folder in ("docs", "scripts", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_the_pages_show_the_figures_of_the_runs(project):
    run(sys.executable, project / "scripts/results.py")
    for page in ("README.md", "docs/results.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert (project / page).read_text(encoding="utf-8") == text, "python scripts/results.py"
    rows = rows_of((ROOT / "docs/results.md").read_text(encoding="utf-8"))
    folders = [folder for folder in (ROOT / "results").iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        results = [read_json(path) for path in folder.glob("*.seed*.json")]
        for arm in {result["arm"] for result in results}:
            group = [result["scores"] for result in results if result["arm"] == arm]
            for split in set(group[0]) - {"valid"}:
                scores = [scores[split]["sacreBLEU"]["score"] for scores in group]
                spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
                expected = [arm, split, str(len(scores)), f"{statistics.mean(scores):.2f}{spread}"]
                assert expected in [row[:4] for row in rows]
        for path in folder.glob("*.comparison.json"):
            comparison = read_comparison(path)
            for split, metrics in comparison.tests.items():
                for arm, side in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
                    scores = {r["seed"]: r["scores"][split]["sacreBLEU"]["score"] for r in results if r["arm"] == side}
                    compared = getattr(metrics["sacreBLEU"], arm)
                    assert compared.items() <= scores.items()
                    if path.name == "ce-el.comparison.json":
                        assert compared == scores, "the headline is of all seeds"


def test_runs_of_a_page_differ_by_criterion_and_seed_alone():
    for folder in (ROOT / "results").iterdir():
        results = [read_json(path) for path in folder.glob("*.seed*.json")]
        assert not differences(results)
        commands = {
            result["command"]
            .split(" --criterion ")[0]
            .replace(f"--seed {result['seed']} ", "")
            .replace(result["name"], "")
            for result in results
        }
        assert len(commands) == 1


def test_an_edited_figure_is_put_right(project):
    path = project / "results.md"
    page = path.read_text(encoding="utf-8")
    figure = next(row for row in rows_of(page) if row[:2] == ["ce", "test_2016_flickr"])[3]
    path.write_text(page.replace(f"| {figure} |", "| 99.99 |", 1), encoding="utf-8")
    run(sys.executable, project / "scripts/results.py")
    assert path.read_text(encoding="utf-8") == page


def test_a_work_directory_is_taken_over_without_paths_of_the_machine(project, work):
    folder = project / "runs" / "tiny"
    shutil.copytree(work.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "report-*"))
    for report in ("report-ce-el", "report-again"):
        shutil.copytree(work.folder / "report-ce-el", folder / report)
    (project / "examples" / "tiny").mkdir()
    (project / "examples" / "tiny" / "recipe.yaml").write_text(json.dumps(TINY))  # JSON is YAML
    add = (sys.executable, project / "scripts/results.py", "--add", folder)
    assert "paths outside the project" in run(*add, code=2).stderr
    for path in folder.glob("*/*.json"):
        text = path.read_text(encoding="utf-8").replace(str(work.folder), str(folder))
        path.write_text(text.replace(f"{ROOT}/", f"{project}/"), encoding="utf-8")
    page = project / "results.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n<!-- arms: tiny ce el -->\n<!-- end -->\n")
    run(*add)
    written = {path.name for path in (project / "results/tiny").iterdir()}
    assert written == {
        "ce.seed1.json",
        "ce.seed2.json",
        "el.seed1.json",
        "el.seed2.json",
        "ce-el.comparison.json",
        "again.comparison.json",
        "valid_bleu.svg",
    }
    result = read_json(project / "results/tiny/el.seed2.json")
    assert set(result["inside"]) >= {"valid nll (nats)", "calibration error"}
    assert str(project) not in json.dumps(result)
    assert [row[:3] for row in rows_of(page.read_text(encoding="utf-8"))[-2:]] == [
        ["ce", "test", "2"],
        ["el", "test", "2"],
    ]
    run(*add, "--into", "tiny.again")
    assert (project / "results/tiny.again/ce.seed1.json").exists()
    assert "--into goes with --add" in run(*add[:2], "--into", "x", code=2).stderr
    assert "no evaluated runs" in run(*add[:3], project / "docs", code=2).stderr
    before = {path: path.read_text() for path in (project / "docs").rglob("*.*") if path.suffix in (".json", ".md")}
    scores = folder / "ce.seed1" / "scores.json"
    result = read_json(scores)
    result["scores"]["test"]["sacreBLEU"]["score"] += 1
    write_json(scores, result)
    assert "not of the present scores of ce.seed1; make the report again" in run(*add, code=2).stderr
    shutil.copy(folder / "el.seed1" / "average.pt", folder / "ce.seed1")
    assert "of another average than the scores" in run(*add, code=2).stderr
    assert all(path.read_text() == text for path, text in before.items())
