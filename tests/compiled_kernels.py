"""Check the GPU kernels that benchmarks/gpu_bounds.py compiles."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCALARS = {"forward": 3, "backward": 8}  # loads of one value: ignored, target and its logit; statistics and upstream


def check_compiled(which):
    """Check all kernels of benchmarks/gpu_bounds.py --check `which`, and return them."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    for tool in ("cuobjdump", "nvdisasm", "ptxas"):
        if not (tools / tool).exists():
            pytest.skip(f"{tool} is missing in {tools}")
    command = [
        sys.executable,
        ROOT / "benchmarks/gpu_bounds.py",
        "--check",
        which,
    ]  # not in this process: it interprets
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    for each in compiled:
        loads = {int(bits): number for bits, number in each["loads"].items()}
        stores = {int(bits): number for bits, number in each["stores"].items()}
        assert each["spills"] == each["stack"] == 0 and each["registers"] <= 255, each
        assert loads[each["width"]] >= each["expected"], each
        if each["whole"] and each["width"] > 16:  # a row is loaded once (16 bits wide are also scalars)
            assert sum(loads.values()) <= each["expected"] + SCALARS[each["kernel"]], each
        if each["kernel"] == "backward":  # the gradient and, in ignored rows, zeros
            assert stores == {each["width"]: 2 * each["expected"]}, each
    return compiled
