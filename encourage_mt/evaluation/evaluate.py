"""From a trained run to scores.json: average checkpoints, translate with beam search, detokenize, score."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.bitext import read_lines
from ..data.prepare import data_checksum
from ..data.subwords import restore_bytes
from ..data.tokenization import detokenize
from ..environment import USER_DIR, describe_hardware, versions
from ..errors import UserError
from ..files import file_hash, read_json, write_json
from ..plugin.checkpoints import last_checkpoints, load_checkpoint
from ..processes import describe_failure, start
from ..recipe import TOKENIZED_BLEU
from ..training.run_folder import Run, mapping, options_of, read_log, training_settings
from . import scoring
from .averaging import average


def evaluate(run: Run, comet: Path | None = None) -> dict:
    """Scores of `run` on valid and the test sets, as kept in its scores.json; what is there is not made again.

    Leaves average.pt and one detokenized translation a set (SPLIT.LANG) beside it. Raises UserError if checkpoints
    are missing or damaged, or the data is not what the model was trained on.
    """
    path = run.folder / "scores.json"
    paths = last_checkpoints(run.checkpoints, run.average)
    settings = {
        "average": run.average,
        "beam": run.beam,
        "lenpen": run.lenpen,
        "comet": scoring.comet_signature(comet) if comet else None,
        "data_sha256": data_checksum(run.data),
        "checkpoints_sha256": {path.name: file_hash(path) for path in paths},
    }
    if run.provenance.get("data_sha256") not in (None, settings["data_sha256"]):
        raise UserError(f"{run.data}: not the data that {run.name} was trained on, its checksum differs")
    if path.exists():
        result = read_json(path)
        if result.get("evaluation") == settings:
            print(f"{run.name}: scored already")
            return result
    text = read_json(run.data / "manifest.json")["text"]
    averaged = run.folder / "average.pt"
    state = load_checkpoint(paths[-1])
    check_dictionary(run.data, text, state)
    with options_of(paths[-1]):
        training, criterion = training_settings(state), dict(mapping(state["cfg"]["criterion"]))
    del state  # one checkpoint at a time is held
    average(paths, averaged)
    path.unlink(missing_ok=True)  # what it tells of is replaced from here on
    scores = {}
    for split, subset in subsets(text).items():
        lines = translate(run, averaged, split, subset, text)
        scores[split] = score(run, split, lines, text, comet)
    result = {
        "name": run.name,
        "recipe": run.recipe,
        "arm": run.arm,
        "seed": run.seed,
        "command": shlex.join(
            ["fairseq-train"] + [w for n, v in run.options.items() for w in [f"--{n}"] + [str(v)] * (v is not True)]
        ),
        "criterion": criterion,
        "evaluation": settings,
        "scores": scores,
        "training": training,
        **speed(run.log),
        "machine": describe_hardware(),
        "versions": versions(),
        "provenance": run.provenance,
    }
    write_json(path, result)
    return result


def subsets(text: dict) -> dict[str, str]:
    """{split: name of its binarized subset}: valid, and the test sets as test, test1, ..."""
    return {"valid": "valid", **{split: f"test{number or ''}" for number, split in enumerate(text["tests"])}}


def check_dictionary(data: Path, text: dict, state: dict) -> None:
    """Raises UserError if the data's dictionaries do not have the sizes of the model's embeddings."""
    for side, language in (("encoder", text["source"]), ("decoder", text["target"])):
        path = data / "data-bin" / f"dict.{language}.txt"
        with open(path, encoding="utf-8") as lines:
            types = sum(1 for _ in lines) + 4  # fairseq adds <s>, <pad>, </s>, <unk>
        embedded = state["model"].get(f"{side}.embed_tokens.weight")
        if embedded is not None and embedded.size(0) != types:
            raise UserError(f"{path}: {types} types, the model has {embedded.size(0)}: it was trained on other data")


def translate(run: Run, checkpoint: Path, split: str, subset: str, text: dict) -> list[str]:
    """Translations of a binarized subset, subwords undone, in the order of the source; kept in SPLIT.LANG.

    SPLIT.LANG is detokenized; where the data is tokenized, SPLIT.tok.LANG has what the model wrote, which is what is
    returned. Raises UserError if fairseq-generate fails or leaves sentences out.
    """
    command = ["fairseq-generate", str(run.data / "data-bin"), "--user-dir", str(USER_DIR), "--path", str(checkpoint)]
    command += ["--source-lang", text["source"], "--target-lang", text["target"], "--gen-subset", subset]
    command += ["--beam", str(run.beam), "--lenpen", str(run.lenpen), "--max-tokens", "8000"]
    command += ["--remove-bpe", text["remove_bpe"], "--num-workers", "0", "--no-progress-bar"]
    # with its default of 8, fairseq drops the last batch whenever its size is no multiple of it
    command += ["--required-batch-size-multiple", "1"]
    expected = text["lines"][split]
    log = run.folder / f"{split}.generate.log"
    hypotheses = {}
    bar = tqdm(total=expected, desc=f"{run.name} {split}", unit="sentence", mininterval=1)
    with open(log, "w", encoding="utf-8", buffering=1) as out, bar:  # by lines, in order with the errors
        process = start(command, stdout=subprocess.PIPE, stderr=out, encoding="utf-8")
        for line in process.stdout:
            out.write(line)
            match = re.match(r"D-(\d+)\t[^\t]+\t(.*)", line)
            if match:
                hypotheses[int(match.group(1))] = match.group(2)
                bar.update()
    if process.wait():
        raise UserError(describe_failure("fairseq-generate", process.returncode, log))
    if sorted(hypotheses) != list(range(expected)):
        raise UserError(f"{split}: {len(hypotheses)} of {expected} sentences were translated (log: {log})")
    lines = [hypotheses[index] for index in range(expected)]
    if text["byte_fallback"]:
        lines = list(map(restore_bytes, lines))
    if text["tokenizer"] == "none":
        write_lines(run.folder / f"{split}.{text['target']}", lines)
    else:
        write_lines(run.folder / f"{split}.tok.{text['target']}", lines)
        write_lines(run.folder / f"{split}.{text['target']}", detokenize(lines, text["target"]))
    return lines


def score(run: Run, split: str, lines: list[str], text: dict, comet: Path | None) -> dict:
    """All scores of one set: of the detokenized text against the raw references, and of the tokenized text `lines`."""
    references = read_lines(run.data / "text" / f"{split}.{text['target']}")
    hypotheses = read_lines(run.folder / f"{split}.{text['target']}")
    result = scoring.score(hypotheses, references, text["target"], text["lowercase"])
    if text["tokenizer"] != "none":
        tokenized = read_lines(run.data / "tokenized" / f"{split}.{text['target']}")
        result[TOKENIZED_BLEU] = scoring.tokenized_bleu(lines, tokenized)
    if comet:
        sources = read_lines(run.data / "text" / f"{split}.{text['source']}")
        result["COMET"] = scoring.comet(comet, sources, hypotheses, references, torch.cuda.device_count())
    return result


def write_lines(path: Path, lines: list[str]) -> None:
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(line + "\n" for line in lines)
    os.replace(partial, path)


def speed(log: Path) -> dict:
    """{"target_tokens_per_second": mean over epochs, "train_seconds": time in updates}; empty without a log."""
    epochs = [record for record in read_log(log) if "train_loss" in record]
    if not epochs:
        return {}
    rates = [float(record["train_wps"]) for record in epochs]
    return {
        "target_tokens_per_second": round(sum(rates) / len(rates), 1),
        "train_seconds": sum(float(record["train_train_wall"]) for record in epochs),
    }


def evaluated_checkpoint(run: Run) -> Path:
    """The averaged checkpoint that was scored. Raises UserError if it is gone or the run is not evaluated."""
    path = run.folder / "average.pt"
    if not (path.exists() and (run.folder / "scores.json").exists()):
        raise UserError(f"{run.folder}: no average.pt with scores.json; bash scripts/evaluate.sh {run.folder}")
    return path
