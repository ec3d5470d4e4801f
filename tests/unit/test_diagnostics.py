"""Compare the measurements of a hand-made model with closed forms."""

import math

import numpy as np
import pytest
import torch

from encourage_mt.errors import UserError
from encourage_mt.evaluation.diagnostics import loss_options, measure, per_token
from encourage_mt.loss.options import LossOptions

FAIRSEQ = {"smoothing_convention": "fairseq"}
CE = LossOptions(bonus="none", **FAIRSEQ)
# probabilities of 4 types, the target, for three tokens: sure and right, sure and wrong, unsure and right
P = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
TARGET = torch.tensor([0, 1, 3])
SHIFT = torch.tensor([[3.0], [-5.0], [40.0]], dtype=torch.float64)  # softmax does not see it
LOGITS = P.log() + SHIFT
IDENTITY = torch.eye(4, dtype=torch.float64)


def values_of(name, options=CE, weight=IDENTITY, logits=LOGITS):
    return per_token(logits, TARGET, options, weight)[name].tolist()


def test_probabilities_and_margins_are_those_of_the_logits():
    assert values_of("p") == pytest.approx([0.7, 0.1, 0.4], abs=1e-14)
    assert values_of("nll") == pytest.approx([-math.log(0.7), -math.log(0.1), -math.log(0.4)], abs=1e-13)
    assert values_of("confidence") == pytest.approx([0.7, 0.7, 0.4], abs=1e-14)
    assert values_of("guess") == [0, 0, 3]
    assert values_of("margin") == pytest.approx([math.log(7), -math.log(7), math.log(4 / 3)], abs=1e-13)


def test_energies_are_negative_logits_and_their_gap_ignores_a_shift():
    ln = math.log
    energy, others = values_of("energy"), values_of("others")
    assert energy == pytest.approx([-ln(0.7) - 3, -ln(0.1) + 5, -ln(0.4) - 40], abs=1e-12)
    mean_of_others = [-ln(0.1), -(ln(0.7) + 2 * ln(0.1)) / 3, -(ln(0.1) + ln(0.2) + ln(0.3)) / 3]
    assert others == pytest.approx([mean_of_others[0] - 3, mean_of_others[1] + 5, mean_of_others[2] - 40], abs=1e-12)
    found = measure([(LOGITS, TARGET)], np.ones(4), CE, IDENTITY)["energy"]
    gap = (mean_of_others[0] + ln(0.7) + mean_of_others[1] + ln(0.1) + mean_of_others[2] + ln(0.4)) / 3
    assert found["gap"] == pytest.approx(gap, abs=1e-12)
    assert found["gap"] == pytest.approx(found["others"]["mean"] - found["target"]["mean"], abs=1e-12)


SLOPES = {
    "cross entropy": (CE, [[-0.3, 0.1, 0.1, 0.1], [0.7, -0.9, 0.1, 0.1], [0.1, 0.2, 0.3, -0.6]]),
    "smoothed cross entropy": (  # p - q, with q = 0.7 for the target and 0.1 for each of the others
        LossOptions(bonus="none", label_smoothing=0.3, **FAIRSEQ),
        [[0.0, 0.0, 0.0, 0.0], [0.6, -0.6, 0.0, 0.0], [0.0, 0.1, 0.2, -0.3]],
    ),
    "encouraging loss": (  # -1 for the target as long as p < log_end, p_k / (1 - p) for the others
        LossOptions(log_end=0.9),
        [[-1, 1 / 3, 1 / 3, 1 / 3], [7 / 9, -1, 1 / 9, 1 / 9], [1 / 6, 2 / 6, 3 / 6, -1]],
    ),
    "beyond log_end": (  # for p = 0.7: (1/p + 1/(1 - log_end)) p (1 - p) = 0.3 + 0.42
        LossOptions(log_end=0.5),
        [[-0.72, 0.24, 0.24, 0.24], [7 / 9, -1, 1 / 9, 1 / 9], [1 / 6, 2 / 6, 3 / 6, -1]],
    ),
    "power": (  # p - p^2: (1 + 2 p) (1 - p) p / p
        LossOptions(bonus="power", bonus_weight=0.5),
        [[-0.3 * 1.49, *[0.1 * 1.49] * 3], [0.7 * 1.01, -0.9 * 1.01, *[0.1 * 1.01] * 2]]
        + [[0.1 * 1.16, 0.2 * 1.16, 0.3 * 1.16, -0.6 * 1.16]],
    ),
}


@pytest.mark.parametrize("options, slopes", SLOPES.values(), ids=SLOPES)
def test_the_gradient_is_that_of_the_training_loss_at_the_decoders_output(options, slopes):
    slopes = np.array(slopes)
    assert values_of("gradient", options) == pytest.approx(np.linalg.norm(slopes, axis=1), abs=1e-12)
    weight = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -3.0]])  # 4 types, 2 dimensions
    expected = np.linalg.norm(slopes @ weight, axis=1)
    assert values_of("gradient", options, torch.tensor(weight)) == pytest.approx(expected, abs=1e-12)
    found = measure([(LOGITS, TARGET)], np.ones(4), options, IDENTITY)["gradient"]
    norms = np.linalg.norm(slopes, axis=1)
    assert found["well_classified"] == pytest.approx(norms[0] / norms.sum(), abs=1e-12)
    assert found["well_classified_tokens"] == pytest.approx(1 / 3)
    share = np.array(found["share"])
    for token, low in enumerate((0.7, 0.1, 0.4)):
        index = [i for i, edge in enumerate(found["edges"][:-1]) if edge - 1e-9 < low < edge + 0.05 - 1e-9][0]
        around = share[max(0, index - 1) : index + 1].sum()  # 0.7 is an edge, and may fall to either side of it
        assert around == pytest.approx(norms[token] / norms.sum(), abs=1e-12)


def test_half_precision_logits_are_measured_in_float64():
    z = torch.tensor([[12.0, 0.0, -4.0, 1.0]], dtype=torch.float16)
    values = per_token(z, torch.tensor([0]), CE, IDENTITY.half())
    others = math.exp(-12) + math.exp(-16) + math.exp(-11)
    assert values["nll"].item() == pytest.approx(math.log1p(others), rel=1e-9)
    assert values["gradient"].dtype == torch.float64


def test_batches_are_joined_and_histograms_are_shares():
    batches = [(LOGITS[:1], TARGET[:1]), (LOGITS[1:], TARGET[1:])]
    found = measure(batches, np.ones(4), CE, IDENTITY)
    whole = measure([(LOGITS, TARGET)], np.ones(4), CE, IDENTITY)
    assert found["tokens"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.1) + math.log(0.4)) / 3)
    assert found["nll"] == pytest.approx(whole["nll"])
    for histogram in (found["probability"], found["margin"], found["energy"]["target"], found["energy"]["others"]):
        assert len(histogram["edges"]) == len(histogram["share"]) + 1
        assert sum(histogram["share"]) == pytest.approx(1)
    margin = found["margin"]
    filled = {edge: share for edge, share in zip(margin["edges"][:-1], margin["share"], strict=True) if share}
    assert filled == {-2.0: pytest.approx(1 / 3), 0.0: pytest.approx(1 / 3), 1.5: pytest.approx(1 / 3)}
    assert found["probability"]["mean"] == pytest.approx(0.4)
    assert margin["mean"] == pytest.approx(math.log(4 / 3) / 3)


def test_values_outside_a_histogram_are_counted_in_its_outermost_bin():
    logits = torch.tensor([[300.0, 0.0], [300.0, 0.0]], dtype=torch.float64)
    found = measure([(logits, torch.tensor([0, 1]))], np.ones(2), CE, torch.eye(2, dtype=torch.float64))
    assert found["margin"]["share"][0] == found["margin"]["share"][-1] == 0.5
    assert found["probability"]["share"][0] == found["probability"]["share"][-1] == 0.5
    assert found["energy"]["target"]["share"][0] == 0.5
    assert found["calibration"]["tokens"][-1] == 2 and found["calibration"]["error"] == pytest.approx(0.5)


def test_the_calibration_error_is_the_weighted_distance_of_confidence_from_accuracy():
    """20 tokens at confidence 0.7, 12 of them right; 10 at 0.95, all right; 10 at 0.62 and 0.64, 7 of them right."""
    confidence = [0.7] * 20 + [0.95] * 10 + [0.62] * 5 + [0.64] * 5
    right = [1] * 12 + [0] * 8 + [1] * 10 + [1] * 7 + [0] * 3
    p = torch.tensor([[c, 1 - c] for c in confidence], dtype=torch.float64)
    target = torch.tensor([0 if hit else 1 for hit in right])
    found = measure([(p.log(), target)], np.ones(2), CE, torch.eye(2, dtype=torch.float64))["calibration"]
    assert found["error"] == pytest.approx((20 * 0.1 + 10 * 0.05 + 10 * 0.07) / 40)
    assert list(found["tokens"][[9, 10, 14]]) == [10, 20, 10] and sum(found["tokens"]) == 40
    assert found["confidence"][9] == pytest.approx(0.63) and found["accuracy"][9] == pytest.approx(0.7)
    assert found["accuracy"][10] == pytest.approx(0.6)


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error():
    p = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64)
    found = measure([(p.log(), torch.tensor([0, 0, 0, 1]))], np.ones(2), CE, torch.eye(2, dtype=torch.float64))
    assert found["calibration"]["error"] == pytest.approx(0, abs=1e-12)


def test_accuracy_and_f1_go_by_frequency_in_train():
    counts = np.array([0, 1, 9, 10, 99_999, 100_000])
    target = torch.tensor([0, 1, 1, 2, 3, 4, 4, 4, 5])
    guess = torch.tensor([1, 1, 4, 2, 4, 4, 4, 3, 5])
    logits = torch.nn.functional.one_hot(guess, 6).double()
    rows = measure([(logits, target)], counts, CE, torch.eye(6, dtype=torch.float64))["frequency"]
    by_range = {(row["from"], row["below"]): (row["tokens"], row["accuracy"], row["f1"]) for row in rows}
    assert by_range == {
        (0, 1): (1, 0.0, 0.0),
        (1, 10): (3, pytest.approx(2 / 3), pytest.approx(2 * 2 / (3 + 3))),
        (10, 100): (1, 0.0, 0.0),
        (100, 1000): (0, None, None),
        (1000, 10000): (0, None, None),
        (10000, 100000): (3, pytest.approx(2 / 3), pytest.approx(2 * 2 / (3 + 4))),
        (100000, None): (1, 1.0, 1.0),
    }


def test_the_loss_is_taken_from_the_options_of_the_checkpoint():
    assert loss_options({"_name": "cross_entropy", "sentence_avg": False}) == CE
    smoothed = {"_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "ignore_prefix_size": 0}
    assert loss_options(smoothed) == LossOptions(bonus="none", label_smoothing=0.1, **FAIRSEQ)
    options = {"bonus": "power", "log_end": 0.75, "bonus_exponent": 3.0, "bonus_weight": 0.5}
    options |= {"label_smoothing": 0.2, "smoothing_convention": "paper"}
    ours = {"_name": "label_smoothed_encouraging_loss", "loss_backend": "auto", "report_accuracy": True, **options}
    assert loss_options(ours) == LossOptions(**options)
    for name, value in (("log_end", "x"), ("bonus", "zzz"), ("label_smoothing", None)):
        with pytest.raises(UserError, match=f"scores.json: criterion: {name}"):
            loss_options({**ours, name: value})


def test_a_trusted_bonus_from_outside_is_measured(monkeypatch, tmp_path):
    (tmp_path / "own_bonus.py").write_text("def linear(p, q, options):\n    return p\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ENCOURAGE_MT_BONUSES", "own_bonus:linear")
    assert loss_options({"bonus": "own_bonus:linear"}).bonus == "own_bonus:linear"


def test_a_bonus_from_outside_is_not_imported_and_leaves_the_gradient_out():
    options = loss_options({"bonus": "evil:function", "label_smoothing": 0.1})
    assert options is None
    found = measure([(LOGITS, TARGET)], np.ones(4), options, IDENTITY)
    assert found["gradient"] is None and found["nll"] > 0
