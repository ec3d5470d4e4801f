"""Check the scores of rare and frequent words on made-up text, and that they find what was planted, and only that."""

import json
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from samples import draw_references, sample_data

from encourage_mt.errors import UserError
from encourage_mt.evaluation import significance
from encourage_mt.evaluation.significance import compare_resampled
from encourage_mt.evaluation.words import FREQUENCIES, NAME, NUMBER, ROWS, count_words, match_words, word_statistic
from encourage_mt.files import write_json

GOLDEN = Path(__file__).with_name("compare_mt.json")
TRAIN = Counter(the=5000, cat=120, sat=12, mat=7, zebra=3, Berlin=2, The=900, Dog=4, dog=50, on=1000)
F1, ACCURACY = 0, len(ROWS) + 1  # where the columns of each score begin


def scores_of(translations, references, train=TRAIN):
    """Return word_statistic of whole test set."""
    table = match_words([line.split() for line in translations], [line.split() for line in references], train)
    return word_statistic(table, np.arange(len(references))[None])[0]


def test_words_are_matched_within_a_sentence_and_as_often_as_in_the_reference():
    found = scores_of(["the the cat mat", "sat zebra"], ["the cat sat", "the zebra zebra"])
    expected = {  # by frequency: matched, in the references, in the translations
        **{0: (0, 0, 0), 1: (1, 2, 1), 5: (0, 0, 1), 10: (0, 1, 1), 100: (1, 1, 1), 1000: (1, 2, 2)},
    }
    for column, low in enumerate(FREQUENCIES):
        matched, wanted, given = expected[low]
        if not wanted:
            assert np.isnan(found[column]) and np.isnan(found[ACCURACY + column])
        else:
            assert found[F1 + column] == pytest.approx(200 * matched / (wanted + given))
            assert found[ACCURACY + column] == pytest.approx(100 * matched / wanted)
    assert found[len(FREQUENCIES)] == pytest.approx(200 * 3 / (6 + 6)), "micro-average"
    assert found[len(ROWS)] == pytest.approx(np.mean([200 / 3, 0, 100, 50])), "macro-average, of ranges with words"


def test_names_and_numbers_are_found_without_a_tagger():
    line = "Zoe saw Berlin , The Dog , 3 cats and I in 2b . Munich 's A380"
    found = match_words([[]], [line.split()], TRAIN)[0, :, 1]
    assert found[NAME] == 1, "Berlin; not a word after a full stop, seen in lower case, of one letter, or with a digit"
    assert found[NUMBER] == 3


def test_contractions_and_escaped_marks_are_neither_names_nor_numbers():
    """I'm is one token of 13a; Moses escapes brackets, pipes and quotes."""
    line = "on &#91; &#124; &#93; , &quot; Otto saw Zoe , I'm I’ve I'll &quot; Karl"
    found = match_words([[]], [line.split()], Counter(["on"]))[0, :, 1]
    assert (found[NAME], found[NUMBER]) == (1, 0), "Zoe; Otto and Karl are at the start"
    line = "on dr. Otto , l&apos; Italie , d&apos; Anna . &apos; Karl ... Zoe"
    found = match_words([[]], [line.split()], Counter(["on"]))[0, :, 1]
    assert found[NAME] == 3, "abbreviations and elisions end no sentence; Karl and Zoe are at the start"


def test_a_matched_name_is_found_wherever_the_translation_has_it():
    reference, other = "on Berlin sat".split(), "Berlin sat".split()
    assert match_words([other], [reference], TRAIN)[0, NAME].tolist() == [1, 1, 1]
    assert match_words([reference], [other], TRAIN)[0, NAME].tolist() == [0, 0, 0], "no name in the reference"
    twice = "on Berlin Berlin".split()
    assert match_words([twice], [reference], TRAIN)[0, NAME].tolist() == [1, 1, 2]
    assert match_words([reference], [twice], TRAIN)[0, NAME].tolist() == [1, 2, 1]


def test_a_copy_of_the_reference_is_perfect_and_no_overlap_is_zero():
    references = ["the cat sat on Berlin 3", "zebra mat dog unseen"]
    assert np.nanmin(scores_of(references, references)) == 100
    assert np.nanmax(scores_of(["x y", "z"], references)) == 0


def planted(rng, count, rates, baseline_rates=None):
    """Return statistics of two sides with two seeds; a word of a range of frequency is left out with its rate."""
    references = [line.split() for line in draw_references(rng, count)]
    train = Counter({f"w{number}": (0, 3, 7, 50, 500, 5000)[number % 6] for number in range(300)})

    def translate(rates):
        return [[w for w in line if rng.random() >= rates[int(w[1:]) % 6]] for line in references]

    sides = [
        {seed: partial(word_statistic, match_words(translate(r), references, train)) for seed in (1, 2)}
        for r in (baseline_rates or rates, rates)
    ]
    return sides


def test_a_planted_failure_on_rare_words_is_found_there_and_only_there():
    rng = np.random.default_rng(1)
    sides = planted(rng, 150, [0.2, 0.6, 0.2, 0.2, 0.2, 0.2], [0.2] * 6)
    found = {each.metric: each for each in compare_resampled(list("abcdefghijklmnopqrst"), sides, 150)}
    low, high = found["b"].bootstrap_interval
    assert found["b"].gain < -25 and low < found["b"].gain < high < -10 and found["b"].bootstrap_p < 0.001
    for other in "acdef":
        low, high = found[other].bootstrap_interval
        assert abs(found[other].gain) < 8 and found[other].bootstrap_p > 0.01 and low < 0 < high
    assert found["g"].gain < -3 > found["j"].gain, "of all words, and of the macro-average"


def test_equal_systems_differ_at_the_nominal_rate(monkeypatch):
    monkeypatch.setattr(significance, "BLOCK", 300)
    monkeypatch.setattr(significance, "SAMPLES", 300)
    rng = np.random.default_rng(2)
    compared = [compare_resampled(list("abcdefg"), planted(rng, 40, [0.3] * 6), 40) for _ in range(25)]
    p = np.array([[each.bootstrap_p for each in rows] for rows in compared])
    assert p.size == 175 and 0.01 < (p < 0.05).mean() < 0.11 and 0.4 < (p < 0.5).mean() < 0.6
    over_seeds = np.array([each.p for rows in compared for each in rows if each.p is not None])
    assert 0.01 < (over_seeds < 0.05).mean() < 0.1


def test_the_same_gain_of_a_few_words_in_every_seed_is_no_proof_over_seeds():
    references = [["rare"]] * 4 + [["frequent"]] * 20
    better = match_words(references, references, Counter(frequent=5000, rare=1))
    worse = match_words([["x"], *references[1:]], references, Counter(frequent=5000, rare=1))
    sides = [{seed: partial(word_statistic, table) for seed in (1, 2, 3)} for table in (worse, better)]
    rare = compare_resampled(list("abcdefg"), sides, 24)[0]
    assert rare.gain == pytest.approx(100 - 600 / 7) and rare.p is None and rare.interval is None
    assert rare.bootstrap_p > 0.3


def test_a_word_that_only_one_sentence_has_proves_nothing():
    references = [["frequent"]] * 29 + [["rare"]]
    train = Counter(frequent=5000, rare=1)
    tables = [match_words(lines, references, train) for lines in ([*references[:-1], ["x"]], references)]
    sides = [{1: partial(word_statistic, table)} for table in tables]
    found = {each.metric: each for each in compare_resampled(list("abcdefg"), sides, 30)}
    assert found["b"].gain == 100 and set(found) == {"b", "f", "g"}
    assert found["b"].bootstrap_interval == (100, 100)
    for group in "bg":
        assert found[group].bootstrap_p > 0.3, "a third of the samples lack the sentence"


def test_words_are_left_out_with_a_warning_without_the_binarized_train(tmp_path, caplog):
    data = sample_data(tmp_path / "data", {"en": ["a line"]})
    assert not count_words(data) and "train.de-en.en" in caplog.text
    write_json(data.folder / "words.json", {"format": 2, "counts": {"a": "x"}})
    with pytest.raises(UserError, match="words.json: counts.a"):
        count_words(data)


def test_kept_counts_of_other_data_do_not_count(tmp_path):
    data = sample_data(tmp_path / "data", {"en": ["a line"]})
    for checksum, expected in ((data.checksum, {"a": 7}), ("0" * 64, {})):
        write_json(data.folder / "words.json", {"format": 2, "data_sha256": checksum, "counts": {"a": 7}})
        assert count_words(data) == expected
    write_json(data.folder / "words.json", {"format": 2, "counts": {"a": 7}})
    assert not count_words(data), "a file of an earlier version says nothing of its data"


# --- compare-mt


def golden_text():
    """References, two translations and train counts in which every range has words."""
    rng = np.random.default_rng(4)
    references = draw_references(rng, 60)
    systems = []
    for rate in (0.2, 0.4):
        lines = [line.split() for line in references]
        systems.append(
            [" ".join(w if rng.random() > rate else f"w{rng.integers(300)}" for w in line) for line in lines]
        )
    return (
        references,
        systems,
        {f"w{number}": (0, 1, 4, 5, 9, 10, 99, 100, 999, 1000)[number % 10] for number in range(300)},
    )


def test_scores_are_those_of_compare_mt():
    """Of version 0.2.10, kept in compare_mt.json: [F1 and recall by frequency] of each system."""
    references, systems, train = golden_text()
    golden = json.loads(GOLDEN.read_text())
    for system, expected in zip(systems, golden["systems"], strict=True):
        found = scores_of(system, references, Counter(train))
        for begin, name in ((F1, "fmeas"), (ACCURACY, "rec")):
            assert found[begin : begin + len(FREQUENCIES)] / 100 == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.skipif(not shutil.which("compare-mt"), reason="compare-mt is not installed")
def test_the_kept_figures_are_those_of_the_installed_compare_mt(tmp_path):
    references, systems, train = golden_text()
    for name, lines in {"ref": references, "a": systems[0], "b": systems[1]}.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "counts").write_text("".join(f"{word}\t{count}\n" for word, count in train.items()))
    cutoffs = ":".join(map(str, FREQUENCIES[1:]))
    # version 0.2.10 prints recall where it is asked for prec, and precision for rec
    accuracies = f"bucket_type=freq,freq_count_file=counts,bucket_cutoffs={cutoffs},acc_type=fmeas+prec"
    argv = ["compare-mt", "ref", "a", "b", "--compare_word_accuracies", accuracies, "--decimals", "10"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split("\t")[:3] for line in done.stdout.splitlines() if line.count("\t") >= 2]
    rows = [list(map(float, row[1:])) for row in rows if row[0].startswith(("<", ">", "["))]
    golden = json.loads(GOLDEN.read_text())["systems"]
    for column in (0, 1):
        found = [row[column] for row in rows[: 2 * len(FREQUENCIES)]]
        assert found == pytest.approx([*golden[column]["fmeas"], *golden[column]["rec"]], abs=1e-9)
