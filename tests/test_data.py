"""Bitext, its preparation, downloads, and the bundled corpus."""

import functools
import gzip
import hashlib
import http.server
import json
import threading

import pytest
from conftest import TINY, run, write_recipe

from encourage_mt import grammar
from encourage_mt.bitext import fetch, read_bitext, read_lines
from encourage_mt.errors import UserError
from encourage_mt.prepare import prepare
from encourage_mt.recipe import load_recipe


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- reading


def test_lines_end_at_newline_alone(tmp_path):
    path = write(tmp_path / "a", "\ufeffeins\u2028zwei\r\ndrei\x0bvier\u0085\n\nfünf")
    assert read_lines(path) == ["eins\u2028zwei", "drei\x0bvier\u0085", "", "fünf"]
    assert read_lines(write(tmp_path / "a.gz", gzip.compress(path.read_bytes()))) == read_lines(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("empty", b"", "empty: empty file"),
        ("bytes", b"gut\nna\xff ja\n", "bytes: line 2, byte 3: not UTF-8"),
        ("page.gz", b"<html>not found</html>", "page.gz: Not a gzipped file"),
        ("cut.gz", gzip.compress(b"eins\nzwei\n")[:-9], "cut.gz: Compressed file ended"),
    ],
)
def test_files_that_are_no_text_are_named(name, content, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        read_lines(write(tmp_path / name, content))
    with pytest.raises(UserError, match="No such file"):
        read_lines(tmp_path / "absent")


def test_sides_of_different_length_are_refused(tmp_path):
    with pytest.raises(UserError, match="de has 2 lines, .*en has 1"):
        read_bitext(write(tmp_path / "de", "a\nb\n"), write(tmp_path / "en", "a\n"))


# --- preparing a user's own files


def own_recipe(folder, **files):
    """A recipe of the tiny model on files beside it: the bundled corpus as text, but for `files`."""
    splits = grammar.generate(5, {"train": 200, "valid": 10, "test": 10})
    for split, pairs in splits.items():
        for side, language in enumerate(("de", "en")):
            write(
                folder / f"{split}.{language}", files.get(f"{split}_{language}", "".join(p[side] + "\n" for p in pairs))
            )
    return write_recipe(folder, data={split: [f"{split}.de", f"{split}.en"] for split in splits})


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"train_de": "nur eine Zeile\n"}, "they must pair line by line"),
        ({"test_en": ""}, "test.en: empty file"),
        ({"valid_de": b"\xe4\n" * 10}, "valid.de: line 1, byte 1: not UTF-8"),
        ({"train_de": "\n" * 200}, "train: no pair has text on both sides"),
        ({"train_de": "a\n" * 200, "train_en": "a\n" * 200}, "subword model:"),
    ],
)
def test_bad_files_end_in_one_line_and_leave_no_data(files, expected, tmp_path):
    recipe = own_recipe(tmp_path, **files)
    done = run("encourage-mt", "run", recipe, "--raw-dir", tmp_path, "--work-dir", tmp_path / "work", code=2)
    assert expected in done.stderr and done.stderr.strip().count("\n") == 0
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_prepared_data_is_whole_and_made_once(tmp_path, capsys):
    recipe = load_recipe(own_recipe(tmp_path))
    lines = read_lines(tmp_path / "train.de")
    write(tmp_path / "train.de", "\n".join(["", *lines[1:]]) + "\n")
    data = prepare(recipe, tmp_path / "work", tmp_path)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["pairs"] == {"train": 199, "valid": 10, "test": 10}
    assert manifest["train pairs dropped for an empty side"] == 1
    assert read_lines(data / "text" / "test.en") == read_lines(tmp_path / "test.en")
    assert (data / "data-bin" / "dict.de.txt").read_bytes() == (data / "data-bin" / "dict.en.txt").read_bytes()
    assert not (tmp_path / "work" / "data.partial").exists()
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    prepare(recipe, tmp_path / "work", tmp_path)
    assert "is prepared already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    write(tmp_path / "train.de", "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="prepared from another train.de"):
        prepare(recipe, tmp_path / "work", tmp_path)


# --- fetching


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_download_is_checked_and_kept(server, tmp_path):
    folder, url = server
    write(folder / "train.de", "Haus\n")
    digest = hashlib.sha256(b"Haus\n").hexdigest()
    path = fetch("train.de", None, tmp_path / "raw", url, digest)
    assert path.read_text() == "Haus\n"
    (folder / "train.de").unlink()
    assert fetch("train.de", None, tmp_path / "raw", url, digest) == path, "the second time needs no server"


@pytest.mark.parametrize("content", ["<html>moved</html>", None], ids=["another file", "none (404)"])
def test_a_wrong_download_is_refused_and_leaves_nothing(content, server, tmp_path):
    folder, url = server
    if content:
        write(folder / "train.de", content)
    with pytest.raises(UserError, match="train.de: .*--raw-dir"):
        fetch("train.de", None, tmp_path / "raw", url, "0" * 64)
    assert not list((tmp_path / "raw").glob("*"))


def test_files_at_hand_are_checked_too(tmp_path):
    write(tmp_path / "train.de", "Haus\n")
    assert fetch("train.de", tmp_path, tmp_path / "raw", None, hashlib.sha256(b"Haus\n").hexdigest())
    with pytest.raises(UserError, match="sha256 differs"):
        fetch("train.de", tmp_path, tmp_path / "raw", None, "0" * 64)
    with pytest.raises(UserError, match="no such file"):
        fetch("train.en", tmp_path, tmp_path / "raw", None, None)
    with pytest.raises(UserError, match="give the folder of its files with --raw-dir"):
        fetch("train.en", None, tmp_path / "raw", None, None)


# --- the bundled corpus

SIZES = {"train": 2000, "valid": 50, "test": 100}


@pytest.fixture(scope="module")
def splits():
    return grammar.generate(1, SIZES)


def test_the_corpus_is_the_same_everywhere(splits):
    assert splits == grammar.generate(1, SIZES)
    assert splits != grammar.generate(2, SIZES)
    text = "".join(f"{split}\t{de}\t{en}\n" for split, pairs in splits.items() for de, en in pairs)
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_DIGEST, "a change of the grammar moves every figure"


CORPUS_DIGEST = "4f2ea54d8b3e3a3d9984f0086b912b919d848c2a34276c7a4c2a2e1b9ae050e6"


def test_no_sentence_stands_twice(splits):
    for side in (0, 1):
        sentences = [pair[side] for pairs in splits.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_test_sentences_combine_what_train_has_only_apart():
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
        (r"^(Den|Einen|Meinen|Deinen|Seinen|Unseren|Diesen|Keinen) ", "an object first: only its case tells"),
        (r", (weil|wenn|obwohl|bevor|während) .* (hat|haben|ist|sind)\.$", "the verb last in a subordinate clause"),
        (r" (ab|an|auf|ein|mit|weg|zu|zurück|aus)\.$", "a separated prefix at the end"),
        (r"und(zwanzig|dreißig|vierzig|fünfzig) ", "units before tens"),
        (r"(Herrn|Frau) [A-Z]", "names"),
        (r" (dem|einem) [a-zöüß]+en ", "an adjective in the dative"),
    ],
)
def test_the_corpus_has_what_makes_german_hard(pattern, why, splits):
    import re

    assert sum(bool(re.search(pattern, de)) for de, _ in splits["train"]) >= 15, why


def test_pairs_a_reader_can_check():
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
    assert TINY["data"]["generate"]["seed"] == 3
