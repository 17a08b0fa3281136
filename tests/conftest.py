"""Settings for every test: one thread per process, no network beyond this machine, no display.

The tests run on the machine's GPUs where it has RANKS of them; FASTGRPO_TEST_DEVICE=cuda or cpu
decides otherwise, and is how they find the rehearsed ones (docs/guides/gpu/rehearsal.md).
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastgrpo.parallel.world import World

FREE_GIB = 4  # on the disk of temporary files, where a whole suite has held more than 1 at a time
RANKS = 4  # of a test at most, each with a GPU of its own
FOUND = len(list(Path("/dev").glob("nvidia[0-9]*")))
if os.environ.get("FASTGRPO_TEST_DEVICE", "cuda" if FOUND >= RANKS else "cpu") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for variable, value in {
    "OMP_NUM_THREADS": "1",  # read when torch is first imported
    "FASTGRPO_PROCESSES": "1",  # a lone process stays one where there are GPUs, too
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as a shell without job control starts what runs in the background; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A disk that fills up half-way would fail tests one by one, for reasons that hide it."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if free < FREE_GIB:
        pytest.exit(
            f"{tempfile.gettempdir()}: {free:.1f} GiB free and the tests need {FREE_GIB}; remove "
            "what is old there, or set TMPDIR to another disk.",
            returncode=2,
        )


LONGEST = (
    "test_chaos",
    "test_rehearsal",
    "test_slurm",
    "test_meshes",
    "test_train",
    "test_families",
    "test_update",
    "test_resume",
    "test_replicas",
    "test_export",
    "test_sample",
    "test_launch",
    "test_stopping",
    "test_evaluate",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first: one that came last would keep a single process busy
    alone.
    """
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """This process as the only rank."""
    from fastgrpo.parallel.world import open_world

    with open_world() as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu_world() -> "Iterator[World]":
    """This process as the only rank, on the CPU where there are GPUs, too: beside an oracle."""
    from fastgrpo.parallel.world import open_world
    from tests.harness import tiny

    with tiny.without_gpus(), open_world() as opened:
        yield opened


@pytest.fixture(scope="session")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that two ranks trained."""
    from tests.harness import runs

    folder = tmp_path_factory.mktemp("two_ranks") / "run"
    runs.succeed(folder, runs.SMALLER, ranks=2)
    return folder
