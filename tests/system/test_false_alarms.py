"""Count how often sacreBLEU's paired tests report a difference between systems that do not differ."""

import functools

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from samples import corrupt, draw_references

from encourage_mt.evaluation import scoring, significance
from encourage_mt.evaluation.comparison import Comparison
from encourage_mt.evaluation.significance import paired_tests


def test_two_systems_with_the_same_error_rate_differ_at_the_nominal_rate(monkeypatch):
    """240 draws: randomization alarms in 5%, sacreBLEU's bootstrap in 10%, as the explanation says."""
    monkeypatch.setattr(significance, "PairedTest", functools.partial(PairedTest, n_samples=199))
    monkeypatch.setattr(scoring, "metrics", lambda language, lowercase: {"sacreBLEU": BLEU()})
    rng = np.random.default_rng(3)
    p = {"bs": [], "ar": []}
    for _ in range(240):
        references = draw_references(rng, 30)
        systems = [corrupt(rng, references, 0.25) for _ in range(2)]
        *_, tests = paired_tests(*systems, references, "en", False)["sacreBLEU"]
        for test, value in tests.items():
            p[test].append(value)
    alarms = {test: np.sum(np.array(values) < 0.05) for test, values in p.items()}
    assert 3 <= alarms["ar"] <= 22, "12 are expected, standard deviation 3.4"
    assert 12 <= alarms["bs"] <= 40 and alarms["bs"] > alarms["ar"], "24 are expected, standard deviation 4.6"
    assert 0.4 < np.mean(np.array(p["ar"]) < 0.5) < 0.6
    assert "falls below 0.05 about twice as often" in Comparison.explanation
