#!/usr/bin/env python3
"""Compile the GPU kernels without a GPU, and print bounds of their time from their instructions.

Without options, print a lower bound of the time per row, from the instruction counts and the published rates of two
GPUs. It is a bound, not a measurement; benchmarks/loss.py --device cuda measures on a GPU. With --check CASES, print
registers, spills, and widths of loads and stores of the compiled kernels as JSON, for the tests.
"""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter cannot compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from encourage_mt.evaluation.formatting import markdown_table
from encourage_mt.loss import LossOptions, triton_kernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {"target": "*i64", "ignored": "*i1", "terms": "*fp32", "statistics": "*fp32", "upstream": "*fp32"}
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

# Published rates of the SXM models: streaming multiprocessors, boost clock in GHz, memory bandwidth in GB/s. Each
# multiprocessor issues 4 instructions of a warp per cycle; its special functions (exp, log, 1/x) take 8 cycles a warp.
GPUS = {"A100 80GB": (80, 108, 1.41, 2039), "H100 80GB": (90, 132, 1.98, 3350)}


def compile_kernel(kernel, architecture, dtype, vocabulary, options):
    """Return `kernel` ("forward" or "backward") compiled for sm_`architecture`.

    A dict of the arguments and: registers per thread; stack, bytes per thread, and spills, instructions that use local
    memory; instructions and special_functions of all warps for a row; loads and stores of logits and gradients,
    {bits: number per thread}; whole, whether a row is read once; width, the bits that the alignment of rows allows;
    expected, how many accesses of that width cover a thread's share of a row.
    """
    function = getattr(triton_kernels, f"_{kernel}")
    logits = torch.empty((1, vocabulary), dtype=getattr(torch, dtype), device="meta")
    shared = triton_kernels.constants(
        logits, *triton_kernels.bonus_and_scalars(LossOptions(**{"label_smoothing": 0.1, **options}), vocabulary)
    )
    if kernel == "forward":
        blocks = {**triton_kernels.forward_blocks(vocabulary), "PAIRS": architecture >= 100}
        types, programs = blocks["BLOCK"] * blocks["BLOCKS"], 1
    else:
        blocks = triton_kernels.backward_blocks(vocabulary)
        types, programs = blocks["BLOCK"], math.ceil(vocabulary / blocks["BLOCK"])
    warps = blocks.pop("num_warps")
    constants = {**shared, **blocks}
    kinds = {**POINTERS, "logits": f"*{TYPES[dtype]}", "out": f"*{TYPES[dtype]}", "tokens": "i32", "vocabulary": "i32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in function.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]  # what Triton finds out at run time
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name == "vocabulary" and vocabulary % 16 == 0)
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, divisible),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    operations, resources = disassemble(compiled.asm["cubin"])
    width = 8 * math.gcd(16, vocabulary * logits.itemsize)
    return {
        "kernel": kernel,
        "architecture": architecture,
        "dtype": dtype,
        "vocabulary": vocabulary,
        "options": options,
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "spills": sum(count for name, count in operations.items() if name.startswith(("LDL", "STL"))),
        "instructions": sum(operations.values()) * warps * programs,
        "special_functions": sum(n for name, n in operations.items() if name.startswith("MUFU")) * warps * programs,
        "loads": accesses(operations, "LDG"),
        "stores": accesses(operations, "STG"),
        "whole": blocks.get("WHOLE", True),
        "width": width,
        "expected": types * logits.itemsize * 8 // (width * warps * 32),
    }


def disassemble(cubin):
    """Return ({operation: number of instructions}, {resource: amount}) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    operations = Counter(match[1] for match in instruction.finditer(code))
    del operations["NOP"]
    return operations, {name: int(amount) for name, amount in re.findall(r"(REG|STACK):(\d+)", usage)}


def accesses(operations, prefix):
    """Return {bits: number} of the accesses to global memory that begin with `prefix`."""
    numbers = Counter()
    for name, count in operations.items():
        if name.startswith(prefix):
            parts = set(name.split("."))
            numbers[next((bits for bits in (128, 64) if str(bits) in parts), 16 if "U16" in parts else 32)] += count
            if parts & {"U8", "S8"}:
                numbers[32] -= count
                numbers[8] += count
    return {bits: number for bits, number in numbers.items() if number}


def cases(which):
    """Return arguments of `compile_kernel`: "core" takes a few seconds, "all" all that matter."""
    bonuses = [{"bonus": bonus} for bonus in triton_kernels.BONUS_KINDS]
    log = [{"bonus": "log"}]
    started = [{"bonus": name, "bonus_start": 0.1} for name in triton_kernels.BONUS_KINDS if name != "none"]
    tangents = [{"log_end": 0.0}, {"log_end": 0.3, "bonus_start": 0.1}, {"log_end": 1.0, "bonus_start": 0.1}]
    if which == "core":
        rows = [([90], ["bfloat16"], [32768], log), ([90], ["bfloat16", "float32"], [248, 249], log)]
    else:
        rows = [
            ([80, 90, 100], ["bfloat16", "float32"], [32768], bonuses),
            ([80, 90, 100], TYPES, [256, 248, 249], bonuses),
            ([90], TYPES, [252, 250], log),
            ([90], ["float16"], [32768, 6632], log),
            ([80, 90, 100], ["bfloat16", "float32"], [32768], started),
            ([80, 90, 100], ["bfloat16"], [32768], tangents),
            ([90], ["float16"], [32768, 16384], [*started, *tangents]),
            ([90], ["bfloat16"], [32768], [{"log_end": 1.0}, {"label_smoothing": 0.0}]),
            ([90], ["bfloat16", "float32"], [100000, 100001], log),
        ]
    return list(itertools.chain.from_iterable(itertools.product(("forward", "backward"), *row) for row in rows))


def bounds(vocabularies, dtype):
    """Return the table of lower bounds of the time per row of logits, if the rows keep the whole GPU busy."""
    rows = []
    for (gpu, (architecture, processors, clock, bandwidth)), vocabulary, bonus in itertools.product(
        GPUS.items(), vocabularies, ("none", "log")
    ):
        for kernel, passes in (("forward", 1), ("backward", 2)):
            compiled = compile_kernel(kernel, architecture, dtype, vocabulary, {"bonus": bonus})
            memory = passes * vocabulary * getattr(torch, dtype).itemsize / bandwidth
            arithmetic = max(compiled["instructions"], 8 * compiled["special_functions"]) / (4 * processors * clock)
            rows.append(
                {
                    "GPU": gpu,
                    "vocabulary": vocabulary,
                    "bonus": bonus,
                    "kernel": kernel,
                    "registers": compiled["registers"],
                    "instructions a type": round(compiled["instructions"] * 32 / vocabulary, 1),
                    "memory, ns a row": round(memory, 2),
                    "arithmetic, ns a row": round(arithmetic, 2),
                    "bound, ns a row": round(max(memory, arithmetic), 2),
                    "time": "not measured",
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", choices=("core", "all"), help="print the compiled kernels of these cases as JSON")
    text = "vocabulary sizes of the table of bounds (default: 6632 10000 32000)"
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[6632, 10000, 32000], help=text)
    text = "type of the logits in the table of bounds (default: %(default)s)"
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help=text)
    args = parser.parse_args()
    if max(args.vocabularies) > triton_kernels.WHOLE_ROW:
        parser.error(
            f"--vocabularies: at most {triton_kernels.WHOLE_ROW}; the loop over a longer row would be counted once"
        )
    if args.check:
        with ProcessPoolExecutor(2) as pool:
            json.dump(list(pool.map(compile_kernel, *zip(*cases(args.check), strict=True))), sys.stdout)
        return
    print(f"Lower bounds for {args.dtype}, from instruction counts and published rates. Not a measurement.\n")
    rows = bounds(args.vocabularies, args.dtype)
    print(markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows]))


if __name__ == "__main__":
    main()
