"""Test manifest.json: both formats are read; any other content is refused in one line."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import sample_data

from encourage_mt.data.manifest import Lengths, PreparedData, find_warnings
from encourage_mt.errors import UserError

SHARED = {"sources_in_train": 0, "targets_in_train": 1, "pairs_in_train": 0}
V01 = {
    "options": {
        "source": "de",
        "target": "en",
        "data": [{"train": ["train.tsv"], "urls": ["https://x"]}],
        "lowercase": False,
    },
    "sources": {"train.tsv": {"path": "/x/train.tsv", "bytes": 9, "sha256": "0" * 64, "checked": "nothing"}},
    "pairs": {"train": 7, "valid": 2, "tst": 3},
    "counts": {
        split: {"read": 9, "too_long": 2, "kept": kept} for split, kept in (("train", 7), ("valid", 2), ("tst", 3))
    },
    "text": {
        **{"source": "de", "target": "en", "tests": ["tst"], "lines": {"valid": 2, "tst": 3}},
        **{"tokenizer": "none", "lowercase": False, "remove_bpe": "@@ ", "byte_fallback": False},
    },
    "subword": {"learned_on_lines": 14},
    "percent_unknown": {"train": {"de": 0.0}, "valid": {"de": 0.5}, "tst": {"de": 1}},
    "dictionary": {"de": 8, "en": 8},
    "checksums": {"dict.de.txt": "1" * 64, "train.de-en.de.bin": "2" * 64},
    "lengths_in_pieces": {"train": {"de": {"mean": 3.5, "longest": 7}}},
    "duplicates": {"train_pairs": 1},
    "leakage": {"valid": SHARED, "tst": SHARED},
    "versions": {"python": "3.11"},
    "warnings": ["tst: a warning"],
}
NOW = PreparedData.upgrade(V01)


def write(folder, content):
    path = folder / "manifest.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(folder):
    """The problem with a manifest: the one line of its UserError, without the name of the file."""
    with pytest.raises(UserError) as error:
        PreparedData.open(folder)
    line, path = str(error.value), folder / "manifest.json"
    assert line.isprintable() and line.startswith(f"{path}: ") and len(line) < 1000
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("content", [V01, NOW], ids=["version 0.1", "format 2"])
def test_both_formats_are_read(content, tmp_path):
    write(tmp_path, content)
    data = PreparedData.open(tmp_path)
    assert data.languages == ("de", "en") and data.data_bin == tmp_path / "data-bin" and not data.is_tokenized
    assert data.lines == V01["pairs"] and data.subsets == {"valid": "valid", "tst": "test"}
    # of version 0.1, which run.json files name
    assert data.checksum == "e1203fe6535e01338fe81d7e1a6165c89b8d155ee8e29ebc72de76a3012414dd"
    assert data.options["data"] == [{"train": ["train.tsv"]}], "addresses are not an option of the preparation"
    lines = [" ".join(line.split()) for line in data.describe().splitlines()]
    assert "| train | train | 7 | too_long 2 | de 0% | |" in lines
    assert "| tst | test | 3 | too_long 2 | de 1% | 0 pairs, 0 sources, 1 targets |" in lines
    assert "1 pairs repeat" in lines[-4] and "de 8, en 8" in lines[-3]
    assert data.checksum in lines[-2] and lines[-1] == "warning: tst: a warning"
    data.write()
    assert json.loads((tmp_path / "manifest.json").read_text())["subsets"] == {"valid": "valid", "tst": "test"}
    assert PreparedData.open(tmp_path) == data


@pytest.mark.parametrize(
    "split, source, target, expected",
    [
        ("train", 1024, 5, ["train: a sentence of 1,024 pieces; fairseq's Transformers take up to 1,023"]),
        ("valid", 5, 1024, ["valid: a sentence of 1,024 pieces; .* up to 1,023; training needs a shorter one"]),
        ("test", 1023, 1024, ["test: .*; scoring needs --engine ctranslate2"]),
        ("test", 1024, 5, ["test: .*; scoring is not possible"]),
        ("test", 1023, 1023, []),
    ],
)
def test_sentences_that_are_too_long_are_announced(split, source, target, expected):
    lengths = {split: {side: Lengths(mean=1.0, longest=n) for side, n in (("de", source), ("en", target))}}
    found = find_warnings({}, {}, {}, {}, lengths)
    assert len(found) == len(expected) and all(map(re.fullmatch, expected, found))


@pytest.mark.parametrize(
    "key, changes",
    [
        ("format: ", {"format": 3}),
        ("remove_bpe: ", {"remove_bpe": "--user-dir=evil"}),
        ("source: ", {"source": "--user-dir=evil"}),
        ("tests.0: ", {"tests": ["../x"]}),
        ("lowercase: ", {"lowercase": 1}),
        ("counts: ", {"tests": ["tst", "more"]}),
        ("counts.train.kept: ", {"counts": {"train": {"kept": -1}}}),
        ("checksums.dict.de.txt: ", {"checksums": {"dict.de.txt": "0"}}),
        ("checksums.../x: ", {"checksums": {"../x": "0" * 64}}),
        ("folder: ", {"folder": "/etc"}),
        ("colour: ", {"colour": "red"}),
    ],
)
def test_a_field_that_is_not_ours_is_refused_by_its_key(key, changes, tmp_path):
    write(tmp_path, {**NOW, **changes})
    assert refusal(tmp_path).startswith(key)


def test_a_damaged_or_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="encourage-mt prepare"):
        PreparedData.open(tmp_path)
    whole = json.dumps(NOW)
    for content in ("", "null", "[]", "{}", whole[: len(whole) // 2], "[" * 9999, whole.replace("0.5", "NaN")):
        write(tmp_path, content)
        refusal(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff")
    refusal(tmp_path)
    for depth in range(900, 1000):  # near the limit of Python, reading succeeds where writing does not
        write(tmp_path, json.dumps(NOW)[:-1] + f', "x": {"[" * depth}{"]" * depth}}}')
        refusal(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)


def places(content, prefix=()):
    """All key paths of nested mappings and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([V01, NOW]), st.data())
def test_any_change_of_a_manifest_is_accepted_or_refused_in_one_line(tmp_path_factory, original, data):
    content = copy.deepcopy(original)
    *parents, last = data.draw(st.sampled_from(list(places(original))))
    parent = content
    for key in parents:
        parent = parent[key]
    parent[last] = data.draw(VALUES)
    folder = Path(tmp_path_factory.getbasetemp())
    text = write(folder, content).read_bytes()
    try:
        PreparedData.open(folder).describe()
    except UserError as error:
        line = str(error)
        assert line.startswith(f"{folder / 'manifest.json'}: ") and line.isprintable() and len(line) < 1000
    assert (folder / "manifest.json").read_bytes() == text


def test_text_with_another_number_of_lines_is_refused(tmp_path):
    data = sample_data(tmp_path / "data", {"de": ["a", "b"], "en": ["a", "b"]})
    assert data.read_text("test", "en") == ["a", "b"]
    (data.folder / "text" / "test.en").write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="test.en: has 1 lines, the manifest 2"):
        data.read_text("test", "en")
    with pytest.raises(UserError, match="manifest.json: options: subword"):
        assert data.subword_options
