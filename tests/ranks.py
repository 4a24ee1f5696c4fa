"""Real torchrun processes over gloo, for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(ranks, *command, check=True, timeout=600, env=None):
    """Run a Python script on `ranks` processes; returns the completed process."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            *map(str, command),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            **(env or {}),
        },
    )
    if check and run.returncode:
        raise AssertionError(
            f"exit code {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
        )
    return run
