"""Compare the measurements of a trained model with fairseq's log; they are kept in analysis.json, confidence.json."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from conftest import PAIRS
from samples import sample_result

from encourage_mt.errors import UserError
from encourage_mt.evaluation import confidence, diagnostics
from encourage_mt.evaluation.diagnostics import Analysis, analyse
from encourage_mt.evaluation.evaluate import as_json
from encourage_mt.files import read_json, read_record, write_json
from encourage_mt.plugin.checkpoints import load_checkpoint
from encourage_mt.training.run_folder import open_run, read_log


@pytest.fixture
def evaluated(el_run, tiny, tmp_path):
    """A run whose averaged checkpoint is the last one of training; fairseq logged its values on valid."""
    checkpoint = el_run / "checkpoint_last.pt"
    shutil.copy(checkpoint, tmp_path / "average.pt")
    shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    sample_result(criterion=as_json(load_checkpoint(checkpoint)["cfg"]["criterion"])).write(tmp_path)
    return open_run(tmp_path, data=tiny[1])


def pieces_of(lines, data):
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(data / "subword.model"))
    return [encoder.encode(line, out_type=str) for line in lines]


def test_a_trained_model_is_measured_as_fairseq_logged_it(evaluated, el_run):
    found = analyse(evaluated)
    logged = [record for record in read_log(el_run / "log") if "valid_loss" in record][-1]
    assert found.nll / math.log(2) == pytest.approx(float(logged["valid_nll_loss"]), abs=0.002)
    assert 100 * found.accuracy == pytest.approx(float(logged["valid_accuracy"]), abs=0.01)
    text = (evaluated.data / "text" / "valid.en").read_text(encoding="utf-8").splitlines()
    assert found.tokens == sum(len(line) + 1 for line in pieces_of(text, evaluated.data))
    assert sum(row.tokens for row in found.frequency) == found.tokens
    assert sum(found.calibration.tokens) == found.tokens
    assert 0 < found.gradient.well_classified < 1 or found.gradient.well_classified_tokens == 0
    assert read_record(evaluated.folder / "analysis.json", Analysis) == found


def test_frequencies_are_those_of_the_target_side_of_train(evaluated):
    _, task = diagnostics.load(evaluated.folder / "average.pt", evaluated.data, "train")
    counts = diagnostics.frequencies(task)
    text = [target for _, target in PAIRS["train"]]
    lines = pieces_of(text, evaluated.data)
    expected = Counter(piece for line in lines for piece in line)
    dictionary = task.target_dictionary
    assert len(counts) == len(dictionary) and counts[dictionary.eos()] == len(lines)
    assert {dictionary[i]: n for i, n in enumerate(counts) if n and i != dictionary.eos()} == expected


def test_an_analysis_is_reused_until_the_checkpoint_changes(evaluated, monkeypatch):
    path = evaluated.folder / "analysis.json"
    first = analyse(evaluated)
    content = read_json(path)
    monkeypatch.setattr(diagnostics, "load", None)  # nothing is measured again
    assert analyse(evaluated) == first
    write_json(path, {name: value for name, value in content.items() if name != "format"})
    assert analyse(evaluated) == first, "of version 0.1"
    without = {**content, "gradient": None}  # of a bonus that was not trusted then
    for changed in (without, {**content, "source": {**content["source"], "checkpoint_sha256": "0" * 64}}):
        write_json(path, changed)
        with pytest.raises(TypeError):
            analyse(evaluated)
    content["margin"]["share"].pop()
    write_json(path, content)
    with pytest.raises(UserError, match="analysis.json: margin: .*share"):
        analyse(evaluated)
    (evaluated.folder / "average.pt").unlink()
    with pytest.raises(UserError, match="average.pt.*encourage-mt evaluate"):
        analyse(evaluated)


@pytest.fixture
def translated(evaluated, tiny):
    """The run above, which has translated each sentence of its test set into the reference of the one before."""
    recipe, data = tiny
    references = (data / "text" / "test.en").read_text(encoding="utf-8").splitlines()
    lines = [*references[-1:], *references[:-1]]
    (evaluated.folder / "test.en").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return evaluated


def test_the_confidence_in_the_reference_is_the_likelihood_of_the_diagnostics(evaluated):
    model, task = diagnostics.load(evaluated.folder / "average.pt", evaluated.data, "valid")
    pairs = task.dataset("valid")
    sides = [[side[index] for index in range(len(side))] for side in (pairs.src, pairs.tgt)]
    values = confidence.score_pairs(model, task, *sides, "confidence")
    log_p = np.concatenate([each["log_probability"] for each in values])
    assert -log_p.mean() == pytest.approx(analyse(evaluated).nll, rel=1e-5)
    assert [len(each["energy"]) for each in values] == [len(line) for line in sides[1]], "in the order of the pairs"
    again = confidence.score_pairs(model, task, *(side[:1] for side in sides), "confidence")
    assert again[0]["entropy"] == pytest.approx(values[0]["entropy"], rel=1e-4)


def test_a_sentence_that_is_longer_than_a_batch_is_measured(evaluated, monkeypatch):
    expected = analyse(evaluated)
    (evaluated.folder / "analysis.json").unlink()
    monkeypatch.setattr(diagnostics, "MAX_TOKENS", 2)
    assert analyse(evaluated).nll == pytest.approx(expected.nll, rel=1e-5)


def test_confidence_is_kept_until_the_translation_changes(translated, monkeypatch):
    path = translated.folder / "confidence.json"
    first = confidence.measure_confidence(translated)
    found = first.sets["test"]
    data = translated.prepared()
    pieces = [line.split(" ") for line in confidence.translation_pieces(translated, data, "test")]
    assert list(map(len, found.probability)) == list(map(len, pieces))
    assert found.scores["fewest pieces"] == [-len(line) - 1 for line in pieces]
    assert 0 < sum(map(sum, found.correct)) < sum(map(len, pieces)), "other sentences share only some pieces"
    monkeypatch.setattr(confidence, "load", None)  # nothing is measured again
    assert confidence.measure_confidence(translated) == first
    content = read_json(path)
    write_json(path, {**content, "sets": {}})
    with pytest.raises(TypeError):
        confidence.measure_confidence(translated)
    content["sets"]["test"]["correct"][0].pop()
    write_json(path, content)
    with pytest.raises(UserError, match="confidence.json: sets.test: correct"):
        confidence.measure_confidence(translated)
    write_json(path, first.model_dump(mode="json"))
    with open(translated.folder / "test.en", "a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(TypeError):
        confidence.measure_confidence(translated)


def test_data_that_fairseq_cannot_read_is_one_line(evaluated, tmp_path):
    shutil.copytree(evaluated.data, tmp_path / "data")
    run = open_run(evaluated.folder, data=tmp_path / "data")
    (path,) = (run.data / "data-bin").glob("valid.*.en.idx")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="average.pt: fairseq cannot load"):
        analyse(run)
