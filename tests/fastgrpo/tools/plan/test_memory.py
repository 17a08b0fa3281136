"""The plan of DiffusionNFT and of an initial policy against what runs of the tiny model keep and
send.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastgrpo.core import config
from fastgrpo.core.config import Objective, Optimizer, Recipe
from fastgrpo.core.policy import Policy, move
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import Group, World
from fastgrpo.tools.plan import phases, planner
from fastgrpo.tools.plan.costs import compute, memory
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.simulation.counters import Sent
from fastgrpo.tools.plan.subject import subject
from fastgrpo.training import trainer as training
from fastgrpo.training import update
from fastgrpo.training.method import Experience
from fastgrpo.training.methods.nft import METHOD
from fastgrpo.training.policies import Reference, Unadapted
from fastgrpo.training.rollout import Plan
from fastgrpo.training.trainer import Trainer
from tests import ROOT
from tests.harness import tiny

LAUNCH = ROOT / "launch"
CPU = torch.device("cpu")
NFT = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")


def recipe(*overrides: str, name: str = "t2v_tiny") -> Recipe:
    return config.load(LAUNCH / f"{name}.toml", overrides)


# --- DiffusionNFT
# -------------------------------------------------------------------------------------------------


def test_trajectories_of_nft_are_what_its_samples_hold() -> None:
    """x_0 alone, which the update noises again."""
    policy, slots = tiny.load_policy(), list(range(tiny.GROUP))
    drawn = METHOD.sample(
        policy,
        METHOD.plan(tiny.plan(policy, shared_noise=False), Objective()),
        tiny.encode(),
        slots,
        {},
    )
    held = sum(
        tensor.numel() * tensor.itemsize
        for kept in drawn.trajectories.values()
        for tensor in (*kept.states.values(), *kept.velocities.values(), *kept.log_probs.values())
    )
    asked = recipe(*NFT, "rollout.steps=5", "video.frames=9", "video.height=24", "video.width=40")
    job = subject(asked, 1, 8).job
    assert asked.steps_trained == 3
    assert memory.trajectories(job, len(slots)) == held


def test_velocities_are_those_of_the_trained_states() -> None:
    """Of 12 samples 6 are selected, with 3 states each; none is on the device with store=host."""
    small = ("rollout.steps=5", "video.frames=9", "video.height=24", "video.width=40")
    few = ("prompts.per_iteration=3", "rollout.samples_per_prompt=4", "objective.best_of_n=2")
    job = subject(recipe(*NFT, *small, *few), 1, 8).job
    latent = tiny.plan(tiny.load_policy(), shared_noise=False).latent_shape
    states, _ = phases._update_work(job)
    assert memory.velocities(job, states) == {"velocities": 4 * math.prod(latent) * 6 * 3}
    assert not memory.velocities(subject(recipe(*NFT, "rollout.store=host"), 1, 8).job, states)
    assert not memory.velocities(subject(recipe(*small), 1, 8).job, states)


def test_raw_weights_are_what_the_average_displaces(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer.create(tiny.load_policy(), Optimizer(ema_decay=0.5), None)
    copied: list[Mapping[str, Tensor]] = []
    monkeypatch.setattr(training, "_copy", lambda values, parameters: copied.append(values))
    with training.averaged_weights(trainer):
        pass
    _, raw = copied  # what is put back
    job = subject(recipe(*NFT), 1, 8).job
    assert memory.raw_weights(job) == {
        "raw weights": sum(v.numel() * v.itemsize for v in raw.values())
    }


def test_raw_weights_lie_there_while_samples_are_drawn_and_decoded() -> None:
    machine = Machine(gpu("h800"), Achieved())

    def phases_with(*overrides: str) -> set[str]:
        found = planner.plan(recipe(*overrides, name="t2v_hunyuan"), 64, machine)
        weights = {phase.name: phase.memory.get("raw weights", 0.0) for phase in found.phases}
        assert set(weights.values()) <= {0.0, memory.states(found.subject.job).get("average")}
        return {name for name, count in weights.items() if count}

    assert phases_with(*NFT) == {"rollout", "decode"}
    assert phases_with("optimizer.ema_decay=0.5") == set()
    assert phases_with(*NFT, "distributed.offload=true") == set()


def test_raw_weights_count_before_the_rollout_chooses_whole_weights() -> None:
    """With memory for 1.5 times the weights beside the states, but not beside the raw weights
    too.
    """
    found = subject(recipe(*NFT, name="t2v_hunyuan"), 8, 8)
    whole = sum(compute.gathered_bytes(found.job, unit) for unit in found.job.network.units)
    held = sum(memory.states(found.job).values()) + found.auxiliary.vae * found.job.element
    raw = memory.raw_weights(found.job)["raw weights"]

    def machine(room: float) -> Machine:
        card = gpu("h800")
        return Machine(
            type(card)(**{**vars(card), "memory_gib": room / 2**30}),
            Achieved(reserve_gib=0.0, fragmentation=0.0),
        )

    assert not phases.holds_whole(found, machine(held + 1.5 * whole + 0.9 * raw))
    assert phases.holds_whole(found, machine(held + 1.5 * whole + 1.1 * raw))


# --- the initial policy
# -------------------------------------------------------------------------------------------


@contextmanager
def two_ranks(sp: int) -> Iterator[World]:
    """The first of two ranks of which the other does not exist: collectives are counted and bring
    nothing.
    """
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        group = Group(dist.group.WORLD, 0, 2) if sp == 2 else None
        yield World(
            rank=0,
            size=2,
            device=CPU,
            mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)),
            sp=group,
        )
    finally:
        dist.destroy_process_group()


def sharded(asked: Recipe, world: World) -> Policy:
    policy = policies.load(asked.model, CPU, asked.lora)
    sharding.shard(policy, world, torch.float32)
    return policy


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("distributed.sp=2",),
        ("distributed.sp=2", "model.gradient_checkpointing=true"),
        ("lora.rank=4",),
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_micro_batches_with_an_initial_policy_send_what_is_planned(
    overrides: tuple[str, ...],
) -> None:
    """To the byte, of the update's own micro-batch; the second network's root is gathered in the
    first, and stays.
    """
    asked = recipe("objective.kl_weight=0.1", *overrides)
    condition = move(tiny.encode()[0], CPU)
    job = subject(asked, 2, 8, text=len(condition["text"])).job
    counted = []
    with two_ranks(job.sp) as world:
        policy = sharded(asked, world)
        reference: Reference = Unadapted(policy)
        if not job.lora:
            reference = sharded(asked, world)
            reference.network.requires_grad_(False)
        trainer = Trainer.create(policy, asked.optimizer, reference)
        plan_ = Plan(
            seed=0,
            iteration=0,
            group_size=2,
            grid=torch.linspace(1, 0, 3),
            eta=0.3,
            shared_noise=True,
            latent_shape=job.latent,
        )
        experience = Experience(
            plan=plan_,
            conditions=[condition],
            trajectories={},
            advantages=torch.ones(2),
            selected=torch.ones(2),
        )
        for _ in range(2):
            with Sent(1) as sent:
                update._dummy_loss(trainer, experience, world, 0).backward()
            counted.append(dict(sent.sent))
        if job.second_network:
            states, root = memory.states(job), held_by_root(reference)
            assert states["initial policy"] == states["weights"] + root
    planned = compute.micro_batch(job, 1)
    expected = {
        "all-gather": planned.gather,
        "reduce-scatter": planned.scatter,
        "all-to-all": planned.exchange,
        "gather of tokens": planned.collect,
    }
    first = compute.gathered_bytes(job, job.network.rest) / 2 if job.second_network else 0.0
    assert counted[1] == {kind: count for kind, count in expected.items() if count}
    assert counted[0] == counted[1] | {"all-gather": planned.gather + first}


def held_by_root(reference: Any) -> int:
    """Bytes of whole weights that FSDP2 holds for a network's root between forwards."""
    group = reference.network._get_fsdp_state()._fsdp_param_group
    assert group.is_unsharded
    return sum(p.unsharded_param.untyped_storage().nbytes() for p in group.fsdp_params)


def test_the_update_has_the_initial_policys_share_of_the_wire() -> None:
    """The blocks once more in each micro-batch."""
    machine = Machine(gpu("h800"), Achieved())
    link = {}
    for weight in ("0.0", "0.1"):
        found = planner.plan(
            recipe(f"objective.kl_weight={weight}", name="t2v_hunyuan"), 8, machine
        )
        (link[weight],) = (phase.link for phase in found.phases if phase.name == "update")
    job = found.subject.job
    blocks = sum(compute.gathered_bytes(job, unit) for unit in job.network.blocks)
    _, batches = phases._update_work(job)
    assert link["0.1"] - link["0.0"] == pytest.approx(7 / 8 * blocks * batches)
