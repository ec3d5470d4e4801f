#!/usr/bin/env python3
"""Measure time and memory of the loss and its gradient, compared with fairseq's label-smoothed cross entropy (LSCE).

All rows of a table run in turn in one process; times are medians. On a CPU each table is made twice, because memory
management decides most of the baseline's time: once with freed memory kept by the process, as in our trainings and
under jemalloc, and once with glibc's defaults, which give large blocks back to the kernel and get them zeroed page by
page. Memory is the peak beyond what was in use before, with glibc's defaults. Compare ratios only within one table.
On a GPU, each time is that of ten calls in a row, because one call takes about as long as starting its kernels.
"""

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from fairseq_models import MODELS, build

from encourage_mt.environment import describe_hardware
from encourage_mt.evaluation.formatting import markdown_table
from encourage_mt.loss import chunked
from encourage_mt.loss.functional import loss_terms
from encourage_mt.loss.fused_projection import projected_loss_terms
from encourage_mt.loss.options import LossOptions

EL = LossOptions(label_smoothing=0.1, smoothing_convention="fairseq")
CE = LossOptions(bonus="none", label_smoothing=0.1, smoothing_convention="fairseq")
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1152921504606846976"}
BASELINE = "fairseq LSCE"
ROOFLINE = "roofline: copy the logits once"
TOKENS = {"cpu": 2048, "cuda": 8192}
CALLS = {"cpu": 1, "cuda": 10}  # in one measured time
VOCABULARIES = (6000, 10000, 32000)
SPREADS = (0, 1, 2, 3, 4)
PAD = 1
FEATURES = 512
SECONDS = 1  # for each row, after at least RUNS runs; no row runs more often than --repeats
RUNS = 5


def fairseq_lsce(logits, target):
    """Return what fairseq's LabelSmoothedCrossEntropyCriterion computes from logits."""
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    return label_smoothed_nll_loss(log_probs, target, 0.1, ignore_index=PAD)[0]


def ours(options, backend):
    return lambda logits, target: loss_terms(logits, target, options, PAD, backend=backend).loss


def from_logits(device):
    """Return {row: (logits, target) -> loss}; the first row is the baseline."""
    fast = "triton" if device == "cuda" else "native"
    rows = {BASELINE: fairseq_lsce, f"EL {fast}": ours(EL, fast), f"CE {fast}": ours(CE, fast)}
    rows |= {"EL chunked": ours(EL, "chunked"), "EL reference": ours(EL, "reference")}
    if device == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError:
            return rows
        rows["Liger cross entropy, with a copy of the logits"] = lambda logits, target: liger_cross_entropy(
            logits.clone(), target, ignore_index=PAD, reduction="sum", label_smoothing=0.1
        )  # the clone is there because it overwrites the logits
    return rows


def from_features():
    """Return {row: (features, weight, target) -> loss}, with the output projection; the first row is the baseline."""
    rows = {
        f"projection, {BASELINE}": lambda x, w, y: fairseq_lsce(x @ w.T, y),
        "projection, EL": lambda x, w, y: ours(EL, "auto")(x @ w.T, y),
        "EL, fused projection": lambda x, w, y: projected_loss_terms(x, w, y, EL, PAD)[0].loss,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        of_torch = functools.partial(F.linear_cross_entropy, reduction="sum", ignore_index=PAD)
        options = torch.nn.LinearCrossEntropyOptions()  # its chunks; it has them without label smoothing only
        rows["torch linear_cross_entropy, not chunked"] = functools.partial(of_torch, label_smoothing=0.1)
        rows["torch linear_cross_entropy, chunked (options=...), no smoothing"] = functools.partial(
            of_torch, options=options
        )
    return rows


def make_target(vocabulary, device):
    target = torch.randint(2, vocabulary, (TOKENS[device],), generator=torch.Generator().manual_seed(0))
    target[::10] = PAD
    return target.to(device)


def make_logits(vocabulary, spread, target):
    """Return logits [tokens, vocabulary]: noise of deviation `spread`, the target up to 20 above it if spread is 2."""
    generator = torch.Generator().manual_seed(1)
    tokens = len(target)
    logits = spread * torch.randn(tokens, vocabulary, generator=generator)
    if spread == 2:
        logits[torch.arange(tokens), target.cpu()] += 20 * torch.rand(tokens, generator=generator)
    return logits.to(target.device)


def train_logits(vocabulary):
    """Return logits [tokens, vocabulary] and targets of a small model, trained here on a made-up language.

    The next word is a function of the present one, or, one time in four, drawn from Zipf's distribution.
    """
    torch.manual_seed(0)
    tokens = TOKENS["cpu"]
    zipf = 1 / torch.arange(1, vocabulary - 1).float()
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary, 128), torch.nn.Linear(128, vocabulary))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    successors = torch.randperm(vocabulary - 2) + 2
    for _ in range(60):
        words = torch.multinomial(zipf, tokens, replacement=True)
        drawn = torch.multinomial(zipf, tokens, replacement=True) + 2
        target = torch.where(torch.rand(tokens) < 0.25, drawn, successors[words])
        optimizer.zero_grad()
        logits = model(words)
        F.cross_entropy(logits, target, label_smoothing=0.1).backward()
        optimizer.step()
    return logits.detach(), target


def peak_bytes(action, device):
    """Return the peak bytes during action() beyond those before it: of the allocator (CUDA) or the process (CPU)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak back to the present size
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def seconds_of(action, device, reset):
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    for _ in range(CALLS[device] - 1):
        reset()
        action()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / CALLS[device]


def interleave(actions, device, repeats, reset=lambda: None):
    """Return {name: (median seconds, peak bytes)} of {name: action}; the actions run in turn."""
    seconds = {name: [] for name in actions}
    peaks = {}
    for name, action in actions.items():  # warm up
        reset()
        action()
        reset()
        chunked.release_memory()
        peaks[name] = peak_bytes(action, device)
    for _ in range(repeats):
        for name, action in actions.items():
            if len(seconds[name]) < RUNS or sum(seconds[name]) < SECONDS:
                reset()
                seconds[name].append(seconds_of(action, device, reset))
    return {name: (statistics.median(values), peaks[name]) for name, values in seconds.items()}


def measure(functions, inputs, target, device, repeats, others=None):
    """Return {row: (seconds, peak bytes)}: loss and gradient of each function of (*inputs, target), and `others`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def reset():
        for leaf in leaves:
            leaf.grad = None

    actions = {name: (lambda f=f: f(*leaves, target).backward()) for name, f in functions.items()}
    return interleave(actions | (others or {}), device, repeats, reset)


def bench_sizes(dtypes, device, memory, repeats, quick):
    """Return rows of all implementations for each size."""
    rows = []
    for vocabulary in VOCABULARIES[:1] if quick else VOCABULARIES:
        for dtype in dtypes:
            target = make_target(vocabulary, device)
            logits = make_logits(vocabulary, 2, target).to(dtype)
            size = {"vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
            buffer = torch.empty_like(logits)
            copy = {ROOFLINE: functools.partial(buffer.copy_, logits)}
            functions = from_logits(device)
            validation = {
                f"{name}, no gradient": functools.partial(functions[name], logits, target)
                for name in list(functions)[:2]
            }
            results = measure(functions, [logits], target, device, repeats, copy | validation)
            for names in (functions | copy, validation):
                rows += as_rows({name: results[name] for name in names}, size, memory, results[ROOFLINE][0])
            del logits, buffer, copy, validation
            torch.manual_seed(2)
            weight = (torch.randn(vocabulary, FEATURES) / FEATURES**0.5).to(device, dtype)
            features = torch.randn(len(target), FEATURES).to(device, dtype)
            results = measure(from_features(), [features, weight], target, device, repeats)
            rows += as_rows(results, size, memory)
    return rows


def as_rows(results, size, memory, copied=None):
    """Return a row for each result; the first is the baseline of `time / LSCE`."""
    baseline = next(iter(results.values()))
    return [
        {
            "implementation": name,
            **size,
            "ms": round(1e3 * seconds, 2),
            "time / LSCE": round(seconds / baseline[0], 2),
            "time / copy": round(seconds / copied, 2) if copied else None,
            "extra MiB": round(peak / 2**20) if memory == "default" and name != ROOFLINE else None,
        }
        for name, (seconds, peak) in results.items()
    ]


def bench_spreads(repeats, quick):
    """Return rows of one size for logits of several spreads and of a trained model."""
    vocabulary = VOCABULARIES[0]
    target = make_target(vocabulary, "cpu")
    cases = {f"noise of deviation {spread}": (make_logits(vocabulary, spread, target), target) for spread in SPREADS}
    if not quick:
        cases["a trained model"] = train_logits(vocabulary)
    functions = {BASELINE: fairseq_lsce, "EL native": ours(EL, "native"), "EL chunked": ours(EL, "chunked")}
    actions, leaves = {}, []
    for case, (logits, labels) in cases.items():
        leaf = logits.requires_grad_()
        leaves.append(leaf)
        for name, function in functions.items():
            actions[case, name] = lambda f=function, x=leaf, y=labels: f(x, y).backward()

    def reset():
        for leaf in leaves:
            leaf.grad = None

    results = interleave(actions, "cpu", 2 * repeats, reset)
    return [
        {
            "logits": case,
            **{f"{name}, ms": round(1e3 * results[case, name][0], 2) for name in functions},
            "native / LSCE": round(results[case, "EL native"][0] / results[case, BASELINE][0], 2),
        }
        for case in cases
    ]


@contextmanager
def busy_cores(processes=2):
    """Keep `processes` other processes computing during the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def bench_busy(repeats, quick):
    """Return rows for each size while two other processes keep the cores busy."""
    rows = []  # without chunked: its thousands of barriers take minutes here
    functions = {BASELINE: fairseq_lsce, "EL native": ours(EL, "native")}
    for vocabulary in VOCABULARIES[:1] if quick else VOCABULARIES:
        target = make_target(vocabulary, "cpu")
        logits = make_logits(vocabulary, 2, target)
        with busy_cores():
            results = measure(functions, [logits], target, "cpu", 2 * repeats)
        rows += as_rows(results, {"vocabulary": vocabulary}, "kept")
    return rows


def bench_steps(device, repeats, quick):
    """Return rows of training steps: forward, loss, backward, Adam; the model is in float32, on a GPU in bfloat16."""
    rows = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, (architecture, vocabulary, options) in list(MODELS.items())[: 1 if quick else None]:
        model, sample, criteria = build(architecture, vocabulary, options, device, dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step(criterion, model=model, sample=sample, optimizer=optimizer):
            optimizer.zero_grad()
            criterion(model, sample)[0].backward()
            optimizer.step()

        results = interleave({row: (lambda c=c: step(c)) for row, c in criteria.items()}, device, repeats)
        with torch.no_grad():
            logits = model(**sample["net_input"])[0].flatten(0, 1)
        functions = {BASELINE: fairseq_lsce, "EL": ours(EL, "auto"), "EL chunked": ours(EL, "chunked")}
        alone = measure(functions, [logits], sample["target"].flatten(), device, repeats)
        for row, (seconds, _) in results.items():
            rows.append(
                {
                    "implementation": row,
                    "model": name,
                    "vocabulary": vocabulary,
                    "ms": round(1e3 * seconds, 1),
                    "tokens/s / LSCE's": round(results[BASELINE][0] / seconds, 3),
                    "share of the loss in the step": round(alone[row][0] / seconds, 3) if row in alone else None,
                }
            )
    return rows


def as_table(rows):
    """Return rows as a Markdown table, without columns that are empty."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if any(r.get(name) for r in rows)]
    return markdown_table(columns, [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows])


TABLES = ("sizes", "spreads", "busy", "steps")


def rows_of(table, args, memory):
    if table == "sizes":
        dtypes = [torch.bfloat16, torch.float16] if args.device == "cuda" else [torch.float32]
        return bench_sizes(dtypes, args.device, memory, args.repeats, args.quick)
    if table == "steps":
        return bench_steps(args.device, args.repeats, args.quick)
    return {"spreads": bench_spreads, "busy": bench_busy}[table](args.repeats, args.quick)


def in_new_process(args, table, memory):
    """Return the rows of a table made by this script in a process with the settings of `memory`."""
    environment = {name: value for name, value in os.environ.items() if name not in KEPT}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        argv = [sys.executable, __file__, "--tables", table, "--memory", memory, "--device", args.device]
        argv += ["--repeats", str(args.repeats), "--output", output.name, *(["--quick"] if args.quick else [])]
        environment |= KEPT if memory == "kept" else {}
        subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.load(output)["tables"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run")
    text = "sizes: all implementations; spreads: logits of several kinds; busy: two other processes keep the cores "
    text += "busy; steps: training steps; spreads and busy run on a CPU"
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["sizes"], help=text)
    text = "whether the process keeps freed memory (kept), or glibc's defaults apply (default); CPU only"
    parser.add_argument("--memory", choices=("both", "kept", "default"), default="both", help=text)
    parser.add_argument("--repeats", type=int, default=15, help="maximum number of runs per row")
    parser.add_argument("--quick", action="store_true", help="measure only the smallest size")
    parser.add_argument("--output", type=Path, default=Path("bench_loss.json"), help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")
    if args.device == "cuda" and not set(args.tables) <= {"sizes", "steps"}:
        parser.error("--tables: only sizes and steps run on a GPU; add --device cpu for the others")
    logging.getLogger("encourage_mt").setLevel(logging.WARNING)
    memories = ("kept", "default") if args.memory == "both" else (args.memory,)
    tables = {}
    for table in args.tables:
        for memory in memories if args.device == "cpu" else ("default",):
            wanted = [value if memory == "kept" else None for value in KEPT.values()]
            if args.device == "cuda" or [os.environ.get(name) for name in KEPT] == wanted:
                made = {f"{table}, {memory} memory": rows_of(table, args, memory)}
            else:
                made = in_new_process(args, table, memory)
            tables |= made
            for name, rows in made.items():
                print(f"\n{name}\n\n{as_table(rows)}", flush=True)
    result = {
        "machine": describe_hardware(args.device),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "tokens": TOKENS[args.device],
        "tables": tables,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{result['machine']}, {result['threads']} threads, torch {result['torch']}; wrote {args.output}")


if __name__ == "__main__":
    main()
