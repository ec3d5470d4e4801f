"""Provide made-up results without trainings, and random references and translations with a given rate of errors."""

import numpy as np

from encourage_mt.data.manifest import PreparedData, hash_text
from encourage_mt.evaluation.results import Result
from encourage_mt.files import write_record
from encourage_mt.training.run_folder import Run, open_run

EVALUATION = {
    **{"average": 10, "beam": 5, "lenpen": 1.0, "comet": None},
    **{"data_sha256": hash_text({}), "checkpoints_sha256": {}},  # of sample_data
}
WORDS = np.array([f"w{number}" for number in range(300)])


def sample_result(arm="ce", seed=1, **fields):
    """Return the scores of a run, with `fields` in place of the defaults."""
    record = {
        **{"name": f"{arm}.seed{seed}", "recipe": "tiny", "arm": arm, "seed": seed, "evaluation": EVALUATION},
        **{"options": {}, "criterion": {}, "training": {}, "scores": {}, "provenance": {}, "versions": {}},
        **{"machine": "another, that evaluated"},
    }
    return Result(**{**record, **fields})


def sample_data(folder, texts, **fields):
    """Return prepared data that consists only of the raw `texts` {language: lines} of one test set."""
    (folder / "text").mkdir(parents=True)
    for language, lines in texts.items():
        write_lines(folder / "text" / f"test.{language}", lines)
        counts = {split: {"kept": len(lines)} for split in ("train", "valid", "test")}
    empty = "options sources percent_unknown dictionary checksums lengths_in_pieces leakage versions".split()
    record = {
        **{"source": "de", "target": "en", "tests": ["test"], "tokenizer": "none", "lowercase": False},
        **{"remove_bpe": "sentencepiece", "byte_fallback": False, "learned_on_lines": 0, "counts": counts},
        **{"duplicate_train_pairs": 0, "warnings": [], **dict.fromkeys(empty, {})},
    }
    data = PreparedData(folder=folder, **{**record, **fields})
    data.write()
    return data


def sample_run(folder, data, arm="ce", seed=1):
    """A run that was never trained."""
    folder.mkdir(parents=True)
    how = {"average": 10, "beam": 5, "lenpen": 1.0, "precision": "fp32", "options": {}, "provenance": {}}
    write_record(folder / "run.json", Run(folder=folder, recipe="r", arm=arm, seed=seed, data=data, **how))
    return open_run(folder)


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def draw_references(rng, count):
    return [" ".join(rng.choice(WORDS, rng.integers(6, 16))) for _ in range(count)]


def corrupt(rng, references, rate):
    """Return translations of a system that gets each word wrong with probability `rate`."""
    lines = [np.array(line.split()) for line in references]
    return [" ".join(np.where(rng.random(len(w)) < rate, rng.choice(WORDS, len(w)), w)) for w in lines]
