"""Settings for every test: one thread per process, no network beyond this machine, no display."""

import os
from pathlib import Path

import pytest

for variable, value in {
    "OMP_NUM_THREADS": "1",  # read when torch is first imported
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)


@pytest.fixture(scope="session")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that two ranks trained."""
    from tests import runs

    folder = tmp_path_factory.mktemp("two_ranks") / "run"
    runs.succeed(folder, runs.SMALLER, ranks=2)
    return folder
