"""Test the sizes that are chosen for own text of any number of pairs, and that the choice can be edited."""

import pytest
import torch
import yaml
from conftest import ROOT

from encourage_mt.arguments import parse_arguments
from encourage_mt.cli import open_recipe
from encourage_mt.data import sizing
from encourage_mt.data.sizing import (
    CPU,
    KEPT,
    MANY_GPUS,
    ONE_GPU,
    choose,
    count_characters,
    count_pairs,
    describe,
    describe_kept,
    keep,
)
from encourage_mt.data.subwords import learn
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe

OWN = ROOT / "examples/own/recipe.yaml"


def test_the_page_has_the_sizes():
    page = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
    for cpu, gpu in zip(CPU, ONE_GPU, strict=True):
        other = f" (GPU: {gpu.vocabulary:,})" if gpu.vocabulary != cpu.vocabulary else ""
        cells = [f"{cpu.pairs:,}" if cpu.pairs else "more", f"{cpu.vocabulary:,}{other}"]
        for size in (cpu, gpu):
            cells += [f"{size.layers}+{size.layers}, {size.width}, {size.dropout}"]
            cells += [f"{size.max_tokens * size.update_freq:,}", f"{size.seen:,}"]
        assert f"| {' | '.join(cells)} |" in page


def own(chosen, path=OWN, files=("a.de", "a.en")):
    return load_recipe(path, bitext=list(files), chosen=chosen)


MACHINES = {0: CPU, 1: ONE_GPU, 2: MANY_GPUS, 64: MANY_GPUS}
BORDERS = [200, 1000, *(row.pairs + more for row in CPU[:-1] for more in (0, 1)), 10**9]


@pytest.mark.parametrize("gpus", MACHINES)
def test_each_row_ends_at_its_number_of_pairs(gpus):
    rows = MACHINES[gpus]
    assert [row.pairs for row in rows] == [3_000, 10_000, 50_000, 200_000, 1_000_000, 0]
    for row, after in zip(rows, rows[1:], strict=False):
        for pairs, expected in ((row.pairs, row), (row.pairs + 1, after)):
            chosen = choose(pairs, gpus)
            assert chosen["subword"]["vocab_size"] == expected.vocabulary
            assert [chosen["train"][name] for name in ("dropout", "lr")] == [expected.dropout, expected.lr]
    assert choose(10**9, gpus)["train"]["encoder-embed-dim"] == rows[-1].width


@pytest.mark.parametrize("gpus", MACHINES)
@pytest.mark.parametrize("pairs", BORDERS)
def test_the_warm_up_is_at_most_a_third_even_with_short_sentences(pairs, gpus):
    chosen = choose(pairs, gpus)
    train, pieces = chosen["train"], 10  # in the longer sentence of a pair
    kept = pairs - 2 * chosen["held_out"]["test"]
    updates = kept * pieces / (train["max-tokens"] * train["update-freq"]) * train["max-epoch"]
    assert 3 * train["warmup-updates"] <= updates


@pytest.mark.parametrize("pairs, epochs", [(0, 100), (1000, 100), (8000, 40), (29_000, 10), (50_000, 8), (50_001, 20)])
def test_fewer_pairs_are_seen_more_often(pairs, epochs):
    assert choose(pairs, 0)["train"]["max-epoch"] == epochs


@pytest.mark.parametrize("pairs, held_out", [(0, 1), (80, 10), (7999, 999), (8000, 1000), (10**8, 1000)])
def test_an_eighth_of_a_small_corpus_is_held_out(pairs, held_out):
    assert choose(pairs, 0)["held_out"] == {"valid": held_out, "test": held_out}


@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("pairs", [0, 10**4, 10**5, 10**9])
def test_the_choice_is_a_valid_recipe(pairs, gpus):
    chosen = choose(pairs, gpus)
    recipe = own(chosen)
    assert recipe.average <= recipe.train["max-epoch"] and recipe.filled["train"] == recipe.train
    assert recipe.train["max-tokens-valid"] >= 1024, "the longest sentence that the model takes is validated"
    for side in ("encoder", "decoder"):
        assert recipe.train[f"{side}-embed-dim"] % recipe.train[f"{side}-attention-heads"] == 0
    text = describe(recipe, chosen, pairs, gpus)
    assert f"{pairs:,} pairs" in text and "pieces" in text and f"{chosen['train']['max-epoch']} epochs" in text


def test_a_chosen_recipe_is_kept_and_used_as_it_was_edited(tmp_path):
    first = own(choose(8000, 0))
    keep(first.filled, tmp_path, 0)
    kept = tmp_path / KEPT
    assert own(None, kept).model_dump() == first.model_dump() and own(choose(0, 0), kept).filled is None
    content = yaml.safe_load(kept.read_text())
    kept.write_text(yaml.safe_dump({**content, "train": {**content["train"], "dropout": 0.25}}))
    assert own(choose(0, 0), kept).train["dropout"] == 0.25


@pytest.mark.parametrize("before, now, warns", [(0, 0, False), (1, 2, False), (0, 1, True), (2, 0, True)])
def test_a_recipe_that_was_chosen_for_another_machine_is_announced(before, now, warns, tmp_path):
    keep(own(choose(8000, before)).filled, tmp_path, before)
    line = describe_kept(tmp_path / KEPT, OWN, now)
    assert (
        str(tmp_path / KEPT) in line
        and f"not {OWN}" in line
        and ("WARNING" in line) == ("--overwrite" in line) == warns
    )
    (tmp_path / KEPT).write_text("name: own\n", encoding="utf-8")
    assert "WARNING" not in describe_kept(tmp_path / KEPT, OWN, now), "edited"


@pytest.mark.parametrize("gpus, width", [(1, 512), (2, 1024)])
def test_prepare_chooses_for_the_gpus_of_the_training(gpus, width, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sizing, "count_pairs", lambda *_: 5_000_000)
    monkeypatch.setattr(sizing, "count_characters", lambda *_: 100)
    files = [str(tmp_path / name) for name in ("a.de", "a.en")]
    words = ["prepare", str(OWN), "--bitext", *files, "--work-dir", str(tmp_path), "--gpus", str(gpus)]
    recipe, _ = open_recipe(parse_arguments(words))
    assert recipe.train["encoder-embed-dim"] == width


def test_the_modern_form_may_have_fewer_pieces_than_asked():
    assert own(choose(8000, 0)).modern().subword.options["hard_vocab_limit"] is False


def test_what_a_recipe_says_itself_is_not_chosen(tmp_path):
    path = tmp_path / "recipe.yaml"
    content = yaml.safe_load(OWN.read_text())
    train = {"arch": "transformer", "max-tokens": 9, "max-update": 9}
    content |= {"train": train, "data": {"held_out": {"valid": 3, "test": 4}}}
    path.write_text(yaml.safe_dump(content))
    chosen = choose(8000, 0)
    recipe = own(chosen, path)
    assert (recipe.train, recipe.subword.vocab_size, recipe.data[0].held_out["test"]) == (train, 2000, 4)
    assert describe(recipe, chosen, 8000, 0) == "for 8,000 pairs and a CPU: 2,000 pieces"
    with pytest.raises(UserError, match="subword: is missing"):
        own(None, path)


def test_pairs_are_counted_in_the_first_file(tmp_path):
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei")
    assert count_pairs(own(choose(0, 0)), tmp_path) == 3
    with pytest.raises(UserError, match="none.de: "):
        count_pairs(own(choose(0, 0), files=("none.de", "a.en")), tmp_path)


@pytest.mark.parametrize("pairs, types", [(12, 26), (200, 1500)], ids=["a few sentences", "many characters"])
def test_the_vocabulary_fits_any_text(pairs, types, tmp_path):
    letters = [chr(0x4E00 + number) for number in range(types)]
    lines = ["".join(letters[(7 * line + place) % types] for place in range(20)) for line in range(pairs)]
    for language in ("zh", "ja"):
        (tmp_path / f"a.{language}").write_text("\n".join(lines), encoding="utf-8")
    recipe = own(choose(0, 0), files=("a.zh", "a.ja"))
    subword = choose(pairs, 0, count_characters(recipe, tmp_path))["subword"]
    learn(zip(lines, lines, strict=True), pairs, subword, tmp_path / "subword")
    assert len((tmp_path / "subword.vocab").read_text(encoding="utf-8").splitlines()) <= subword["vocab_size"]


def test_the_vocabulary_grows_with_the_characters_alone(tmp_path):
    assert choose(8000, 0, 100)["subword"]["vocab_size"] == 2000
    assert choose(8000, 0, 2500)["subword"]["vocab_size"] == 5256
    (tmp_path / "a.tsv").write_text("ab\tba\n" * 9999 + "c\td\n", encoding="utf-8")
    recipe = load_recipe(OWN, "xx", "yy", ["a.tsv"], choose(0, 0))
    assert count_characters(recipe, tmp_path) == 3, "a, b and the tab; c and d are rare"
