"""Check the confidence of pieces and sentences, and which pieces are correct, on hand-made logits and text."""

import math

import numpy as np
import pytest
import torch

from encourage_mt.evaluation.confidence import FIRST_PIECES, SCORES, correct_pieces, sentence_scores, token_values

P = [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]


def test_the_values_of_a_piece_are_those_of_its_logits():
    logits = torch.tensor([P], dtype=torch.float64).log() + 3.0  # softmax does not see the shift
    found = {name: values[0].tolist() for name, values in token_values(logits, torch.tensor([[1, 2]])).items()}
    entropies = [-sum(p * math.log(p) for p in row) for row in P]
    assert found == {
        "log_probability": pytest.approx([math.log(0.2), math.log(0.5)], abs=1e-6),
        "maximum_probability": pytest.approx([0.7, 0.5], abs=1e-6),
        "entropy": pytest.approx(entropies, abs=1e-6),
        "maximum_logit": pytest.approx([math.log(0.7) + 3, math.log(0.5) + 3], abs=1e-6),
        "energy": pytest.approx([-3, -3], abs=1e-6),
    }


def test_a_sentence_has_the_mean_of_its_pieces_and_higher_is_more_confident():
    length = FIRST_PIECES + 2
    sure = {"log_probability": -0.1, "maximum_probability": 0.9, "entropy": 0.3, "maximum_logit": 9.0, "energy": -9.5}
    unsure = {"log_probability": -2.0, "maximum_probability": 0.4, "entropy": 2.5, "maximum_logit": 2.0, "energy": -3.0}
    values = [{name: np.full(length, value) for name, value in each.items()} for each in (sure, unsure)]
    values[1]["log_probability"][FIRST_PIECES:] = -9.0
    found = sentence_scores(values)
    assert set(found) == set(SCORES)
    assert found["mean log-probability"] == pytest.approx([-0.1, (-2.0 * FIRST_PIECES - 18) / length])
    assert found[f"log-probability of {FIRST_PIECES} pieces"] == pytest.approx([-0.1, -2.0])
    assert found["negative energy"] == pytest.approx([9.5, 3.0])
    assert found["fewest pieces"].tolist() == [-length, -length]
    assert all(first > second for name, (first, second) in found.items() if name != "fewest pieces")


@pytest.mark.parametrize(
    "translation, reference, expected",
    [
        ("a b c", "a b c", "111"),
        ("a x c", "a b c", "101"),
        ("a b c", "a c", "101"),
        ("a c", "a b c", "11"),
        ("c a b", "a b c", "011"),  # TER would shift a word
        ("", "a b", ""),
        ("x y", "", "00"),
    ],
)
def test_a_piece_is_correct_if_the_shortest_edit_keeps_it(translation, reference, expected):
    assert correct_pieces(translation.split(), reference.split()) == [mark == "1" for mark in expected]


def test_a_repetition_is_correct_once():
    assert sum(correct_pieces(["a", "a"], ["a"])) == 1
