"""Export a trained run, and translate raw text with the export: the same translations as `evaluate`, bad input."""

import io
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import EL, refused, run

from encourage_mt import processes
from encourage_mt.cli import main
from encourage_mt.evaluation.results import Result
from encourage_mt.files import read_json, write_json
from encourage_mt.serving import export
from encourage_mt.serving.model import Model
from encourage_mt.serving.translate import Translator
from encourage_mt.training.run_folder import open_run


@pytest.fixture(scope="module")
def evaluated(train, tmp_path_factory):
    """Folder of an evaluated run that has learned something."""
    folder = tmp_path_factory.mktemp("serving") / "el.seed1"
    train(folder, *EL, "--max-epoch", 20, "--keep-last-epochs", 2)
    main(["evaluate", str(folder), "--average", "2", "--beam", "3"])
    return folder


@pytest.fixture(scope="module")
def model(evaluated):
    """Folder of its export."""
    folder = evaluated.parent / "model"
    main(["export", str(evaluated), "--output", str(folder)])
    return folder


@pytest.fixture
def converted(model, monkeypatch):
    """Take the files of `model` in place of a conversion, which takes seconds."""

    def convert(checkpoint, data, output, *rest):
        shutil.copytree(model, output, ignore=shutil.ignore_patterns("subword.*", "model.json", "README.md"))

    monkeypatch.setattr(export, "convert_checkpoint", convert)


def source(tiny):
    return (tiny[1] / "text" / "test.de").read_text(encoding="utf-8")


def test_an_export_has_everything_and_says_how_it_was_checked(evaluated, model):
    record = Model.open(model)
    assert (record.source, record.target, record.beam, record.quantization) == ("de", "en", 3, "float32")
    assert {"model.bin", "config.json", "subword.model"} <= set(record.files)
    assert {path.name for path in model.iterdir()} == {*record.files, "model.json", "README.md"}
    assert record.agreement.sentences == 20 and record.agreement.share >= export.LEAST_SHARE
    card, result = (model / "README.md").read_text(encoding="utf-8"), Result.read(evaluated)
    for score in (*result.scores["test"].values(), *result.scores["valid"].values()):
        assert f"{score.score:.2f}" in card and score.signature in card
    assert "train.tsv" in card and "licence" in card and record.agreement.describe() in card
    assert [path.name for path in model.parent.iterdir() if path.name.startswith(".model")] == []


def test_the_command_translates_a_raw_test_file_as_evaluate_does(evaluated, model, tiny):
    done = run("encourage-mt", "translate", model, "--batch-size", 4, stdin=source(tiny))
    assert done.stdout == (evaluated / "test.en").read_text(encoding="utf-8")
    assert done.stderr.strip() == ""


def test_a_moved_export_needs_neither_run_nor_fairseq(model, evaluated, tiny, tmp_path):
    shutil.copytree(model, tmp_path / "a copy")
    code = "import sys\nsys.modules['torch'] = None\n"
    code += "from encourage_mt.serving.translate import Translator\n"
    code += f"print('\\n'.join(Translator({str(tmp_path / 'a copy')!r}).translate(sys.stdin.read().splitlines())))\n"
    code += "assert 'fairseq' not in sys.modules"
    expected = (evaluated / "test.en").read_text(encoding="utf-8")  # what `encourage-mt translate` gives, see above
    assert run(sys.executable, "-c", code, stdin=source(tiny)).stdout == expected


def test_beam_and_several_translations(model, tiny):
    translator = Translator(model, device="cpu", threads=1)
    lines = source(tiny).splitlines()
    best, greedy = translator.hypotheses(lines), translator.hypotheses(lines, beam=1)
    assert [h.text for (h,) in best] == translator.translate(lines, beam=3) != [h.text for (h,) in greedy]
    several = translator.hypotheses(lines, beam=4, nbest=4)
    assert {len(hypotheses) for hypotheses in several} == {4}
    assert all(a.score >= b.score for hypotheses in several for a, b in zip(hypotheses, hypotheses[1:], strict=False))
    assert all(len({h.text for h in hypotheses}) > 1 for hypotheses in several)


def test_data_that_was_moved_is_named(evaluated, model, converted, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    data = open_run(evaluated).data
    os.rename(data, data.with_name("moved"))
    try:
        assert "name its folder with --data" in refused(capsys, "export", tmp_path / "run", "--output", tmp_path / "x")
        main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "x"), "--data", str(data.with_name("moved"))])
    finally:
        os.rename(data.with_name("moved"), data)
    assert Model.open(tmp_path / "x").source == "de"


def test_lines_that_an_export_translates_in_parts_are_not_compared(
    evaluated, model, converted, tmp_path, monkeypatch, capsys
):
    text = (open_run(evaluated).data / "text" / "valid.de").read_text(encoding="utf-8")
    lengths = sorted(map(len, map(Translator(model).pieces, text.splitlines())))
    for limit, expected in ((lengths[9], lengths[9]), (0, None)):
        monkeypatch.setattr(export, "MAX_PIECES", limit)
        argv = ["export", str(evaluated), "--output", str(tmp_path / str(limit))]
        if expected is None:
            assert "every sentence of the validation set has more than 0 pieces" in refused(capsys, *argv)
            continue
        main(argv)
        assert Model.open(tmp_path / str(limit)).agreement.sentences == sum(each <= limit for each in lengths)


def test_an_evaluated_run_is_exported_once(evaluated, model, converted, tiny, monkeypatch, capsys):
    """An export of another type that somebody put there does not count."""
    int8 = Model.open(model).model_copy(update={"folder": evaluated / "export", "quantization": "int8"})
    shutil.copytree(model, int8.folder)
    int8.write()
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source(tiny).encode())))
        main(["translate", str(evaluated)])
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out == (evaluated / "test.en").read_text(encoding="utf-8")
    assert "converting" in outputs[0].err and outputs[1].err == ""


def test_an_export_that_another_process_made_meanwhile_is_not_replaced(evaluated, model, tmp_path, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("export"))

    @contextmanager
    def wait_for_another(folder):
        shutil.copytree(model, folder / "export")
        yield

    monkeypatch.setattr(export, "locked", wait_for_another)
    monkeypatch.setattr(export, "convert_checkpoint", None)
    assert Model.open(export.exported(open_run(tmp_path / "run"))).files == Model.open(model).files


def test_an_export_replaces_an_earlier_one_but_nothing_else(evaluated, model, tmp_path, capsys):
    """The scores come from CTranslate2, so fairseq translates valid again."""
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(evaluated, tmp_path / "run")
    scores = read_json(evaluated / "scores.json")
    scores["evaluation"]["engine"] = "ctranslate2"
    write_json(tmp_path / "run" / "scores.json", scores)
    (tmp_path / "run" / "valid.en").unlink()
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model"), "--quantization", "int8"])
    record = Model.open(tmp_path / "model")
    assert record.quantization == "int8" and "sacreBLEU" in record.agreement.required
    assert record.agreement.bleu_fairseq == Model.open(model).agreement.bleu_fairseq
    assert (tmp_path / "model" / "model.bin").stat().st_size < (model / "model.bin").stat().st_size
    (tmp_path / "model" / "mine").touch()
    assert "mine" in refused(capsys, "export", evaluated, "--output", tmp_path / "model")
    assert (tmp_path / "model" / "mine").exists()


@pytest.mark.parametrize("quantization, limit, value", [("float32", "LEAST_SHARE", 1.01), ("int8", "LARGEST_LOSS", -9)])
def test_an_export_that_disagrees_is_not_written(
    quantization, limit, value, evaluated, converted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, limit, value)
    error = refused(capsys, "export", evaluated, "--output", tmp_path / "model", "--quantization", quantization)
    assert "of 20 sentences" in error and error.endswith("101% identical" if quantization == "float32" else "-9 lower")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_scores_is_refused(evaluated, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    assert "encourage-mt evaluate" in refused(capsys, "export", tmp_path / "run", "--output", tmp_path / "model")


def test_text_that_is_not_utf8_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gut\nschlecht \xff\n")))
    assert "standard input: line 2, byte 10" in refused(capsys, "translate", model)


def test_a_closed_pipe_ends_quietly(model, tiny):
    argv = [processes.program_path("encourage-mt"), "translate", str(model), "--batch-size", "1"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipe, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        process.stdin.write(source(tiny))
        process.stdin.flush()
        assert process.stdout.readline().strip(), "a line is answered before the input ends"
        process.stdout.close()
        process.stdin.write(source(tiny))
        process.stdin.close()
        assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.bin", lambda content: content[: len(content) // 2]),
        ("model.bin", lambda content: content[:6]),
        ("model.bin", lambda content: b"\xff" * 64),
        ("config.json", lambda content: b"{"),
        ("config.json", lambda content: b"[1]"),
        ("shared_vocabulary.json", lambda content: b'["a"]'),
    ],
)
def test_a_damaged_file_of_the_engine_is_one_line(name, damage, model, tmp_path, capsys, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: has changed since the export" in refused(capsys, "translate", tmp_path / "model")
    Model.open(model).model_copy(update={"folder": tmp_path / "model", "files": {}}).write()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Ein Haus.\n"), encoding="utf-8"))
    assert "CTranslate2" in refused(capsys, "translate", tmp_path / "model", "--device", "cpu")
    (tmp_path / "model/model.json").unlink()
    assert "has no model.json" in refused(capsys, "translate", tmp_path / "model")
