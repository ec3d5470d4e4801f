"""Test the progress bar of a training, from the lines of its log."""

from encourage_mt.training.train import Training, progress_bar

TRAINED = '2026-01-01 | INFO | train_inner | {"epoch": 2, "update": 1.5, "loss": "9.1"}\n'
FAILED = TRAINED.replace("9.1", "nan")
BEGUN = '2026-01-01 | INFO | fairseq_cli.train | begin validation on "valid" subset\n'
VALIDATED = '2026-01-01 | INFO | valid | {"epoch": 2, "valid_loss": "8.7", "valid_bleu": "3.25"}\n'


def test_the_bar_says_that_a_training_validates_and_that_its_loss_is_not_finite(tmp_path):
    log = tmp_path / "train.log"
    log.touch()
    training = Training.__new__(Training)  # without a process
    training.bar, training.bleu, training.note, training.rest = progress_bar("el.seed1", 4, "epoch", 0), "-", "", ""
    training.records, training.alarm = [], ""
    shown = []
    with open(log) as training.lines, open(log, "a") as written:
        for text in (TRAINED, BEGUN[:40], BEGUN[40:], VALIDATED, TRAINED, FAILED):
            written.write(text)
            written.flush()
            training.read()
            shown.append((training.bar.n, training.bar.postfix))
    training.bar.close()
    plain, validates = "valid BLEU -", "valid BLEU -, validating"
    later, failed = "valid BLEU 3.25", "valid BLEU 3.25, ALARM: the loss is not finite"
    assert shown == [(1.5, text) for text in (plain, plain, validates, later, later, failed)]
