"""What the tests of single families share: edited folders, one GRPO iteration without reward, the
plain objective.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.core.config import Objective, Optimizer, Video
from fastgrpo.core.policy import Condition, Policy, experts_of, predict, stack
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training import rollout
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Drawn, Plan
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.harness import tiny

CPU = torch.device("cpu")
GROUP = 3
STEPS = 3
ETA = 0.4
CONFIGS = {
    "": "model_index.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}


def changed(folder: Path, copy: Path, part: str, **entries: object) -> Path:
    """A copy of the folder with entries of one part's config changed; part "" is
    model_index.json.
    """
    shutil.copytree(folder, copy)
    file = copy / part / CONFIGS.get(part.split("_")[0], "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return copy


def noise_of(policy: Policy, video: Video) -> Tensor:
    """The same noise on every call, float32 [1, C, F, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *policy.latent_shape(video), generator=generator)


def write_pictures(folder: Path, video: Video) -> None:
    """Two coloured pictures in the clips' size, 0.png and 1.png."""
    for number in range(2):
        pixels = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(number))
        small = Image.fromarray((255 * pixels).byte().numpy())
        small.resize((video.width, video.height), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )


def plan_of(
    policy: Policy, video: Video, group_size: int = GROUP, steps: int = STEPS, eta: float = ETA
) -> Plan:
    """A plan of one iteration whose samples share their initial noise."""
    shape = policy.latent_shape(video)
    grid = policy.time_grid(steps, None, shape)
    return Plan(
        seed=3,
        iteration=0,
        group_size=group_size,
        grid=grid,
        experts=experts_of(policy.network, grid),
        eta=eta,
        shared_noise=True,
        latent_shape=shape,
    )


def draw(policy: Policy, plan: Plan, conditions: list[Condition], size: int) -> Drawn:
    """Trajectories of all prompts in batches of at most `size`; the policy is sharded."""
    slots = range(len(conditions) * plan.group_size)
    with sharding.gathered(policy.network):
        return rollout.draw(policy, plan, conditions, slots, size)


def first_ratio(
    policy: Policy,
    plan: Plan,
    drawn: Drawn,
    conditions: list[Condition],
    size: int,
    world: World,
) -> float:
    """max |log ratio| of an update in batches of `size`, before its first optimizer step; every
    step but the last is trained.
    """
    kept = torch.ones(len(drawn.slots), dtype=torch.bool)
    metrics = update(
        Trainer.create(policy, Optimizer(lr=1e-30, batch_size=size), None),
        Objective(),
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions,
            advantages=kept.float(),
            selected=kept,
        ),
        world,
    )
    assert metrics["update/transitions"] == len(drawn.slots) * (len(plan.grid) - 2)
    return metrics["update/max_log_ratio_first"]


def largest_log_ratio(
    policy: Policy, video: Video, conditions: list[Condition], world: World
) -> float:
    """Before the first optimizer step, over every trainable step, for rollout and update batches of
    1, 2 and 3.
    """
    sharding.shard(policy, world, torch.float32)
    plan, largest = plan_of(policy, video), 0.0
    for rollout_batch, update_batches in ((1, (1, 3)), (2, (2,)), (3, (1, 2, 3))):
        drawn = draw(policy, plan, conditions, rollout_batch)
        assert drawn.final.std() > 0.1
        for update_batch in update_batches:
            ratio = first_ratio(policy, plan, drawn, conditions, size=update_batch, world=world)
            largest = max(largest, ratio)
    return largest


def assert_gradient_is_the_objectives(
    policy: Policy,
    video: Video,
    condition: Condition,
    world: World,
    network: nn.Module,
    predict: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """An update's gradient on one sample is plain autograd's of the objective written out, as
    functions of `network`.

    network: another copy of the policy's, unsharded;  predict: x [1, C, F, H, W] and t [1] to the
    velocity, by it
    """
    sharding.shard(policy, world, torch.float32)
    plan = plan_of(policy, video)
    drawn = draw(policy, plan, [condition], GROUP)
    trainer = tiny.Recorder.create(policy, Optimizer(lr=1e-4, batch_size=2), None)
    assert isinstance(trainer, tiny.Recorder)
    kept = torch.arange(GROUP) == 0
    update(
        trainer,
        Objective(),
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=[condition],
            advantages=0.7 * kept,
            selected=kept,
        ),
        world,
    )

    loss = torch.zeros(())
    for step in range(STEPS - 1):
        t, dt = plan.grid[step], plan.grid[step] - plan.grid[step + 1]
        x, x_next = (
            drawn.trajectories[0].states[step][None],
            drawn.trajectories[0].states[step + 1][None],
        )
        v = predict(x, t[None])
        mean = x - dt * (v + ETA**2 / (2 * t) * (x + (1 - t) * v))
        log_prob = torch.distributions.Normal(mean, ETA * dt.sqrt()).log_prob(x_next).mean()
        loss = loss - 0.7 * (log_prob - log_prob.detach()).exp() / (STEPS - 1)
    loss.backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert expected.keys() == trainer.gradients[0].keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert whole > 0
    for name, grad in expected.items():
        assert (trainer.gradients[0][name] - grad).norm() <= 1e-5 * whole, name


def assert_checkpointing_changes_memory_alone(
    plain: Policy, recomputing: Policy, x: Tensor, about: Condition
) -> None:
    """Gradients equal bit for bit, and every block ran a second time.

    about: the conditions of the batch
    """
    runs = dict.fromkeys(recomputing.blocks, 0)

    def count(block: nn.Module, inputs: object) -> None:
        runs[block] += 1

    for block in runs:
        block.register_forward_pre_hook(count)
    for policy in (plain, recomputing):
        policy.velocity(x, torch.full((len(x),), 0.6), about).square().mean().backward()
    assert set(runs.values()) == {2}
    for one, other in zip(
        plain.network.parameters(), recomputing.network.parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None)  # what no image token sees has none
        if one.grad is not None and other.grad is not None:
            assert torch.equal(one.grad, other.grad)


def assert_nothing_waits_for_the_device(
    policy: Policy, video: Video, conditions: list[Condition]
) -> None:
    """A fake tensor has no values, so that reading one, which would wait for a GPU, is an error."""
    plan = plan_of(policy, video)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, times = torch.empty(len(conditions), *plan.latent_shape), torch.empty(len(plan.grid))
        v = predict(policy, x, times[0].expand(len(x)), stack(conditions), plan.expert(0))
        assert policy.transition(x, v=v, t=times[0], t_next=times[1], eta=ETA)[0].shape == x.shape


def outside_blocks(network: nn.Module, blocks: list[nn.Module]) -> set[str]:
    """Modules with parameters of their own that are in no block, and so in the root's FSDP
    group.
    """
    inside = {id(p) for block in blocks for p in block.parameters()}
    return {
        name.rpartition(".")[0] for name, p in network.named_parameters() if id(p) not in inside
    }
