#!/usr/bin/env python3
"""Measure pairs per second and peak memory of the preparation of data, stage by stage, on generated pairs.

The published (Moses) pipeline is compared with sacremoses line by line, followed by subword-nmt, in one process; the
output must be identical. On a shared machine, compare only ratios within one table.

The pairs come from examples/bundled_de_en/grammar.py. Their words get Zipf-distributed prefixes, so that the vocabulary
grows with the text, as it does in real text.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sacremoses import MosesTokenizer
from subword_nmt.apply_bpe import BPE
from tqdm import tqdm

from encourage_mt.data import subwords
from encourage_mt.data.bitext import iterate_pairs
from encourage_mt.data.stages import EncodeStage, TextStage, drop_reason, ordered_map
from encourage_mt.environment import cores, describe_hardware
from encourage_mt.recipe import Clean, Recipe, modern_subword

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "bundled_de_en"))
import grammar  # noqa: E402

CLEAN = Clean(max_length=175, max_ratio=1.5, unit="tokens")
PUBLISHED = {"tokenizer": "moses", "lowercase": True, "clean": CLEAN, "subword": {"merges": 10000}}
MODERN = {"clean": Clean(max_length=250, max_ratio=3), "subword": modern_subword(10000)}
BASE_PAIRS = 20_000  # from the grammar, which is slow; they are respelled again and again
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ei", "au")]


def generate(number):
    """Yield `number` pairs, the same every time."""
    rng = random.Random(1)
    base = grammar.generate(1, {"all": BASE_PAIRS})["all"]

    def respell(sentence):
        words = sentence.split(" ")
        for index in range(0, len(words), 4):  # a quarter of the words, so that new ones keep coming
            word = words[index]
            rank = int(rng.paretovariate(0.7))
            while rank and len(word) < 40:
                rank, syllable = divmod(rank, len(SYLLABLES))
                word = SYLLABLES[syllable] + word
            words[index] = word
        return " ".join(words)

    for _, pair in zip(range(number), itertools.cycle(base)):
        yield respell(pair[0]), respell(pair[1])


class Memory:
    """Measures the peak resident memory, in MB, of this process and its children while the block runs."""

    def __enter__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.2):
            self.peak = max(self.peak, sum(map(_resident, [Path("/proc/self"), *_children()])))

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def _children():
    task = Path("/proc/self/task")
    pids = [pid for thread in task.iterdir() for pid in (thread / "children").read_text().split()]
    return [Path("/proc") / pid for pid in pids]


def _resident(process):
    """Return the private memory of a process and its share of memory shared with others, in MB."""
    try:
        text = (process / "smaps_rollup").read_text()
    except OSError:  # the process has ended
        return 0
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:"))) / 1024


def line_by_line(pairs, prefix):
    """Run sacremoses, the cleaning rule and subword-nmt in one process, as the published scripts do in Perl."""
    tokenizers = [MosesTokenizer("de"), MosesTokenizer("en")]
    with open(f"{prefix}.codes", encoding="utf-8") as codes:
        bpe = BPE(codes)
    for pair in pairs:
        tokens = [t.tokenize(line, return_str=True).lower() for t, line in zip(tokenizers, pair, strict=True)]
        if not drop_reason(*(len(side.split()) for side in tokens), CLEAN):
            yield 1, [bpe.process_line(side) + "\n" for side in tokens]


def tokenized(recipe, pairs, workers):
    """Yield the pairs that are kept."""
    for _, rows in ordered_map(TextStage(recipe, is_train=True), pairs, workers):
        yield from ((source, target) for reason, source, target in rows if not reason)


def encoded(recipe, pairs, prefix, workers):
    clean = Clean() if recipe.tokenizer == "moses" else recipe.clean
    stage = EncodeStage(recipe.subword.options, prefix, clean, recipe.subword.byte_fallback)
    for chunk, result in ordered_map(stage, pairs, workers):
        yield len(chunk), result.text


def time_row(name, blocks, number, rows, write_to):
    """Write `blocks` of (pairs read, text of both sides) to a file for each side, and add a row to the table."""
    with ExitStack() as files:
        memory = files.enter_context(Memory())
        out = [files.enter_context(open(f"{write_to}.{s}", "w", encoding="utf-8", newline="\n")) for s in "ab"]
        bar = files.enter_context(tqdm(desc=name, total=number, unit=" pairs", unit_scale=True, mininterval=1))
        started, used = time.perf_counter(), cpu_seconds()
        for count, texts in blocks:
            for file, text in zip(out, texts, strict=True):
                file.write(text)
            bar.update(count)
        seconds, used = time.perf_counter() - started, cpu_seconds() - used
    row = {"stage": name, "pairs": number, "pairs_per_second": number / seconds}
    rows.append({**row, "cpu_us_per_pair": used / number * 1e6, "peak_mb": memory.peak})


def cpu_seconds():
    """Return the CPU time of this process and of its children that have ended."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def lines_of(pairs):
    return ((1, [side + "\n" for side in pair]) for pair in pairs)


def pairs_of(path):
    return iterate_pairs([Path(f"{path}.{side}") for side in "ab"], [1, 2], [])


def measure(number, baseline_number, workers, folder):
    """Return the rows of the table, and counts of the text. The slow baseline runs on the first `baseline_number`."""
    rows = []
    raw = folder / "raw"
    time_row("generating", lines_of(generate(number)), number, [], raw)
    rest = {
        "name": "bench",
        "source": "de",
        "target": "en",
        "data": {split: [f"{split}.de", f"{split}.en"] for split in ("train", "valid", "test")},
        "train": {"max-tokens": 1000, "max-epoch": 10},
        "arms": {"ce": {"criterion": "cross_entropy"}},
    }
    published, modern = (Recipe.model_validate({**options, **rest}) for options in (PUBLISHED, MODERN))
    learned_on = min(number, 100_000)
    subwords.learn(
        tokenized(published, itertools.islice(pairs_of(raw), learned_on), 1),
        learned_on,
        published.subword.options,
        folder / "published",
    )
    subwords.learn(itertools.islice(pairs_of(raw), learned_on), learned_on, modern.subword.options, folder / "modern")

    first = list(itertools.islice(pairs_of(raw), baseline_number))
    time_row("sacremoses, subword-nmt", line_by_line(first, folder / "published"), len(first), rows, folder / "slow")
    for count in dict.fromkeys((1, workers)):
        label = f"{count} process" + "es" * (count > 1)
        both = encoded(published, tokenized(published, first, count), folder / "published", count)
        time_row(f"published, the same pairs, {label}", both, len(first), rows, folder / f"fast{count}")
        if any((folder / f"fast{count}.{s}").read_bytes() != (folder / f"slow.{s}").read_bytes() for s in "ab"):
            raise SystemExit("error: the output differs from the output of sacremoses and subword-nmt")
    label = f"{workers} processes"
    steps = [
        (f"published: tokenize, clean, {label}", lines_of(tokenized(published, pairs_of(raw), workers)), "tokens"),
        (
            f"published: encode, {label}",
            encoded(published, pairs_of(folder / "tokens"), folder / "published", workers),
            "pieces",
        ),
        (f"modern: text, {label}", lines_of(tokenized(modern, pairs_of(raw), workers)), "text"),
        (
            f"modern: encode, clean, {label}",
            encoded(modern, pairs_of(folder / "text"), folder / "modern", workers),
            "out",
        ),
    ]
    for name, pairs, file in steps:
        time_row(name, pairs, number, rows, folder / file)
    types = Counter(word for pair in pairs_of(folder / "tokens") for side in pair for word in side.split())
    return rows, {"tokens": sum(types.values()), "types": len(types)}


def table(rows):
    """Return the rows as a Markdown table."""
    base = rows[0]["pairs_per_second"]
    lines = ["| stage | pairs | pairs/s | times the first row | CPU µs a pair | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row['pairs']:,} | {row['pairs_per_second']:,.0f} | {row['pairs_per_second'] / base:.1f}"
        lines.append(f"| {row['stage']} | {figures} | {row['cpu_us_per_pair']:.0f} | {row['peak_mb']:,.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=500_000, help="number of pairs to generate")
    parser.add_argument("--baseline-pairs", type=int, default=50_000, help="number of pairs for the slow first row")
    parser.add_argument("--workers", type=int, default=cores(), help="number of processes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, text = measure(arguments.pairs, arguments.baseline_pairs, arguments.workers, Path(folder))
    print(f"{describe_hardware('cpu')}; {text['tokens']:,} tokens, {text['types']:,} types\n\n{table(rows)}")
    if arguments.json:
        content = {"machine": describe_hardware("cpu"), **text, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
