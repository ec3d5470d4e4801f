"""Results that were never trained, and random references and translations with a given rate of errors."""

import numpy as np

from encourage_mt.evaluation.results import Result

EVALUATION = {
    **{"average": 10, "beam": 5, "lenpen": 1.0, "comet": None},
    **{"data_sha256": "d" * 64, "checkpoints_sha256": {}},
}
WORDS = np.array([f"w{number}" for number in range(300)])


def sample_result(arm="ce", seed=1, **fields):
    """The scores of a run without any, but for `fields`."""
    record = {
        **{"name": f"{arm}.seed{seed}", "recipe": "tiny", "arm": arm, "seed": seed, "evaluation": EVALUATION},
        **{"options": {}, "criterion": {}, "training": {}, "scores": {}, "provenance": {}, "versions": {}},
        **{"machine": "another, that evaluated"},
    }
    return Result(**{**record, **fields})


def draw_references(rng, count):
    return [" ".join(rng.choice(WORDS, rng.integers(6, 16))) for _ in range(count)]


def corrupt(rng, references, rate):
    """A system that gets each word wrong with probability `rate`."""
    lines = [np.array(line.split()) for line in references]
    return [" ".join(np.where(rng.random(len(w)) < rate, rng.choice(WORDS, len(w)), w)) for w in lines]
