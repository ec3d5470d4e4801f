"""Test the loss in Hugging Face's Trainer: 20 steps equal the same steps by hand; the example works."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install -e .[transformers]"
)
pytest.importorskip("accelerate", reason="not installed: pip install -e .[transformers]")

from encourage_mt.integrations.transformers import EncouragingLossForTrainer  # noqa: E402

ROOT = Path(__file__).parents[2]
VOCABULARY = 40
STEPS, ACCUMULATED, BATCH = 20, 2, 3
TINY = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **sizes))


def make_gpt2():
    """Its class name does not tell Trainer that labels are shifted."""
    config = transformers.GPT2Config(
        **TINY, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def make_marian():
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    config = transformers.MarianConfig(**TINY, **sizes, d_model=16, dropout=0.0, decoder_start_token_id=0)
    return transformers.MarianMTModel(config)


def make_examples(model):
    """Return examples of different lengths, some labels ignored: a decoder-only model is trained on the input."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in torch.randint(3, 9, (STEPS * ACCUMULATED * BATCH,), generator=generator).tolist():
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = tokens.clone() if not model.config.is_encoder_decoder else tokens.flip(0)
        labels[0 if length % 2 else 1] = -100
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def collate(model, examples):
    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence([each[name] for each in examples], True, value)

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return batch


def summed_loss(logits, labels, smoothing=0.1, log_end=0.5):
    """The definition: sum over targets and types of q (-log p + b(p))."""
    logits, labels = logits[labels != -100], labels[labels != -100]
    p = logits.softmax(dim=1)
    bonus = torch.where(p <= log_end, (1 - p).log(), torch.tensor(1 - log_end).log() - (p - log_end) / (1 - log_end))
    q = torch.full_like(p, smoothing / VOCABULARY)
    q[torch.arange(len(labels)), labels] += 1 - smoothing
    return (q * (bonus - p.log())).sum()


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_marian])
def test_twenty_steps_equal_those_by_hand(make, tmp_path):
    """Gradient accumulation over batches with different numbers of targets; labels shifted for decoder-only models."""
    torch.manual_seed(0)
    model = make()
    by_hand = copy.deepcopy(model)
    examples = make_examples(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATED, num_train_epochs=1,
        max_grad_norm=0.0, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        model, arguments, train_dataset=examples, data_collator=lambda rows: collate(model, rows),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        compute_loss_func=EncouragingLossForTrainer(label_smoothing=0.1),
    )  # fmt: skip
    trainer.train()

    plain = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for step in range(STEPS):
        start = step * ACCUMULATED * BATCH
        batches = [collate(by_hand, examples[i : i + BATCH]) for i in range(start, start + ACCUMULATED * BATCH, BATCH)]
        losses, targets = 0.0, 0
        for batch in batches:
            labels = batch.pop("labels")
            logits = by_hand(**batch).logits
            if not model.config.is_encoder_decoder:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses += summed_loss(logits, labels)
            targets += labels.ne(-100).sum()
        plain.zero_grad()
        (losses / targets).backward()
        plain.step()
    assert trainer.state.global_step == STEPS
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_without_a_count_of_items_the_loss_is_a_mean():
    model = make_llama()
    batch = collate(model, make_examples(model)[:3])
    labels = batch.pop("labels")
    outputs = model(**batch)
    expected = summed_loss(outputs.logits[:, :-1], labels[:, 1:]) / labels[:, 1:].ne(-100).sum()
    torch.testing.assert_close(EncouragingLossForTrainer(label_smoothing=0.1)(outputs, labels), expected)
    for count in (0, torch.tensor(0)):  # a batch without targets
        loss = EncouragingLossForTrainer()(outputs, torch.full_like(labels, -100), count)
        (gradient,) = torch.autograd.grad(loss, outputs.logits, retain_graph=True)
        assert loss.isnan() and not gradient.any()
    count = labels[:, 1:].ne(-100).sum()
    half = EncouragingLossForTrainer(label_smoothing=0.1)(outputs, labels, count.expand(2, 1))
    torch.testing.assert_close(2 * half, expected, msg="Trainer multiplies by the 2 GPUs of DataParallel")
    by_name = EncouragingLossForTrainer(label_smoothing=0.1, shift_labels=True)(outputs.to_tuple(), labels)
    torch.testing.assert_close(by_name, expected)
    with pytest.raises(ValueError, match="shift_labels"):
        EncouragingLossForTrainer()(outputs.to_tuple(), labels)
    with pytest.raises(ValueError, match="labels"):
        EncouragingLossForTrainer()(outputs, None)


def test_the_example_fine_tunes_and_scores(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "tiny")
    make_marian().half().save_pretrained(tmp_path / "tiny")
    (tmp_path / "a").write_text("a b c d\n" * 8 + "e f g\n" * 8)
    (tmp_path / "b").write_text("h g f e\n" * 8 + "c b a\n" * 8)
    files = [str(tmp_path / name) for name in "ab"]
    command = [
        sys.executable,
        ROOT / "examples/transformers/finetune.py",
        "--model",
        tmp_path / "tiny",
        "--train",
        *files,
    ]
    command += ["--test", *files, "--output", tmp_path / "out", "--epochs", "2", "--max-length", "10", "--beam", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "BLEU" in done.stdout and "|version:" in done.stdout
    assert len((tmp_path / "out/translations.txt").read_text().splitlines()) == 16
    assert transformers.MarianMTModel.from_pretrained(tmp_path / "out").dtype == torch.float32

    def refused(*wrong):
        monkeypatch.setattr(sys, "argv", [str(word) for word in [*command[1:], *wrong]])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(command[1]), run_name="__main__")
        errors = capsys.readouterr().err
        assert "usage:" not in errors and "Traceback" not in errors
        return errors.splitlines()[-1]

    for wrong, message in (
        (["--test", "missing", "b"], "missing"),
        (["--log-end", "2"], "log_end"),
        (["--epochs", "0"], "--epochs: must be a number above 0"),
        (["--model", tmp_path], f"{tmp_path}: cannot be loaded as an encoder-decoder model ("),
    ):
        assert message in refused(*wrong)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert refused().endswith("pip install -e '.[recipes,transformers]'")
