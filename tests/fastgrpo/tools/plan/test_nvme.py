"""Masters and moments on a node's NVMe in a plan: its space, its seconds, the memory that it saves."""

from dataclasses import replace

import pytest
from diffusers import HunyuanVideoTransformer3DModel

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.parallel.nvme.folder import BUFFERS, RECORD_BYTES
from fastgrpo.tools.plan import phases, planner
from fastgrpo.tools.plan.costs import host
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan
from tests import ROOT
from tests.harness import tiny

TINY = ROOT / "launch" / "t2v_tiny.toml"
T2V = ROOT / "launch" / "t2v_hunyuan.toml"
NVME = ("distributed.offload=nvme", "distributed.offload_path=/nvme")
CARD = Machine(gpu("h100"), Achieved())


def made(*overrides: str, gpus: int = 1, machine: Machine = CARD) -> Plan:
    return planner.plan(config.load(TINY, overrides), gpus, machine)


def seconds(found: Plan, name: str) -> float:
    return next(phase.seconds for phase in found.phases if phase.name == name)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_file_holds_the_networks_tensors(shards: int) -> None:
    """Oracle: the shapes of the network itself; rows that FSDP2 pads stay in host memory."""
    network = HunyuanVideoTransformer3DModel.from_pretrained(tiny.FOLDER / "transformer")
    parts = [
        (-(-len(p) // shards) * (p.numel() // len(p)), len(p) % shards == 0)
        for p in network.parameters()
    ]
    found = made(*NVME, "optimizer.ema_decay=0", gpus=shards)
    mapped = sum(size for size, even in parts if even)
    whole = sum(size for size, _ in parts)
    job = found.subject.job
    assert host.on_nvme(job) == {"masters": shards * 4 * mapped, "moments": shards * 8 * whole}
    held = {
        "weights": shards * 4 * (whole - mapped),
        "gradients": shards * 4 * whole,
        "optimizer": shards * BUFFERS * RECORD_BYTES,
    }
    assert found.host == {kind: size for kind, size in held.items() if size}
    memory = made("distributed.offload=true", "optimizer.ema_decay=0", gpus=shards)
    saved = sum(memory.host.values()) - sum(found.host.values())
    assert host.saved_by_nvme(job) == saved
    assert not host.on_nvme(memory.subject.job)


def test_a_step_waits_for_a_disk_that_is_slower() -> None:
    """24 bytes of each parameter, once per optimizer step; a quick disk costs nothing."""
    quick = made(*NVME, machine=replace(CARD, nvme_gbs=1e9))
    memory = made("distributed.offload=true")
    assert seconds(quick, "update") == seconds(memory, "update")
    slow = [made(*NVME, machine=replace(CARD, nvme_gbs=rate)) for rate in (0.1, 0.05)]
    job = slow[0].subject.job
    size = sum(host.on_nvme(job).values())
    assert phases.nvme_seconds(job, slow[0].machine) == pytest.approx(2 * size / 0.1e9)
    steps = job.recipe.optimizer.updates_per_iteration
    more = seconds(slow[1], "update") - seconds(slow[0], "update")
    assert more == pytest.approx(steps * 2 * size / 0.1e9)
    assert seconds(slow[1], "rollout") == seconds(slow[0], "rollout")


def test_masters_that_memory_does_not_keep_are_read_for_each_gather() -> None:
    recipe = config.load(T2V, [*NVME, "distributed.rollout_weights=gathered"])
    roomy, tight = (planner.plan(recipe, 1, replace(CARD, ram_gib=gib)) for gib in (256, 64))
    assert roomy.fits_host and tight.fits_host
    masters = host.on_nvme(roomy.subject.job)["masters"]
    more = seconds(tight, "rollout") - seconds(roomy, "rollout")
    assert more == pytest.approx(masters / 3e9)
    assert seconds(tight, "update") > seconds(roomy, "update") + 2 * masters / 3e9


def test_the_line_and_what_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe on an NVMe is tuned there; adapters, which a run would refuse there, leave it."""
    asked = ["plan", str(T2V), *NVME, "--gpus", "1", "--gpu", "h100", "--ram-gib", "192"]
    cli.main([*asked, "--disk-gbs", "6", "--lora", "32", "--tune"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("NVMe: "))
    assert "143.3 GiB per node (masters 47.8, moments 95.5)" in line
    assert "at 6 GB/s (--disk-gbs)" in line
    overrides = [one.strip().split() for one in lines if one.startswith("  ") and "=" in one]
    tuned, adapters = (next(one for one in overrides if has(one)) for has in (full, with_lora))
    assert not any(key.startswith("distributed.offload") for key in tuned)
    config.load(T2V, [*NVME, *tuned])
    config.load(T2V, [*NVME, *adapters])
    assert "distributed.offload_path=none" in adapters


def full(overrides: list[str]) -> bool:
    return not with_lora(overrides)


def with_lora(overrides: list[str]) -> bool:
    return "lora.rank=32" in overrides
