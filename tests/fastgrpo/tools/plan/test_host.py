"""The host's memory in a plan, and the order and figures of what it prints."""

import json

import pytest
from diffusers import HunyuanVideoTransformer3DModel

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.tools.plan import planner, tables
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from tests import ROOT
from tests.harness import tiny

TINY = ROOT / "launch" / "t2v_tiny.toml"
T2V = ROOT / "launch" / "t2v_hunyuan.toml"
CARD = Machine(gpu("h100"), Achieved())
OFFLOAD = "distributed.offload=true"


def host(*overrides: str, gpus: int = 1) -> dict[str, float]:
    return planner.plan(config.load(TINY, overrides), gpus, CARD).host


def rounded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def test_nothing_waits_on_the_host_unless_asked() -> None:
    assert not host()


@pytest.mark.parametrize("shards", [1, 2])
def test_offloaded_states_are_the_networks_tensors_in_pinned_blocks(shards: int) -> None:
    """Oracle: the shapes of the network itself, each shard a block of its own."""
    network = HunyuanVideoTransformer3DModel.from_pretrained(tiny.FOLDER / "transformer")
    shapes = [tuple(p.shape) for p in network.parameters()]
    parts = [
        -(-shape[0] // shards) * p.numel() // shape[0] if shape else 1
        for shape, p in zip(shapes, network.parameters(), strict=True)
    ]
    found = host(OFFLOAD, "optimizer.ema_decay=0.0", gpus=shards)
    assert found["weights"] == found["gradients"] == shards * sum(rounded(4 * n) for n in parts)
    assert found["optimizer"] == shards * 8 * sum(parts)
    assert host(OFFLOAD, gpus=shards)["average"] == shards * 4 * sum(parts)


def test_waiting_trajectories_are_one_block_per_latent() -> None:
    """160 samples of 9 x 32 x 32; 4 chosen of 6 steps: at most 5 noisy ones, so 6 states."""
    recipe = config.load(TINY)
    latent = planner.plan(recipe, 1, CARD).subject.job.latent
    block = rounded(4 * latent[0] * latent[1] * latent[2] * latent[3])
    assert host("rollout.store=host")["trajectories"] == block * 6 * 160
    nft = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")
    found = host("rollout.store=host", *nft, "objective.best_of_n=8")
    assert (found["trajectories"], found["velocities"]) == (block * 160, block * 80 * 4)


def test_a_checkpoint_in_the_background_is_a_copy_of_the_states() -> None:
    states = host(OFFLOAD, "checkpoint.background=true")
    trained = states["optimizer"] / 8
    assert states["checkpoint"] == 16 * trained  # weights, two moments, the average


def test_a_tuned_recipe_is_told_with_the_hosts_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(T2V), "--gpus", "1", "--gpu", "h100"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (tuned,) = (line for line in lines if line.startswith("tuned, with the same results: "))
    assert "of the host's per node" in tuned
    assert any(line.startswith("  ") and OFFLOAD in line.split() for line in lines)


def test_the_hosts_memory_has_a_line_and_is_in_the_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["plan", str(T2V), "--gpus", "8", "--gpu", "h100", OFFLOAD]
    cli.main(asked)
    assert "host memory: " in capsys.readouterr().out
    cli.main([*asked, "--json"])
    found = json.loads(capsys.readouterr().out)["host_bytes_per_node"]
    assert 16 * 12.8e9 < sum(found.values()) < 24 * 12.9e9


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [
        (37912.3, 0, "37,912"),
        (0.0041, 0, "0.0041"),
        (0.31, 0, "0.31"),
        (0.04, 1, "0.04"),
        (2.5, 1, "2.5"),
    ],
)
def test_no_figure_is_a_naught(value: float, digits: int, said: str) -> None:
    assert tables.brief(value, digits) == said
