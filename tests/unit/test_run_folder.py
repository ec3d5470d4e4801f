"""Test run.json: written, read, upgraded from version 0.1, and refused in one line where it is damaged."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encourage_mt.atomic import atomic_folder, atomic_write, temporary_folder
from encourage_mt.data.manifest import PreparedData
from encourage_mt.errors import UserError
from encourage_mt.training.run_folder import Run, open_run, parse_options

OPTIONS = {
    "source-lang": "de",
    "seed": 1,
    "lr": 0.003,
    "share-all-embeddings": True,
    "eval-bleu-args": '{"beam": 1}',
    "criterion": "label_smoothed_encouraging_loss",
    "log-end": 0.5,
}
COMMAND = (
    "fairseq-train /w/data/data-bin --user-dir /elsewhere/encourage_mt --source-lang de --seed 1 --lr 0.003 "
    "--share-all-embeddings --save-dir /w/el.seed1/checkpoints --eval-bleu-args '{\"beam\": 1}' "
    "--criterion label_smoothed_encouraging_loss --log-end 0.5"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A saved run whose data counts as prepared."""
    monkeypatch.setattr(PreparedData, "open", lambda folder: None)
    folder = tmp_path / "el.seed1"
    (tmp_path / "data").mkdir()
    fields = {"recipe": "r", "arm": "el", "seed": 1, "average": 2, "beam": 5, "lenpen": 1.0, "precision": "fp32"}
    provenance = {"data_sha256": "d", "starts": []}
    run = Run(folder=folder, data=tmp_path / "data", options=OPTIONS, provenance=provenance, **fields)
    run.save()
    return run


def change(run, **changes):
    path = run.folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_is_read_as_it_was_written(run):
    assert open_run(run.folder).options == OPTIONS
    assert list(open_run(run.folder).options) == list(OPTIONS), "in order: the criterion and its own options come last"
    assert open_run(run.folder, beam=1, lenpen=None).beam == 1
    assert open_run(run.folder, lenpen=None).lenpen == 1.0


@pytest.mark.parametrize("name", [".lock", "test.generate.log", "scores.json.tmp", "export", "robustness/test.de.tmp"])
def test_a_link_through_which_a_run_would_write_is_refused(name, run, tmp_path):
    (run.folder / "checkpoints").symlink_to(tmp_path)  # on another disk
    open_run(run.folder)
    (run.folder / "robustness").mkdir()
    (run.folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        open_run(run.folder)


def test_a_moved_work_directory_finds_its_data(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").rename(tmp_path / "elsewhere" / "data")
    shutil.copytree(run.folder, tmp_path / "elsewhere" / "el.seed1")
    moved = open_run(tmp_path / "elsewhere" / "el.seed1", data=None)
    assert moved.data == tmp_path / "elsewhere" / "data"
    assert f"--save-dir={tmp_path / 'elsewhere' / 'el.seed1' / 'checkpoints'}" in moved.command_line()


def test_a_folder_of_version_0_1_opens_and_its_training_resumes(run):
    record = json.loads((run.folder / "run.json").read_text())
    del record["format"], record["options"]
    (run.folder / "run.json").write_text(json.dumps({**record, "command": COMMAND}))
    opened = open_run(run.folder)
    assert {name: str(value) for name, value in OPTIONS.items()} == {n: str(v) for n, v in opened.options.items()}
    run.save()  # the same training: not refused
    assert json.loads((run.folder / "run.json").read_text())["format"] == 2
    with pytest.raises(UserError, match="fairseq-train"):
        parse_options("rm -r " + shlex.quote("a b") + " c")


def test_another_training_in_the_same_folder_is_refused(run):
    for update, name in (
        ({"options": {**OPTIONS, "lr": 0.1}}, "lr"),
        ({"options": {k: v for k, v in OPTIONS.items() if k != "log-end"}}, "log-end"),
        ({"precision": "fp16"}, "precision"),
        ({"provenance": {"data_sha256": "other", "starts": []}}, "data"),
    ):
        with pytest.raises(UserError, match=f"different {name} .*--work-dir"):
            run.model_copy(update=update).save()
    watching = {"log-interval": 7, "keep-last-epochs": 3, "max-tokens-valid": 9}
    watching |= {"tensorboard-logdir": "tb", "wandb-project": "mt", "eval-tokenized-bleu": True}
    run.model_copy(update={"options": {**OPTIONS, **watching}}).save()


@pytest.mark.parametrize(
    "key, value",
    [
        ("beam", "--user-dir=evil"),
        ("beam", 0),
        ("beam", True),
        ("lenpen", "--user-dir=evil"),
        ("average", 0),
        ("average", -1),
        ("seed", -1),
        ("arm", "../evil"),
        ("precision", "fp8"),
        ("options", {"--user-dir=evil": 1}),
        ("options", {"lr": [1]}),
        ("options", None),
        ("provenance", {"starts": [{"command": 1}]}),
        ("provenance", {"data_sha256": 1}),
        ("format", 3),
        ("unknown", 1),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(key, value, run):
    change(run, **{key: value})
    with pytest.raises(UserError, match=rf"run\.json: {key}") as error:
        open_run(run.folder)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*Run.model_fields, "command"]), value=JSON)
def test_any_value_in_any_field_is_accepted_or_refused_in_one_line(key, value, run):
    run.folder.joinpath("run.json").unlink()
    run.save()
    change(run, **{key: value})
    try:
        opened = open_run(run.folder)
    except UserError as error:
        assert "\n" not in str(error) and "run.json" in str(error)
    else:
        assert opened.beam >= 1 and opened.average >= 1 and isinstance(opened.lenpen, float)


@pytest.mark.parametrize(
    "state",
    [
        {"model": {"w": torch.zeros(1)}},
        {"model": {"w": torch.zeros(1)}, "cfg": None},
        {"model": {"w": torch.zeros(1)}, "cfg": {"criterion": {"_name": "x"}, "common": {}}},
        {"model": {"w": "text"}},
        {"model": "text"},
        [1],
    ],
    ids=["no cfg", "cfg null", "cfg without task", "text in the model", "model of text", "a list"],
)
def test_a_checkpoint_without_its_options_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="checkpoint_last.pt") as error:
        open_run(tmp_path)
    assert "\n" not in str(error.value)


BY_HAND = {"criterion": {"_name": "x"}, "common": {"seed": 1, "fp16": 0, "bf16": 0, "amp": 0}}


@pytest.mark.parametrize(
    "save_dir, data, expected",
    [
        ("runs/el", "d/data-bin", "{tmp}/d"),
        ("runs/el", "{tmp}/elsewhere/data-bin", "{tmp}/elsewhere"),
        ("./runs/el/", "d/data-bin", "{tmp}/d"),
        (".", "d/data-bin", "{tmp}/runs/el/d"),
        ("another/name", "d/data-bin", "{here}/d"),
        ("{tmp}/runs/el", "d/data-bin", "{here}/d"),
    ],
)
def test_a_relative_path_of_the_data_begins_where_the_training_was_started(
    save_dir, data, expected, tmp_path, monkeypatch
):
    """Or, where --save-dir does not say where that was, in the current folder."""
    here, folder = tmp_path / "here", tmp_path / "runs" / "el"
    here.mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(PreparedData, "open", lambda folder: None)
    save_dir, data, expected = (path.format(tmp=tmp_path, here=here) for path in (save_dir, data, expected))
    options = {**BY_HAND, "task": {"data": data}, "checkpoint": {"save_dir": save_dir}}
    torch.save({"model": {"w": torch.zeros(1)}, "cfg": options}, folder / "checkpoint_last.pt")
    with pytest.raises(UserError, match=f"{expected} does not exist; .*--data"):
        open_run(folder)
    Path(expected).mkdir(parents=True)
    assert open_run(folder).data.resolve() == Path(expected)
    assert open_run(folder, data=tmp_path).data == tmp_path


def test_what_a_killed_process_left_does_not_stop_the_next(tmp_path):
    for name in ("work", ".output.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("half")
    with temporary_folder(tmp_path / "work") as folder, atomic_folder(tmp_path / "output") as partial:
        assert not list(folder.iterdir()) and not partial.exists()
        partial.mkdir()
    (tmp_path / "output" / "file").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "output") as partial:
        partial.mkdir()
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["output"], (
        "what was there stays, and nothing is left beside it"
    )
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["file"]


def test_a_link_beside_a_folder_is_not_written_through(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".report.tmp").symlink_to(tmp_path / "mine")
    with atomic_folder(tmp_path / "report") as partial:
        (partial / "figures").mkdir(parents=True)
    assert not list((tmp_path / "mine").iterdir()) and (tmp_path / "report" / "figures").is_dir()


def test_a_link_beside_a_file_is_not_written_through(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "other")
    with atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert (tmp_path / "other").read_text() == "kept" and (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
