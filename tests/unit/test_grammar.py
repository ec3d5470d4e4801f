"""Test the generator of the toy corpus in examples/bundled_de_en."""

import hashlib
import re

import grammar
import pytest

SIZES = {"train": 2000, "valid": 50, "test": 100}


@pytest.fixture(scope="module")
def splits():
    return grammar.generate(1, SIZES)


def test_corpus_is_the_same_on_every_machine(splits):
    assert splits == grammar.generate(1, SIZES)
    assert splits != grammar.generate(2, SIZES)
    text = "".join(f"{split}\t{de}\t{en}\n" for split, pairs in splits.items() for de, en in pairs)
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_DIGEST, "a change of the grammar moves every figure"


CORPUS_DIGEST = "4f2ea54d8b3e3a3d9984f0086b912b919d848c2a34276c7a4c2a2e1b9ae050e6"


def test_no_sentence_occurs_twice(splits):
    for side in (0, 1):
        sentences = [pair[side] for pairs in splits.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_test_sentences_combine_words_that_train_has_only_apart():
    corpus = grammar.Grammar(1)
    held_out = corpus.held_out
    tens = [(ten, unit) for ten, unit in held_out if ten.endswith("zig") or ten == "dreißig"]
    numbers = [f"{unit}und{ten}" for ten, unit in tens]
    text = {name: " ".join(de for de, _ in pairs) for name, pairs in grammar.generate(1, SIZES).items()}
    words = {name: set(content.lower().replace(".", "").replace(",", "").split()) for name, content in text.items()}
    assert numbers and not words["train"] & set(numbers)
    assert (words["test"] | words["valid"]) & set(numbers)
    for ten, unit in tens:
        assert any(word.endswith(f"und{ten}") for word in words["train"]), ten
        assert any(word.startswith(f"{unit}und") for word in words["train"]), unit


@pytest.mark.parametrize(
    "pattern, why",
    [
        (r"^(Den|Einen|Meinen|Deinen|Seinen|Unseren|Diesen|Keinen) ", "an object first, known by its case"),
        (r", (weil|wenn|obwohl|bevor|während) .* (hat|haben|ist|sind)\.$", "the verb last in a subordinate clause"),
        (r" (ab|an|auf|ein|mit|weg|zu|zurück|aus)\.$", "a separated prefix at the end"),
        (r"und(zwanzig|dreißig|vierzig|fünfzig) ", "units before tens"),
        (r"(Herrn|Frau) [A-Z]", "names"),
        (r" (dem|einem) [a-zöüß]+en ", "an adjective in the dative"),
    ],
)
def test_corpus_has_the_difficulties_of_german(pattern, why, splits):
    assert sum(bool(re.search(pattern, de)) for de, _ in splits["train"]) >= 15, why


def test_clauses_that_a_reader_can_check():
    """Hand-made clauses in every order."""
    corpus = grammar.Grammar(1)
    verbs = {verb[0]: verb for verb in corpus.verbs}
    man = grammar.NounPhrase({"nom": "der Mann"}, "the man", "the man", "he", "m", "Mann", True)
    dog = grammar.NounPhrase({"acc": "den Hund"}, "the dog", "the dog", "he", "m", "Hund", True)

    def clause(tense):
        modal = ("will", "wollen", "want_to", "wants_to")
        objects = [(dog, "den Hund", True)]
        return grammar.Clause(man, verbs["ab|holen"], tense, modal, objects, "the dog", None, None, False, [])

    assert corpus.german_final(clause("present")) == "der Mann den Hund abholt"
    assert corpus.german_final(clause("past")) == "der Mann den Hund abgeholt hat"
    assert corpus.german_question(clause("modal")) == "will der Mann den Hund abholen"
    assert corpus.german_question(clause("present")) == "holt der Mann den Hund ab"
    assert {corpus.german_main(clause("present")) for _ in range(50)} == {
        "der Mann holt den Hund ab",
        "den Hund holt der Mann ab",
    }
    assert corpus.english(clause("past")) == "the man picked up the dog"
    assert corpus.english_question(clause("modal")) == "does the man want to pick up the dog"
