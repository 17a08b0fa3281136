"""Offload and prefetching on two ranks: neither changes a result, and gathers are asked for when
the recipe says. And Wan in bfloat16, beside diffusers' network loaded in bfloat16.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests import ROOT
from tests.harness import chaos, forks, runs, tiny
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


def test_masters_and_moments_on_a_disk_end_with_the_same_weights(found: Any) -> None:
    """As those without offload to 1e-6, as those in host memory bit for bit, by several records."""
    assert found["records"] >= 3
    for name in found["initial"]:
        assert torch.equal(found["nvme"][name], found["offloaded"][name]), name
        if not name.endswith(ZERO):
            torch.testing.assert_close(found["nvme"][name], found["plain"][name], rtol=0, atol=1e-6)


def test_masters_and_moments_lie_in_the_file(found: Any) -> None:
    """All but the masters that FSDP2 pads."""
    for name, (master, *moments) in found["mapped"].items():
        assert all(moments), name
        assert master == (len(found["initial"][name]) % 2 == 0), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_a_step_goes_on_from_its_checkpoint_on_a_disk_and_without(
    tmp_path: Path,
) -> None:
    """Bit for bit as a run that offloads to host memory and is not disturbed."""
    disk, run = tmp_path / "disk", ["optimizer.updates_per_iteration=2", *runs.SMALLER]
    disk.mkdir()
    nvme = [*run, "distributed.offload=nvme", f"distributed.offload_path={disk}"]
    nvme += ["run.preflight=true"]  # its trial of a checkpoint leaves the moments zero
    memory = [*run, "distributed.offload=true"]
    runs.succeed(tmp_path / "calm", memory, ranks=2)
    # of the second iteration's first step, on the rank that prints nothing
    moment = chaos.InCall("fastgrpo.parallel.nvme.adamw:OffloadedAdamW._step_record", 3)
    folder = tmp_path / "nvme"
    killed = forks.start(
        "fastgrpo.cli",
        runs.arguments(folder, nvme),
        ranks=2,
        first=chaos.mine(moment, 1),
        output=tmp_path / "told",
    )
    assert killed.wait(runs.LIMIT) == 1
    assert "distributed.offload=nvme: " in (tmp_path / "told").read_text()
    assert set(chaos.published(folder)) == {1} and not any(disk.iterdir())
    shutil.copytree(folder, tmp_path / "memory")
    calm = runs.checkpoint(tmp_path / "calm", 2, tmp_path)
    for place, settings in (("nvme", nvme), ("memory", memory)):
        told = runs.succeed(tmp_path / place, settings, ranks=2)
        assert "resumed from checkpoint step-1" in told
        runs.assert_same_checkpoint(runs.checkpoint(tmp_path / place, 2, tmp_path), calm)
    assert not any(disk.iterdir())


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
