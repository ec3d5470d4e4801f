"""Test fairseq's own commands with the plugin: train, resume, fine-tune, generate, validate, interact, average."""

import json
import math
import pickle
import re
import sys

import numpy
import pytest
import torch
from conftest import CE, EL, EVAL_BLEU, ROOT, run

from encourage_mt.environment import USER_DIR
from encourage_mt.errors import UserError
from encourage_mt.plugin import checkpoints
from encourage_mt.training.run_folder import read_log


def log_of(text, tmp_path):
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8")
    return read_log(path)


def generate(checkpoint, data, *options, code=0):
    argv = ["fairseq-generate", data / "data-bin", "--path", checkpoint, "--cpu", "--beam", "2"]
    return run(*argv, "--remove-bpe", "sentencepiece", "--required-batch-size-multiple", "1", *options, code=code)


def hypotheses(output):
    lines = [line[2:].split("\t") for line in output.splitlines() if line.startswith("D-")]
    return {int(index): text for index, _, text in lines}


def test_training_logs_likelihood_and_bonus(el_run):
    epochs = [record for record in read_log(el_run / "log") if "train_loss" in record]
    assert [record["epoch"] for record in epochs] == [1, 2]
    for record in epochs:
        assert float(record["train_bonus"]) < 0
        assert math.isclose(float(record["train_ppl"]), 2 ** float(record["train_nll_loss"]), rel_tol=0.01)
        assert 0 <= float(record["train_accuracy"]) <= 100


def test_resume_continues_where_it_stopped(el_run, train, tmp_path):
    for file in el_run.glob("checkpoint_last.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    log = train(tmp_path, *EL, *EVAL_BLEU, "--report-accuracy", "--max-epoch", "3").output
    assert "Loaded checkpoint" in log and "(epoch 3 @" in log
    assert [record["epoch"] for record in log_of(log, tmp_path) if "train_loss" in record] == [3]


def test_generate_interactive_and_from_pretrained_give_the_same_translation(el_run, tiny, tmp_path):
    recipe, data = tiny
    checkpoint = el_run / "checkpoint_last.pt"
    generated = hypotheses(generate(checkpoint, data, "--user-dir", USER_DIR).stdout)
    source = (data / "text" / "test.de").read_text(encoding="utf-8")
    assert sorted(generated) == list(range(21)), "every sentence is translated, whatever the size of the last batch"

    argv = ["fairseq-interactive", data / "data-bin", "--path", checkpoint, "--user-dir", USER_DIR, "--cpu"]
    argv += ["-s", "de", "-t", "en", "--bpe", "sentencepiece", "--sentencepiece-model", data / "subword.model"]
    interactive = run(*argv, "--beam", "2", "--buffer-size", "50", "--max-tokens", "4000", stdin=source).stdout
    assert hypotheses(interactive) == generated

    script = f"""
from fairseq.models.transformer import TransformerModel
model = TransformerModel.from_pretrained(
    {str(el_run)!r}, "checkpoint_last.pt", {str(data / "data-bin")!r}, user_dir={str(USER_DIR)!r},
    bpe="sentencepiece", sentencepiece_model={str(data / "subword.model")!r})
print("\\n".join("HYP " + line for line in model.translate({source.split(chr(10))[:5]!r}, beam=2)))
"""
    output = run(sys.executable, "-c", script).stdout
    assert [line[4:] for line in output.splitlines() if line.startswith("HYP ")] == [generated[i] for i in range(5)]


def test_validate_reports_the_same_values_as_training(el_run, tiny, tmp_path):
    _, data = tiny
    argv = ["fairseq-validate", data / "data-bin", "--task", "translation", "--path", el_run / "checkpoint_last.pt"]
    argv += ["--user-dir", USER_DIR, "--cpu", "--max-tokens", "1000", "--log-format", "json"]
    log = run(*argv, "--required-batch-size-multiple", "1").output
    validated = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"valid_loss"' in line][-1]
    trained = [record for record in read_log(el_run / "log") if "valid_loss" in record][-1]
    for name in ("valid_loss", "valid_nll_loss", "valid_bonus"):
        assert float(validated[name]) == pytest.approx(float(trained[name]), abs=0.002)


class RunsCode:
    """An object in a hostile checkpoint: unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(el_run, tiny, tmp_path):
    _, data = tiny
    proof, hostile = tmp_path / "proof", tmp_path / "hostile.pt"
    state = torch.load(el_run / "checkpoint_last.pt", weights_only=False)
    state["extra_state"]["payload"] = RunsCode(proof)
    torch.save(state, hostile)
    output = generate(hostile, data, "--user-dir", USER_DIR, code=1)
    assert "Weights only load failed" in output.stderr
    averaged = tmp_path / "average.pt"
    argv = [sys.executable, ROOT / "scripts/average_checkpoints.py", "--inputs", hostile, "--output", averaged]
    error = run(*argv, code=2).stderr
    assert error.count("\n") == 1 and "hostile.pt" in error
    assert not proof.exists() and not averaged.exists()
    torch.load(hostile, weights_only=False)
    assert proof.exists(), "the checkpoint is indeed hostile"


def test_a_checkpoint_with_an_option_that_is_code_is_refused(el_run, tiny, tmp_path):
    """fairseq evaluates this option with Python."""
    _, data = tiny
    proof, hostile = tmp_path / "proof", tmp_path / "hostile.pt"
    state = torch.load(el_run / "checkpoint_last.pt", weights_only=False)
    state["cfg"]["model"].adaptive_softmax_cutoff = f"[5, open({str(proof)!r}, 'w')] and [5]"
    torch.save(state, hostile)
    assert "adaptive_softmax_cutoff is code" in generate(hostile, data, "--user-dir", USER_DIR, code=1).stderr
    with pytest.raises(UserError, match="hostile.pt: .*adaptive_softmax_cutoff is code"):
        checkpoints.load_checkpoint(hostile)
    assert not proof.exists()


def test_the_allow_list_has_exactly_the_types_of_a_checkpoint_with_eval_bleu(el_run):
    path = el_run / "checkpoint_last.pt"
    listed = checkpoints.types_in_files()

    def loads(entries):
        with torch.serialization.safe_globals(entries):
            try:
                return bool(torch.load(path, weights_only=True))
            except pickle.UnpicklingError:
                return False

    assert loads(listed)
    needless = [entry for entry in listed if loads([other for other in listed if other is not entry])]
    of_several_processes, (_, name) = needless
    assert of_several_processes is type(numpy.dtype(numpy.float64))
    assert name in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), (
        "nothing unneeded is listed, except the name of the other numpy"
    )


def test_fine_tuning_across_criteria(el_run, train, tmp_path):
    """From the encouraging loss to cross entropy, and from there back."""
    before = el_run / "checkpoint_last.pt"
    for name, criterion in (("ce", CE), ("el", EL)):
        log = train(tmp_path / name, *criterion, "--finetune-from-model", before, "--max-epoch", "1").output
        assert "loading pretrained model from" in log
        before = tmp_path / name / "checkpoint_last.pt"
        assert (tmp_path / name / "checkpoint1.pt").exists()


def test_resuming_with_another_criterion_is_refused(el_run, train, tmp_path):
    (tmp_path / "checkpoint_last.pt").write_bytes((el_run / "checkpoint_last.pt").read_bytes())
    assert "Criterion does not match" in train(tmp_path, *CE, "--max-epoch", "3", code=1).output


def test_an_option_out_of_range_is_a_usage_error(train, tmp_path):
    last = train(tmp_path / "run", *EL, "--log-end", "1.5", code=2).stderr.strip().splitlines()[-1]
    assert "error: argument --log-end" in last and "log_end" in last and "1.5" in last
    assert not (tmp_path / "run").exists()


MY_BONUS = "def square(p, one_minus_p, options):\n    return -(p**2)\n"


def test_a_users_bonus_with_schedule_and_rdrop_continues_after_a_resume(train, tmp_path, monkeypatch):
    """The second process continues the schedule where the first one stopped."""
    (tmp_path / "my_bonus.py").write_text(MY_BONUS)
    monkeypatch.chdir(tmp_path)
    options = (*EL, "--bonus", "my_bonus:square", "--rdrop-alpha", "1", "--log-interval", "1")
    options += ("--bonus-schedule", "linear", "--bonus-schedule-updates", "40", "--bonus-defer-updates", "2")
    records = []
    for epochs in ("1", "2"):
        log = train(tmp_path / "run", *options, "--max-epoch", epochs).output
        assert ("my_bonus:square" in log) and "reference" in log
        records += [r for r in log_of(log, tmp_path) if "bonus_weight" in r and "num_updates" in r]
    weights = {int(r["num_updates"]): float(r["bonus_weight"]) for r in records}
    assert weights == pytest.approx({n: max(0, n - 3) / 40 for n in range(1, len(weights) + 1)}, abs=1e-4)
    assert all(float(r["divergence"]) > 0 for r in records)


def hydra_train(data, save_dir, *options, code=0):
    """fairseq-hydra-train with the file of docs/fairseq.md, and a tiny model."""
    (config,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/fairseq.md").read_text(), re.DOTALL | re.MULTILINE)
    (save_dir / "train.yaml").write_text(config)
    words = [f"common.user_dir={USER_DIR}", f"task.data={data / 'data-bin'}", f"checkpoint.save_dir={save_dir}"]
    for side in ("encoder", "decoder"):
        for name, value in {"layers": 1, "embed_dim": 32, "ffn_embed_dim": 32, "attention_heads": 2}.items():
            words.append(f"model.{side}.{name}={value}")
    words += ["common.cpu=true", "optimization.max_epoch=1", "dataset.max_tokens=1000", *options]
    return run(
        "fairseq-hydra-train", "--config-dir", save_dir, "--config-name", "train", *words, code=code, cwd=save_dir
    )


def test_hydra_trains_with_the_same_options(tiny, tmp_path):
    _, data = tiny
    hydra_train(data, tmp_path, "criterion.log_end=0.75")
    state = checkpoints.load_checkpoint(tmp_path / "checkpoint_last.pt")
    criterion = state["cfg"]["criterion"]
    assert (criterion["_name"], criterion["log_end"], criterion["label_smoothing"]) == (EL[1], 0.75, 0.1)
    generated = generate(tmp_path / "checkpoint_last.pt", data, "--user-dir", USER_DIR).stdout
    assert len(hypotheses(generated)) == 21


def test_hydra_refuses_a_value_out_of_range(tiny, tmp_path):
    error = hydra_train(tiny[1], tmp_path, "criterion.log_end=1.5", code=2).output
    assert "Traceback" not in error
    assert any("log_end" in line and "1.5" in line for line in error.splitlines())


def test_average_of_epochs_translates(el_run, tiny, tmp_path):
    _, data = tiny
    averaged = tmp_path / "average.pt"
    argv = [sys.executable, ROOT / "scripts/average_checkpoints.py", "--inputs", el_run, "--output", averaged]
    assert "checkpoint1.pt checkpoint2.pt" in run(*argv, "--num-epoch-checkpoints", "2").stdout
    assert len(hypotheses(generate(averaged, data, "--user-dir", USER_DIR).stdout)) == 21
