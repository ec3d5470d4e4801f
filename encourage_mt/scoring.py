"""From a trained run to scores: average, translate with beam search, score detokenized text with sacreBLEU."""

import json
import math
import os
import platform
import re
import shlex
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import torch
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

from .averaging import average, last_checkpoints
from .bitext import read_lines
from .commands import USER_DIR, cores, failure, resolve
from .errors import UserError
from .prepare import data_checksum
from .recipe import Recipe
from .training import Run, summary


def evaluate(run: Run, recipe: Recipe, data: Path) -> dict:
    """Scores of `run` on the test sets of `recipe`, as kept in its scores.json; what is there is not made again."""
    path = run.folder / "scores.json"
    settings = {
        "averaged_checkpoints": recipe.average,
        "beam": recipe.beam,
        "lenpen": recipe.lenpen,
        "data_sha256": data_checksum(data),
    }
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if all(result[name] == value for name, value in settings.items()) and list(result["scores"]) == recipe.tests:
            print(f"{run.folder.name}: scored already")
            return result
    averaged = run.folder / "average.pt"
    average(last_checkpoints(run.checkpoints, recipe.average), averaged)
    scores = {}
    for index, test in enumerate(recipe.tests):
        references = read_lines(data / "text" / f"{test}.{recipe.target}")
        hypotheses = run.folder / f"{test}.{recipe.target}"
        translate(averaged, data, f"test{index or ''}", recipe, hypotheses, len(references))
        scores[test] = score(read_lines(hypotheses), references)
    result = {
        "arm": run.arm,
        "recipe": recipe.name,
        "command": shlex.join(run.command),
        **settings,
        "scores": scores,
        **summary(run),
        "machine": machine(),
        "versions": {
            package.metadata["Name"]: package.version
            for package in distributions()
            if package.metadata["Name"]
            in ("encourage-mt", "fairseq", "fairseq-fixed", "torch", "sacrebleu", "sentencepiece")
        },
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return result


def translate(checkpoint: Path, data: Path, subset: str, recipe: Recipe, output: Path, expected: int) -> None:
    """Translate a binarized subset into the text file `output`, one line per source line, subwords undone.

    Raises UserError if fairseq-generate fails or leaves sentences out.
    """
    command = ["fairseq-generate", str(data / "data-bin"), "--user-dir", str(USER_DIR), "--path", str(checkpoint)]
    command += ["--source-lang", recipe.source, "--target-lang", recipe.target, "--gen-subset", subset]
    command += ["--beam", str(recipe.beam), "--lenpen", str(recipe.lenpen), "--max-tokens", "8000"]
    command += ["--remove-bpe", "sentencepiece", "--num-workers", "0", "--no-progress-bar"]
    # with its default of 8, fairseq drops the last batch whenever its size is no multiple of it
    command += ["--required-batch-size-multiple", "1"]
    log = output.with_name(f"{output.name}.generate.log")
    hypotheses = {}
    bar = tqdm(total=expected, desc=f"{output.parent.name} {output.stem}", unit="sentence", mininterval=1)
    with open(log, "w", encoding="utf-8", buffering=1) as out, bar:  # by lines, in order with the errors
        process = subprocess.Popen(
            resolve(command), stdout=subprocess.PIPE, stderr=out, stdin=subprocess.DEVNULL, encoding="utf-8"
        )
        for line in process.stdout:
            out.write(line)
            match = re.match(r"D-(\d+)\t[^\t]+\t(.*)", line)
            if match:
                hypotheses[int(match.group(1))] = match.group(2)
                bar.update()
    if process.wait():
        raise UserError(failure("fairseq-generate", process.returncode, log))
    if sorted(hypotheses) != list(range(expected)):
        raise UserError(f"{subset}: {len(hypotheses)} of {expected} sentences were translated (log: {log})")
    partial = output.with_name(output.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(hypotheses[index] + "\n" for index in range(expected))
    os.replace(partial, output)


def score(hypotheses: "list[str]", references: "list[str]") -> dict:
    """Corpus BLEU and chrF of detokenized, cased text, each with its sacreBLEU signature."""
    result = {}
    for metric in (BLEU(), CHRF()):
        value = metric.corpus_score(hypotheses, [references]).score
        if math.isnan(value):
            raise UserError("a score is not a number")
        result[type(metric).__name__] = {"score": value, "signature": str(metric.get_signature())}
    return result


def machine(device: str = "") -> str:
    """What the figures were made on, in words: the GPU if there is one, unless `device` is cpu."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        model = match.group(1) if match else model
    return f"CPU, {cores()} cores ({model})"


def table(results: "list[dict]") -> str:
    """Results as a Markdown table, one row per run and test set, signatures beneath."""
    rows = ["| arm | test set | BLEU | chrF | target tokens/s | training time |", "|---|---|---|---|---|---|"]
    signatures = {}
    for result in results:
        for test, scores in result["scores"].items():
            minutes, seconds = divmod(round(result["train_seconds"]), 60)
            figures = [f"{scores[name]['score']:.2f}" for name in ("BLEU", "CHRF")]
            signatures.update({name: scores[name]["signature"] for name in scores})
            speed = f"{result['target_tokens_per_second']:,.0f}"
            rows.append(f"| {result['arm']} | {test} | {' | '.join(figures)} | {speed} | {minutes}:{seconds:02d} |")
    names = {"BLEU": "BLEU", "CHRF": "chrF"}
    rows += ["", *(f"{names[name]} signature: `{signature}`" for name, signature in signatures.items())]
    return "\n".join(rows)
