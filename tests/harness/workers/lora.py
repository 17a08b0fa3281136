"""One rank of tests/models/test_lora.py: two updates of adapters, a checkpoint between them, and
resuming from it.

argv: folder for the checkpoint and for result.pt
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress
from fastgrpo.core.config import Checkpoint, Lora, Model, Objective
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.core.processes import leave
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World, open_world
from fastgrpo.training.method import Experience
from fastgrpo.training.policies import Reference, Unadapted
from fastgrpo.training.rollout import Plan, Trajectory
from fastgrpo.training.update import update
from tests.harness import tiny

LORA = Lora(rank=4, alpha=6.0)
OBJECTIVE = Objective(clip_range=1e-4, kl_weight=0.5)


def stir(network: nn.Module) -> None:
    """Adapters as after some training: B no longer 0."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(
                parameter.device
            )


def load_policy(world: World, stirred: bool) -> Policy:
    """The tiny HunyuanVideo with adapters, sharded."""
    policy = policies.load(Model(family="hunyuan_video", path=str(tiny.FOLDER)), world.device, LORA)
    if stirred:
        stir(policy.network)
    sharding.shard(policy, world, torch.float32)
    return policy


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    plain = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().cpu().clone() for name, t in plain.items()}


def adapters(policy: Policy) -> dict[str, Tensor]:
    return whole({name: p for name, p in policy.network.named_parameters() if p.requires_grad})


def create_trainer(policy: Policy, reference: Reference, lr: float) -> tiny.Recorder:
    settings = tiny.settings(8, lr=lr).model_copy(update={"ema_decay": 0.9})
    trainer = tiny.Recorder.create(policy, settings, reference)
    assert isinstance(trainer, tiny.Recorder)
    return trainer


def train(
    trainer: tiny.Recorder,
    plan: Plan,
    trajectories: Mapping[int, Trajectory],
    conditions: list[Condition],
    world: World,
) -> dict[str, float]:
    kept = torch.ones(len(tiny.PROMPTS) * tiny.GROUP, dtype=torch.bool)
    return update(
        trainer,
        OBJECTIVE,
        Experience(
            plan=plan,
            trajectories=trajectories,
            conditions=conditions,
            advantages=tiny.advantages(),
            selected=kept,
        ),
        world,
    )


def run(folder: Path, world: World) -> dict[str, Any]:
    """returns what the test compares, the same on every rank"""
    policy, conditions = load_policy(world, stirred=True), tiny.encode()
    initial = adapters(policy)
    plan = replace(tiny.plan(policy), trained=1)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    trainer = create_trainer(policy, Unadapted(policy), 1e-3)
    metrics = train(
        trainer, plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )
    checkpoints = Checkpoints(folder / "checkpoints", Checkpoint(), world)
    checkpoints.save(trainer, Progress(iteration=1))
    train(trainer, plan=plan, trajectories=trajectories, conditions=conditions, world=world)

    fresh = load_policy(world, stirred=False)
    resumed = create_trainer(fresh, Unadapted(fresh), 1e-3)
    progress = checkpoints.load(resumed)
    train(resumed, plan=plan, trajectories=trajectories, conditions=conditions, world=world)
    return {
        "initial": initial,
        "gradients": trainer.gradients,
        "metrics": metrics,
        "through": adapters(policy)
        | {f"ema.{name}": value for name, value in whole(trainer.ema).items()},
        "resumed": adapters(resumed.policy)
        | {f"ema.{name}": value for name, value in whole(resumed.ema).items()},
        "progress": progress.iteration,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with open_world() as world:
        result = run(folder, world)
        if world.main:
            torch.save(result, folder / "result.pt")
    leave(0)
