"""Offload and prefetching on two ranks: neither changes a result, and gathers are asked for when
the recipe says.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.harness import tiny
from tests.system.test_meshes import ZERO


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("sharding") / "found"
    command = [sys.executable, "-m", "tests.harness.workers.sharding", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file)


def test_offload_ends_with_the_weights_of_no_offload(found: Any) -> None:
    """With torch's fused AdamW against its plain one, which rounds otherwise."""
    for name, before in found["initial"].items():
        if name.endswith(ZERO):  # AdamW makes a step of what rounding left
            continue
        assert (found["plain"][name] - before).abs().max() > 1e-4
        torch.testing.assert_close(
            found["offloaded"][name], found["plain"][name], rtol=0, atol=1e-6
        )


def test_the_optimizer_is_fused_where_it_is_offloaded_whatever_wrote_the_checkpoint(
    found: Any,
) -> None:
    assert found["fused"] == [tiny.device().type == "cuda", True]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_blocks_are_gathered_as_far_ahead_as_asked(found: Any, ahead: int) -> None:
    run = found["prefetch"][ahead]
    events, blocks = run["events"], run["blocks"]
    middle = events.index(("backward", 0))
    gathered = 0
    for what, number in events[:middle]:
        gathered += what == "gather"
        if what == "forward":
            assert gathered == 1 + min(number + 1 + ahead, blocks)  # 1: the root's
    gathered, ended = 0, 0
    for what, _ in events[middle:]:
        gathered += what == "gather"
        if what == "reduce":
            ended += 1
            # without: one ahead, by the engine
            assert gathered == min(ended + max(ahead, 1), blocks)
    assert ended == blocks + 1


@pytest.mark.parametrize("ahead", [1, 2])
def test_prefetching_changes_no_bytes_and_no_gradient(found: Any, ahead: int) -> None:
    plain, run = found["prefetch"][0], found["prefetch"][ahead]
    for kind in ("gather", "reduce"):
        assert sorted(e for e in run["events"] if e[0] == kind) == sorted(
            e for e in plain["events"] if e[0] == kind
        )
    assert run["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert torch.equal(run["gradients"][name], gradient), name
