"""Test the examples of image and graph classification end to end, on data made here."""

import gzip
import importlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from encourage_mt import EncouragingLoss
from encourage_mt.files import read_json, write_json

PUBLISHED = ("images", "graphs")  # folders in results/
NO_GRAPHS = "torch_geometric is not installed: pip install -e .[recipes,classification]"


@pytest.fixture(scope="module")
def images():
    """The module train_images, with short attacks."""
    module = load("images", "train_images")
    import measures

    module.ALL_RATES = module.RATES
    module.ATTACKED, module.RATES, measures.STEPS, measures.QUERIES = 40, (0.05, 0.1), 5, 5
    return module


def load(folder, name):
    sys.path.insert(0, str(ROOT / "examples" / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder with 600 and 200 images of ten classes, each a bright row at another height, and digits.npz."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for split, size in (("train", 600), ("t10k", 200)):
        labels = (np.arange(size) % 10).astype(np.uint8)
        pictures = rng.integers(0, 30, (size, 28, 28), dtype=np.uint8)
        pictures[np.arange(size), 2 + 2 * labels.astype(int)] += 200
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", pictures)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    np.savez(folder / "digits.npz", images=rng.integers(0, 256, (50, 28, 28), dtype=np.uint8))
    return folder


@pytest.fixture
def run(images, raw, monkeypatch, capsys):
    """run(*options) runs the script in this process; returns (exit code, output, errors)."""

    def start(*options, folder=raw):
        argv = ["train_images.py", "--raw-dir", folder, "--digits", folder / "digits.npz", "--epochs", 4, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        code = 0
        try:
            images.main()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return start


def test_images_are_trained_measured_and_reported(run, tmp_path, images, monkeypatch):
    work = tmp_path / "work"
    settings = [name for name in images.SETTINGS if name != "long_tail_10"]
    options = ("--work-dir", work, "--seeds", 2, "--arms", "ce", "el_050", "--settings", *settings)
    code, output, _ = run(*options)
    assert code == 0
    for setting in settings:
        names = {path.name for path in (work / setting).glob("*.json")}
        assert names == {f"{arm}.seed{seed}.json" for arm in ("ce", "el_050") for seed in (1, 2)}
        assert len(list((work / setting / "tuning").iterdir())) == 4
        assert f"## {setting}" in output
    assert output.count("Held-out accuracy by learning rate") == len(settings)
    measures = read_json(work / "balanced/ce.seed1.json")["measures"]
    assert measures["accuracy"] > 30 and {"AUROC digits, logit", "FPR95 noise, energy"} <= set(measures)
    assert measures["PGD margin eps 1"] <= measures["PGD margin eps 0.05"] <= measures["accuracy"]
    tail = read_json(work / "long_tail_100/ce.seed1.json")["measures"]
    groups = [tail[f"accuracy, {name}"] for name in ("many", "medium", "few")]
    assert tail["accuracy"] == pytest.approx(np.dot(groups, [0.3, 0.4, 0.3]))
    assert "AUROC held-out class, probability" in read_json(work / "without_class/el_050.seed2.json")["measures"]
    report = (work / "report.md").read_text(encoding="utf-8")
    assert "seeds with the same gain, do not show" in report and (work / "balanced_accuracy_changes.png").exists()

    monkeypatch.setattr(images, "fit", None)  # nothing is trained again
    assert run(*options)[:2] == (0, output)
    empty = tmp_path / "empty"
    code, _, errors = run("--report-only", "--work-dir", empty)
    assert code == 2 and f"{empty}: no such folder" in errors and not empty.exists()
    empty.mkdir()
    code, _, errors = run("--report-only", "--work-dir", empty)
    assert code == 2 and f"{empty}: has no finished run of ce" in errors
    path = work / "balanced/el_050.seed1.json"
    record = read_json(path)
    write_json(path, {**record, "loss": {"log_end": 0.75}})
    code, _, errors = run(*options)
    assert code == 2 and "el_050.seed1.json: log_end: is 0.75, now 0.5" in errors.strip().splitlines()[-1]
    write_json(path, {**record, "loss": {**record["loss"], "label_smoothing": 0.1}})
    code, _, errors = run(*options)
    assert code == 2 and "label_smoothing: is 0.1, now None" in errors.strip().splitlines()[-1]
    for name, value in (("rate", 0.4), ("seed", 2)):
        write_json(path, {**record, name: value})
        code, _, errors = run(*options)
        assert code == 2 and f"{name}: is {value}, now {record[name]}" in errors.strip().splitlines()[-1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_reports_are_of_the_published_runs(name, run, images, tmp_path, monkeypatch):
    published, copy = ROOT / "results" / name, tmp_path / name
    shutil.copytree(published, copy)
    if name == "images":
        monkeypatch.setattr(images, "RATES", images.ALL_RATES)
        assert run("--work-dir", copy, "--report-only", "--epochs", 10)[0] == 0
    else:
        pytest.importorskip("torch_geometric", reason=NO_GRAPHS)
        monkeypatch.setattr(sys, "argv", ["train_graphs.py", "--work-dir", str(copy), "--report-only"])
        load("graphs", "train_graphs").main()
    report = (published / "report.md").read_text(encoding="utf-8")
    assert (copy / "report.md").read_text(encoding="utf-8") == report, "write it again with --report-only"
    pictures = sorted(copy.glob("*.svg"))
    assert pictures and not any("$" in picture.read_text(encoding="utf-8") for picture in pictures)  # raw TeX


def test_the_tables_of_the_page_are_of_the_published_reports():
    reports = [(ROOT / "results" / name / "report.md").read_text(encoding="utf-8") for name in PUBLISHED]
    rows = [line for report in reports for line in report.splitlines()]
    page = (ROOT / "docs/classification.md").read_text(encoding="utf-8").partition("\n## Results\n")[2]
    tables, claims = (
        [line for line in part.splitlines() if line.startswith("|")] for part in page.split("\n## ", maxsplit=1)
    )
    assert tables and set(tables) <= set(rows)
    measured = {cell.strip() for line in rows for cell in line.split("|")}
    assert claims and {cell.strip() for line in claims[2:] for cell in line.split("|")[5:-1]} <= measured


def test_bad_input_is_refused_in_one_line(run, raw, tmp_path):
    def refused(*options, folder=raw):
        code, _, errors = run("--work-dir", tmp_path / "work", *options, folder=folder)
        assert code == 2 and errors.count("\n") == 1 and not (tmp_path / "work").exists()
        return errors

    assert "'el_9'" in refused("--arms", "el_9")
    assert str(tmp_path / "none") in refused(folder=tmp_path / "none")
    for path in raw.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes((raw / labels.name).read_bytes()[:-20])
    assert f"{labels}: not a complete" in refused(folder=tmp_path)
    labels.write_bytes(gzip.compress(gzip.decompress((raw / labels.name).read_bytes())[:-1]))
    assert f"{labels}: has 599 values, its header says 600" in refused(folder=tmp_path)
    write_idx(labels, np.arange(600).astype(np.uint8) % 9)  # without class 9
    assert f"{labels}: must have one label below 10 for each of 600 images, and each label" in refused(folder=tmp_path)
    write_idx(labels, np.arange(600).astype(np.uint8))
    labels.write_bytes(gzip.compress(bytes([0, 0, 8, 2, *b"\xff" * 4, 0, 0, 0, 28]) + bytes(28)))
    assert f"{labels}: has 28 values, its header says" in refused(folder=tmp_path)
    labels.write_bytes((raw / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert f"{labels}: must have one label below 10 for each of 600 images" in refused(folder=tmp_path)
    labels.write_bytes((raw / labels.name).read_bytes())
    (tmp_path / "digits.npz").write_bytes(b"PK")
    assert f"{tmp_path / 'digits.npz'}: not a complete .npz file" in refused(folder=tmp_path)
    for values, problem in (
        (np.zeros((2, 8, 8), dtype=np.uint8), "has the shape [2, 8, 8]"),
        (np.zeros((0, 28, 28), dtype=np.uint8), "has the shape [0, 28, 28]"),
        (np.zeros((2, 28, 28)), "has the shape [2, 28, 28], torch.float64"),  # would be divided by 255 again
        (np.array(["one"]), "not a complete .npz file"),
    ):
        np.savez(tmp_path / "digits.npz", images=values)
        assert problem in refused(folder=tmp_path)


def test_digits_are_read_only_where_they_are_measured(run, tmp_path):
    options = ("--work-dir", tmp_path, "--arms", "ce", "--seeds", 1, "--digits", tmp_path / "none.npz", "--settings")
    assert run(*options, "long_tail_10")[0] == 0
    code, _, errors = run(*options, "balanced")
    assert code == 2 and "none.npz" in errors


@pytest.mark.parametrize("epochs", [1, 4, 5, 6])
def test_a_training_of_a_few_steps_ends(epochs, images, raw):
    data = images.load(raw)
    losses = images.fit(EncouragingLoss(), data["images"][:100], data["labels"][:100].long(), 1, 0.05, epochs)[1]
    assert len(losses) == epochs


def test_without_bonus_all_steps_equal_those_of_torch(images, raw):
    data = images.load(raw)
    losses = {}
    for smoothing in (0.0, 0.1):
        criteria = (
            nn.CrossEntropyLoss(label_smoothing=smoothing),
            EncouragingLoss(bonus="none", label_smoothing=smoothing),
            EncouragingLoss(log_end=0.5, label_smoothing=smoothing),
        )
        fits = [images.fit(each, data["images"], data["labels"].long(), 1, 0.05, 3)[1] for each in criteria]
        np.testing.assert_allclose(fits[1], fits[0], rtol=1e-4)
        assert len(fits[0]) == 12 and not np.allclose(fits[2], fits[0], rtol=0.01)
        losses[smoothing] = fits[0]
    assert losses[0.0] != losses[0.1]


def test_the_tail_is_thinned_and_nothing_held_out_is_trained_on(images):
    labels = torch.arange(10).repeat(1000)
    chosen, _ = images.choose(labels, "long_tail_100", tuning=False)
    counts = labels[chosen].bincount().tolist()
    assert counts == [round(1000 * 100 ** (-k / 9)) for k in range(10)]
    chosen, held_out = images.choose(labels, "balanced", tuning=True)
    assert sorted([*chosen.tolist(), *held_out.tolist()]) == list(range(10_000)) and len(held_out) == 1000
    chosen, held_out = images.choose(labels, "without_class", tuning=True)
    assert labels[chosen].max() == labels[held_out].max() == 8


def test_a_killed_experiment_continues(run, images, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RATES", images.ALL_RATES)  # as in the process that is killed
    options = ["--work-dir", tmp_path, "--settings", "long_tail_10", "--arms", "ce", "--seeds", "1", "--epochs", "3"]
    argv = [sys.executable, ROOT / "examples/images/train_images.py", "--raw-dir", raw, *options]
    process = subprocess.Popen([*map(str, argv), "--digits", raw / "digits.npz"], stderr=subprocess.PIPE)
    tuning = tmp_path / "long_tail_10/tuning"
    while process.poll() is None and not list(tuning.glob("*.json")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in tuning.glob("*.json")}
    assert before and not (tmp_path / "report.md").exists()
    assert run(*options)[0] == 0
    assert (tmp_path / "report.md").exists() and len(list(tuning.iterdir())) == 4
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def test_attacks_and_scores_equal_their_definitions(images):
    import measures

    torch.manual_seed(0)
    model, labels = images.Net(), torch.arange(10)
    pictures = torch.rand(10, 1, 28, 28)
    for eps in (0.05, 1.0):
        attacked = {name: measures.pgd(model, pictures, labels, eps, name) for name in measures.OBJECTIVES}
        attacked["fgsm"] = measures.fgsm(model, pictures, labels, eps)
        attacked["square"] = measures.square(model, pictures, labels, eps)
        for result in attacked.values():
            assert (result - pictures).abs().max() <= eps + 1e-6 and 0 <= result.min() <= result.max() <= 1
            margins = [measures.margin(model(each), labels).mean().item() for each in (result, pictures)]
            assert margins[0] < margins[1]
    nn.init.constant_(model[-1].weight, torch.nan)  # a training that diverged
    logits = measures.predict(model, pictures)
    assert not logits.any() and set(measures.under_attack(model, pictures, labels).values()) == {10}
    diverged = measures.inside(logits, labels, images.LossOptions(), model[-1].weight)
    assert np.isfinite(list(diverged.values())).all() and diverged["margin (nats)"] == 0
    known, unknown = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.5, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    scores = measures.unknown_inputs(known, unknown, "x")
    assert scores["AUROC x, logit"] == pytest.approx(100 * 5 / 6)
    assert scores["FPR95 x, logit"] == 50
    confident = measures.unknown_inputs(known[:1] * 20, known[1:2] * 20, "x")  # the probabilities round to 1
    assert confident["AUROC x, probability"] == 100
    torch.testing.assert_close(measures.log_odds(logits := torch.randn(9, 5)).sigmoid(), logits.softmax(1).amax(1))


@pytest.fixture
def graphs(monkeypatch):
    """The module train_graphs, with a bonus deferred by two epochs."""
    pytest.importorskip("torch_geometric", reason=NO_GRAPHS)
    module = load("graphs", "train_graphs")
    monkeypatch.setattr(module, "DEFERRED_EPOCHS", {name: 2 for name in module.DEFERRED_EPOCHS})
    return module


@pytest.fixture
def graph_files(tmp_path):
    """A folder with PROTEINS: 60 rings of 4 to 8 nodes, whose class is the label of most of their nodes."""
    rng = np.random.default_rng(0)
    edges, indicator, node_labels, first = [], [], [], 1
    classes = np.arange(60) % 2
    for number, label in enumerate(classes, 1):
        size = rng.integers(4, 9)
        nodes = range(first, first + size)
        edges += [f"{a}, {b}" for one in range(size) for a, b in (
            (nodes[one], nodes[one - 1]), (nodes[one - 1], nodes[one]))]  # fmt: skip
        indicator += [str(number)] * size
        node_labels += [str(label if rng.random() < 0.9 else 1 - label) for _ in nodes]
        first += size
    folder = tmp_path / "raw" / "PROTEINS"
    folder.mkdir(parents=True)
    parts = {"A": edges, "graph_indicator": indicator, "graph_labels": map(str, classes), "node_labels": node_labels}
    for part, lines in parts.items():
        (folder / f"PROTEINS_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder.parent


def test_graphs_are_trained_and_reported(graphs, graph_files, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"

    def run(*options):
        argv = ["train_graphs.py", "--raw-dir", graph_files, "--work-dir", work, "--settings", "PROTEINS", *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        graphs.main()
        return capsys.readouterr().out

    monkeypatch.setattr(graphs, "RATE", 0.01)
    output = run("--seeds", 2, "--epochs", 8)
    records = {arm: read_json(work / f"PROTEINS/{arm}.seed1.json") for arm in graphs.ARMS}
    assert max(record["measures"]["valid accuracy"] for record in records.values()) > 70
    assert {record["rate"] for record in records.values()} == {0.01}
    assert "el_050_deferred" in output and "seeds with the same gain, do not show" in output and "72.76" in output
    assert run("--seeds", 2, "--epochs", 8) == output

    for options, problem in ((["--arms", "x"], "'x'"), (["--epochs", "9"], "epochs: is 8, now 9")):
        with pytest.raises(SystemExit) as end:
            run("--seeds", "2", *options)
        errors = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and problem in errors[-1]
    shares = {arm: record["measures"]["trained with bonus (%)"] for arm, record in records.items()}
    assert (shares["ce"], shares["el_050"]) == (0, 100) and records["ce"]["training"]["deferred epochs, PROTEINS"] == 2

    shutil.rmtree(work)
    labels = graph_files / "PROTEINS/PROTEINS_node_labels.txt"
    labels.write_text(labels.read_text()[:-20])
    for problem in ("PROTEINS: damaged", "PROTEINS_node_labels.txt: no such file"):
        with pytest.raises(SystemExit) as end:
            run()
        errors = capsys.readouterr().err
        assert end.value.code == 2 and problem in errors.strip().splitlines()[-1] and "Traceback" not in errors
        labels.unlink(missing_ok=True)
        is_written = work.exists()
        shutil.rmtree(work, ignore_errors=True)
    assert not is_written


@pytest.mark.parametrize(
    "name, missing, extras",
    [
        ("graphs", "torch_geometric.data", "recipes,classification"),
        ("graphs", "tabulate", "recipes,classification"),  # our own modules import it
        ("images", "tabulate", "recipes"),
    ],
)
def test_without_a_package_the_scripts_say_how_to_install_it(name, missing, extras, monkeypatch, capsys):
    for module in (f"train_{name}", "experiment", "encourage_mt.evaluation.formatting"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as end:
        load(name, f"train_{name}")
    assert end.value.code == 2 and f"pip install -e '.[{extras}]'" in capsys.readouterr().err


def test_the_pooling_keeps_the_nodes_of_the_highest_score(graphs):
    network, edges = graphs.SAGPool(3, 2), torch.tensor([[*range(8)], [*range(1, 8), 0]])
    for pool in network.pools:
        nodes = torch.randn(8, graphs.HIDDEN)
        scores = pool.gnn(nodes, edges).tanh().flatten()
        *_, kept, score = pool(nodes, edges)
        assert set(kept.tolist()) == set(scores.topk(4).indices.tolist())
        torch.testing.assert_close(score, scores[kept])
        assert not any(weight.requires_grad for weight in pool.select.parameters())  # weight decay would flip its sign


def test_the_bonus_is_deferred_and_splits_are_shared(graphs, graph_files, tmp_path, monkeypatch):
    data = list(graphs.load("PROTEINS", graph_files, tmp_path / "work"))
    weights = []

    class Recorded(EncouragingLoss):
        def forward(self, logits, target):
            weights.append(self.bonus_weight)
            return super().forward(logits, target)

    monkeypatch.setattr(graphs, "EncouragingLoss", Recorded)
    measures = graphs.run(data, "PROTEINS", 4, graphs.ARMS["el_050_deferred"], 1)
    assert weights == [0, 0, 1, 1]
    assert measures["trained with bonus (%)"] == 100 * (measures["best epoch"] > 2)
    parts = graphs.split(60, 3)
    assert parts == graphs.split(60, 3) != graphs.split(60, 4)
    assert sorted(sum(parts, [])) == list(range(60)) and [len(part) for part in parts] == [48, 6, 6]
