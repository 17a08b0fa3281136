"""One GRPO iteration of the shipped tiny model without reward or files: what several tests start
from.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.core.config import Model, Objective, Optimizer, Video
from fastgrpo.core.policy import Condition, Policy, Prompt, move
from fastgrpo.core.processes import local_rank
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training import rollout
from fastgrpo.training.method import Experience, Method
from fastgrpo.training.rollout import Drawn, Plan, Trajectory
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests import ROOT

FOLDER = ROOT / "data" / "tiny_hunyuan_video"
# 45 video tokens: an odd number, which sequence parallelism must split
VIDEO = Video(frames=9, height=24, width=40)
PROMPTS = [  # two text lengths
    "a red circle moves left slowly",
    "watch as one blue square glides upwards quickly",
    "gently a green triangle drifts down",
]
GROUP = 4
STEPS = 5


@dataclass
class Recorder(Trainer):
    """A trainer that keeps each optimizer step's whole gradients."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def step(self) -> Tensor:
        grads = {}
        for name, parameter in self.policy.network.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                grads[name] = (
                    (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu().clone()
                )
        self.gradients.append(grads)
        return super().step()


def device() -> torch.device:
    """The device that `open_world` gives this process."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def without_gpus() -> Iterator[None]:
    """Take the CPU's path inside, whatever the machine has."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        yield


def load_policy(world: World | None = None) -> Policy:
    policy = policies.load(Model(family="hunyuan_video", path=str(FOLDER)), device())
    if world is not None:
        sharding.shard(policy, world, torch.float32)
    return policy


def plan(policy: Policy, shared_noise: bool = True) -> Plan:
    shape = policy.latent_shape(VIDEO)
    return Plan(
        seed=3,
        iteration=0,
        group_size=GROUP,
        grid=policy.time_grid(STEPS, None, shape).to(device()),
        eta=0.4,
        shared_noise=shared_noise,
        latent_shape=shape,
        trained=3,
    )


def encode() -> list[Condition]:
    """The prompts' conditions."""
    settings = Model(family="hunyuan_video", path=str(FOLDER))
    with policies.encoder(settings, VIDEO, device()) as encoder:
        return [
            move(condition, device()) for condition in encoder([Prompt(text) for text in PROMPTS])
        ]


def draw(
    policy: Policy, the_plan: Plan, conditions: list[Condition], world: World, batch_size: int
) -> Drawn:
    """This rank's samples."""
    share = world.share(len(PROMPTS) * GROUP)
    with sharding.gathered(policy.network):
        return rollout.draw(policy, the_plan, conditions, share, batch_size)


def draw_by(
    method: Method,
    trainer: Trainer,
    the_plan: Plan,
    conditions: list[Condition],
    slots: range,
    batch_size: int,
) -> Drawn:
    """The slots' samples as a method without shared noise draws them, with its own weights."""
    network, parts = trainer.policy.network, []
    with method.drawing_weights(trainer), sharding.gathered(network):
        for batch in rollout.batches(slots, conditions, GROUP, batch_size):
            parts.append(method.sample(trainer.policy, the_plan, conditions, batch, {}))
    final = {slot: x for part in parts for slot, x in zip(part.slots, part.final, strict=True)}
    kept = {slot: trajectory for part in parts for slot, trajectory in part.trajectories.items()}
    return Drawn(list(slots), torch.stack([final[slot] for slot in slots]), kept)


def move_average(trainer: Trainer) -> None:
    """Have the moving average differ from the trained weights, alike on any mesh."""
    for value in trainer.ema.values():
        value.mul_(1.02)


def states(drawn: Drawn, the_plan: Plan) -> Tensor:
    """[B, T, C, F, H, W]: each sample's state before each step, of a plan that trains every noisy
    step.
    """
    return torch.stack(
        [
            torch.stack([drawn.trajectories[s].states[n] for n in range(the_plan.steps)])
            for s in drawn.slots
        ]
    )


def log_probs(drawn: Drawn, the_plan: Plan) -> Tensor:
    """[B, T - 1], likewise."""
    return torch.stack(
        [
            torch.stack([drawn.trajectories[s].log_probs[n] for n in the_plan.noisy])
            for s in drawn.slots
        ]
    )


def advantages() -> Tensor:
    """Made-up advantages, one per slot."""
    return torch.randn(len(PROMPTS) * GROUP, generator=torch.Generator().manual_seed(5))


def judge(x_0: Tensor, slots: Sequence[int]) -> Tensor:
    """A made-up differentiable reward of latents [B, C, F, H, W], which differs by slot.

    returns [B]
    """
    wanted = torch.tensor([float(slot % 3) for slot in slots], device=x_0.device)
    return -(x_0.flatten(1).mean(1) - wanted).square()


def moved_reference(world: World | None = None) -> Policy:
    """An initial policy that is not the trained one."""
    reference = load_policy(world)
    with torch.no_grad():
        for parameter in reference.network.parameters():
            parameter.mul_(0.98)
    return reference


def run_update(
    trainer: Trainer,
    the_plan: Plan,
    trajectories: Mapping[int, Trajectory],
    conditions: list[Condition],
    world: World,
    kept: Tensor | None = None,
    objective: Objective = Objective(clip_range=1e-4),  # noqa: B008  it is frozen
) -> dict[str, float]:
    kept = torch.ones(len(PROMPTS) * GROUP, dtype=torch.bool) if kept is None else kept
    return update(
        trainer,
        objective,
        Experience(
            plan=the_plan,
            trajectories=trajectories,
            conditions=conditions,
            advantages=advantages(),
            selected=kept,
            judge=judge,
        ),
        world,
    )


def settings(
    batch_size: int, updates: int = 1, lr: float = 1e-4, ema_decay: float = 0.0
) -> Optimizer:
    return Optimizer(
        lr=lr, batch_size=batch_size, updates_per_iteration=updates, ema_decay=ema_decay
    )
