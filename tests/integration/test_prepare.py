"""Prepare bitext: a user's own files, bad files, options."""

import functools
import gzip
import http.server
import json
import os
import threading

import grammar
import pytest
import yaml
from conftest import ROOT, TINY, refused, run, write_recipe

from encourage_mt.data import stages
from encourage_mt.data.bitext import read_lines
from encourage_mt.data.prepare import data_checksum, prepare
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- preparing a user's own files


def own_recipe(folder, changes=None, **files):
    """A recipe of the tiny model on files beside it: the bundled corpus as text, but for `files`."""
    splits = grammar.generate(5, {"train": 200, "valid": 10, "test": 10})
    for split, pairs in splits.items():
        for side, language in enumerate(("de", "en")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            write(folder / f"{split}.{language}", files.get(f"{split}_{language}", text))
    return write_recipe(folder, data={split: [f"{split}.de", f"{split}.en"] for split in splits}, **(changes or {}))


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"train_de": "nur eine Zeile\n"}, "they must pair line by line"),
        ({"test_en": ""}, "test.en: empty file"),
        ({"valid_de": b"\xe4\n" * 10}, "valid.de: line 1, byte 1: not UTF-8"),
        ({"train_de": "\n" * 200}, "train: no pair has text on both sides"),
        ({"train_de": "a\n" * 200, "train_en": "a\n" * 200}, "subword model:"),
        ({"changes": {"clean": {"max_length": 1}}}, "train: no pair is left of 200 after cleaning (too_long 200)"),
        (
            {"changes": {"tokenizer": "moses", "clean": {"max_ratio": 1, "unit": "tokens"}}, "train_de": "ja\n" * 200},
            "train: no pair is left of 200 after cleaning (ratio 200)",
        ),
        (
            {"changes": {"subword": {"merges": 100}}, "train_de": "a\n" * 200, "train_en": "a\n" * 200},
            "subword model: no word has two characters",
        ),
    ],
)
def test_bad_files_end_in_one_line_and_leave_no_data(files, expected, tmp_path):
    recipe = own_recipe(tmp_path, **files)
    done = run("encourage-mt", "prepare", recipe, "--raw-dir", tmp_path, "--work-dir", tmp_path / "work", code=2)
    assert expected in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_prepared_data_is_whole_and_made_once(tmp_path, capsys):
    recipe = load_recipe(own_recipe(tmp_path))
    (tmp_path / "work" / "data.partial").mkdir(parents=True)
    write(tmp_path / "work" / "data.partial" / "of a killed run", "")
    lines = read_lines(tmp_path / "train.de")
    write(tmp_path / "train.de", "\n".join(["", *lines[1:]]) + "\n")
    data = prepare(recipe, tmp_path / "work", tmp_path)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["pairs"] == {"train": 199, "valid": 10, "test": 10}
    assert manifest["counts"]["train"]["empty"] == 1
    assert read_lines(data / "text" / "test.en") == read_lines(tmp_path / "test.en")
    assert (data / "data-bin" / "dict.de.txt").read_bytes() == (data / "data-bin" / "dict.en.txt").read_bytes()
    assert sorted(path.name for path in data.iterdir()) == [
        *("data-bin", "manifest.json", "subword.model", "subword.vocab", "text")
    ]
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    prepare(recipe, tmp_path / "work", tmp_path)
    assert "is prepared already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    write(tmp_path / "train.de", "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="prepared from another train.de"):
        prepare(recipe, tmp_path / "work", tmp_path)


def test_data_of_other_options_is_kept_unless_told_to_overwrite(tmp_path):
    prepare(load_recipe(own_recipe(tmp_path)), tmp_path / "work", tmp_path)
    other = own_recipe(tmp_path, {"lowercase": True, "subword": {"vocab_size": 250, "model_type": "bpe"}})
    command = ("encourage-mt", "prepare", other, "--raw-dir", tmp_path, "--work-dir", tmp_path / "work")
    checksum = data_checksum(tmp_path / "work" / "data")
    error = run(*command, code=2).stderr
    assert "prepared with other options (lowercase, subword); choose another --work-dir" in error
    write(tmp_path / "train.en", "")
    assert "train.en: empty file" in run(*command, "--overwrite", code=2).stderr
    assert data_checksum(tmp_path / "work" / "data") == checksum, "what fails loses nothing"
    own_recipe(tmp_path, {"lowercase": True, "subword": {"vocab_size": 250, "model_type": "bpe"}})
    run(*command, "--overwrite")
    assert data_checksum(tmp_path / "work" / "data") != checksum


def test_odd_characters_shift_and_lose_nothing(tmp_path):
    de, en = ([pair[side] for pair in grammar.generate(5, {"train": 200})["train"]] for side in (0, 1))
    odd = "".join(map(chr, [*range(32), *range(127, 160), 0x2028, 0x2029, 0xFEFF])).replace("\n", "")
    for side in (de, en):
        side[7] = f"A {odd} b{odd}c"
    files = {"train_de": "\ufeff" + "\r\n".join(de) + "\r\n", "train_en": "\n".join(en)}
    test = "\n".join(["x\ry\x85z\u2028w"] * 10) + "\n"
    recipe = load_recipe(own_recipe(tmp_path, **files, test_de=test, test_en=test))
    data = prepare(recipe, tmp_path / "work", tmp_path)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["pairs"] == {"train": 200, "valid": 10, "test": 10}
    told = (tmp_path / "work" / "preprocess.log").read_text()
    for language in ("de", "en"):
        assert f"train.{language}: 200 sents" in told and f"test.{language}: 10 sents" in told
    assert (data / "text" / "test.de").read_bytes().decode() == test, "what is scored against is as it was"


def test_a_line_of_a_million_characters(tmp_path):
    de, en = ([pair[side] for pair in grammar.generate(5, {"train": 200})["train"]] for side in (0, 1))
    de[3], en[4] = "x" * 10**6, "wide " * 200_000
    files = {"train_de": "\n".join(de), "train_en": "\n".join(en), "test_de": "weit " * 200_000 + "\n" + "ja\n" * 9}
    recipe = load_recipe(own_recipe(tmp_path, {"tokenizer": "moses"}, **files))
    data = prepare(recipe, tmp_path / "work", tmp_path)
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["counts"]["train"]["too_long"] == 2 and manifest["pairs"]["test"] == 10
    assert any(warning.startswith("test: a sentence of") for warning in manifest["warnings"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_no_space_left_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def on_full_disk(path, mode="r"):
        return open("/dev/full" if mode == "w" else path, mode, encoding="utf-8")

    monkeypatch.setattr("encourage_mt.data.prepare._open", on_full_disk)
    with pytest.raises(UserError, match="no space left on the disk for .*work"):
        prepare(load_recipe(own_recipe(tmp_path)), tmp_path / "work", tmp_path)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_repetitions_and_leakage_are_counted(tmp_path):
    pairs = grammar.generate(5, {"train": 200})["train"]
    train = pairs + pairs[:3]
    test = [pairs[0], pairs[0], (pairs[1][0], "other"), ("anders", pairs[2][1]), ("neu", "new")]
    files = {f"train_{language}": "".join(p[side] + "\n" for p in train) for side, language in enumerate(("de", "en"))}
    files |= {f"test_{language}": "".join(p[side] + "\n" for p in test) for side, language in enumerate(("de", "en"))}
    manifest_file = prepare(load_recipe(own_recipe(tmp_path, **files)), tmp_path / "work", tmp_path) / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    assert manifest["duplicates"] == {"train_pairs": 3}
    assert manifest["leakage"]["test"] == {"sources_in_train": 3, "targets_in_train": 3, "pairs_in_train": 2}
    assert "test: 2 of its pairs are in train too" in manifest["warnings"]
    assert manifest["percent_unknown"]["test"]["en"] >= 0 and manifest["lengths_in_pieces"]["test"]["en"]["longest"] > 1
    assert {"sacremoses", "sentencepiece", "subword-nmt"} <= set(manifest["versions"])


# --- a user's own text, with valid and test held out of it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with corpus.de and corpus.en.gz, 300 pairs and some that share a sentence; and the same as corpus.tsv."""
    folder = tmp_path_factory.mktemp("corpus")
    pairs = grammar.generate(7, {"all": 300})["all"]
    pairs += [(pairs[0][0], f"{pairs[0][1]} Indeed."), (f"{pairs[1][0]} Ja!", pairs[1][1])]
    pairs += [(pairs[2][0].upper(), f"{pairs[2][1]} Really?")]
    write(folder / "corpus.de", "".join(f"{de}\n" for de, _ in pairs))
    write(folder / "corpus.en.gz", gzip.compress("".join(f"{en}\n" for _, en in pairs).encode()))
    write(folder / "corpus.tsv", "".join(f"{de}\t{en}\n" for de, en in pairs))
    content = yaml.safe_load((ROOT / "examples/own/recipe.yaml").read_text()) | {key: TINY[key] for key in OWN_MODEL}
    content["data"] = {"held_out": {"valid": 20, "test": 30}}
    content["subword"]["vocab_size"] = 400
    write(folder / "recipe.yaml", yaml.safe_dump(content))
    return folder


OWN_MODEL = ("train", "average", "beam")


def sentences(data, languages=("de", "en")):
    return {(s, side): read_lines(data / "text" / f"{s}.{side}") for s in ("valid", "test") for side in languages}


def test_own_text_is_split_so_that_no_sentence_stands_in_two_splits(corpus, tmp_path):
    files = ["--bitext", corpus / "corpus.de", corpus / "corpus.en.gz"]
    run("encourage-mt", "prepare", corpus / "recipe.yaml", *files, "--work-dir", tmp_path / "work")
    data = tmp_path / "work" / "data"
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["pairs"] == {"train": 253, "valid": 20, "test": 30}
    held = sentences(data)
    for side, language in enumerate(("de", "en")):
        everything = [line.split("\t")[side].casefold() for line in read_lines(corpus / "corpus.tsv")]
        for split in ("valid", "test"):
            assert all(everything.count(line.casefold()) == 1 for line in held[split, language])
        assert not set(held["valid", language]) & set(held["test", language])

    tsv = ["--bitext", corpus / "corpus.tsv", "--source", "de", "--target", "en"]
    run("encourage-mt", "prepare", corpus / "recipe.yaml", *tsv, "--reverse", "--work-dir", tmp_path / "turned")
    assert sentences(tmp_path / "turned" / "data") == held, "the same pairs from either form"
    assert (tmp_path / "turned" / "data" / "data-bin" / "test.en-de.en.bin").exists()


def test_own_text_is_trained_on_and_scored(corpus, tmp_path):
    files = ["--bitext", corpus / "corpus.de", corpus / "corpus.en.gz"]
    done = run("encourage-mt", "run", corpus / "recipe.yaml", *files, "--criteria", "el", cwd=tmp_path)
    assert "BLEU signature" in done.stdout and (tmp_path / "runs" / "own_de_en" / "el.seed1").is_dir()


def test_too_few_pairs_to_hold_out_are_refused(corpus, tmp_path, capsys):
    write(tmp_path / "few.de", "eins\nzwei\n")
    write(tmp_path / "few.en", "one\ntwo\n")
    for file, expected in (("few", "held_out: "), ("none", "none.de: ")):
        files = ["--bitext", tmp_path / f"{file}.de", tmp_path / f"{file}.en"]
        work = tmp_path / "work"
        assert expected in refused(capsys, "prepare", corpus / "recipe.yaml", *files, "--work-dir", work)
        assert not (work / "data").exists()


def test_recipe_downloads_its_files_once(tmp_path, capsys):
    for split, pairs in grammar.generate(5, {"train": 200, "valid": 10, "test": 10}).items():
        for side, language in enumerate(("de", "en")):
            write(tmp_path / "served" / f"{split}.{language}", "".join(pair[side] + "\n" for pair in pairs))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = {split: [f"{split}.de", f"{split}.en"] for split in ("train", "valid", "test")}
        data["urls"] = [f"http://127.0.0.1:{server.server_port}"]
        recipe = load_recipe(write_recipe(tmp_path, data=data))
        prepare(recipe, tmp_path / "work", download_dir=tmp_path / "downloads")
        server.shutdown()
    output = capsys.readouterr()
    assert "train: 200 pairs" in output.out and output.err.count('"GET ') == 6


def test_any_number_of_workers_makes_the_same_data(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, tokenizer="moses", subword={"merges": 200}))
    one = prepare(recipe, tmp_path / "one", workers=1)
    monkeypatch.setattr(stages, "CHUNK", 37)
    three = prepare(recipe, tmp_path / "three", workers=3)
    manifests = [json.loads((data / "manifest.json").read_text()) for data in (one, three)]
    assert manifests[0] == manifests[1]
