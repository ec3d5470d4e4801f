"""Prepare bitext: the files written, the input refused, and the files of others that are never deleted."""

import functools
import gzip
import http.server
import json
import os
import shutil
import threading
from contextlib import contextmanager

import grammar
import pytest
import yaml
from conftest import ROOT, TINY, refused, write_recipe

from encourage_mt.cli import main
from encourage_mt.data import prepare as preparation
from encourage_mt.data import stages
from encourage_mt.data.bitext import read_lines
from encourage_mt.data.manifest import PreparedData
from encourage_mt.data.prepare import hold_out, prepare
from encourage_mt.data.sizing import choose
from encourage_mt.errors import UserError
from encourage_mt.recipe import load_recipe


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


# --- preparing a user's own files


def own_recipe(folder, changes=None, **files):
    """Write a recipe of the tiny model on files beside it: the bundled corpus as text, except for `files`."""
    splits = grammar.generate(5, {"train": 200, "valid": 10, "test": 10})
    for split, pairs in splits.items():
        for side, language in enumerate(("de", "en")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            write(folder / f"{split}.{language}", files.get(f"{split}_{language}", text))
    return write_recipe(folder, data={split: [f"{split}.de", f"{split}.en"] for split in splits}, **(changes or {}))


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"train_de": "nur eine Zeile\n"}, ["train.de", "train.en"]),
        ({"valid_de": b"\xe4\n" * 10}, ["valid.de", "line 1, byte 1"]),
        ({"train_de": "\n" * 200}, ["train:"]),
        ({"train_de": "a\n" * 200, "train_en": "a\n" * 200}, ["subword model:"]),
        ({"changes": {"clean": {"max_length": 1}}}, ["train:", "too_long 200"]),
        (
            {"changes": {"tokenizer": "moses", "clean": {"max_ratio": 1, "unit": "tokens"}}, "train_de": "ja\n" * 200},
            ["train:", "ratio 200"],
        ),
        (
            {"changes": {"subword": {"merges": 100}}, "train_de": "a\n" * 200, "train_en": "a\n" * 200},
            ["subword model:"],
        ),
    ],
)
def test_bad_files_end_in_one_line_and_leave_no_data(files, expected, tmp_path, capsys):
    recipe = own_recipe(tmp_path, **files)
    line = refused(capsys, "prepare", recipe, "--raw-dir", tmp_path, "--work-dir", tmp_path / "work", "--workers", 1)
    assert all(part in line for part in expected)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_prepared_data_is_complete_and_made_once(tmp_path, capsys):
    pairs = grammar.generate(5, {"train": 200})["train"]
    train = [("", pairs[5][1]), *pairs, *pairs[:3]]
    unseen = ("\u200b" + pairs[0][0].replace(" ", "  "), pairs[0][1].replace(" ", "\u00ad "))
    test = [pairs[0], unseen, (pairs[1][0], "other"), ("anders", pairs[2][1]), ("neu", "new €")]
    sides = {
        f"{split}_{language}": "".join(pair[side] + "\n" for pair in split_pairs)
        for split, split_pairs in (("train", train), ("test", test))
        for side, language in enumerate(("de", "en"))
    }
    recipe = load_recipe(own_recipe(tmp_path, {"expected": {"test": {"kept": [6, 7]}}}, **sides))
    left = tmp_path / "work" / ".data.tmp"
    left.mkdir(parents=True)
    write(left / "half", "")
    data = prepare(recipe, tmp_path / "work", tmp_path)
    assert not left.exists(), "of a process that was killed"
    assert sorted(path.name for path in data.iterdir()) == [
        *("data-bin", "manifest.json", "subword.model", "subword.vocab", "text")
    ]
    manifest = PreparedData.open(data)
    assert manifest.lines == {"train": 203, "valid": 10, "test": 5} and manifest.counts["train"]["empty"] == 1
    assert manifest.read_text("test", "en") == read_lines(tmp_path / "test.en")
    assert (data / "data-bin" / "dict.de.txt").read_bytes() == (data / "data-bin" / "dict.en.txt").read_bytes()
    assert manifest.duplicate_train_pairs == 3
    assert manifest.leakage["test"].model_dump() == {"sources_in_train": 3, "targets_in_train": 3, "pairs_in_train": 2}
    assert [warning.partition(":")[0] for warning in manifest.warnings] == ["test, kept", "test"]
    assert manifest.percent_unknown["test"]["en"] > 0 and manifest.lengths_in_pieces["test"]["en"].longest > 1
    assert {"sacremoses", "sentencepiece", "subword-nmt"} <= set(manifest.versions)

    before = snapshot(data)
    prepare(recipe, tmp_path / "work", tmp_path)
    assert "is prepared already" in capsys.readouterr().out and snapshot(data) == before
    write(tmp_path / "train.de", "etwas anderes\n")
    with pytest.raises(UserError, match="train.de"):
        prepare(recipe, tmp_path / "work", tmp_path)


def test_odd_characters_and_long_lines_neither_shift_nor_lose_lines(tmp_path):
    de, en = ([pair[side] for pair in grammar.generate(5, {"train": 200})["train"]] for side in (0, 1))
    odd = "".join(map(chr, [*range(32), *range(127, 160), 0x2028, 0x2029, 0xFEFF])).replace("\n", "")
    for side in (de, en):
        side[7] = f"A {odd} b{odd}c"
    de[3], en[4] = "x" * 10**6, "wide " * 200_000
    files = {"train_de": "\ufeff" + "\r\n".join(de) + "\r\n", "train_en": "\n".join(en)}
    test = "\n".join(["x\ry\x85z\u2028w"] * 9 + ["weit " * 200_000]) + "\n"
    recipe = load_recipe(own_recipe(tmp_path, {"tokenizer": "moses"}, **files, test_de=test, test_en=test))
    data = PreparedData.open(prepare(recipe, tmp_path / "work", tmp_path))
    assert data.lines == {"train": 198, "valid": 10, "test": 10} and data.counts["train"]["too_long"] == 2
    log = (tmp_path / "work" / "preprocess.log").read_text()
    for language in ("de", "en"):
        assert f"train.{language}: 198 sents" in log and f"test.{language}: 10 sents" in log
    assert (data.folder / "text" / "test.de").read_bytes().decode() == test, "the references stay as published"
    assert any(warning.startswith("test: ") for warning in data.warnings)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def open_on_full_disk(path, mode="r"):
        return open("/dev/full" if mode == "w" else path, mode, encoding="utf-8")

    monkeypatch.setattr("encourage_mt.data.prepare._open", open_on_full_disk)
    line = refused(capsys, "prepare", own_recipe(tmp_path), "--raw-dir", tmp_path, "--work-dir", tmp_path / "work")
    assert "no space left" in line.lower() and str(tmp_path / "work") in line
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


# --- a work directory that holds something


@pytest.fixture
def prepared(tiny, tmp_path):
    """A work directory with prepared data, and its recipe."""
    shutil.copytree(tiny[1], tmp_path / "work" / "data")
    return tmp_path / "work", write_recipe(tmp_path)


def test_data_of_other_options_is_kept_unless_overwritten(prepared, tmp_path, capsys):
    work, _ = prepared
    before = snapshot(work / "data")
    other = write_recipe(tmp_path, lowercase=True, subword={"vocab_size": 250, "model_type": "bpe"})
    assert "(lowercase, subword)" in refused(capsys, "prepare", other, "--work-dir", work)
    write(tmp_path / "train.tsv", "")
    assert "train.tsv" in refused(capsys, "prepare", other, "--work-dir", work, "--overwrite")
    assert snapshot(work / "data") == before, "a failure loses nothing"
    write_recipe(tmp_path, lowercase=True, subword={"vocab_size": 250, "model_type": "bpe"})
    checksum = PreparedData.open(work / "data").checksum
    write(work / "el.seed1" / "run.json", f'{{"provenance": {{"data_sha256": "{checksum}"}}}}')
    assert "el.seed1 was trained on it" in refused(capsys, "prepare", other, "--work-dir", work, "--overwrite")
    shutil.rmtree(work / "el.seed1")
    main(["prepare", str(other), "--work-dir", str(work), "--overwrite"])
    assert PreparedData.open(work / "data").checksum != checksum


@pytest.mark.parametrize(
    "name, content",
    [
        ("notes.txt", "mine"),
        ("words.txt", "mine"),
        ("manifest.json", '{"name": "of a web page"}'),
        ("manifest.json", None),
    ],
)
def test_files_of_others_are_never_deleted(name, content, prepared, capsys):
    work, recipe = prepared
    if content is None:
        (work / "data" / name).unlink()  # a folder that happens to be called data
    else:
        write(work / "data" / name, content)
    before = snapshot(work)
    line = refused(capsys, "prepare", recipe, "--work-dir", work, "--overwrite")
    assert str(work / "data") in line and name in line
    after = snapshot(work)
    assert {path: state for path, state in after.items() if path.name != ".lock"} == before


def test_data_that_another_process_made_meanwhile_is_not_made_again(prepared, tmp_path, monkeypatch, capsys):
    work, recipe = prepared
    os.rename(work / "data", tmp_path / "made")

    @contextmanager
    def wait_for_another(folder):
        os.rename(tmp_path / "made", work / "data")
        yield

    monkeypatch.setattr(preparation, "locked", wait_for_another)
    monkeypatch.setattr(preparation, "_Preparation", None)
    main(["prepare", str(recipe), "--work-dir", str(work)])
    assert "is prepared already" in capsys.readouterr().out


def test_another_file_of_the_second_alternative_is_refused(tmp_path):
    """The first alternative is a download; the files of the second one are beside the recipe."""
    download = {"urls": ["https://x"], "train": ["a.tsv"], "valid": ["b.tsv"], "test": ["c.tsv"]}
    recipe = load_recipe(write_recipe(tmp_path, data=[download, TINY["data"]]))
    data = prepare(recipe, tmp_path / "work")
    write(data / "words.123.json.tmp", "of a report that was killed")
    with open(tmp_path / "test.tsv", "a", encoding="utf-8") as file:
        file.write("eins\tone\n")
    with pytest.raises(UserError, match="prepared from another test.tsv"):
        prepare(recipe, tmp_path / "work")
    assert prepare(recipe, tmp_path / "work", overwrite=True) == data
    for name in "abc":
        shutil.copy(tmp_path / "test.tsv", tmp_path / f"{name}.tsv")
    with pytest.raises(UserError, match=r"not prepared from [abc]\.tsv"):  # they are those of the first alternative
        prepare(recipe, tmp_path / "work", tmp_path)
    for name in ("a", "train"):  # so that neither alternative is complete
        (tmp_path / f"{name}.tsv").unlink()
    assert prepare(recipe, tmp_path / "work", tmp_path) == data


def test_data_behind_a_link_is_not_replaced(prepared, tmp_path, capsys):
    work, recipe = prepared
    os.rename(work / "data", tmp_path / "elsewhere")
    (work / "data").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    assert "data: is a link" in refused(capsys, "prepare", recipe, "--work-dir", work, "--overwrite")
    assert snapshot(tmp_path / "elsewhere") == before


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
    content["subword"] = {**choose(300, 0)["subword"], "vocab_size": 400}
    write(folder / "recipe.yaml", yaml.safe_dump(content))
    return folder


OWN_MODEL = ("train", "average", "beam")


def sentences(data, languages=("de", "en")):
    return {(s, side): read_lines(data / "text" / f"{s}.{side}") for s in ("valid", "test") for side in languages}


def test_held_out_pairs_are_not_cleaned(corpus, tmp_path):
    content = yaml.safe_load((corpus / "recipe.yaml").read_text())
    content |= {"tokenizer": "moses", "clean": {"max_ratio": 1.1, "unit": "tokens"}}
    write(tmp_path / "recipe.yaml", yaml.safe_dump(content))
    files = [str(corpus / "corpus.de"), str(corpus / "corpus.en.gz")]
    lines = PreparedData.open(prepare(load_recipe(tmp_path / "recipe.yaml", bitext=files), tmp_path / "work")).lines
    assert lines["train"] < 200 and (lines["valid"], lines["test"]) == (20, 30)


def test_own_text_is_split_so_that_no_sentence_is_in_two_splits(corpus, tmp_path):
    files = [str(corpus / "corpus.de"), str(corpus / "corpus.en.gz")]
    data = prepare(load_recipe(corpus / "recipe.yaml", bitext=files), tmp_path / "work")
    assert PreparedData.open(data).lines == {"train": 253, "valid": 20, "test": 30}
    held = sentences(data)
    for side, language in enumerate(("de", "en")):
        everything = [line.split("\t")[side].casefold() for line in read_lines(corpus / "corpus.tsv")]
        for split in ("valid", "test"):
            assert all(everything.count(line.casefold()) == 1 for line in held[split, language])
        assert not set(held["valid", language]) & set(held["test", language])

    recipe = load_recipe(corpus / "recipe.yaml", "de", "en", [str(corpus / "corpus.tsv")])
    turned = prepare(recipe.reversed(), tmp_path / "turned")
    assert sentences(turned) == held, "the same pairs from either form"
    assert (turned / "data-bin" / "test.en-de.en.bin").exists()


def test_the_pairs_that_are_held_out_depend_on_their_text_alone():
    """So a corpus that grows keeps most of them, and both directions have the same."""
    pairs = [(f"Satz {number}", f"sentence {number}") for number in range(100)]
    chosen = {6: "valid", 16: "valid", 71: "test", 85: "test", 11: "test"}
    others = [("a" * 1001, "too long"), ("ﬁn", "end"), ("fin", "another")]  # NFKC makes these sources equal
    others += [("ze\u00adro\u200b", "nil"), ("zero", "none")]  # and these look equal
    for corpus in (pairs, [pair[::-1] for pair in pairs], [*pairs, *others]):
        assert hold_out(corpus, {"valid": 2, "test": 3}) == chosen
    every = hold_out([*pairs, *others], {"test": 100 - 1})
    assert not set(range(100, 105)) & set(every)


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
    assert "| train | train | 200 |" in " ".join(output.out.split()) and output.err.count('"GET ') == 6


def test_any_number_of_workers_makes_the_same_data(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, tokenizer="moses", subword={"merges": 200}))
    one = prepare(recipe, tmp_path / "one", workers=1)
    monkeypatch.setattr(stages, "CHUNK", 37)
    three = prepare(recipe, tmp_path / "three", workers=3)
    manifests = [json.loads((data / "manifest.json").read_text()) for data in (one, three)]
    assert manifests[0] == manifests[1]
