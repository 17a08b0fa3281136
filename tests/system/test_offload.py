"""Offload and prefetching on two ranks: neither changes a result, and gathers are asked for when
the recipe says. And Wan in bfloat16, beside diffusers' network loaded in bfloat16.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests import ROOT
from tests.harness import tiny
from tests.harness.folders import wan
from tests.harness.workers.sharding import wan_inputs
from tests.system.test_meshes import ZERO


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("sharding") / "found"
    wan.write(Path(f"{file}.wan"))
    command = [sys.executable, "-m", "tests.harness.workers.sharding", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    network = WanTransformer3DModel.from_pretrained(
        f"{file}.wan", subfolder="transformer", torch_dtype=torch.bfloat16
    )
    return torch.load(file) | {"network": network}


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


STAYING = ("time_embedder", "scale_shift_table", "norm2")
"""What of Wan has weights in float32 where diffusers has the others in bfloat16."""


def test_wan_in_bfloat16_equals_diffusers_network_to_the_last_bit(found: Any) -> None:
    """Forward of two ranks with the same samples, beside one process; gradients up to the order in
    which bfloat16 adds up what comes back from the blocks.
    """
    network, (x, t, condition) = found["network"], wan_inputs()
    staying = {n for n, p in network.named_parameters() if p.dtype == torch.float32}
    assert staying and all(any(word in name.split(".") for word in STAYING) for name in staying)
    text = condition["text"].bfloat16()
    v = network(x.bfloat16(), t * 1000, text, return_dict=False)[0].float()
    v.square().mean().backward()
    assert torch.equal(found["wan"]["velocity"], v.detach())
    gradients = found["wan"]["gradients"]
    assert gradients.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        assert gradients[name].dtype == torch.float32
        if not name.endswith("to_k.bias"):  # which softmax does not see: 0 but for rounding
            expected = parameter.grad.float()
            assert (gradients[name] - expected).norm() <= 0.02 * expected.norm(), name


def test_so_it_does_beneath_adapters(found: Any) -> None:
    """They add nothing before they are trained; only they have a gradient."""
    run = found["wan with adapters"]
    assert torch.equal(run["velocity"], found["wan"]["velocity"])
    assert run["gradients"] and all(".lora_" in name for name in run["gradients"])
