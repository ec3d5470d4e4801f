"""Test how raw text is prepared, split and restored around the engine, and the record of an exported model."""

import io
import logging
import sys

import pytest
from conftest import PAIRS, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import sample_data

from encourage_mt.data import subwords
from encourage_mt.data.bitext import MAX_LINE
from encourage_mt.data.stages import TextStage
from encourage_mt.errors import UserError
from encourage_mt.evaluation import converted_model
from encourage_mt.evaluation.converted_model import MAX_PIECES, Translation
from encourage_mt.files import file_hash, read_json, write_json
from encourage_mt.recipe import Recipe
from encourage_mt.serving import translate
from encourage_mt.serving.export import check_output
from encourage_mt.serving.model import CARD, RECORD, Model, Preparation, preparation_of
from encourage_mt.serving.translate import Translator, translate_stream

RAW = {
    **{"tokenizer": "none", "aggressive_hyphens": False, "straight_apostrophes": False},
    **{"normalize_punctuation": False, "lowercase": False},
}
MOSES = {**RAW, "tokenizer": "moses", "aggressive_hyphens": True, "straight_apostrophes": True, "lowercase": True}
HOSTILE = [
    "",
    " ",
    "a\rb",
    "a\x00b",
    "a\u2028b\u2029c",
    "a\x85b\x0bc\x1cd",
    "\ufeffa",
    "🙂 <unk> </s>",
    "▁a ▁",
    "@@ a@@",
]


def echo_pieces(engine, sources, beam, lenpen, nbest=1):
    """Translate pieces into themselves; each worse translation has one piece more."""
    for pieces in sources:
        assert 0 < len(pieces) <= MAX_PIECES
        yield [Translation(pieces + ["▁x"] * rank, -rank - len(pieces) / 100) for rank in range(nbest)]


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(translate, "load_model", lambda *options: None)
    monkeypatch.setattr(translate, "translate_pieces", echo_pieces)


def export(folder, preparation=RAW, **subword):
    """Write the files of an export, without the engine's, into `folder`; return its record."""
    folder.mkdir()
    options = (
        {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} if not subword else subword
    )
    subwords.learn(PAIRS["train"], len(PAIRS["train"]), options, folder / "subword")
    model = Model(
        folder=folder,
        name="el.seed1",
        recipe="tiny",
        source="de",
        target="en",
        preparation=Preparation(**preparation),
        subword=options,
        remove_bpe="@@ " if subword else "sentencepiece",
        byte_fallback=not subword,
        beam=3,
        lenpen=1.0,
        quantization="float32",
        checkpoint_sha256="0" * 64,
        files={path.name: file_hash(path) for path in folder.iterdir()},
        versions={},
    )
    model.write()
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("echo") / "model"
    export(folder)
    return folder


@pytest.fixture
def echo(model, no_engine):
    """A translator of raw text whose engine repeats what it is given."""
    return Translator(model)


def stream(translator, text, **options):
    """Return the lines that `translate_stream` writes for `text`."""
    content = text if isinstance(text, bytes) else text.encode()
    output = io.BytesIO()
    translate_stream(translator, io.BytesIO(content), output, lines=2, **options)
    lines = output.getvalue().decode().split("\n")
    assert lines.pop() == "", "every line ends"
    return lines


# --- text


def test_text_is_prepared_as_by_the_alternative_that_was_used(tmp_path):
    """The first alternative of the recipe holds the test set out of train; the data comes from the second."""
    alternatives = [{"train": ["a.tsv"], "held_out": {"test": 1}}, {"train": ["b.tsv"], "test": ["c.tsv"]}]
    options = {"data": alternatives, "tokenizer": "moses", "straight_apostrophes": True, "normalize_punctuation": True}
    data = sample_data(tmp_path / "data", {"de": ["x"], "en": ["x"]}, tokenizer="moses", options=options)
    assert preparation_of(data, "test") == Preparation.of({**options, "lowercase": False}, False)
    assert preparation_of(data, "test") != Preparation.of({**options, "lowercase": False}, True)


@pytest.mark.parametrize(
    ("split", "data", "like_train"),
    [
        ("test", {"valid": ["b.tsv"], "test": ["c.tsv"]}, False),
        ("test", {"held_out": {"valid": 1, "test": 1}}, True),
        ("test", {"valid_every": 2, "test": ["c.tsv"]}, False),
        ("valid", {"valid_every": 2, "test": ["c.tsv"]}, True),
        ("valid", {"valid": ["b.tsv"], "held_out": {"test": 1}}, False),
    ],
)
def test_text_is_prepared_as_the_set_was(split, data, like_train, tmp_path):
    data = {"train": ["a.tsv"], **data}
    recipe = Recipe(
        **{"name": "r", "source": "de", "target": "en", "data": data, "subword": {"merges": 10}, "tokenizer": "moses"},
        **{"straight_apostrophes": True, "normalize_punctuation": True, "lowercase": True, "aggressive_hyphens": True},
        **{"train": {"max-tokens": 1, "max-epoch": 10}, "arms": {"ce": {"criterion": "label_smoothed_cross_entropy"}}},
    )
    prepared = sample_data(
        tmp_path / "data",
        {"de": ["x"], "en": ["x"]},
        tokenizer="moses",
        lowercase=True,
        remove_bpe="@@ ",
        options=recipe.preparation,
        counts=dict.fromkeys(
            ("train", "valid", "test"), {"kept": 1, "held_out": len({"held_out", "valid_every"} & set(data))}
        ),
    )
    steps = preparation_of(prepared, split).steps("de")
    lines = ["Das ist ein „Test“ – gut-gemeint, l’État (d.h. nicht schlecht).", *HOSTILE]
    expected = [source for _, source, _ in TextStage(recipe, is_train=like_train)([(line, "") for line in lines])]
    for line, tokens in zip(lines, expected, strict=True):
        for step in steps:
            line = step(line)
        assert line == tokens


def test_pieces_become_the_text_they_were(echo):
    lines = [source for source, _ in PAIRS["test"]] + ["Größe 5 € 🙂"]
    assert echo.translate(lines) == lines


def test_moses_tokens_and_merges_become_text(tmp_path, no_engine):
    export(tmp_path / "model", MOSES, merges=100)
    translator = Translator(tmp_path / "model")
    assert translator.translate(["Das ist gut-gemeint, (A & B)!"]) == ["das ist gut-gemeint, (a & b)!"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_any_text_gives_one_line_for_each_line(echo, lines):
    text = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    translations = stream(echo, text)
    assert len(translations) == len(lines)
    assert translations == echo.translate(
        [line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(lines)]
    )


def test_hostile_lines_stay_in_their_order(echo):
    lines = [part for number, line in enumerate(HOSTILE) for part in (f"mark{number}", line)]
    translations = stream(echo, "\n".join(lines))  # the last line has no end
    assert translations[::2] == [f"mark{number}" for number in range(len(HOSTILE))]
    assert translations[1] == translations[3] == "" and translations[11] == "a b c d"


def test_bytes_that_are_line_ends_do_not_end_a_line(echo):
    assert echo.text(["▁a", "<0x0A>", "b", "<0x0D>", "<0xE2>", "<0x82>", "<0xAC>"]) == "a b €"


# --- long lines


@pytest.mark.parametrize(
    "sentence, ends",
    [("Das ist ein Satz. ", "."), ("das ist kein satz ", ""), ("x", "")],
    ids=["sentences", "words", "a word"],
)
def test_a_long_line_is_translated_in_parts(sentence, ends, echo, caplog):
    line = (sentence * 500).strip()
    with caplog.at_level(logging.WARNING):
        short, *_, empty, again = stream(echo, f"short\n{line}\n\n{line}\n")
    assert (short, empty) == ("short", "")
    assert again.replace(" ", "") == line.replace(" ", "")
    assert again == line or sentence == "x"
    assert len([record for record in caplog.records if str(MAX_PIECES) in record.message]) == 1, "it is said once"
    parts = echo._split(echo.pieces(line))
    assert len(parts) > 2 and all(part[-1].endswith(ends) for part in parts)
    ((best,),) = echo.hypotheses([line])
    assert best.score == pytest.approx(-sum(map(len, parts)) / 100 / len(parts)), "the mean of the parts"


def test_merges_are_cut_between_words(tmp_path, no_engine):
    export(tmp_path / "model", MOSES, merges=20)
    parts = Translator(tmp_path / "model")._split((["a@@", "b@@", "c"] * 200)[: MAX_PIECES * 2])
    assert [len(part) for part in parts] == [198, 198, 4]


def test_text_without_spaces_is_cut_after_a_sentence(echo):
    parts = echo._split(["▁", *"这是一句话。" * 60])
    assert [(len(part), part[-1]) for part in parts] == [(199, "。"), (162, "。")]


# --- options


def test_several_translations_with_scores(echo):
    lines = stream(echo, "ein Hund\n\n", nbest=2, scores=True)
    assert [line.partition("\t")[2] for line in lines] == ["ein Hund", "ein Hund x", "", ""]
    scores = [float(line.partition("\t")[0]) for line in lines]
    assert scores[0] > scores[1] and scores[2:] == [0, 0]
    with pytest.raises(UserError, match="--nbest 4.* 3"):
        echo.hypotheses(["a"], nbest=4)
    with pytest.raises(UserError, match="--nbest 4.* 3"):
        stream(echo, "", nbest=4)
    with pytest.raises(UserError, match="--nbest 1.* 0"):
        echo.hypotheses(["a"], beam=0)
    with pytest.raises(TypeError, match="list of lines"):
        echo.translate("ein Hund")


def test_lines_are_translated_as_they_arrive(echo):
    class Source(io.BytesIO):
        def readline(self, limit):
            written.append(output.getvalue().count(b"\n"))
            return super().readline(limit)

    output, written = io.BytesIO(), []
    translate_stream(echo, Source(b"a\n" * 7), output, lines=3)
    assert written == [0, 0, 0, 3, 3, 3, 6, 6] and output.getvalue() == b"a\n" * 7


def test_the_longest_line_is_translated(echo):
    line = b" " * MAX_LINE
    assert stream(echo, line + b"\n") == stream(echo, line)


@pytest.mark.parametrize(
    "content, expected", [(b"a\nb\xff\n", "line 2, byte 2"), (b"a\n" + b"b" * (MAX_LINE + 1), "line 2")]
)
def test_bad_input_names_the_line(content, expected, echo):
    with pytest.raises(UserError, match=f"standard input: {expected}"):
        stream(echo, content)


# --- the record


def test_a_missing_extra_says_how_to_install_it(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    error = refused(capsys, "translate", model)
    assert "serving" in error and "pip install ctranslate2" in error


def test_a_model_that_the_engine_cannot_load(model, capsys):
    assert str(model) in refused(capsys, "translate", model, "--device", "cpu")


def test_a_missing_gpu_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 0)
    assert "--device cuda" in refused(capsys, "translate", model, "--device", "cuda")


@pytest.mark.parametrize(
    "subword, damage",
    [
        *(({}, damage) for damage in (b"", b"text\n", b"\0" * 9, None)),
        *(({"merges": 20}, damage) for damage in (b"", b"one line of text\n", b"\xff \xfe\n", b"#version: x\n")),
    ],
)
def test_a_damaged_subword_model_is_one_line(subword, damage, tmp_path, no_engine, capsys):
    model = export(tmp_path / "model", **subword)
    path = tmp_path / "model" / ("subword.codes" if subword else "subword.model")
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    model.model_copy(update={"files": {}}).write()  # as if it had been exported so
    capsys.readouterr()  # a progress bar
    for load in (lambda: Translator(path.parent), lambda: subwords.sample(["ein Hund"], path.with_suffix(""), 1)):
        with pytest.raises(UserError, match=f"{path}: not .*[a-z]"):
            load()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [RuntimeError("damaged"), IndexError("damaged"), MemoryError("damaged")])
def test_any_error_of_the_engine_is_one_line(error, tmp_path, monkeypatch):
    class Engine:
        def __init__(self, *arguments, **options):
            if arguments:
                raise error

        def translate_iterable(self, sources, **options):
            raise error
            yield

    monkeypatch.setattr("ctranslate2.Translator", Engine)
    with pytest.raises(UserError, match=f"{tmp_path}: .*damaged"):
        converted_model.load_model(tmp_path)
    with pytest.raises(UserError, match="CTranslate2: damaged"):
        list(converted_model.translate_pieces(Engine(), [["a"]], 1, 1.0))


def other_format(folder):
    write_json(folder / "model.json", {**read_json(folder / "model.json"), "format": 9})


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda folder: (folder / "subword.model").unlink(), "subword.model: is missing"),
        (lambda folder: (folder / "subword.vocab").write_text(""), "subword.vocab: .*checksum"),
        (other_format, "format: must be 1, got 9"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json: not JSON"),
        (lambda folder: (folder / "model.json").unlink(), "no model.json"),
    ],
)
def test_a_damaged_model_is_refused(damage, expected, tmp_path):
    export(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=expected):
        Model.open(tmp_path / "model")


def test_a_missing_model_is_refused(tmp_path, capsys):
    assert "nowhere: no such folder" in refused(capsys, "translate", tmp_path / "nowhere")


def test_only_an_earlier_export_is_replaced(tmp_path):
    export(tmp_path / "model")
    check_output(tmp_path / "model")
    check_output(tmp_path / "new")
    (tmp_path / "model" / "mine.txt").touch()
    with pytest.raises(UserError, match="mine.txt"):
        check_output(tmp_path / "model")
    (tmp_path / "model" / "mine.txt").unlink()
    (tmp_path / "model" / CARD).unlink(missing_ok=True)
    (tmp_path / "model" / CARD).mkdir()
    with pytest.raises(UserError, match=CARD):
        check_output(tmp_path / "model")
    (tmp_path / "odd").mkdir()
    for others in ('{"files": 5}', "{}"):
        (tmp_path / "odd" / RECORD).write_text(others, encoding="utf-8")
        with pytest.raises(UserError, match=f"not an earlier export .*{RECORD}"):
            check_output(tmp_path / "odd")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file")
