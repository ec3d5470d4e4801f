#!/usr/bin/env python3
"""Measure time and memory of the loss and its gradient, compared with fairseq's label-smoothed cross entropy.

All implementations run interleaved in one process. Times are medians over repeats after a warm-up; memory is the peak
beyond what was in use before. The machine may be noisy: compare only ratios within one table.
"""

import argparse
import json
import logging
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from encourage_mt.environment import describe_hardware
from encourage_mt.loss import chunked
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.fused_projection import projected_loss_terms
from encourage_mt.loss.options import LossOptions

EL = LossOptions(label_smoothing=0.1, smoothing_convention="fairseq")
CE = LossOptions(bonus="none", label_smoothing=0.1, smoothing_convention="fairseq")
PAD = 1
FEATURES = 512


def fairseq_lsce(logits, target):
    """Return what fairseq's LabelSmoothedCrossEntropyCriterion computes from logits."""
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    return label_smoothed_nll_loss(log_probs, target, 0.1, ignore_index=PAD)[0]


def ours(options, backend):
    return lambda logits, target: loss_terms(logits, target, options, PAD, backend=backend).loss


def from_logits(device):
    """Return {row: (logits, target) -> loss}; the others are compared with the first."""
    rows = {
        "fairseq LSCE": fairseq_lsce,
        "EL reference": ours(EL, "reference"),
        "EL reference, torch.compile": torch.compile(ours(EL, "reference")),
        "EL chunked": ours(EL, "chunked"),
        "CE chunked": ours(CE, "chunked"),
    }
    if device == "cuda":
        rows |= {"EL triton": ours(EL, "triton"), "CE triton": ours(CE, "triton")}
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError:
            return rows
        rows["Liger cross entropy"] = lambda logits, target: liger_cross_entropy(
            logits.clone(), target, ignore_index=PAD, reduction="sum", label_smoothing=0.1
        )  # it writes its gradient over the logits, which here are kept
    return rows


def from_features(device):
    """Return {row: (features, weight, target) -> loss}, with the output projection included."""
    rows = {
        "projection, fairseq LSCE": lambda x, w, y: fairseq_lsce(x @ w.T, y),
        "projection, EL chunked": lambda x, w, y: ours(EL, "chunked")(x @ w.T, y),
        "EL fused projection": lambda x, w, y: projected_loss_terms(x, w, y, EL, PAD)[0].loss,
        "CE fused projection": lambda x, w, y: projected_loss_terms(x, w, y, CE, PAD)[0].loss,
    }
    if hasattr(F, "linear_cross_entropy"):
        rows["torch linear_cross_entropy"] = lambda x, w, y: F.linear_cross_entropy(
            x, w, y, reduction="sum", ignore_index=PAD, label_smoothing=0.1
        )
    if device == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            return rows
        rows["Liger fused linear cross entropy"] = lambda x, w, y: liger_fused_linear_cross_entropy(
            x, w, y, ignore_index=PAD, reduction="sum", label_smoothing=0.1
        )
    return rows


def make_input(tokens, vocabulary, dtype, device):
    """Return (logits, features, weight, target) like a half-trained model's: targets have p from near 0 to near 1.

    logits [tokens, vocabulary] are noise of deviation 2 with the target up to 20 above; a tenth of the targets is
    padding. features [tokens, FEATURES] and weight [vocabulary, FEATURES] stand for the same with the projection.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(tokens, vocabulary, generator=generator)
    target = torch.randint(2, vocabulary, (tokens,), generator=generator)
    logits[torch.arange(tokens), target] += 20 * torch.rand(tokens, generator=generator)
    weight = torch.randn(vocabulary, FEATURES, generator=generator) / FEATURES**0.5
    features = torch.randn(tokens, FEATURES, generator=generator) + 20 * torch.rand(tokens, 1) * weight[target]
    target[::10] = PAD
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (logits, features, weight)]
    return *leaves, target.to(device)


class PeakMemory:
    """Measures the peak bytes beyond those at the start of the block: of the process, or of CUDA's allocator."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.before

    @staticmethod
    def _status(field):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def timed(action, device):
    """Return the seconds that `action()` takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(actions, device, repeats, prepare=lambda: None):
    """Return {name: (median seconds, peak extra bytes)} of {name: action}, each run `repeats` times in turn."""
    seconds = {name: [] for name in actions}
    peaks = {}
    for repeat in tqdm(range(repeats + 1), unit="round", leave=False):
        for name, action in actions.items():
            prepare()
            if repeat == 0:  # warm-up: compiles, allocates
                action()
                prepare()
                chunked.release_memory()
                with PeakMemory(device) as peak:
                    action()
                peaks[name] = peak.bytes
            else:
                seconds[name].append(timed(action, device))
    return {name: (statistics.median(values), peaks[name]) for name, values in seconds.items()}


def bench_loss(tokens, vocabulary, dtype, device, repeats):
    """Return the rows for loss and gradient at one size."""
    *leaves, target = make_input(tokens, vocabulary, dtype, device)
    logits, features, weight = leaves

    def forget():
        for leaf in leaves:
            leaf.grad = None

    rows = []
    for group, inputs in ((from_logits(device), (logits,)), (from_features(device), (features, weight))):
        actions = {name: (lambda f=f, i=inputs: f(*i, target).backward()) for name, f in group.items()}
        results = interleaved(actions, device, repeats, forget)
        forget()
        baseline_seconds, baseline_bytes = results[next(iter(group))]
        for name, (seconds, peak) in results.items():
            rows.append(
                {
                    "implementation": name,
                    "tokens": tokens,
                    "vocabulary": vocabulary,
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds": round(1e3 * seconds, 2),
                    "time ratio": round(seconds / baseline_seconds, 3),
                    "extra MiB": round(peak / 2**20, 1),
                    "memory ratio": round(peak / baseline_bytes, 3),
                }
            )
    room = torch.empty_like(logits, requires_grad=False)
    copied = statistics.median(timed(lambda: room.copy_(logits.detach()), device) for _ in range(2 * repeats))
    rows.append(
        {
            "implementation": "roofline: read logits, write gradient",
            "tokens": tokens,
            "vocabulary": vocabulary,
            "dtype": str(dtype).removeprefix("torch."),
            "milliseconds": round(1e3 * copied, 2),
            "time ratio": round(copied / (rows[0]["milliseconds"] / 1e3), 3),
        }
    )
    return rows


MODELS = {
    "transformer_iwslt_de_en": ("transformer_iwslt_de_en", 10000, {}),
    "4+4 layers, 128 wide": (
        "transformer",
        32000,
        {
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_embed_dim": 128,
            "decoder_embed_dim": 128,
            "encoder_ffn_embed_dim": 256,
            "decoder_ffn_embed_dim": 256,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
}


def build(architecture, vocabulary, options):
    """Return (model, sample, {criterion name: criterion}) for whole training steps on random text, made by fairseq."""
    import fairseq.criterions
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    from encourage_mt.plugin import criterion

    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{index}")
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    arguments = argparse.Namespace(
        **options, share_all_embeddings=True, max_source_positions=256, max_target_positions=256
    )
    ARCH_CONFIG_REGISTRY[architecture](arguments)
    torch.manual_seed(0)
    model = ARCH_MODEL_REGISTRY[architecture].build_model(arguments, task).train()
    sentences, length = 80, 25
    source, target = (torch.randint(4, vocabulary, (sentences, length)) for _ in range(2))
    sample = {
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.full((sentences,), length),
            "prev_output_tokens": target.roll(1, dims=1),
        },
        "target": target,
        "ntokens": target.numel(),
    }
    lsce = fairseq.criterions.label_smoothed_cross_entropy.LabelSmoothedCrossEntropyCriterion(task, False, 0.1)
    el = criterion.LabelSmoothedEncouragingLossCriterion
    criteria = {
        "fairseq LSCE": lsce,
        "EL": el(task, False, 0.1),
        "EL reference": el(task, False, 0.1, loss_backend="reference"),
        "CE (bonus none)": el(task, False, 0.1, bonus="none"),
        "EL, fused projection": el(task, False, 0.1, fuse_projection=True),
    }
    return model, sample, criteria


def bench_steps(repeats):
    """Return the rows for whole training steps on CPU (forward, loss, backward, Adam), all with the same model."""
    rows = []
    for name, (architecture, vocabulary, options) in MODELS.items():
        model, sample, criteria = build(architecture, vocabulary, options)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step(criterion, model=model, sample=sample, optimizer=optimizer):
            optimizer.zero_grad()
            loss, sample_size, _ = criterion(model, sample)
            loss.backward()
            optimizer.step()

        results = interleaved({row: (lambda c=c: step(c)) for row, c in criteria.items()}, "cpu", repeats)
        with torch.no_grad():
            logits = model(**sample["net_input"])[0].flatten(0, 1)
        leaf, target = logits.requires_grad_(), sample["target"].flatten()

        def loss_alone(function, leaf=leaf, target=target):
            leaf.grad = None
            function(leaf, target).backward()

        functions = {"fairseq LSCE": fairseq_lsce, "EL": ours(EL, "auto")}
        alone = interleaved({row: (lambda f=f: loss_alone(f)) for row, f in functions.items()}, "cpu", repeats)
        for row, (seconds, _) in results.items():
            rows.append(
                {
                    "implementation": row,
                    "model": name,
                    "vocabulary": vocabulary,
                    "target tokens": sample["ntokens"],
                    "milliseconds": round(1e3 * seconds, 1),
                    "tokens/s ratio": round(results["fairseq LSCE"][0] / seconds, 3),
                    "loss's share of the step": round(alone[row][0] / seconds, 3) if row in alone else None,
                }
            )
    return rows


def as_table(rows):
    """Return the rows as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join('' if row.get(c) is None else str(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run")
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, 10,000 types, few repeats")
    parser.add_argument(
        "--steps", action="store_true", help="time whole training steps (on CPU) instead of the loss alone"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_loss.json"), help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no GPU")
    if args.device == "cuda" and args.steps:
        parser.error("--steps times the CPU; add --device cpu")
    logging.disable(logging.INFO)
    repeats = 3 if args.quick else 7
    if args.steps:
        rows = bench_steps(repeats)
    else:
        sizes = [(2048, 10000)] if args.quick else [(2048, 10000), (2048, 32000), (8192, 10000)]
        dtypes = [torch.float32]
        if args.device == "cuda":
            sizes += [] if args.quick else [(8192, 32000), (8192, 128000)]
            dtypes = [torch.bfloat16, torch.float16]
        rows = [row for size in sizes for dtype in dtypes for row in bench_loss(*size, dtype, args.device, repeats)]
    result = {
        "machine": describe_hardware(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['machine']}, {result['threads']} threads, torch {result['torch']}\n\n{as_table(rows)}\n")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
