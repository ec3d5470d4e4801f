#!/usr/bin/env python3
"""Measure how fast fairseq and CTranslate2 (float32, int8) translate a test set of an evaluated run, and their BLEU.

Each engine runs in a process of its own, with the code and options of `encourage-mt evaluate`. Start-up (imports and
loading the model) and the conversion for CTranslate2 are measured separately. If other programs use the machine,
compare CPU seconds only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TYPES = {"fairseq": "float32", "ctranslate2 float32": "float32", "ctranslate2 int8": "int8"}
MARK = "benchmark mark:"  # begins a line with the time and the CPU seconds of this process so far


def mark():
    print(MARK, time.monotonic(), time.process_time(), flush=True)


def run_fairseq(words):
    """Run fairseq-generate in this process; print marks when everything is loaded and at the end."""
    from fairseq.tasks.fairseq_task import FairseqTask
    from fairseq_cli import generate

    build_generator = FairseqTask.build_generator

    def mark_and_build(*args, **options):  # fairseq builds it last
        mark()
        return build_generator(*args, **options)

    FairseqTask.build_generator = mark_and_build
    sys.argv = words
    generate.cli_main()
    mark()


def run_ctranslate2(folder, threads, beam, lenpen, remove_bpe):
    """Translate the sources in folder/sources.json in this process; print lines and marks as fairseq-generate does."""
    from encourage_mt.data.subwords import join_pieces
    from encourage_mt.evaluation import converted_model

    model = converted_model.load_model(Path(folder) / "model", "cpu", int(threads))
    sources = json.loads((Path(folder) / "sources.json").read_text(encoding="utf-8"))
    mark()
    for index, (best,) in enumerate(converted_model.translate_pieces(model, sources, int(beam), float(lenpen))):
        print(f"D-{index}\t{best.score}\t{join_pieces(best.pieces, remove_bpe)}")
    mark()


def measure(engine, run, split, threads, folder):
    """Return a row of the table and the translations of `engine`."""
    from encourage_mt.evaluation import converted_model, engines, evaluate

    data, row = run.prepared(), {"engine": engine}
    if engine == "fairseq":
        command = ["fairseq", *engines.generate_command(run, data, run.folder / "average.pt", [split]), "--cpu"]
    else:
        before = os.times()
        converted_model.convert_checkpoint(
            run.folder / "average.pt", data, folder / "model", folder / "log", quantization=TYPES[engine]
        )
        row["conversion_cpu_seconds"] = cpu_seconds(os.times()) - cpu_seconds(before)
        (folder / "sources.json").write_text(json.dumps(engines.read_pieces(data, split)), encoding="utf-8")
        command = ["ctranslate2", folder, threads, run.beam, run.lenpen, data.remove_bpe]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    marks = [list(map(float, values)) for values in re.findall(rf"^{MARK} (\S+) (\S+)$", done.stdout, re.MULTILINE)]
    (loaded, loaded_cpu), (end, end_cpu) = marks
    texts = {int(index): text for index, text in re.findall(r"^D-(\d+)\t[^\t]+\t(.*)$", done.stdout, re.MULTILINE)}
    lines = evaluate.write_translation([texts[index] for index in range(data.lines[split])], data, split, folder)
    row |= {
        "start_seconds": loaded - started,
        "start_cpu_seconds": loaded_cpu,
        "seconds": end - loaded,
        "cpu_seconds": end_cpu - loaded_cpu,
        "sentences_per_second": len(lines) / (end - loaded),
        "sacreBLEU": evaluate.score(lines, data, split, folder, None)["sacreBLEU"].score,
    }
    return row, lines


def cpu_seconds(times):
    return times.children_user + times.children_system


def table(rows):
    """Return the rows as a Markdown table."""
    base = rows[0]["cpu_seconds"]
    lines = ["| engine | sentences/s | CPU s | times the first row | start-up, CPU s | conversion, CPU s | sacreBLEU |"]
    lines[0] += " the same lines |"
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for row in rows:
        conversion = f"{row['conversion_cpu_seconds']:.1f}" if "conversion_cpu_seconds" in row else ""
        figures = f"{row['sentences_per_second']:.1f} | {row['cpu_seconds']:.2f} | {base / row['cpu_seconds']:.1f}"
        figures += f" | {row['start_cpu_seconds']:.1f} | {conversion} | {row['sacreBLEU']:.2f} | {row['same_lines']:,}"
        lines.append(f"| {row['engine']} | {figures} |")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--child"]:
        engine, *arguments = sys.argv[2:]
        return run_fairseq(arguments) if engine == "fairseq" else run_ctranslate2(*arguments)
    from encourage_mt.environment import describe_hardware, versions
    from encourage_mt.training.run_folder import open_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of an evaluated run")
    parser.add_argument("--split", help="set to translate (default: the first test set)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    data = run.prepared()
    split = arguments.split or data.tests[0]
    rows, first = [], None
    for engine in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            row, lines = measure(engine, run, split, arguments.threads, Path(folder))
        first = first or lines
        rows.append({**row, "same_lines": sum(map(str.__eq__, first, lines))})
    content = {
        "machine": describe_hardware("cpu"),
        "versions": versions(),
        "threads": arguments.threads,
        "set": f"{run.recipe} {split}",
        "sentences": data.lines[split],
        "beam": run.beam,
        "rows": rows,
    }
    print(f"{content['machine']}, {arguments.threads} threads; {content['set']}: {content['sentences']:,} sentences\n")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
