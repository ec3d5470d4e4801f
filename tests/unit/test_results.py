"""Test scores.json, comparison.json, analysis.json: read as written, or refused in one line with file and key."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import sample_result

from encourage_mt.errors import UserError
from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.diagnostics import CALIBRATION_EDGES, FREQUENCY_EDGES, HISTOGRAMS, Analysis
from encourage_mt.evaluation.results import Result
from encourage_mt.evaluation.significance import MetricComparison
from encourage_mt.files import read_json, read_record, write_json, write_record
from encourage_mt.report.charts import calibration, diagnostic_charts
from encourage_mt.report.tables import runs_table

BLEU = {"score": 30.0, "signature": "nrefs:1", "length_ratio": 1.0}
START = {"command": "c", "time": "t", "processes": 1, "versions": {}, "git_revision": None, "machine": "m"}
RESULT = sample_result(
    scores={"test": {"sacreBLEU": BLEU, "TER": {"score": 50.0, "signature": "s"}}},
    provenance={"data_sha256": "d" * 64, "starts": [START]},
    curve=[{"epoch": 1.0, "updates": 10.0, "bleu": 1.5, "nll": 6.0}],
)


def histogram(edges):
    return {"mean": 0.5, "edges": edges.tolist(), "share": [1.0] + [0.0] * (len(edges) - 2)}


BINS = len(CALIBRATION_EDGES) - 1
ENERGY = {side: histogram(HISTOGRAMS[f"energy.{side}"]) for side in ("target", "others")}
ANALYSIS = Analysis(
    source={"split": "valid", "checkpoint_sha256": "c"},
    tokens=9,
    accuracy=0.5,
    nll=1.0,
    probability=histogram(HISTOGRAMS["probability"]),
    margin=histogram(HISTOGRAMS["margin"]),
    energy={"gap": 1.0, **ENERGY},
    gradient={"well_classified": 0.5, "well_classified_tokens": 0.5}
    | {name: value for name, value in histogram(HISTOGRAMS["gradient"]).items() if name != "mean"},
    calibration={"error": 0.1, "tokens": [1] * BINS, "confidence": [0.5] * BINS, "accuracy": [0.5] * BINS},
    frequency=[{"from": start, "below": None, "tokens": 1, "accuracy": 0.5, "f1": None} for start in FREQUENCY_EDGES],
)
COMPARISON = Comparison(
    baseline="ce",
    candidate="el",
    tests={"test": {"sacreBLEU": MetricComparison("sacreBLEU", {1: 30.0}, {1: 31.0}, {1: {"bs": 0.1, "ar": 0.2}})}},
    signatures={"sacreBLEU": "nrefs:1"},
    differences=[],
)
RECORDS = {"scores.json": RESULT, "analysis.json": ANALYSIS, "comparison.json": COMPARISON}
USES = {
    "scores.json": lambda result: runs_table([result]),
    "analysis.json": lambda analysis: diagnostic_charts({"ce": [analysis], "el": [ANALYSIS]}),
    "comparison.json": lambda comparison: comparison.markdown(),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """The paths of all values in a JSON document; of a list, the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_read_back_as_it_was_written(name, tmp_path):
    write_record(tmp_path / name, RECORDS[name])
    assert read_record(tmp_path / name, type(RECORDS[name])) == RECORDS[name]
    USES[name](RECORDS[name])
    write_json(tmp_path / name, {**read_json(tmp_path / name), "format": 3})
    with pytest.raises(UserError, match=f"{name}: format: must be 2, got 3"):
        read_record(tmp_path / name, type(RECORDS[name]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.mark.parametrize("name", RECORDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_record_is_refused_in_one_line_or_can_be_used(name, folder, data):
    """One value is replaced by another, or removed."""
    path = folder / name
    write_record(path, RECORDS[name])
    content = read_json(path)
    place = data.draw(st.sampled_from(list(places(content))))
    spoiled = copy.deepcopy(content)
    holder = spoiled
    for key in place[:-1]:
        holder = holder[key]
    if not place:
        spoiled = data.draw(JSON)
    elif data.draw(st.booleans()):
        holder[place[-1]] = data.draw(JSON)
    elif isinstance(holder, dict):
        del holder[place[-1]]
    path.write_text(json.dumps(spoiled))
    written = path.read_bytes()
    try:
        record = read_record(path, type(RECORDS[name]))
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        USES[name](record)
    assert path.read_bytes() == written


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\ufeff{}", "[" * 5000])
def test_a_file_that_is_not_a_json_object_is_refused(text, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UserError, match="scores.json: "):
        Result.read(path)


def test_a_run_without_tokens_in_a_bin_does_not_move_its_point():
    values = {"tokens": [2] + [0] * (BINS - 1), "confidence": [0.1] + [0] * (BINS - 1), "accuracy": [0.5] * BINS}
    empty = {name: [0] * BINS for name in values}
    runs = [{"error": 0.1, **each} for each in (values, empty)]
    (_, line, _) = calibration({"ce": runs, "el": runs}).figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0.1, 0.5]]
