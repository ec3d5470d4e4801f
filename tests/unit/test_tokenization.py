"""Check that tokens and pieces equal those of sacremoses and subword-nmt."""

import io
import os
import random
import time

import grammar
import pytest
import regex
from sacremoses import MosesPunctNormalizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE

from encourage_mt import atomic
from encourage_mt.data import subwords
from encourage_mt.data.subwords import encoder, learn, restore_bytes
from encourage_mt.data.tokenization import PunctuationNormalizer, Tokenizer, detokenize

# the rules look at full stops, prefixes, commas, numbers, apostrophes, dots, hyphens, quotes, spaces and controls
BITS = [*"aZé5'’\".,  -`:;!?()[]|<>&/…«»„“–—%№ßĳ٣あ漢😀@#sdmn\u00a0\u2028\x85\x01"]
BITS += ["...", "Dr.", "No.", "DOTMULTI", "'s", " ' ", "z.B.", "e.g.", "5,000", "5.", " 5", "n't", ".'", "wort"]


def lines(seed, number):
    rng = random.Random(seed)
    made = ["".join(rng.choices(BITS, k=rng.randint(1, 14))) for _ in range(number)]
    return made + [side for pair in grammar.generate(seed, {"train": 100})["train"] for side in pair]


@pytest.mark.parametrize("aggressive_hyphens", [False, True])
@pytest.mark.parametrize("language", ["de", "en", "fr", "ru", "fi", "xx"])
def test_tokens_equal_those_of_sacremoses(language, aggressive_hyphens):
    slow, fast = MosesTokenizer(language), Tokenizer(language, aggressive_hyphens)
    for line in lines(1, 2000):
        expected = slow.tokenize(line, aggressive_dash_splits=aggressive_hyphens, return_str=True)
        assert fast(line) == expected, repr(line)


@pytest.mark.parametrize("language", ["de", "en", "cs"])
def test_punctuation_equals_that_of_sacremoses_except_for_unprintable_characters(language):
    slow, fast = MosesPunctNormalizer(language, perl_parity=True), PunctuationNormalizer(language)
    for line in lines(2, 2000):
        assert fast(line) == regex.sub(r"\p{C}", " ", slow.normalize(line)), repr(line)


def test_detokenizing_restores_the_text():
    text = ["He said: \"It's 5,000 & more [now] - isn't it?\"", "A well-known <b> | Dr. No."]
    tokens = list(map(Tokenizer("en", aggressive_hyphens=True), text))
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


def test_merges_and_pieces_equal_those_of_subword_nmt(codes):
    from subword_nmt.learn_bpe import learn_bpe

    text = io.StringIO("\n".join(side for pair in grammar.generate(1, {"train": 300})["train"] for side in pair))
    learn_bpe(text, expected := io.StringIO(), 300)
    assert codes.with_suffix(".codes").read_text(encoding="utf-8") == expected.getvalue()
    with open(f"{codes}.codes", encoding="utf-8") as file:
        slow = BPE(file)
    fast = encoder({"merges": 300}, codes)
    for line in map(Tokenizer("de"), lines(3, 1000)):
        assert fast(line) == slow.process_line(line)


def test_byte_pieces_become_characters():
    assert restore_bytes("5 <0xE2><0x82><0xAC> und <0xC3><0xA4>b <0xE2>") == "5 € und äb \ufffd"


def test_sentencepiece_learns_on_a_sample_of_large_text(tmp_path, monkeypatch):
    pairs = grammar.generate(1, {"train": 300})["train"]
    monkeypatch.setattr(subwords, "SAMPLED_LINES", 250)
    options = {"vocab_size": 200, "model_type": "bpe"}
    assert learn(iter(pairs), 300, options, tmp_path / "sampled") == 200
    monkeypatch.undo()
    assert learn([*pairs[::3], ("x" * 4193, "y" * 4192)], 101, options, tmp_path / "long") == 201, "one is too long"
    learn(pairs[::3], 100, options, tmp_path / "same")
    assert (tmp_path / "sampled.vocab").read_text() == (tmp_path / "same.vocab").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize(
    "file, options", [("codes", {"merges": 9}), ("model", {"vocab_size": 90}), ("vocab", {"vocab_size": 90})]
)
def test_full_disk_is_reported(file, options, tmp_path, monkeypatch):
    def open_full(path, mode, **text):
        full = path.name == f"subword.{file}.tmp"
        return open("/dev/full", mode.replace("x", "w"), **text) if full else open(path, mode, **text)

    monkeypatch.setattr(atomic, "open", open_full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        learn(grammar.generate(1, {"train": 50})["train"], 50, options, tmp_path / "subword")
    assert not (tmp_path / f"subword.{file}").exists()
