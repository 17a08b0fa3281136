"""Prompts' conditions to trajectories: SDE sampling with keyed noise, and the ODE for evaluation.

A sample's slot is prompt * G + sample within its iteration. All of a sample's noise is keyed by (seed, iteration,
prompt, sample, step), so how slots are dealt over ranks and batches changes nothing but the speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo import noise
from fastgrpo.distributed import World
from fastgrpo.flow import gaussian_log_prob
from fastgrpo.models import Condition, Policy, shape_key, stack

Round = tuple[list[int], bool]  # a batch of slots, and whether its result counts


@dataclass(frozen=True)
class Plan:
    """What is drawn in an iteration, the same on every rank."""

    seed: int
    iteration: int
    group_size: int
    grid: Tensor  # [T + 1] float32, from 1 to 0
    eta: float
    shared_noise: bool
    latent_shape: tuple[int, ...]  # (C, F, H, W)

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    def initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """x at t = 1.  returns [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = []
        for slot in slots:
            prompt, sample = divmod(slot, self.group_size)
            keys.append(("initial", self.seed, self.iteration, prompt, 0 if self.shared_noise else sample))
        return noise.normal(keys, self.latent_shape, device)

    def step_noise(self, slots: Sequence[int], step: int, device: torch.device) -> Tensor:
        """The noise that step injects.  returns [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = [
            ("step", self.seed, self.iteration, *divmod(slot, self.group_size), step) for slot in slots
        ]
        return noise.normal(keys, self.latent_shape, device)


@dataclass
class Trajectories:
    """Samples of one rank. B samples, T steps; the last step has no log-probability."""

    slots: list[int]
    states: Tensor  # [B, T, C, F, H, W] float32: x at grid[0] .. grid[T - 1]
    log_probs: Tensor  # [B, T - 1] float32, of the transition from states[:, i] to states[:, i + 1]
    final: Tensor  # [B, C, F, H, W] float32: x_0


def batches(slots: Sequence[int], conditions: Sequence[Condition], group_size: int, size: int) -> Iterator[list[int]]:
    """Slots in batches of at most `size` whose conditions have equal shapes, so that nothing is padded.

    conditions: one per prompt of the iteration
    """
    by_shape: dict[object, list[int]] = {}
    for slot in slots:
        by_shape.setdefault(shape_key(conditions[slot // group_size]), []).append(slot)
    for members in by_shape.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


def rounds(
    total: int, conditions: Sequence[Condition], group_size: int, size: int, world: World, lockstep: bool
) -> Iterator[Round]:
    """The batches of this rank's group, each with whether its result counts.

    lockstep: with sharded weights every forward is a collective, so a group with fewer batches repeats its last one
    until it has run as many as the others.
    """
    own = list(batches(world.share(total), conditions, group_size, size))
    yield from ((batch, True) for batch in own)
    if lockstep:
        shares = [world.share(total, group) for group in range(world.groups)]
        most = max(sum(1 for _ in batches(share, conditions, group_size, size)) for share in shares)
        filler = own[-1] if own else [0]
        yield from ((filler, False) for _ in range(most - len(own)))


@torch.no_grad()
def sample(policy: Policy, plan: Plan, conditions: Sequence[Condition], slots: list[int]) -> Trajectories:
    """Draw one batch of trajectories from the reverse SDE; its last step is the deterministic estimate of x_0."""
    prompts = [slot // plan.group_size for slot in slots]
    distinct = sorted(set(prompts))
    row_of = torch.tensor([distinct.index(prompt) for prompt in prompts], device=plan.grid.device)
    condition_of = stack([conditions[prompt] for prompt in distinct])
    condition = {name: tensor[row_of] for name, tensor in condition_of.items()}

    x = plan.initial_noise(slots, plan.grid.device)
    states, log_probs = [x], []
    for step, (t, t_next) in enumerate(pairwise(plan.grid[:-1])):
        if step == 0 and plan.shared_noise:  # equal states: one evaluation serves the whole group
            first = x[[prompts.index(prompt) for prompt in distinct]]
            v = policy.velocity(first, t.expand(len(first)), condition_of)[row_of]
        else:
            v = policy.velocity(x, t.expand(len(x)), condition)
        mean, std = policy.transition(x, v, t, t_next, plan.eta)
        x = mean + std * plan.step_noise(slots, step, plan.grid.device)
        log_probs.append(gaussian_log_prob(x, mean, std))
        states.append(x)
    t = plan.grid[-2]
    final = policy.clean_estimate(x, policy.velocity(x, t.expand(len(x)), condition), t)
    return Trajectories(slots, torch.stack(states, 1), torch.stack(log_probs, 1), final)


@torch.no_grad()
def sample_ode(policy: Policy, x: Tensor, grid: Tensor, condition: Condition) -> Tensor:
    """The deterministic sampler of evaluation and pictures: Euler steps of the flow.  x: noise;  returns x_0"""
    for t, t_next in pairwise(grid[:-1]):
        v = policy.velocity(x, t.expand(len(x)), condition)
        x, _ = policy.transition(x, v, t, t_next, 0.0)
    return policy.clean_estimate(x, policy.velocity(x, grid[-2].expand(len(x)), condition), grid[-2])


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """Batches of one rank put together, in the order of their slots."""
    slots = [slot for part in parts for slot in part.slots]
    order = sorted(range(len(slots)), key=slots.__getitem__)
    index = torch.tensor(order, device=parts[0].final.device)
    return Trajectories(
        [slots[i] for i in order],
        torch.cat([part.states for part in parts])[index],
        torch.cat([part.log_probs for part in parts])[index],
        torch.cat([part.final for part in parts])[index],
    )
