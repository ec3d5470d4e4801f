"""Run the recipes of examples/ on archives with the layout of the real ones; outputs were checked by hand."""

import os
import tarfile
import zipfile
from pathlib import Path

import grammar
import pytest
import yaml
from conftest import ROOT, run
from fairseq.data import Dictionary, data_utils

from encourage_mt.data.bitext import read_lines
from encourage_mt.data.manifest import PreparedData
from encourage_mt.data.prepare import prepare
from encourage_mt.data.subwords import restore_bytes
from encourage_mt.recipe import load_recipe

SHARED = ROOT.parent / "shared" / "data"


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f"{path.name}.content"
    with tarfile.open(path, "w:gz") as file:
        for name, lines in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
            file.add(folder / name, name)
    for member in sorted(folder.rglob("*"), reverse=True):
        member.rmdir() if member.is_dir() else member.unlink()
    return path


def segments(*lines):
    """As in IWSLT's .xml and WMT's .sgm files."""
    head = ['<?xml version="1.0" encoding="UTF-8"?>', '<doc docid="1" genre="lectures">', "<title>A title</title>"]
    return [*head, *(f'<seg id="{n}"> {line} </seg>' for n, line in enumerate(lines, start=1)), "</doc>"]


def example(tmp_path, name, **changes):
    """The recipe of examples/NAME without the checksums of the real archives."""
    content = yaml.safe_load((ROOT / "examples" / name / "recipe.yaml").read_text(encoding="utf-8")) | changes
    if isinstance(content["data"], dict):
        content["data"].pop("checksums", None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return load_recipe(tmp_path / "recipe.yaml")


def binarized(data, recipe, split, language):
    """Lines of the binarized data, subwords undone."""
    folder = data / "data-bin"
    dictionary = Dictionary.load(str(folder / f"dict.{language}.txt"))
    path = folder / f"{split}.{recipe.source}-{recipe.target}.{language}"
    lines = data_utils.load_indexed_dataset(str(path), dictionary)
    return [dictionary.string(line, recipe.remove_bpe).strip() for line in lines]


def text(data, kind, split, *languages):
    return [read_lines(data / kind / f"{split}.{language}") for language in languages]


# --- IWSLT14


@pytest.fixture
def iwslt14(tmp_path):
    """A folder with de-en.tgz; of its 55 lines 49 are kept, in this order: title, description, 1..3, long, 4..46."""
    de = ["<url>http://www.ted.com</url>", "<keywords>talks</keywords>", "<talkid>1</talkid>"]
    en = list(de)
    de += ["<title>Die Welt &amp; wir</title>", "<description>Er sagt: „Geht's?“ – Ja.</description>"]
    en += ["<title>The World &amp; us</title>", "<description>He says: “Isn't it?” – Yes.</description>"]
    for number in range(1, 47):
        de.append(f"  Hier ist Satz {number}. ")
        en.append(f"Here is sentence {number}.")
        if number == 3:
            de += ["", "Nein.", "lang " * 176, "lang " * 175]
            en += ["One side only.", "No, not at all, my friend.", "long " * 176, "long " * 175]
    members = {"de-en/train.tags.de-en.de": de, "de-en/train.tags.de-en.en": en}
    for place, name in enumerate(["TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"]):
        lines = [f"Dr. Meier hat’s um {place}.30 Uhr."], [f"It’s {place},000 &quot;miles&quot; away…"]
        for language, side in zip(("de", "en"), lines, strict=True):
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = segments(*side)
    pack(tmp_path / "raw" / "de-en.tgz", members)
    return tmp_path / "raw"


def test_iwslt14(iwslt14, tmp_path, capfd):
    recipe = example(tmp_path, "iwslt14_de_en")
    data = prepare(recipe, tmp_path / "work", iwslt14)
    assert text(data, "text", "valid", "de", "en") == [
        ["Hier ist Satz 20.", "Hier ist Satz 43."],
        ["Here is sentence 20.", "Here is sentence 43."],
    ]
    assert text(data, "tokenized", "valid", "de") == [["hier ist satz 20.", "hier ist satz 43."]]  # ordinals, to Moses
    assert text(data, "text", "test", "de", "en") == [
        [f"Dr. Meier hat’s um {place}.30 Uhr." for place in range(5)],
        [f"It’s {place},000 &quot;miles&quot; away…" for place in range(5)],
    ]
    assert text(data, "tokenized", "test", "de", "en") == [
        [f"dr. meier hat &apos; s um {place}.30 uhr ." for place in range(5)],
        [f"it &apos;s {place},000 &amp; quot ; miles &amp; quot ; away …" for place in range(5)],
    ]
    numbers = [number for number in range(1, 47) if number not in (20, 43)]
    train = binarized(data, recipe, "train", "en")
    assert train[:2] == ["the world &amp; amp ; us", "he says : “ isn &apos;t it ? ” – yes ."]
    assert train[5] == " ".join(["long"] * 175)
    assert [line for place, line in enumerate(train) if place not in (0, 1, 5)] == [
        f"here is sentence {number} ." for number in numbers
    ]
    assert len(binarized(data, recipe, "train", "de")) == len(train)
    assert not (data / "tokenized" / "train.de").exists() and not (data / "raw").exists()
    assert (data / "data-bin/dict.de.txt").read_bytes() != (data / "data-bin/dict.en.txt").read_bytes()

    manifest = PreparedData.open(data)
    train = manifest.counts["train"]
    assert {name: train[name] for name in ("read", "empty", "ratio", "too_long", "held_out", "kept")} == {
        "read": 52,
        "empty": 1,
        "ratio": 1,
        "too_long": 1,
        "held_out": 2,
        "kept": 47,
    }
    assert manifest.sources["de-en.tgz"].checked == "no checksum is published"
    assert "train, kept: 47, published 160,239 or 160,250" in manifest.warnings
    assert "warning: test, kept: 5, published 6,750" in capfd.readouterr().out


def test_iwslt14_reversed_and_modern(iwslt14, tmp_path):
    recipe = example(tmp_path, "iwslt14_de_en", subword={"merges": 400}).reversed().modern()
    assert recipe.name == "iwslt14_en_de.modern" and recipe.remove_bpe == "sentencepiece"
    data = prepare(recipe, tmp_path / "work", iwslt14)
    assert (data / "data-bin" / "test.en-de.en.bin").exists() and not (data / "tokenized").exists()
    # every 23rd of all lines but those with tags
    assert text(data, "text", "valid", "de") == [["Hier ist Satz 17.", "Hier ist Satz 40."]]
    undone = [restore_bytes(line) for line in binarized(data, recipe, "test", "en")]
    assert undone == [f"It’s {place},000 &quot;miles&quot; away..." for place in range(5)], "NFKC, cased, bytes for ’"
    dictionary = read_lines(data / "data-bin" / "dict.en.txt")
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= {line.split()[0] for line in dictionary}
    assert set(PreparedData.open(data).percent_unknown["test"].values()) == {0.0}
    assert dictionary == read_lines(data / "data-bin" / "dict.de.txt")


# --- IWSLT17


def test_iwslt17(tmp_path):
    head = ['<doc docid="1" genre="lectures">', "<url>http://x</url>", "<keywords>k</keywords>", "<talkid>1</talkid>"]
    head += ["<speaker>A B</speaker>", '<reviewer href="x">R</reviewer>', '<translator href="x">T</translator>']
    members = {
        "fr-en/train.tags.fr-en.fr": [
            *head,
            "<title>Un titre</title>",
            *(f" L'homme numéro {n} dit : « Oui ! » " for n in range(30)),
            "</doc>",
        ],
        "fr-en/train.tags.fr-en.en": [
            *head,
            "<title>A title</title>",
            *(f" Man number {n} says: “Yes!” " for n in range(30)),
            "</doc>",
        ],
    }
    for year in ("dev2010", "tst2010", "tst2011", "tst2012", "tst2013", "tst2014", "tst2015"):
        members[f"fr-en/IWSLT17.TED.{year}.fr-en.fr.xml"] = segments(f"C’est {year}.")
        members[f"fr-en/IWSLT17.TED.{year}.fr-en.en.xml"] = segments(f"That’s {year}.")
    raw = tmp_path / "raw"
    pack(raw / "2017-01-trnted/texts/fr/en/fr-en.tgz", members)
    source = {"fr-en/IWSLT17.TED.tst2017.fr-en.fr.xml": segments("Bonjour.", "Qu’est-ce que c’est ?")}
    target = {"en-fr/IWSLT17.TED.tst2017.en-fr.en.xml": segments("Hello.", "What is it?")}
    pack(raw / "2017-01-ted-test/texts/fr/en/fr-en.tgz", source)
    pack(raw / "2017-01-ted-test/texts/en/fr/en-fr.tgz", target)

    recipe = example(tmp_path, "iwslt17_fr_en", subword={"vocab_size": 90, "model_type": "bpe"})
    data = prepare(recipe, tmp_path / "work", raw)
    assert binarized(data, recipe, "train", "fr") == [
        "Un titre",
        *(f"L&apos; homme numéro {n} dit : « Oui ! »" for n in range(30)),
    ]
    assert binarized(data, recipe, "train", "en")[1] == "Man number 0 says : “ Yes ! ”"
    years = ["dev2010", "tst2010", "tst2011", "tst2012", "tst2013", "tst2014"]
    assert text(data, "tokenized", "valid", "fr") == [[f"C&apos; est {year} ." for year in years]]
    assert text(data, "text", "tst2015", "fr", "en") == [["C’est tst2015."], ["That’s tst2015."]]
    assert text(data, "tokenized", "tst2017", "fr", "en") == [
        ["Bonjour .", "Qu&apos; est-ce que c&apos; est ?"],
        ["Hello .", "What is it ?"],
    ]
    assert (data / "data-bin/dict.fr.txt").read_bytes() == (data / "data-bin/dict.en.txt").read_bytes()


# --- WMT14


def test_wmt14(tmp_path):
    en = [f"“Well-known”  line {n}, isn’t it?" for n in range(1, 121)]
    de = [f"„Altbekannte-Zeile“  Nummer {n}, nicht wahr?" for n in range(1, 121)]
    en[110], de[110] = "a\x01b\u2028c\u200bd", "a\x01b\u2028c\u200bd"
    en[111], de[111] = "only one side", ""
    en[112], de[112] = "line " * 9, "Nummer " * 5
    raw = tmp_path / "raw"
    parts = {
        "training-parallel-europarl-v7.tgz": ("training/europarl-v7.de-en", slice(0, 90)),
        "training-parallel-commoncrawl.tgz": ("commoncrawl.de-en", slice(90, 99)),
        "training-parallel-nc-v12.tgz": ("training/news-commentary-v12.de-en", slice(99, None)),
    }
    for archive, (name, part) in parts.items():
        pack(raw / archive, {f"{name}.en": en[part], f"{name}.de": de[part]})
    tests = {"en": ["“Ten” – isn’t it well-known?"], "de": ["„Zehn“ – gut-bekannt?"]}
    sides = {"src.en": tests["en"], "ref.de": tests["de"]}
    pack(raw / "test-full.tgz", {f"test-full/newstest2014-deen-{k}.sgm": segments(*v) for k, v in sides.items()})

    recipe = example(tmp_path, "wmt14_en_de")
    data = prepare(recipe, tmp_path / "work", raw)
    assert text(data, "text", "valid", "en", "de") == [[en[99]], [de[99]]]
    expected = "&quot; Well @-@ known &quot; line 100 , isn &apos;t it ?"
    assert text(data, "tokenized", "valid", "en") == [[expected]]
    assert text(data, "text", "newstest2014", "en", "de") == [tests["en"], tests["de"]]
    assert text(data, "tokenized", "newstest2014", "en", "de") == [
        ["“ Ten ” – isn &apos;t it well @-@ known ?"],
        ["„ Zehn “ – gut @-@ bekannt ?"],
    ]
    train = binarized(data, recipe, "train", "de")
    assert train[0] == "&quot; Altbekannte @-@ Zeile &quot; Nummer 1 , nicht wahr ?"
    assert train[109:] == ["a b c d", *(train[0].replace(" 1 ", f" {n} ") for n in range(114, 121))]
    counts = PreparedData.open(data).counts
    assert counts["train"] == {
        "read": 120,
        "held_out": 1,
        "before_cleaning": 119,
        "with_text": 118,
        "empty": 1,
        "ratio": 1,
        "kept": 117,
    }


# --- Tatoeba


def test_tatoeba_from_its_archive(tmp_path):
    lines = [f"Tom ate {n} apples.\tTom aß {n} Äpfel.\tCC-BY 2.0 (France) Attribution: tatoeba.org" for n in range(300)]
    lines += ["Hi.\tHallo.\tx", "Hi.\tHi.\tx", "Hello.\tHallo.\tx"]
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "deu-eng.zip", "w") as file:
        file.writestr("_about.txt", "CC BY 2.0 FR")
        file.writestr("deu.txt", "\n".join(lines))
    recipe = example(tmp_path, "tatoeba_de_en", subword={"vocab_size": 330, "model_type": "bpe", "byte_fallback": True})
    corpus = recipe.data[0].model_copy(update={"held_out": {"valid": 20, "test": 30}})
    recipe = recipe.model_copy(update={"data": [corpus, *recipe.data[1:]]})
    data = prepare(recipe, tmp_path / "work", tmp_path / "raw")
    counts = PreparedData.open(data).counts
    assert [counts[split]["kept"] for split in ("train", "valid", "test")] == [253, 20, 30]
    assert "Tom aß " in read_lines(data / "text" / "test.de")[0]
    assert "Hallo." in binarized(data, recipe, "train", "de"), "sentences that stand twice are never held out"


# --- a user's own text


def test_own_text_is_trained_on_and_scored(tmp_path):
    pairs = grammar.generate(7, {"all": 300})["all"]
    for side, language in enumerate(("de", "en")):
        (tmp_path / f"corpus.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    argv = ["encourage-mt", "run", ROOT / "examples/own/recipe.yaml"]
    argv += ["--bitext", tmp_path / "corpus.de", tmp_path / "corpus.en", "--arms", "el"]
    short = ["max-epoch=4", "average=2", "beam=2", "encoder-layers=1", "decoder-layers=1"]
    done = run(*argv, "--set", *short, cwd=tmp_path)
    work = tmp_path / "runs" / "own_de_en"
    assert "for 300 pairs and " in done.stdout and "BLEU signature" in done.stdout and (work / "el.seed1").is_dir()
    assert "updates per epoch" in done.stdout
    content = yaml.safe_load((work / "recipe.yaml").read_text())
    assert content["train"]["max-epoch"] > 4 and content["data"]["held_out"]["test"] == 37
    content["arms"]["el"]["log-end"] = 0.25
    (work / "recipe.yaml").write_text(yaml.safe_dump(content))
    again = run(*argv, "--set", *short, cwd=tmp_path, code=2)
    assert str(work / "recipe.yaml") in again.stdout and "different log-end" in again.stderr


# --- the real corpora, from local files


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data to serve as --raw-dir")
def test_multi30k_from_local_files(tmp_path):
    recipe = load_recipe(ROOT / "examples/multi30k_de_en/recipe.yaml")
    data = prepare(recipe, tmp_path, SHARED)
    manifest = PreparedData.open(data)
    assert manifest.lines == {"train": 29000, "valid": 1014, "test_2016_flickr": 1000, "test_2017_flickr": 1000}
    assert manifest.checksum == "7dc1605a71fb94121754f22dff71b2296fa0c95f4b282c70d1ba969592a06d03"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data to serve as --raw-dir")
@pytest.mark.parametrize(
    "name, folder, train, test",
    [("tatoeba_de_en", "tatoeba", 160852, 3000), ("tatoeba_fr_en", "tatoeba_fr", 152263, 6000)],
)
def test_tatoeba_from_local_files(tmp_path, name, folder, train, test):
    recipe = load_recipe(ROOT / "examples" / name / "recipe.yaml")
    data = prepare(recipe, tmp_path, SHARED / folder)
    manifest = PreparedData.open(data)
    assert manifest.counts["train"]["read"] == train
    assert manifest.lines["valid"] == 2000 and manifest.lines["test"] == test
    assert set(manifest.percent_unknown["test"].values()) == {0.0}


# --- the script


def test_prepare_script_names_the_known_corpora(tmp_path):
    environment = {**os.environ, "VENV": str(tmp_path / "none")}
    for argument in ("wmt15", ""):
        error = run("bash", ROOT / "scripts" / "prepare.sh", argument, code=2, env=environment).stderr
        known = sorted(path.parent.name for path in (ROOT / "examples").glob("*/recipe.yaml"))
        assert f"'{argument}'" in error and " ".join(known) in error and error.count("\n") == 1
    assert not Path(environment["VENV"]).exists()
