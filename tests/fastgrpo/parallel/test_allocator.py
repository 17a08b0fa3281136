"""The host's allocator keeps what a run frees, unless the user's environment says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TWICE = """
import resource
import torch
from fastgrpo.parallel.world import open_world

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2 << 20) for _ in range(8)]  # 64 MiB in all
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with open_world():
    print([faults() for _ in range(12)][-1])  # the heap has room for all after some
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("users", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1048576"}, False)]
)
def test_what_is_freed_is_not_cleared_again(users: dict[str, str], kept: bool) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE],
        env=environment | users,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) < pages / 4) == kept, done.stdout
