"""Test scripts/train.sbatch with replacements for SLURM's commands."""

import os
import subprocess

import pytest
from conftest import ROOT, fake_venv


@pytest.mark.parametrize(
    "code, near_the_end, requeued",
    [(143, True, True), (143, False, False), (0, True, False), (0, False, False), (2, False, False)],
)
def test_sbatch_script_finds_the_first_node_and_requeues_a_job_out_of_time(code, near_the_end, requeued, tmp_path):
    """SLURM's commands and encourage-mt are replaced by scripts that record how they are called."""
    for name, body in (
        ("scontrol", 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "scontrol $*" >>"$CALLS"; fi'),
        ("scancel", 'echo "scancel $*" >>"$CALLS"'),
        ("srun", 'shift; [ -z "$NEAR" ] || { kill -USR1 $PPID; sleep 0.5; }; SLURM_NODEID=1 exec "$@"'),
    ):
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    fake_venv(tmp_path / "venv", 'echo "encourage-mt $*" >>"$CALLS"; exit "$CODE"')
    environment = {
        **os.environ,
        **{
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VENV": str(tmp_path / "venv"),
            "CALLS": str(tmp_path / "calls"),
        },
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "45678"},
        **{"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "CODE": str(code), "NEAR": "yes" if near_the_end else ""},
    }
    argv = ["bash", str(ROOT / "scripts/train.sbatch"), "r.yaml", "--arm", "el"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert sorted((tmp_path / "calls").read_text().splitlines()) == sorted(
        [
            "encourage-mt train r.yaml --arm el --gpus 8 --nodes 2 --node 1 --master n7:25678",
            *["scancel --signal=TERM 45678"] * near_the_end,
            *["scontrol requeue 45678"] * requeued,
        ]
    )
