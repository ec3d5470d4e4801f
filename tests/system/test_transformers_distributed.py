"""Compare Hugging Face's Trainer with the loss on two processes (DDP over gloo) and on one."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="not installed: pip install -e .[transformers]")

SCRIPT = """
import sys, torch, transformers
from encourage_mt.integrations.transformers import EncouragingLossForTrainer
torch.manual_seed(0)
tokens = torch.randint(3, 40, (24, 7))
labels = tokens.masked_fill(torch.rand(24, 7) < 0.3, -100)  # other numbers of targets in each batch
rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]
config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = transformers.LlamaForCausalLM(config)
class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
arguments = transformers.TrainingArguments(sys.argv[2], per_device_train_batch_size=int(sys.argv[1]), max_grad_norm=0.0,
    gradient_accumulation_steps=2, num_train_epochs=1, use_cpu=True, save_strategy="no", report_to="none",
    gradient_checkpointing=True)
trainer = InOrder(model, arguments, train_dataset=rows,
    compute_loss_func=EncouragingLossForTrainer(label_smoothing=0.1),
    optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)))
trainer.train()
assert trainer.state.global_step == 3
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), sys.argv[2] + "/model.pt")
"""


def test_two_processes_train_as_one(tmp_path):
    import torch

    (tmp_path / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    models = []
    for processes, batch in (("1", "4"), ("2", "2")):
        folder = tmp_path / processes
        folder.mkdir()
        command = [*launch, processes, tmp_path / "train.py", batch, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        models.append(torch.load(folder / "model.pt", weights_only=True))
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-4, atol=1e-6)
