import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Small matrices on many threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402


@pytest.fixture(scope="session")
def process_group():
    """One rank in this process; tests with two ranks start torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A barely warmed-up tiny model and 64 phantoms."""
    out = tmp_path_factory.mktemp("start")
    subprocess.run(
        [sys.executable, "tiny.py", "--out", out, "--rows", "64", "--iterations", "40"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return out
