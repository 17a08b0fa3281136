"""Prompts' conditions to trajectories: SDE sampling with keyed noise, and the ODE for evaluation.

A sample's slot is prompt * G + sample within its iteration. All of a sample's noise is keyed by
(seed, iteration, prompt, sample, step), so how slots are dealt over ranks and batches changes
nothing but the speed.

Samples of a group that share their initial noise are equal until the first noisy step: the steps
before it, and its prediction, are computed once for the group (`shared_prefixes`). Of each sample
only the transitions that the update will train are kept; its key determines them beforehand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.algorithm import noise, samplers, selection
from fastgrpo.core.memory import to_host
from fastgrpo.core.policy import Condition, Policy, shape_key, stack
from fastgrpo.parallel.world import World

Round = tuple[list[int], bool]  # a batch of slots or prompts, and whether its result counts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The samples of an iteration and how they are drawn, the same on every rank."""

    seed: int
    iteration: int
    group_size: int
    grid: Tensor  # [T + 1] float32, from 1 to 0
    eta: float
    shared_noise: bool
    latent_shape: tuple[int, ...]  # (C, F, H, W)
    window: range | None = None  # the noisy steps; None: all but the last
    trained: int | None = None  # transitions trained per sample; None: all noisy ones
    choice: str = "random"  # which transitions, see selection.choose_timesteps
    sampler: str = "dance"  # the noisy steps' transition, see samplers
    store: str = "device"  # or host: the memory in which the chosen transitions wait

    @property
    def steps(self) -> int:
        """T, the number of the grid's steps."""
        return len(self.grid) - 1

    @property
    def noisy(self) -> range:
        """The steps that draw noise."""
        return range(self.steps - 1) if self.window is None else self.window

    @property
    def first(self) -> int:
        """The step in which a group's samples part; with shared noise they are equal before it."""
        return self.noisy.start if self.shared_noise else 0

    def chosen(self, slot: int) -> list[int]:
        """The steps of a sample that the update trains, in increasing order."""
        count = len(self.noisy) if self.trained is None else self.trained
        key = ("timesteps", self.seed, self.iteration, *divmod(slot, self.group_size))
        return selection.choose_timesteps(self.noisy, count, self.choice, key)

    def initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """The states x at t = 1.  returns float32 [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = []
        for slot in slots:
            prompt, sample = divmod(slot, self.group_size)
            sample = 0 if self.shared_noise else sample
            keys.append(("initial", self.seed, self.iteration, prompt, sample))
        return noise.normal(keys, self.latent_shape, device)

    def step_noise(self, slots: Sequence[int], step: int, device: torch.device) -> Tensor:
        """The noise that a step injects.  returns float32 [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = []
        for slot in slots:
            prompt, sample = divmod(slot, self.group_size)
            keys.append(("step", self.seed, self.iteration, prompt, sample, step))
        return noise.normal(keys, self.latent_shape, device)


@dataclass(frozen=True)
class SharedPrefix:
    """The state of a group's samples before step `plan.first`, and the network's prediction."""

    x: Tensor  # [C, F, H, W] float32
    v: Tensor  # [C, F, H, W] float32


@dataclass
class Trajectory:
    """The states of one sample, and their log-probabilities or velocities, for the update."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """Before and after each chosen step: x [C, F, H, W] float32."""
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    """For each chosen step: float32 scalar."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """For steps whose old mean the update evaluated itself: [C, F, H, W] float32."""
    velocities: dict[int, Tensor] = field(default_factory=dict)
    """For steps at which the update evaluated the moving average: [C, F, H, W] float32."""


@dataclass
class Drawn:
    """A batch of B samples in the order of `slots`."""

    slots: list[int]
    final: Tensor  # [B, C, F, H, W] float32: x_0
    trajectories: dict[int, Trajectory]  # by slot


def batches(
    slots: Sequence[int],
    conditions: Sequence[Condition],
    group_size: int,
    size: int,
) -> Iterator[list[int]]:
    """Slots in batches of at most `size` with conditions of equal shapes, so without padding.

    conditions: one per prompt of the iteration
    """
    by_shape: dict[object, list[int]] = {}
    for slot in slots:
        by_shape.setdefault(shape_key(conditions[slot // group_size]), []).append(slot)
    for members in by_shape.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """The distribution of an iteration's samples over groups of ranks and batches."""

    conditions: Sequence[Condition]  # one per prompt of the iteration
    group_size: int
    batch_size: int  # samples per forward
    world: World
    lockstep: bool = False
    """Every forward is a collective, since the weights are sharded: a group with fewer batches
    repeats its last one until it has run as many as the others.
    """

    @property
    def total(self) -> int:
        """Samples of all ranks."""
        return len(self.conditions) * self.group_size

    def rounds(self) -> Iterator[Round]:
        """The batches of this rank's group, each with whether its result counts."""
        return self._in_step(self.samples_of)

    def prefix_rounds(self) -> Iterator[Round]:
        """The batches of this rank's group's prompts for `shared_prefixes`, like `rounds`."""
        return self._in_step(self.prompts_of)

    def batch_sizes(self) -> dict[int, tuple[int, int]]:
        """How many rows the network saw at once, by slot, of all ranks.

        returns (rows beside the prompt's shared state, rows beside the sample's own states)
        """
        sizes: dict[int, tuple[int, int]] = {}
        for group in range(self.world.groups):
            of_prompt = {p: len(batch) for batch in self.prompts_of(group) for p in batch}
            for batch in self.samples_of(group):
                for slot in batch:
                    sizes[slot] = of_prompt[slot // self.group_size], len(batch)
        return sizes

    def samples_of(self, group: int) -> list[list[int]]:
        """A group of ranks' samples in batches."""
        share = self.world.share(self.total, group)
        return list(batches(share, self.conditions, self.group_size, self.batch_size))

    def prompts_of(self, group: int) -> list[list[int]]:
        """A group of ranks' prompts in batches."""
        share = self.world.share(self.total, group)
        end = -(-share.stop // self.group_size) if share else 0
        prompts = range(share.start // self.group_size, end)
        return list(batches(prompts, self.conditions, 1, self.batch_size))

    def _in_step(self, of_group: Callable[[int], list[list[int]]]) -> Iterator[Round]:
        own = of_group(self.world.group)
        yield from ((batch, True) for batch in own)
        if self.lockstep:
            most = max(len(of_group(group)) for group in range(self.world.groups))
            filler = own[-1] if own else [0]
            yield from ((filler, False) for _ in range(most - len(own)))


@torch.no_grad()
def shared_prefixes(
    policy: Policy, plan: Plan, conditions: Sequence[Condition], prompts: Sequence[int]
) -> dict[int, SharedPrefix]:
    """Follow the ODE from the shared noise to the first noisy step, once per prompt."""
    condition = stack([conditions[prompt] for prompt in prompts])
    x = plan.initial_noise([prompt * plan.group_size for prompt in prompts], plan.grid.device)
    for t, t_next in pairwise(plan.grid[: plan.first + 1]):
        v = policy.velocity(x, t.expand(len(x)), condition)
        x, _ = policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)
    v = policy.velocity(x, plan.grid[plan.first].expand(len(x)), condition)
    return {prompt: SharedPrefix(x[row], v[row]) for row, prompt in enumerate(prompts)}


@torch.no_grad()
def sample(
    policy: Policy,
    plan: Plan,
    conditions: Sequence[Condition],
    slots: list[int],
    prefixes: Mapping[int, SharedPrefix],
) -> Drawn:
    """Draw one batch of trajectories; the last step is the deterministic estimate of x_0.

    prefixes: by prompt, where the plan shares noise
    """
    prompts = [slot // plan.group_size for slot in slots]
    condition = stack([conditions[prompt] for prompt in prompts])
    sampler = samplers.of(policy, plan.sampler)
    chosen = {slot: plan.chosen(slot) for slot in slots}
    trajectories = {slot: Trajectory() for slot in slots}
    if plan.shared_noise:
        x = torch.stack([prefixes[prompt].x for prompt in prompts])
        v = torch.stack([prefixes[prompt].v for prompt in prompts])
    else:
        x = plan.initial_noise(slots, plan.grid.device)
        v = policy.velocity(x, plan.grid[0].expand(len(x)), condition)
    for step in range(plan.first, plan.steps - 1):
        t, t_next = plan.grid[step], plan.grid[step + 1]
        if step > plan.first:
            v = policy.velocity(x, t.expand(len(x)), condition)
        if step not in plan.noisy:
            x, _ = policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)
            continue
        mean, std = sampler.transition(x, v, t=t, t_next=t_next, eta=plan.eta)
        x_next = mean + std * plan.step_noise(slots, step, plan.grid.device)
        log_prob = sampler.log_prob(x_next, mean, std)
        for row, slot in enumerate(slots):
            if step in chosen[slot]:
                trajectory = trajectories[slot]
                if step not in trajectory.states:
                    trajectory.states[step] = stored(x[row], plan)
                trajectory.states[step + 1] = stored(x_next[row], plan)
                trajectory.log_probs[step] = log_prob[row]
        x = x_next
    t = plan.grid[-2]
    if plan.steps - 1 > plan.first:
        v = policy.velocity(x, t.expand(len(x)), condition)
    return Drawn(slots, policy.clean_estimate(x, v, t), trajectories)


def stored(x: Tensor, plan: Plan) -> Tensor:
    """A copy of a sample's state, since a view would keep the whole batch in memory.

    x: [C, F, H, W];  returns a copy like x, on the device or in the host's pinned memory
    """
    return to_host(x) if plan.store == "host" and x.is_cuda else x.clone()


@torch.no_grad()
def sample_ode(policy: Policy, x: Tensor, grid: Tensor, condition: Condition) -> Tensor:
    """Follow the flow's ODE by Euler steps: the deterministic sampler of evaluation and pictures.

    x: noise [B, C, F, H, W] float32;  grid: [T + 1] from 1 to 0;  returns x_0 like x
    """
    for t, t_next in pairwise(grid[:-1]):
        v = policy.velocity(x, t.expand(len(x)), condition)
        x, _ = policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)
    t = grid[-2]
    return policy.clean_estimate(x, policy.velocity(x, t.expand(len(x)), condition), t)


def draw(
    policy: Policy,
    plan: Plan,
    conditions: Sequence[Condition],
    slots: Sequence[int],
    size: int,
) -> Drawn:
    """Draw all of the slots in batches of at most `size`, on this rank alone.

    The rank must hold the weights whole.
    """
    prefixes: dict[int, SharedPrefix] = {}
    if plan.shared_noise:
        own = sorted({slot // plan.group_size for slot in slots})
        for prompts in batches(own, conditions, 1, size):
            prefixes |= shared_prefixes(policy, plan, conditions, prompts)
    parts = [
        sample(policy, plan=plan, conditions=conditions, slots=batch, prefixes=prefixes)
        for batch in batches(slots, conditions, plan.group_size, size)
    ]
    final = {slot: x for part in parts for slot, x in zip(part.slots, part.final, strict=True)}
    trajectories: dict[int, Trajectory] = {}
    for part in parts:
        trajectories |= part.trajectories
    return Drawn(list(slots), torch.stack([final[slot] for slot in slots]), trajectories)
