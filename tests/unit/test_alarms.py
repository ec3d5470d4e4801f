"""Test the alarms about trainings, with made-up logs."""

import json

import pytest
from samples import sample_result

from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.evaluate import speed
from encourage_mt.evaluation.significance import MetricComparison
from encourage_mt.report.tables import arms_table, learning_curve, runs_table
from encourage_mt.training.alarms import final_alarms, loss_alarm
from encourage_mt.training.run_folder import read_log, rows_by_epoch


def log(nll, lr=()):
    """Records as in a log of fairseq: a line for each value, whose loss is below zero, as with a bonus."""
    return [{"epoch": 1, "loss": str(value - 9), "nll_loss": str(value)} for value in nll] + [
        {"epoch": 1, "train_loss": "1.0", "train_lr": str(rate)} for rate in lr
    ]


DAMAGED = [
    '{"epoch": 1, "loss": null, "nll_loss": "x"}',
    '{"epoch": 1, "loss": [1], "nll_loss": {"a": 1}, "lr": "fast"}',
    '{"epoch": 1, "loss": "nan", "train_loss": "nan", "train_lr": "nan", "train_wps": "nan", "train_train_wall": "1"}',
    '{"epoch": 1, "train_loss": "1", "train_wps": "1e999", "valid_bleu": "1", "valid_num_updates": "nan"}',
    f'{{"epoch": 1, "loss": 1{"0" * 400}, "valid_bleu": 1}}',
    f'{{"epoch": 1, "loss": 1{"0" * 5000}}}',
    f'{{"epoch": {"[" * 100_000}}}',
    '{"epoch": "one", "valid_bleu": "1", "valid_nll_loss": "1", "valid_num_updates": "1"}',
    '{"epoch": 2, "train_wps": "20", "train_wpb": "20", "train_num_updates": "5", "train_train_wall": "1"}',
    '{"epoch": 1, "loss"}',
    '{"epoch": 1, "train_wps": "20", "train_wpb": "10", "train_num_updates": "2", "train_train_wall": "4"}',
]


def test_a_damaged_log_is_read_as_far_as_it_has_numbers(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("\n".join(f"{line}\n2026 | INFO | train | {line}" for line in DAMAGED), encoding="utf-8")
    records = read_log(path)
    assert records and learning_curve(records) == []
    assert final_alarms(records, 30.0) == ["the loss is not finite"]
    assert rows_by_epoch(records, "train_wps") == {2: [20.0], 1: [20.0]}


def test_the_speed_is_that_of_all_tokens_and_of_the_last_record_of_each_epoch(tmp_path):
    """Not the mean of the epochs' speeds, nor fairseq's train_wps, whose clock includes validation."""
    rows = [(1, 100, 2, 70), (1, 100, 2, 40), (2, 200, 5, 10)]  # epoch, tokens per update, updates so far, seconds
    names = ("epoch", "train_wpb", "train_num_updates", "train_train_wall")
    lines = [json.dumps({"train_wps": "9", **dict(zip(names, map(str, row), strict=True))}) for row in rows]
    (tmp_path / "log").write_text("\n".join(f"2026 | INFO | train | {line}" for line in lines))
    assert speed(tmp_path / "log") == {"target_tokens_per_second": (2 * 100 + 3 * 200) / 50, "train_seconds": 50.0}
    (tmp_path / "short").write_text((tmp_path / "log").read_text().replace('"70"', '"9"').replace('"40"', '"9"'))
    assert speed(tmp_path / "short") == {"train_seconds": 19.0}, "fairseq rounds the time of each epoch"
    assert speed(tmp_path / "none") == {}


FALLING = [10 - step / 10 for step in range(50)]


@pytest.mark.parametrize(
    "records, expected",
    [
        ([], ""),
        (log(FALLING), ""),
        (log([*FALLING, 9.0, 5.0, 9.0]), ""),  # two unusual lines
        (log([*FALLING, *[5.9] * 20]), ""),
        (log([*FALLING, *[6.4] * 3]), "diverges: 6.40 bits per token in training, after 5.30"),
        (log([*FALLING, *[9.0] * 20, *FALLING[-9:]]), ""),  # it recovered
        (log([10, 9, 3, 9, 9, 9, 9]), ""),  # too few lines
        ([{"loss": str(loss)} for loss in [*FALLING, *[8] * 5]], "diverges: 8.00"),  # of a criterion without nll_loss
        (log([*FALLING, float("nan")]), "not finite"),
        ([*log(FALLING), {"valid_loss": "inf"}], "not finite"),
        ([{"train_loss": "nan"}, {"train_loss": "2.0"}], ""),  # the last value counts
    ],
)
def test_loss(records, expected):
    assert expected in loss_alarm(records) and bool(expected) == bool(loss_alarm(records))


@pytest.mark.parametrize(
    "rates, rises",
    [([], 0), ([0.1], 0), ([0.1, 0.2], 1), ([0.1, 0.2, 0.2], 1), ([0.2, 0.2], 0), ([0.1, 0.3, 0.1], 0)],
)
def test_learning_rate(rates, rises):
    alarms = final_alarms(log(FALLING, rates), 30.0)
    assert len(alarms) == rises and all("learning rate" in alarm for alarm in alarms)


def test_bleu_below_1_and_several_alarms():
    assert final_alarms(log(FALLING), 1.0) == []
    alarms = final_alarms(log([*FALLING, float("nan")], [0.1, 0.2]), 0.99)
    assert all(words in alarm for words, alarm in zip(("finite", "not trained", "rate"), alarms, strict=True))


def test_an_alarm_replaces_the_verdicts_and_is_below_the_tables():
    scores = {"test": {"sacreBLEU": {"score": 0.1, "signature": "s"}}}
    results = [sample_result("ce", 1, scores=scores), sample_result("e*l", 1, scores=scores, alarms=["not trained"])]
    for table in (runs_table(results), arms_table(results, [])):
        assert r"**e\*l.seed1: not trained**  " in table.splitlines() and table.count("not trained") == 1
    metrics = {name: MetricComparison(name, {1: 0.1, 2: 0.2}, {1: 9.0, 2: 9.2}) for name in ("TER", "sacreBLEU")}
    sides = {"baseline": "ce", "candidate": "e*l", "signatures": {}, "differences": []}
    compared = Comparison(tests={"test": metrics}, **sides)
    headline, *others = compared.verdicts("test")
    assert (
        headline.startswith("e*l is better than ce")
        and len(others) == 2
        and others[1].startswith("Detecting a gain of 0.4")
    )
    alarmed = compared.model_copy(update={"alarms": ["e*l.seed1: not trained"]})
    (line,) = alarmed.verdicts("test")
    assert line.startswith("No verdict: e*l.seed1: not trained.")
    assert r"**No verdict: e\*l.seed1: not trained. " in alarmed.markdown() and "seeds per" not in alarmed.markdown()
