"""A test file that is started as two ranks of one job."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_ranks(script, folder, *arguments):
    """Run ``script FOLDER ARGUMENT...`` on two ranks; return what each saved as ``end_RANK.pt``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", script, str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{Path(__file__).parent.parent}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"end_{rank}.pt") for rank in (0, 1)]
