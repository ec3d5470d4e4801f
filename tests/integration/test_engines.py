"""Convert a tiny model for CTranslate2, and compare its translations with those of fairseq-generate."""

import re
import shutil

import pytest
import torch
from conftest import refused

from encourage_mt.cli import main
from encourage_mt.data.subwords import join_pieces
from encourage_mt.errors import UserError
from encourage_mt.evaluation import converted_model, engines
from encourage_mt.evaluation.results import Result
from encourage_mt.plugin.checkpoints import load_checkpoint
from encourage_mt.training.run_folder import open_run

pytest.importorskip("ctranslate2", reason="the extra serving is not installed")


@pytest.fixture(scope="module")
def model(work, tmp_path_factory):
    """The folder of ce.seed1 as a CTranslate2 model."""
    run, folder = open_run(work.folder / "ce.seed1"), tmp_path_factory.mktemp("model")
    converted_model.convert_checkpoint(run.folder / "average.pt", run.prepared(), folder / "model", folder / "log")
    return folder / "model"


def read_hypotheses(log):
    """Return {index: (score, text)} of a log of fairseq-generate."""
    lines = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", log.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(index): (float(score), text) for index, score, text in lines}


def test_ctranslate2_searches_like_fairseq_generate(model, work, monkeypatch):
    monkeypatch.setattr(converted_model, "BATCH_TOKENS", 50)  # several batches
    run = open_run(work.folder / "ce.seed1")
    data, translator = run.prepared(), converted_model.load_model(model, "cpu", 1)
    theirs = read_hypotheses(run.folder / "test.generate.log")
    sources = engines.read_pieces(data, "test")
    found = list(converted_model.translate_pieces(translator, sources, run.beam, run.lenpen, nbest=2))
    assert len(found) == len(theirs) == 21 and all(len(each) == 2 for each in found)
    same = [i for i in theirs if join_pieces(found[i][0].pieces, data.remove_bpe) == theirs[i][1]]
    assert len(same) >= 20
    # CTranslate2 divides the probabilities of the first piece by that of not ending there
    assert [found[i][0].score for i in same] == pytest.approx([theirs[i][0] for i in same], abs=0.1)
    assert all(first.score >= second.score for first, second in found)
    assert max(len(best.pieces) for best, _ in found) <= converted_model.MAX_PIECES


def test_a_source_without_pieces_or_longer_than_the_model_allows(model):
    translator = converted_model.load_model(model, "cpu", 1)
    assert [each.pieces for (each,) in converted_model.translate_pieces(translator, [[]], 2, 1.0)] == [[]]
    with pytest.raises(UserError, match="CTranslate2: .*1024"):
        list(converted_model.translate_pieces(translator, [["<unk>"] * 1100], 2, 1.0))


def test_a_damaged_model_or_checkpoint_is_refused_in_one_line(model, work, tmp_path):
    data = open_run(work.folder / "ce.seed1").prepared()
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.bin").write_bytes(b"half")
    with pytest.raises(UserError, match=f"{tmp_path}/model: "):
        converted_model.load_model(tmp_path / "model")
    checkpoint = work.folder / "ce.seed1" / "average.pt"
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(UserError, match="half.pt"):
        converted_model.convert_checkpoint(tmp_path / "half.pt", data, tmp_path / "new", tmp_path / "log")
    torch.save({"model": torch.load(checkpoint, weights_only=False)["model"]}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="bare.pt: cannot be converted"):
        converted_model.convert_checkpoint(tmp_path / "bare.pt", data, tmp_path / "new", tmp_path / "log")
    elsewhere = data.model_copy(update={"folder": tmp_path})
    with pytest.raises(UserError, match=f"ct2-fairseq-converter failed .*log: {tmp_path}/log"):
        converted_model.convert_checkpoint(checkpoint, elsewhere, tmp_path / "new", tmp_path / "log")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "half.pt", "bare.pt", "log"}


def test_the_options_of_a_checkpoint_of_fairseq_hydra_train_are_flattened(work, tmp_path):
    checkpoint = work.folder / "ce.seed1" / "average.pt"
    assert converted_model._with_flat_options(checkpoint, tmp_path) == checkpoint
    state = load_checkpoint(checkpoint)
    state["cfg"]["model"] = {"_name": "transformer", "encoder": {"layers": 1}, "encoder_layers": 6, "dropout": 0.1}
    torch.save({**state, "cfg": {**state["cfg"], "model": {"cross_self_attention": True}}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="CTranslate2 does not support cross-self-attention"):
        converted_model._with_flat_options(tmp_path / "other.pt", tmp_path)
    torch.save(state, tmp_path / "hydra.pt")
    (tmp_path / "flat").mkdir()
    options = load_checkpoint(converted_model._with_flat_options(tmp_path / "hydra.pt", tmp_path / "flat"))["cfg"][
        "model"
    ]
    assert (options.arch, options.task, options.encoder_layers, options.dropout) == (
        "transformer",
        "translation",
        1,
        0.1,
    )


def test_scores_name_the_engine_and_engines_are_not_compared_silently(model, work, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "ce.seed1"
    shutil.copytree(work.folder / "ce.seed1", folder)
    before = Result.read(folder)
    assert before.evaluation.engine == "fairseq"
    monkeypatch.setattr(
        engines, "convert_checkpoint", lambda checkpoint, data, output, log: shutil.copytree(model, output)
    )
    argv = ["evaluate", str(folder), "--engine", "ctranslate2"]
    main(argv)
    result = Result.read(folder)
    assert result.evaluation.engine == "ctranslate2" and "ctranslate2" in result.versions
    assert result.scores["test"]["sacreBLEU"].score == pytest.approx(before.scores["test"]["sacreBLEU"].score, abs=2)
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "checkpoints"]
    capsys.readouterr()
    main(argv)
    assert "ce.seed1: scored already" in capsys.readouterr().out
    error = refused(capsys, "compare", "--baseline", folder, "--candidate", work.folder / "el.seed1")
    assert "engine: ctranslate2 or fairseq" in error
    for command in ("compare", "report"):
        argv = (command, "--baseline", folder, "--candidate", work.folder / "el.seed1", "--engine", "ctranslate2")
        assert "el.seed1: was translated by fairseq; use `encourage-mt evaluate" in refused(capsys, *argv)
