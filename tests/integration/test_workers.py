"""Preparing data by several processes, and from downloads."""

import json

import pytest
from conftest import write_recipe

from encourage_mt.data import stages
from encourage_mt.data.prepare import data_checksum, prepare
from encourage_mt.recipe import load_recipe


@pytest.mark.parametrize("changes", [{}, {"tokenizer": "moses", "subword": {"merges": 200}}], ids=["raw", "moses"])
def test_any_number_of_workers_makes_the_same_data(changes, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    one = prepare(recipe, tmp_path / "one", workers=1)
    monkeypatch.setattr(stages, "CHUNK", 37)
    three = prepare(recipe, tmp_path / "three", workers=3)
    assert data_checksum(one) == data_checksum(three)
    manifests = [json.loads((data / "manifest.json").read_text()) for data in (one, three)]
    assert manifests[0] == manifests[1]
