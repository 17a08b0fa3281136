"""Meshes against one process: FSDP2, HSDP and sequence parallelism give its trajectories and its
gradients.

With batches of one sample every forward is the same on any mesh, so trajectories must be equal bit
for bit, and gradients differ by the order of sums alone. The clips have 45 video tokens, which
neither 2 nor 4 ranks divide, and the prompts have two text lengths.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fastgrpo import models
from fastgrpo.core.config import Distributed
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import stack
from fastgrpo.models.loading import policies
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.parallel.sequence_parallel import install
from fastgrpo.parallel.sharding import shard
from fastgrpo.parallel.world import World, open_world
from tests.fastgrpo.training.test_update import run
from tests.harness import forks, tiny

ZERO = "refiner_blocks.0.attn.to_k.bias"
"""Softmax does not see a bias of the keys that all keys share; where they have one, its true
gradient is zero.
"""

MESHES = {
    "FSDP2": (2, {}),
    "HSDP 2 x 2": (4, {"shard": 2}),
    "sp 2": (2, {"sp": 2}),
    "dp 2 x sp 2": (4, {"sp": 2}),
    "HSDP 2, sp 2": (4, {"sp": 2, "shard": 2}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("alone") / "result", 1, 1, 1)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_equals_one_process(name: str, alone: dict[str, Any], tmp_path: Path) -> None:
    ranks, settings = MESHES[name]
    mesh = run(tmp_path / "result", ranks, 1, 1, None, **settings)
    for tensor in ("states", "final", "log_probs"):
        assert torch.equal(mesh[tensor], alone[tensor]), tensor
    assert mesh["metrics"]["update/max_log_ratio_first"] <= 1e-6
    assert mesh["metrics"]["update/transitions"] == alone["metrics"]["update/transitions"]
    worst = differences(mesh["gradients"][0], alone["gradients"][0])
    assert {key for key, value in worst.items() if value > 1e-6} <= weak(alone["gradients"][0])
    assert max(worst.values()) <= (
        2e-6 if tiny.device().type == "cpu" else 5e-6
    )  # its attention rounds otherwise


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over norm, of each parameter but those whose true gradient is zero."""
    assert actual.keys() == expected.keys()
    keys = [key for key in expected if not key.endswith(ZERO)]
    assert len(keys) == len(expected) - 1
    return {
        key: ((actual[key] - expected[key]).norm() / expected[key].norm()).item() for key in keys
    }


def weak(gradients: dict[str, Tensor]) -> set[str]:
    """Parameters with less than 0.3 % of the whole gradient's norm: float32 rounds sums of ranks'
    parts no finer.
    """
    whole = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    return {key for key, grad in gradients.items() if grad.norm() < 3e-3 * whole}


SHARING = models.with_function("share_sequence")


def test_every_family_shares_sequences_exactly(tmp_path: Path) -> None:
    """Guided with texts of two lengths, odd numbers of tokens, with adapters and recomputation and
    without.
    """
    done = forks.run(
        "tests.harness.workers.sequences", [str(tmp_path), str(tmp_path / "found")], ranks=2
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found").read_text())
    tried = {f"{family} rank {rank}" for family in SHARING for rank in (0, 2)}
    assert set(found) == tried
    for name, differences_of in found.items():
        assert differences_of["velocity"] <= 1e-6, name
        assert differences_of["gradient"] <= 1e-6, name


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"rollout_weights": "gathered"}),
        (2, {"rollout_weights": "sharded"}),
        (4, {"rollout_weights": "sharded", "shard": 2}),
    ],
)
def test_bytes_on_the_wire_are_those_of_the_formulas(
    ranks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The formulas of docs/guides/cluster/parallelism.md."""
    done = forks.run(
        "tests.harness.workers.communication",
        [str(tmp_path / "bytes"), json.dumps(settings)],
        ranks,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads((tmp_path / "bytes").read_text())
    blocks, root, element = counted["blocks"], counted["root"], 4
    whole = element * (blocks + root)
    if settings["rollout_weights"] == "gathered":
        assert counted["rollout"] == {"all-gather": whole}
    else:
        assert counted["rollout"] == {"all-gather": element * (counted["forwards"] * blocks + root)}
    updates, micro_batches = 2, counted["micro_batches"]
    assert micro_batches == (4 if ranks == 2 else 2)  # of all ranks' states, dealt evenly
    expected = {
        "all-gather": micro_batches * element * (2 * blocks + root),
        "reduce-scatter": micro_batches * whole,
    }
    if "shard" in settings:
        expected["all-reduce"] = updates * whole // settings["shard"]
    # what the losses of dealt states need: for each transition that moves a number, and the states
    # before and after it, of which several that meet in one send it once
    moved = counted["update"].pop("all-to-all", 0)
    latent = math.prod(tiny.plan(tiny.load_policy()).latent_shape)
    latents, transitions = divmod(moved // element, latent)
    assert (moved > 0) == (ranks == 4)
    assert transitions < latents <= 2 * transitions or not moved
    assert counted["update"] == expected


def test_bfloat16_under_fsdp_equals_the_plain_network_bit_for_bit() -> None:
    """With inputs cast by FSDP, as is its default, timesteps and guidance are rounded and this
    fails.
    """
    conditions = tiny.encode()[:1]
    plan = tiny.plan(tiny.load_policy())
    x = plan.initial_noise([0], tiny.device())
    t = torch.tensor([0.9873], device=tiny.device())
    plain, sharded = (policies.load(bfloat16(), tiny.device()) for _ in range(2))
    plain.network.to(torch.bfloat16)
    with open_world() as world:
        shard(sharded, world, torch.bfloat16)
        with torch.no_grad():
            expected, actual = (
                policy.velocity(x, t, stack(conditions)) for policy in (plain, sharded)
            )
    assert torch.equal(actual, expected)


def bfloat16() -> Any:
    from fastgrpo.core.config import Model

    return Model(family="hunyuan_video", path=str(tiny.FOLDER), dtype="bfloat16")


@pytest.mark.parametrize(
    ("settings", "size", "node", "expected"),
    [
        ({}, 8, 8, (1, 8)),
        ({}, 64, 8, (8, 8)),
        ({"sp": 4}, 64, 8, (8, 8)),
        ({"shard": 64}, 64, 8, (1, 64)),
        ({"shard": 2}, 4, 4, (2, 2)),
    ],
)
def test_the_mesh_follows_the_nodes(
    settings: dict[str, int], size: int, node: int, expected: tuple[int, int]
) -> None:
    assert mesh_shape(Distributed(**settings), size, node) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sp": 3}, r"distributed.sp=3: does not divide the 8 ranks; use one of 1, 2, 4, 8"),
        ({"shard": 3}, r"distributed.shard=3: must divide the 8 ranks and be a multiple of sp=1"),
        ({"sp": 4, "shard": 2}, r"distributed.shard=2: .*multiple of sp=4; use one of 4, 8"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh_shape(Distributed(**settings), 8, 8)


def test_heads_that_do_not_divide_are_refused_with_those_that_would() -> None:
    from fastgrpo.parallel.world import Group

    group, policy = Group(None, 0, 5), tiny.load_policy()  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"distributed.sp=5: does not divide the network's \d+ heads; use one of 1, 2",
    ):
        install(policy.network, group, policy.share_sequence)


def test_work_is_divided_over_groups_of_ranks() -> None:
    from fastgrpo.parallel.world import Group

    worlds = [
        World(
            rank=rank,
            size=4,
            device=torch.device("cpu"),
            mesh=cast(Any, None),
            sp=Group(cast(Any, None), rank % 2, 2),
        )
        for rank in range(4)
    ]
    assert [list(world.share(5)) for world in worlds] == [[0, 1], [0, 1], [2, 3, 4], [2, 3, 4]]
    assert [list(world.part(3)) for world in worlds] == [[0], [1, 2], [0], [1, 2]]
