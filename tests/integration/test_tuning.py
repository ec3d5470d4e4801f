"""Test `encourage-mt evaluate --tune`, and that a temperature in the averaged model is that of fairseq-generate."""

import re
import shutil

import pytest
import torch
from conftest import refused, run

from encourage_mt.cli import main
from encourage_mt.errors import UserError
from encourage_mt.evaluation import tuning
from encourage_mt.evaluation.averaging import average, last_normalization
from encourage_mt.evaluation.engines import generate_command
from encourage_mt.evaluation.results import Result
from encourage_mt.files import read_json, write_json
from encourage_mt.plugin.checkpoints import last_checkpoints, load_checkpoint
from encourage_mt.training.run_folder import checkpoint_folder, open_run

FEW = [tuning.Search(1, 1.0, 1.0), tuning.Search(2, 0.6, 0.5), tuning.Search(2, 1.4, 0.5)]


@pytest.fixture
def copies(work, tmp_path, monkeypatch):
    """Copies of ce.seed1, el.seed1 and el.seed2, for which only a few searches are tried."""
    pytest.importorskip("ctranslate2", reason="the extra serving is not installed")
    monkeypatch.setattr(tuning, "SEARCHES", FEW)
    for name in ("data", "ce.seed1", "el.seed1", "el.seed2"):
        shutil.copytree(work.folder / name, tmp_path / name)
    return [tmp_path / name for name in ("ce.seed1", "el.seed1", "el.seed2")]


@pytest.fixture
def no_engine(monkeypatch):
    """Let every search translate valid into its source."""

    def translate(run, data, checkpoints, folder, searches):
        for search in searches:
            yield search, data.read_text("valid", data.source)

    monkeypatch.setattr(tuning, "translate_valid", translate)


def set_bleu(folder, *values):
    """Replace the BLEU of each search in tuning.json."""
    record = read_json(folder / "tuning.json")
    tried = [{**search, "bleu": value} for search, value in zip(record["tried"], values, strict=True)]
    write_json(folder / "tuning.json", {**record, "tried": tried})


def test_the_searches_are_those_of_the_documentation():
    assert len(tuning.SEARCHES) == 49 == len(set(tuning.SEARCHES))
    beams, lenpens, temperatures = map(set, zip(*tuning.SEARCHES, strict=True))
    assert (beams, lenpens, temperatures) == ({1, 4, 5, 10}, {0.6, 1.0, 1.4, 1.8}, {0.8, 1.0, 1.25, 1.5})


def test_tuning_takes_the_search_with_the_highest_mean_bleu_of_an_arm(copies, capsys):
    argv = ["evaluate", "--tune", "--engine", "ctranslate2", *map(str, copies)]
    main(argv)
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in output.splitlines() if line.startswith("|")]
    assert [["1", "1.0", "1.0"], ["2", "0.6", "0.5"], ["2", "1.4", "0.5"]] == [row for row in rows if row[0] in "12"]
    measured = read_json(copies[0] / "tuning.json")
    assert "Best of ce: beam " in output and "Best of el: beam " in output
    assert f"sacreBLEU signature: `{measured['signature']}`" in output
    result = Result.read(copies[0])
    chosen = max(measured["tried"], key=lambda search: search["bleu"])
    search = result.evaluation
    assert (search.beam, search.lenpen, search.temperature) == (chosen["beam"], chosen["lenpen"], chosen["temperature"])
    valid = result.scores["valid"]["sacreBLEU"]
    assert (valid.score, valid.signature) == (pytest.approx(chosen["bleu"], abs=1e-9), measured["signature"])

    set_bleu(copies[0], 3.0, 1.0, 2.0)
    set_bleu(copies[1], 9.0, 8.0, 0.0)
    set_bleu(copies[2], 0.0, 7.0, 8.0)  # the means of el are 4.5, 7.5 and 4
    main(argv)
    output = capsys.readouterr().out
    assert all(f"{folder.name}: tuned already" in output for folder in copies)
    settings = [Result.read(folder).evaluation for folder in copies]
    assert [(each.beam, each.lenpen, each.temperature) for each in settings] == [FEW[0], FEW[1], FEW[1]]
    for folder in copies:
        assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "checkpoints"]
    main(argv)
    output = capsys.readouterr().out
    assert all(f"{folder.name}: scored already" in output for folder in copies)

    error = refused(capsys, "compare", "--baseline", copies[0], "--candidate", copies[1])
    assert "beam: 1 or 2; lenpen: 1.0 or 0.6; temperature: 1.0 or 0.5" in error
    main(["compare", "--allow-differences", "--baseline", str(copies[0]), "--candidate", *map(str, copies[1:])])
    output = capsys.readouterr().out
    assert "differ in more than the criterion**: beam: 1 or 2" in output and "search of" not in output
    main(["evaluate", "--beam", "1", str(copies[2])])
    main(["compare", "--allow-differences", "--baseline", str(copies[0]), "--candidate", *map(str, copies[1:])])
    assert "search of el: beam 2, length penalty 0.6, temperature 0.5 or beam 1" in capsys.readouterr().out


def test_runs_that_do_not_belong_together_are_not_tuned_together(copies, capsys):
    record = read_json(copies[2] / "run.json")
    write_json(copies[2] / "run.json", {**record, "options": {**record["options"], "dropout": 0.9}})
    assert "el.seed1 are of one arm but differ in more than the seed" in refused(capsys, "evaluate", "--tune", *copies)
    write_json(copies[2] / "run.json", {**record, "average": record["average"] + 1})
    average = f"average {record['average'] + 1} and {record['average']} checkpoints"
    assert f"el.seed1 are of one arm but {average}" in refused(capsys, "evaluate", "--tune", *copies)
    by_hand = [open_run(folder).model_copy(update={"recipe": ""}) for folder in copies[1:]]
    with pytest.raises(UserError, match="was trained by hand; tune such runs one by one"):
        tuning.tune(by_hand)
    manifest = read_json(copies[0].parent / "data" / "manifest.json")
    other = copies[0].parent / "other"
    shutil.copytree(copies[0].parent / "data", other)
    write_json(other / "manifest.json", {**manifest, "checksums": {**manifest["checksums"], "dict.en.txt": "0" * 64}})
    record = read_json(copies[1] / "run.json")
    write_json(copies[1] / "run.json", {**record, "data": str(other)})
    assert "are of different data" in refused(capsys, "evaluate", "--tune", *copies[:2])
    assert not [folder for folder in copies if (folder / "tuning.json").exists()]


def test_other_checkpoints_are_tuned_anew(copies, no_engine, capsys):
    run = open_run(copies[0])
    for count in (2, 1):
        tuning.tune([run.model_copy(update={"average": count})])
        assert "tuned already" not in capsys.readouterr().out
    assert list(read_json(run.folder / "tuning.json")["checkpoints_sha256"]) == ["checkpoint3.pt"]


def test_tuning_translates_only_what_is_missing(copies, no_engine, capsys, monkeypatch):
    folder = copies[0]
    monkeypatch.setattr(tuning, "SEARCHES", FEW[:2])
    tuning.tune([open_run(folder)])
    set_bleu(folder, 99.0, 98.0)
    monkeypatch.setattr(tuning, "SEARCHES", FEW)
    translate = tuning.translate_valid

    def interrupted(*arguments):
        yield from translate(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "translate_valid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([open_run(folder)])
    assert not (folder / tuning.UNFINISHED).exists()
    tried = read_json(folder / "tuning.json")["tried"]
    assert [tuning.Search(*list(search.values())[:3]) for search in tried] == FEW
    assert [search["bleu"] for search in tried[:2]] == [99.0, 98.0] and tried[2]["bleu"] < 90
    capsys.readouterr()
    tuning.tune([open_run(folder)])
    assert "tuned already" in capsys.readouterr().out


def test_what_tuning_chooses_cannot_be_given(work, capsys):
    folder = work.folder / "ce.seed1"
    assert "--beam cannot be used with --tune" in refused(capsys, "evaluate", folder, "--tune", "--beam", 4)
    for value in ("0", "-1", "nan"):
        assert "--temperature: must be" in refused(capsys, "evaluate", folder, f"--temperature={value}")


def test_the_averaged_model_has_the_temperature_of_fairseq_generate(work, tmp_path):
    trained = open_run(work.folder / "ce.seed1")
    paths, data = last_checkpoints(checkpoint_folder(trained.folder), 2), trained.prepared()
    found = []
    for temperature, option in ((0.5, ()), (1.0, ("--temperature=0.5",)), (1.0, ())):
        average(paths, tmp_path / "average.pt", temperature)
        command = generate_command(trained, data, tmp_path / "average.pt", ["test"])
        found.append(re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", run(*command, *option, "--cpu").stdout, re.MULTILINE))
    ours, theirs, without = ({index: (float(score), text) for index, score, text in each} for each in found)
    assert len(ours) == 21
    same = [index for index in ours if ours[index][1] == theirs[index][1]]
    assert len(same) >= 20, "two hypotheses may be nearly equal"
    assert [ours[index][0] for index in same] == pytest.approx([theirs[index][0] for index in same], abs=1e-3)
    assert any(abs(ours[index][0] - without[index][0]) > 0.1 for index in ours)


def test_which_normalization_comes_last(work, tmp_path):
    state = load_checkpoint(work.folder / "ce.seed1" / "average.pt")
    assert last_normalization(state, tmp_path)[0] == "decoder.layers.0.final_layer_norm.weight"
    layers = {
        f"decoder.layers.{i}.final_layer_norm.{name}": torch.ones(1) for i in (2, 10) for name in ("weight", "bias")
    }
    state["model"].update(layers)
    assert last_normalization(state, tmp_path)[1] == "decoder.layers.10.final_layer_norm.bias"
    state["cfg"]["model"].decoder_normalize_before = True
    with pytest.raises(UserError, match="does not end with a layer normalization"):
        last_normalization(state, tmp_path)
    state["model"].update({"decoder.layer_norm.weight": torch.ones(1), "decoder.layer_norm.bias": torch.zeros(1)})
    assert last_normalization(state, tmp_path) == ["decoder.layer_norm.weight", "decoder.layer_norm.bias"]
    # fairseq-hydra-train writes flat options beside the nested ones, which are those of the model
    state["cfg"]["model"] = {"decoder_normalize_before": False, "decoder": {"normalize_before": True}}
    assert last_normalization(state, tmp_path)[0] == "decoder.layer_norm.weight"
    state["cfg"]["model"] = {"decoder_normalize_before": True, "decoder": {"normalize_before": False}}
    assert last_normalization(state, tmp_path)[0] == "decoder.layers.10.final_layer_norm.weight"
