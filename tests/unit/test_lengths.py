"""Test BLEU by sentence length: ranges, values, intervals."""

import numpy as np
import pytest
from samples import WORDS, corrupt

from encourage_mt.evaluation import scoring
from encourage_mt.evaluation.lengths import bleu_by_length, group


def test_ranges_with_few_sentences_are_joined_to_a_neighbour():
    sizes = {3: 5, 8: 30, 13: 25, 25: 19, 50: 40, 70: 1}
    ranges = group(np.array([length for length, size in sizes.items() for _ in range(size)]))
    assert {name: len(chosen) for name, chosen in ranges.items()} == {"1-10": 35, "11-30": 44, "41+": 41}
    assert sorted(np.concatenate(list(ranges.values()))) == list(range(120))
    assert list(group(np.array([4]))) == ["1-5"]


def test_scores_are_sacrebleus_and_intervals_contain_them():
    rng = np.random.default_rng(1)
    references = [" ".join(rng.choice(WORDS, length)) for length in [8] * 30 + [18] * 300]
    systems = {"a": [corrupt(rng, references, 0.3) for _ in range(2)], "b": [corrupt(rng, references, 0.2)]}
    metric = scoring.metrics("en")["sacreBLEU"]
    short, long = bleu_by_length(references, systems, metric)
    assert (short.name, short.sentences, long.name, long.sentences) == ("6-10", 30, "16-20", 300)
    for each, part in ((short, slice(0, 30)), (long, slice(30, None))):
        expected = {
            label: np.mean([metric.corpus_score(lines[part], [references[part]]).score for lines in side])
            for label, side in systems.items()
        }
        for label, (value, low, high) in each.scores.items():
            assert value == pytest.approx(expected[label]) and low < value < high
        assert each.gain[0] == pytest.approx(expected["b"] - expected["a"]) and each.gain[1] < each.gain[2]
    assert long.gain[1] > 0 and long.gain[2] - long.gain[1] < 0.6 * (short.gain[2] - short.gain[1])
