"""Train with a stand-in for fairseq-train: the progress bars, and which training gets which GPU."""

import os
import re
import shutil
import subprocess

import pytest
import torch
from conftest import TINY, write_recipe
from samples import sample_data

from encourage_mt import environment, processes
from encourage_mt.environment import visible_gpus
from encourage_mt.errors import UserError
from encourage_mt.files import read_json
from encourage_mt.plugin.worker import SAVED
from encourage_mt.recipe import load_recipe
from encourage_mt.training import train as training
from encourage_mt.training.launch import Cluster


@pytest.fixture
def runs(tmp_path):
    """make(seeds, **length): the runs of both arms with each seed."""

    def make(seeds, **length):
        train = {name: value for name, value in TINY["train"].items() if name != "max-epoch"}
        recipe = load_recipe(write_recipe(tmp_path, average=1, train={**train, **length}))
        data = sample_data(tmp_path / "data", {"de": ["a"], "en": ["b"]}).folder
        arms = [(seed, arm) for seed in seeds for arm in ("ce", "el")]
        return [training.make_run(recipe, arm, seed, data, tmp_path, "fp32") for seed, arm in arms]

    return make


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(script): a shell script in place of fairseq-train; returns the [(run, GPUs)] it is started with."""

    def install(script):
        started = []

        def start(words, env, **options):
            folder = next(word for word in words if word.startswith("--save-dir=")).split("/")[-2]
            started.append((folder, env.get("CUDA_VISIBLE_DEVICES")))
            return subprocess.Popen(["sh", "-c", script, "sh", folder], env=env, **options)

        monkeypatch.setattr(training, "start", start)
        monkeypatch.setattr(training, "program_path", lambda name: name)
        return started

    pause = training.time.sleep
    monkeypatch.setattr(training.time, "sleep", lambda seconds: pause(0.02))
    return install


@pytest.mark.parametrize("unit, total", [("max-epoch", 4), ("max-update", 40)])
def test_the_bars_of_a_crashed_training_stay_at_what_it_reached(unit, total, runs, stand_in, monkeypatch):
    """Two trainings crash, each at half of its length."""
    bars, make_bar = {}, training.progress_bar
    monkeypatch.setattr(training, "progress_bar", lambda name, *rest: bars.setdefault(name, make_bar(name, *rest)))
    stand_in('echo \'{"epoch": 3, "update": 2.0, "num_updates": "20"}\'; echo "RuntimeError: broken"; exit 1')
    with pytest.raises(UserError, match="broken.*; .*broken"):
        training.train(runs([1], **{unit: total}), Cluster("fp32"), 2)
    reached = {name: (bar.n, bar.total) for name, bar in bars.items()}
    half = (total / 2, total)
    assert reached == {"all trainings": (1, 2), "ce.seed1": half, "el.seed1": half}


@pytest.mark.parametrize(
    "visible, gpus, expected",
    [(None, 1, ["0", "1", "1", "1"]), ("4,7", 1, ["4", "7", "7", "7"]), ("4,5,6,7", 2, ["4,5", "6,7", "6,7", "6,7"])],
)
def test_a_waiting_training_gets_the_gpus_of_the_one_that_ended(
    visible, gpus, expected, runs, stand_in, monkeypatch, tmp_path
):
    """The first training ends after the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len((visible or "0,1").split(",")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    script = f"cd {tmp_path}; case $1 in ce.seed1) while [ ! -e last ]; do sleep 0.05; done;; "
    save = "; mkdir $1/checkpoints; touch $1/checkpoints/checkpoint_last.pt"
    started = stand_in(script + "el.seed2) touch last;; esac" + save)
    training.train(runs([1, 2], **{"update-freq": 2, "max-epoch": 2}), Cluster("fp32", gpus), 2)
    names = ["ce.seed1", "el.seed1", "ce.seed2", "el.seed2"]
    assert started == list(zip(names, expected, strict=True))
    assert all((tmp_path / name / "train.done").exists() for name in names)


def test_a_training_that_saved_nothing_is_not_done(runs, stand_in, tmp_path):
    """fairseq-train ends at once, with exit code 0, if the learning rate is -1."""
    stand_in("exit 0")
    with pytest.raises(UserError, match=r"ce\.seed1.*without a checkpoint"):
        training.train(runs([1], **{"max-epoch": 2})[:1], Cluster("fp32"), 1)
    assert not (tmp_path / "ce.seed1" / "train.done").exists()


@pytest.mark.parametrize("code", [143, 1])
def test_a_training_that_somebody_else_stopped_has_not_failed(code, runs, stand_in, caplog):
    """torchrun exits with 1 when its workers do with 143."""
    stand_in(f"echo 'stopped after 7 updates; {SAVED}'; exit {code}")
    with caplog.at_level("WARNING", logger="encourage_mt"), pytest.raises(SystemExit) as stop:
        training.train(runs([1], **{"max-epoch": 2})[:1], Cluster("fp32"), 1)
    assert stop.value.code == 143 and "Stopped and saved: ce.seed1." in caplog.text


def test_a_run_that_another_process_trains_does_not_stop_the_others(runs, stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PATIENCE", 0)
    stand_in(f"cd {tmp_path}; mkdir -p $1/checkpoints; touch $1/checkpoints/checkpoint_last.pt")
    both = runs([1], **{"max-epoch": 2})
    with processes.locked(tmp_path / "el.seed1"), pytest.raises(UserError, match=r"el\.seed1: in use by process"):
        training.train(both, Cluster("fp32"), 2)
    assert [(run.folder / "train.done").exists() for run in both] == [True, False]


@pytest.mark.parametrize("name", ["checkpoints/dummy", "checkpoints/checkpoint1.pt", "hydra_train.log", "train.done"])
def test_a_link_through_which_a_training_would_write_is_refused(name, runs, stand_in, tmp_path):
    both = runs([1], **{"max-update": 8})
    path = both[1].folder / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "mine")  # which does not exist yet
    started = stand_in("true")
    with pytest.raises(UserError, match=f"{name}: is a link"):
        training.train(both, Cluster("fp32"), 1)
    assert not started and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("named, count, expected", [("", 2, ["0", "1"]), ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"])])
def test_gpus_are_named_as_cuda_names_them(named, count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == [], "on a machine without a GPU"


def test_a_resumed_training_has_as_many_threads_as_before(runs, stand_in, monkeypatch, tmp_path):
    """Another number would round differently; the other training is done already."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "cores", lambda: 8)
    stand_in(f"cd {tmp_path}; mkdir -p $1/checkpoints; touch $1/checkpoints/checkpoint_last.pt")
    done, resumed = runs([1], **{"max-epoch": 2})
    done.folder.mkdir()
    (done.folder / "train.done").touch()
    training.train([done, resumed], Cluster("fp32"), 2)
    (start,) = read_json(resumed.folder / "run.json")["provenance"]["starts"]
    assert start["command"].startswith("OMP_NUM_THREADS=4 ")


def test_only_the_first_machine_marks_a_training_as_done_and_each_writes_its_own_log(runs, stand_in, tmp_path):
    stand_in(f"cd {tmp_path}; mkdir -p $1/checkpoints; touch $1/checkpoints/checkpoint_last.pt")
    run, _ = runs([1], **{"max-epoch": 2, "update-freq": 2})
    for node, expected in ((1, {"train1.log"}), (0, {"train1.log", "train.log", "run.json", "train.done"})):
        training.train([run], Cluster("fp32", nodes=2, node=node, master="h:1"), 1)
        assert {path.name for path in run.folder.iterdir() if path.is_file() and path.name[0] != "."} == expected


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_an_installed_package_does_not_record_the_revision_of_the_project_around_it(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of a hook that runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # which may ask for signed commits
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    for folder, expected in (("encourage_mt", r"[0-9a-f]{40}"), (".venv/encourage_mt", "None")):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(environment, "USER_DIR", tmp_path / folder)
        assert re.fullmatch(expected, str(environment.git_revision()))
