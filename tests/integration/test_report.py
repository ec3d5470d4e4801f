"""Check the report of two criteria and two seeds: complete, self-contained, escaped, readable in a browser."""

import csv
import html
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import PAIRS, refused
from matplotlib.figure import Figure

from encourage_mt import processes
from encourage_mt.cli import main
from encourage_mt.data.manifest import PreparedData
from encourage_mt.evaluation import scoring
from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.results import Result
from encourage_mt.evaluation.significance import holm
from encourage_mt.evaluation.words import count_words, words_of
from encourage_mt.files import read_json, read_record, write_json
from encourage_mt.recipe import render_options
from encourage_mt.report.charts import Chart, learning_curves
from encourage_mt.report.page import FILE_LIST
from encourage_mt.report.sections import Section, TranslatedSet, disagree, mark_words
from encourage_mt.training.run_folder import open_run

CHARTS = {
    *"seeds_test length_test length_gain_test valid_bleu valid_nll representation energy margin probability".split(),
    *"calibration frequency_accuracy frequency_f1 gains_words_test gains_confidence_test coverage_test".split(),
    *"calibration_pieces_test calibration_sentences_test".split(),
}
TABLES = ("scores_test", "words_test", "confidence_test", "runs")
NASTY = '<script>document.title = "gone"</script> & <b>"bold"</b> ' + "long" * 100


@pytest.fixture(scope="session")
def reported(work, tmp_path_factory):
    """The folder of a report made by the command line; markup and a very long word were put into the texts of its runs.

    Line 3 of the candidate is garbage, line 5 of the baseline.
    """
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(work.folder / "data", folder / "data")
    for side, line in (("de", f"Quelle {NASTY}"), ("en", f"reference {NASTY}")):
        path = folder / "data" / "text" / f"test.{side}"
        replace(path, 4, line)
    references = (folder / "data" / "text" / "test.en").read_text(encoding="utf-8").split("\n")[:-1]
    for name in ("ce.seed1", "ce.seed2", "el.seed1", "el.seed2"):
        run_folder = folder / name
        shutil.copytree(work.folder / name, run_folder, ignore=shutil.ignore_patterns("checkpoints"))
        write_json(run_folder / "run.json", {**read_json(run_folder / "run.json"), "data": str(folder / "data")})
        worse, better = (3, 5) if name.startswith("el") else (5, 3)
        replace(run_folder / "test.en", worse, "zzz")
        replace(run_folder / "test.en", better, references[better - 1])
        if name.startswith("el"):
            replace(run_folder / "test.en", 4, f"output {NASTY}")
        hypotheses = (run_folder / "test.en").read_text(encoding="utf-8").split("\n")[:-1]
        result = Result.read(run_folder)
        scores = {**result.scores, "test": scoring.score(hypotheses, references, "en")}
        result.model_copy(update={"scores": scores, "alarms": []}).write(run_folder)
    output = folder / "report"
    argv = ["report", "--output", output, "--baseline", folder / "ce.seed1", folder / "ce.seed2"]
    main([str(word) for word in [*argv, "--candidate", folder / "el.seed1", folder / "el.seed2"]])
    return output


def replace(path, number, line):
    """Put `line` in place of line `number`, from 1."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines), encoding="utf-8")


def test_the_run_ends_with_a_report_of_everything(work):
    folder = work.folder / "report-ce-el"
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "report.md", "comparison.json", "figures", "tables", FILE_LIST)
    }
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{c}.{k}" for c in CHARTS for k in ("svg", "png")
    }
    for path in (folder / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000
    for path in (folder / "figures").glob("*.svg"):
        assert path.read_text(encoding="utf-8").startswith("<svg ")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<p class="warning">No verdict: ce.seed1: not trained.*el.seed2: not trained', page)
    assert work.done.stdout.count("### test") == 1 and f"Report: {folder / 'report.html'}" in work.done.stdout


def test_the_page_needs_no_network_and_no_other_file(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<iframe" not in page and "<img" not in page and "@import" not in page
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)", page)
    assert {source for source in sources if not source.strip("\"'").startswith(("#", "data:"))} == set()
    assert page.count("<svg ") == len(CHARTS)
    ids = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "clipping paths of two charts do not mix"


def test_the_scores_on_the_page_are_those_of_the_runs(reported):
    page = html.unescape((reported / "report.html").read_text(encoding="utf-8"))
    compared = read_record(reported / "comparison.json", Comparison)
    markdown = (reported / "report.md").read_text(encoding="utf-8")
    for name in ("ce.seed1", "el.seed2"):
        result = Result.read(reported.parent / name)
        for metric, entry in result.scores["test"].items():
            side = "baseline" if result.arm == "ce" else "candidate"
            assert getattr(compared.tests["test"][metric], side)[result.seed] == entry.score
            for text in (page, markdown):
                assert f"{entry.score:.2f}" in text and entry.signature in text
        assert shlex.join(render_options(result.options)) in page and result.evaluation.data_sha256 in page
    assert "paired t-test over 2 seeds" in page and "paired t-test over 2 seeds" in markdown


def test_where_it_helps_is_measured_corrected_and_counted(reported, capsys):
    measures = read_record(reported / "comparison.json", Comparison).measures
    everything = [each for sets in measures.values() for each in sets["test"]]
    assert set(measures) == {"words", "confidence"} and len({each.metric for each in everything}) == len(everything)
    assert holm([each.p for each in everything]) == [each.holm_p for each in everything]
    assert all(each.bootstrap_interval and each.bootstrap_holm_p >= each.bootstrap_p for each in everything)
    for name in ("report.md", "report.html"):
        assert f"{len(everything)} comparisons" in (reported / name).read_text(encoding="utf-8")

    data = PreparedData.open(reported.parent / "data")
    kept = read_json(data.folder / "words.json")
    write_json(data.folder / "words.json", {**kept, "data_sha256": "0" * 64, "counts": {"a": 1}})
    counts = count_words(data)
    assert read_json(data.folder / "words.json") == kept
    assert counts == Counter(word for line in words_of([text for _, text in PAIRS["train"]], data) for word in line)
    folders = [reported.parent / f"{arm}.seed{seed}" for arm in ("ce", "el") for seed in (1, 2)]
    main([str(word) for word in ["compare", "--baseline", *folders[:2], "--candidate", *folders[2:]]])
    printed = capsys.readouterr().out
    assert "### Words of test" in printed and f"{len(measures['words']['test'])} comparisons" in printed
    for each in measures["words"]["test"]:
        assert each.metric in printed


def test_tables_are_beside_the_page_as_latex_and_csv(reported):
    names = {f"{name}.{kind}" for name in TABLES for kind in ("csv", "tex")}
    assert {path.name for path in (reported / "tables").iterdir()} == names
    with open(reported / "tables" / "scores_test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == read_record(reported / "comparison.json", Comparison).table("test").rows
    latex = (reported / "tables" / "scores_test.tex").read_text(encoding="utf-8")
    assert r"\toprule" in latex and latex.count(r"\\") == len(rows) and r"$\pm$" in latex and "±" not in latex


def test_links_of_the_markdown_exist(reported):
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (reported / "report.md").read_text(encoding="utf-8"))
    assert {Path(link).stem for link in links} == CHARTS and len(links) == len(CHARTS)
    assert all((reported / link).is_file() for link in links)


def test_markup_in_the_corpus_is_shown_and_not_run(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>&" not in page
    escaped = "&lt;script&gt;document.title = &#34;gone&#34;&lt;/script&gt; &amp; &lt;b&gt;"
    assert f"<dd>Quelle {escaped}" in page and f"<dd>reference {escaped}" in page
    assert "<mark>output</mark>" in page


def test_the_worst_regressions_come_first_then_the_best_gains(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'<dt>line (\d+)</dt><dd class="(worse|better)">([+-][\d.]+) chrF', page)
    worse = [float(gain) for _, kind, gain in found if kind == "worse"]
    better = [float(gain) for _, kind, gain in found if kind == "better"]
    assert [kind for _, kind, _ in found] == ["worse"] * len(worse) + ["better"] * len(better)
    assert worse == sorted(worse) and max(worse) <= 0 and better == sorted(better, reverse=True)
    assert found[0][0] == "3" and {"4", "5"} <= {line for line, kind, _ in found if kind == "better"}
    assert found[len(worse)][0] == "5"


def test_ten_disagreements_of_each_kind_are_shown_and_equal_outputs_are_left_out():
    lines = [f"word number {i} of the line" for i in range(40)]
    baseline = ["x" if i < 15 else line for i, line in enumerate(lines)]
    candidate = ["x" if 15 <= i < 30 else line for i, line in enumerate(lines)]
    texts = TranslatedSet(lines, lines, {"a": {1: baseline}, "b": {2: candidate}})
    worse, better = disagree(texts, [1, 2], False).values()
    assert len(worse) == len(better) == 10 and max(row["gain"] for row in worse) < 0 < min(r["gain"] for r in better)
    assert all(row["line"] <= 30 for row in worse + better)
    assert mark_words("the big cat", "the cat sat") == [("the", False), ("big", True), ("cat", False)]


def test_case_is_ignored_in_disagreements_of_lowercased_data():
    texts = TranslatedSet(["quelle"], ["The Cat"], {"a": {1: ["the dog"]}, "b": {1: ["the cat"]}})
    ((row,), (same,)) = (disagree(texts, [1, 1], lowercase)["Best gains"] for lowercase in (True, False))
    assert row["outputs"]["b"] == [("the", False), ("cat", False)] and row["scores"][1] == pytest.approx(100)
    assert row["reference"] == "The Cat" and same["outputs"]["b"] == [("the", True), ("cat", True)]


@pytest.mark.parametrize("count, widths", [(1, [6]), (2, [3] * 2), (3, [2] * 3), (4, [3] * 4), (5, [2] * 3 + [3] * 2)])
def test_charts_fill_their_rows(count, widths):
    section = Section("title", charts=[Chart("name", "title", "caption", Figure()) for _ in range(count)])
    section.arrange()
    assert [chart.width for chart in section.charts] == widths and sum(widths) % 6 == 0


def test_a_second_report_replaces_the_first_and_keeps_files_of_others(reported, tmp_path, capsys):
    sides = ["--baseline", reported.parent / "ce.seed1", "--candidate", reported.parent / "el.seed1"]
    output = tmp_path / "report"
    shutil.copytree(reported, output)
    (tmp_path / "report.partial").mkdir()
    main([str(word) for word in ["report", *sides, "--output", output]])
    assert {path.name for path in tmp_path.iterdir()} == {"report", "report.partial"}
    assert "do not show how much seeds vary" in (output / "report.md").read_text(encoding="utf-8")

    (output / "figures" / "mine.svg").write_text("mine")
    error = refused(capsys, "report", *sides, "--output", output)
    assert f"{output}: contains figures/mine.svg" in error and "--output" in error
    assert (output / "figures" / "mine.svg").exists() and (output / "report.html").exists()
    for name in ("report.md", "figures/one.svg"):  # names of ours, but not from a report
        other = tmp_path / name.replace("/", "-")
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("mine")
        assert f"contains {name}" in refused(capsys, "report", *sides, "--output", other)
        assert (other / name).read_text() == "mine"
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, "report", *sides, "--output", tmp_path / "file")


def test_a_run_in_use_by_another_process_is_refused(reported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    runs = [reported.parent / name for name in ("ce.seed1", "el.seed1")]
    with processes.locked(runs[1]):
        error = refused(
            capsys, "report", "--baseline", runs[0], "--candidate", runs[1], "--output", tmp_path / "report"
        )
    assert f"{runs[1]}: in use" in error and not list(tmp_path.iterdir())


def test_curves_have_different_names_and_runs_without_a_log_are_left_out(reported, tmp_path):
    runs = [open_run(reported.parent / name) for name in ("ce.seed1", "ce.seed2", "el.seed1")]
    charts = learning_curves({"ce": runs[:2], "el": runs[2:]})
    assert [chart.name for chart in charts] == ["valid_bleu", "valid_nll"]
    legend = [text.get_text() for text in charts[0].figure.axes[0].get_legend().get_texts()]
    assert legend == ["ce (2 seeds)", "el (1 seed)"]
    shutil.copytree(runs[0].folder, tmp_path / "silent", ignore=shutil.ignore_patterns("train.log"))
    silent = open_run(tmp_path / "silent", data=runs[0].data)
    charts = learning_curves({"ce": [silent, runs[1]], "el": [silent]})
    legend = [text.get_text() for text in charts[0].figure.axes[0].get_legend().get_texts()]
    assert legend == ["ce (1 seed)"] and len(charts[0].figure.axes[0].lines) == 1
    assert learning_curves({"ce": [silent], "el": [silent]}) == []
    lines = runs[0].log.read_text(encoding="utf-8").splitlines(keepends=True)
    silent.log.write_text("".join([*lines, *lines]), encoding="utf-8")  # every epoch twice
    twice, once = learning_curves({"ce": [silent], "el": [runs[0]]})[0].figure.axes[0].lines
    assert (twice.get_xydata() == once.get_xydata()).all()


BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium (or google-chrome) and chromedriver on PATH")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_readable_in_a_browser(width, reported):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    screen = {"width": width, "height": 800, "pixelRatio": 1}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        browser.get((reported / "report.html").as_uri())
        inner, content, height = browser.execute_script(
            "const page = document.documentElement; return [innerWidth, page.scrollWidth, page.scrollHeight]"
        )
        assert inner == width and content <= width and height > 1500
        assert browser.get_log("browser") == []
        assert browser.title.startswith("el (label smoothed encouraging loss, log-end 0.5) against ce (label")
        narrowest = browser.execute_script(
            "return Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width))"
        )
        assert narrowest > 300, "charts fill a phone's width"
    finally:
        browser.quit()
