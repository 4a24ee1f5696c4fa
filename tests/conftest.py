import fcntl
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Small matrices on many threads spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402
from ranks import forked  # noqa: E402


@pytest.fixture(scope="session")
def process_group():
    """One rank in this process; tests with two ranks start torchrun."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A barely warmed-up tiny model, 64 phantoms and, beside 512 of them to validate with, a few.
    pytest's workers share it."""
    shared = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if shared else base) / "start"
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker waits, and finds it complete
        forked(0, "tiny.py", "--out", out, "--rows", "64", "--iterations", "40")
        if not (out / "few.parquet").exists():
            rows = pq.read_table(out / "data/val.parquet").slice(0, 24)
            pq.write_table(rows, out / "few.parquet")
    return out


LONG = """train security eval nodes faults lora dapo merge gradient bench_gpu trl numerics tiny vllm
    judge""".split()


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one process of xdist would work alone at last."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
