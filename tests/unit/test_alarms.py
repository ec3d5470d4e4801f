"""Test the alarms about trainings, with made-up logs."""

import pytest
from samples import sample_result

from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.significance import MetricComparison
from encourage_mt.report.tables import arms_table, runs_table
from encourage_mt.training.alarms import final_alarms, loss_alarm


def log(nll, lr=()):
    """Records as in a log of fairseq: a line for each value, whose loss is below zero, as with a bonus."""
    return [{"epoch": 1, "loss": str(value - 9), "nll_loss": str(value)} for value in nll] + [
        {"epoch": 1, "train_loss": "1.0", "train_lr": str(rate)} for rate in lr
    ]


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
    assert compared.verdicts("test")[0].startswith("e*l is better than ce") and len(compared.verdicts("test")) == 2
    alarmed = compared.model_copy(update={"alarms": ["e*l.seed1: not trained"]})
    (line,) = alarmed.verdicts("test")
    assert line.startswith("No verdict: e*l.seed1: not trained.")
    assert r"**No verdict: e\*l.seed1: not trained. " in alarmed.markdown() and "seeds per" not in alarmed.markdown()
