"""Tokens and pieces are those of sacremoses and subword-nmt, from one process or several."""

import io
import json
import random
import time

import grammar
import pytest
import regex
from conftest import write_recipe
from sacremoses import MosesPunctNormalizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE

from encourage_mt.data import stages, subwords
from encourage_mt.data.prepare import data_checksum, prepare
from encourage_mt.data.stages import drop_reason, hash64, ordered_map
from encourage_mt.data.subwords import BPEEncoder, learn, restore_bytes
from encourage_mt.data.tokenization import PunctuationNormalizer, Tokenizer, detokenize, tokenize
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe

# what the rules look at: full stops, prefixes, commas, numbers, apostrophes, dots, hyphens, quotes, spaces, controls
BITS = [*"aZé5'’\".,  -`:;!?()[]|<>&/…«»„“–—%№ßĳ٣あ漢😀@#sdmn\u00a0\u2028\x85\x01"]
BITS += ["...", "Dr.", "No.", "DOTMULTI", "'s", " ' ", "z.B.", "e.g.", "5,000", "5.", " 5", "n't", ".'", "wort"]


def lines(seed, number):
    rng = random.Random(seed)
    made = ["".join(rng.choices(BITS, k=rng.randint(1, 14))) for _ in range(number)]
    return made + [side for pair in grammar.generate(seed, {"train": 100})["train"] for side in pair]


@pytest.mark.parametrize("aggressive_hyphens", [False, True])
@pytest.mark.parametrize("language", ["de", "en", "fr", "ru", "fi", "xx"])
def test_tokens_are_those_of_sacremoses(language, aggressive_hyphens):
    slow, fast = MosesTokenizer(language), Tokenizer(language, aggressive_hyphens)
    for line in lines(1, 2000):
        expected = slow.tokenize(line, aggressive_dash_splits=aggressive_hyphens, return_str=True)
        assert fast(line) == expected, repr(line)


@pytest.mark.parametrize("language", ["de", "en", "cs"])
def test_punctuation_is_that_of_sacremoses_with_spaces_for_what_does_not_print(language):
    slow, fast = MosesPunctNormalizer(language, perl_parity=True), PunctuationNormalizer(language)
    for line in lines(2, 2000):
        assert fast(line) == regex.sub(r"\p{C}", " ", slow.normalize(line)), repr(line)


def test_detokenized_text_is_what_was_tokenized():
    text = ["He said: \"It's 5,000 & more [now] - isn't it?\"", "A well-known <b> | Dr. No."]
    tokens = tokenize(text, "en", aggressive_hyphens=True)
    assert tokens[1] == "A well @-@ known &lt; b &gt; &#124; Dr. No ."
    assert detokenize(tokens, "en") == [text[0], "A well-known < b > | Dr. No."]


def test_a_line_of_a_million_characters_takes_seconds():
    started = time.monotonic()
    for line in ("x" * 10**6, "wort, " * 170_000, "." * 10**6, "' " * 500_000):
        assert Tokenizer("de")(line)
    assert time.monotonic() - started < 60, "linear, not quadratic"


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("bpe") / "subword"
    learn(grammar.generate(1, {"train": 300})["train"], 300, {"merges": 300}, prefix)
    return prefix


def test_merges_and_pieces_are_those_of_subword_nmt(codes):
    from subword_nmt.learn_bpe import learn_bpe

    text = io.StringIO("\n".join(side for pair in grammar.generate(1, {"train": 300})["train"] for side in pair))
    learn_bpe(text, expected := io.StringIO(), 300)
    assert codes.with_suffix(".codes").read_text(encoding="utf-8") == expected.getvalue()
    with open(f"{codes}.codes", encoding="utf-8") as file:
        slow = BPE(file)
    fast = BPEEncoder(codes)
    for line in map(Tokenizer("de"), lines(3, 1000)):
        assert fast(line) == slow.process_line(line)


def test_bytes_become_characters_again():
    assert restore_bytes("5 <0xE2><0x82><0xAC> und <0xC3><0xA4>b <0xE2>") == "5 € und äb \ufffd"


def test_sentencepiece_learns_on_a_sample_of_large_text(tmp_path, monkeypatch):
    pairs = grammar.generate(1, {"train": 300})["train"]
    monkeypatch.setattr(subwords, "SAMPLED_LINES", 250)
    options = {"vocab_size": 200, "model_type": "bpe"}
    assert learn(iter(pairs), 300, options, tmp_path / "sampled") == {"learned_on_lines": 200}
    monkeypatch.undo()
    learn(pairs[::3], 100, options, tmp_path / "same")
    assert (tmp_path / "sampled.vocab").read_text() == (tmp_path / "same.vocab").read_text()


# --- stages


@pytest.mark.parametrize(
    "lengths, expected",
    [((0, 3), "empty"), ((175, 117), ""), ((176, 170), "too_long"), ((3, 2), ""), ((2, 4), "ratio"), ((1, 1), "")],
)
def test_pairs_are_dropped_where_strictly_beyond_the_limit(lengths, expected):
    assert drop_reason(*lengths, {"max_length": 175, "max_ratio": 1.5}) == expected


def slow_first(chunk):
    time.sleep(0.2 if chunk[0] == 0 else 0)
    return [item * 2 for item in chunk]


def die(chunk):
    import os

    os._exit(9)


def test_order_is_kept_and_only_a_few_chunks_are_held(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 10)
    taken = []
    numbers = (taken.append(n) or n for n in range(500))
    results = ordered_map(slow_first, numbers, 2)
    assert next(results) == (list(range(10)), list(range(0, 20, 2)))
    assert len(taken) <= 10 * (2 * stages.WAITING + 2)
    assert [item for _, result in results for item in result] == list(range(20, 1000, 2))


def test_a_worker_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 1)
    with pytest.raises(UserError, match="a worker was killed"):
        list(ordered_map(die, range(9), 2))


def test_hashes_are_the_same_everywhere():
    assert hash64("Haus") == 697045299593435607


@pytest.mark.parametrize("changes", [{}, {"tokenizer": "moses", "subword": {"merges": 200}}], ids=["raw", "moses"])
def test_any_number_of_workers_makes_the_same_data(changes, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    one = prepare(recipe, tmp_path / "one", workers=1)
    monkeypatch.setattr(stages, "CHUNK", 37)
    three = prepare(recipe, tmp_path / "three", workers=3)
    assert data_checksum(one) == data_checksum(three)
    manifests = [json.loads((data / "manifest.json").read_text()) for data in (one, three)]
    assert manifests[0] == manifests[1]
