"""Prompts' conditions to trajectories: SDE sampling with keyed noise, and the ODE for evaluation.

The steps before samples with one initial noise part, and the prediction there, are computed once
for them (`shared_prefixes`). Of each sample only the transitions that the update will train are
kept; its key determines them beforehand.

Where prompts have noisy steps of their own, all rows of a forward are at one time nevertheless: a
row joins its batch where it leaves its prefix, and leaves a batch of prefixes there.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.algorithm import samplers
from fastgrpo.core.memory import to_host
from fastgrpo.core.policy import Condition, Policy, experts_of, predict, stack
from fastgrpo.training.rollout.dealing import batches
from fastgrpo.training.rollout.plan import Plan


@dataclass(frozen=True)
class SharedPrefix:
    """The state of samples with one initial noise before the step in which they part, and the
    network's prediction there.
    """

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


@torch.no_grad()
def shared_prefixes(
    policy: Policy, plan: Plan, conditions: Sequence[Condition], prefixes: Sequence[int]
) -> dict[int, SharedPrefix]:
    """Follow the ODE from each shared noise to its samples' first noisy step."""
    prompt_of = {prefix: prefix // plan.prefixes_per_prompt for prefix in prefixes}
    left = sorted(prefixes, key=lambda prefix: plan.first_of(prompt_of[prefix]))
    condition = stack([conditions[prompt_of[prefix]] for prefix in left])
    x = plan.initial_noise([prefix * plan.sharing for prefix in left], plan.grid.device)
    found: dict[int, SharedPrefix] = {}
    for step in range(plan.firsts.stop):
        t, t_next = plan.grid[step], plan.grid[step + 1]
        v = predict(policy, x, t.expand(len(x)), condition, plan.expert(step))
        here = [prefix for prefix in left if plan.first_of(prompt_of[prefix]) == step]
        for row, prefix in enumerate(here):  # copies, since a view would keep the batch in memory
            found[prefix] = SharedPrefix(x[row].clone(), v[row].clone())
        left = left[len(here) :]
        if not left and not plan.lockstep:
            break
        if left:  # else the last ones again, as often as on other ranks
            x, v = x[len(here) :], v[len(here) :]
            condition = {name: rows[len(here) :] for name, rows in condition.items()}
            x, _ = policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)
    return found


@torch.no_grad()
def sample(
    policy: Policy,
    plan: Plan,
    conditions: Sequence[Condition],
    slots: list[int],
    prefixes: Mapping[int, SharedPrefix],
) -> Drawn:
    """Draw one batch of trajectories; the last step is the deterministic estimate of x_0.

    prefixes: by number, where the plan shares noise
    returns the samples in the order of their noisy steps
    """
    batch = _Batch.begun(policy, plan, conditions, slots, prefixes)
    for step in range(plan.firsts.start, plan.steps - 1):
        batch.predict(step)
        batch.move(step)
    batch.predict(plan.steps - 1)
    final = policy.clean_estimate(batch.x, batch.v, plan.grid[-2])
    return Drawn(batch.slots, final, batch.trajectories)


@dataclass(kw_only=True)
class _Batch:
    """B samples on their way, in the order of their noisy steps.

    So the rows that do the same in a step follow each other: nothing is gathered by index, which on
    a GPU would wait for the host.
    """

    policy: Policy
    plan: Plan
    slots: list[int]
    condition: Condition
    given: list[int]  # by row, the step whose prediction its prefix gave; -1: none
    x: Tensor  # [B, C, F, H, W] float32
    v: Tensor  # [B, C, F, H, W] float32: the latest prediction
    chosen: dict[int, list[int]]  # by slot, the steps that are kept
    trajectories: dict[int, Trajectory]  # by slot

    @classmethod
    def begun(
        cls,
        policy: Policy,
        plan: Plan,
        conditions: Sequence[Condition],
        slots: Sequence[int],
        prefixes: Mapping[int, SharedPrefix],
    ) -> "_Batch":
        """The batch where its samples leave their prefixes, or at t = 1."""
        slots = sorted(slots, key=lambda slot: plan.noisy_of(slot // plan.group_size).start)
        prompts = [slot // plan.group_size for slot in slots]
        if plan.shared_noise:
            shared = [prefixes[slot // plan.sharing] for slot in slots]
            x, v = torch.stack([of.x for of in shared]), torch.stack([of.v for of in shared])
            given = [plan.first_of(prompt) for prompt in prompts]
        else:
            x = plan.initial_noise(slots, plan.grid.device)
            v, given = torch.zeros_like(x), [-1] * len(slots)
        return cls(
            policy=policy,
            plan=plan,
            slots=slots,
            condition=stack([conditions[prompt] for prompt in prompts]),
            given=given,
            x=x,
            v=v,
            chosen={slot: plan.chosen(slot) for slot in slots},
            trajectories={slot: Trajectory() for slot in slots},
        )

    def predict(self, step: int) -> None:
        """Evaluate the rows that have left their prefixes."""
        rows = bisect_left(self.given, step)
        others_evaluate = self.plan.lockstep and step > self.plan.firsts.start
        if not rows and not others_evaluate:
            return
        asked = max(rows, 1)  # without such rows: the first, as often as on other ranks
        t = self.plan.grid[step].expand(asked)
        condition = {name: values[:asked] for name, values in self.condition.items()}
        v = predict(self.policy, self.x[:asked], t, condition, self.plan.expert(step))
        self.v = _joined([v[:rows], self.v[rows:]])

    def move(self, step: int) -> None:
        """Take a step with the rows that have begun: with noise where it is theirs, else the
        ODE's.
        """
        noisy = [self.plan.noisy_of(slot // self.plan.group_size) for slot in self.slots]
        first = bisect_right([steps.stop for steps in noisy], step)
        end = bisect_right([steps.start for steps in noisy], step)
        begun = bisect_right(self.given, step)
        parts = [self._ode(slice(first), step), self._noisy(range(first, end), step)]
        self.x = _joined([*parts, self._ode(slice(end, begun), step), self.x[begun:]])

    def _ode(self, rows: slice, step: int) -> Tensor:
        """The rows' next states without noise.  returns [rows, C, F, H, W]"""
        t, t_next = self.plan.grid[step], self.plan.grid[step + 1]
        x, v = self.x[rows], self.v[rows]
        return self.policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)[0] if len(x) else x

    def _noisy(self, rows: range, step: int) -> Tensor:
        """The rows' next states with noise, of which the chosen ones are kept.

        returns [rows, C, F, H, W]
        """
        plan, sampler = self.plan, samplers.of(self.policy, self.plan.sampler)
        x, v = self.x[rows.start : rows.stop], self.v[rows.start : rows.stop]
        if not rows:
            return x
        slots = self.slots[rows.start : rows.stop]
        t, t_next = plan.grid[step], plan.grid[step + 1]
        mean, std = sampler.transition(x, v, t=t, t_next=t_next, eta=plan.eta)
        x_next = mean + std * plan.step_noise(slots, step, plan.grid.device)
        log_prob = sampler.log_prob(x_next, mean, std)
        for row, slot in enumerate(slots):
            if step in self.chosen[slot]:
                trajectory = self.trajectories[slot]
                if step not in trajectory.states:
                    trajectory.states[step] = stored(x[row], plan)
                trajectory.states[step + 1] = stored(x_next[row], plan)
                trajectory.log_probs[step] = log_prob[row]
        return x_next


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Consecutive rows as one tensor.  parts: [n, C, F, H, W] each, n >= 0"""
    some = [part for part in parts if len(part)]
    return some[0] if len(some) == 1 else torch.cat(some)


def stored(x: Tensor, plan: Plan) -> Tensor:
    """A copy of a sample's state, since a view would keep the whole batch in memory.

    x: [C, F, H, W];  returns a copy like x, on the device or in the host's pinned memory
    """
    return to_host(x) if plan.store == "host" and x.is_cuda else x.clone()


@torch.no_grad()
def sample_ode(
    policy: Policy,
    x: Tensor,
    grid: Tensor,
    condition: Condition,
    visit: Callable[[int, Tensor], None] = lambda step, x: None,
    experts: Sequence[int] = (),
) -> Tensor:
    """Follow the flow's ODE by Euler steps: the deterministic sampler of evaluation and pictures.

    x: noise [B, C, F, H, W] float32;  grid: [T + 1] from 1 to 0
    visit: called with each step and the state before it, like x
    experts: by step, as `Plan.experts`
    returns x_0 like x
    """
    experts = experts or experts_of(policy.network, grid) or (0,) * (len(grid) - 1)
    for step, (t, t_next) in enumerate(pairwise(grid[:-1])):
        visit(step, x)
        v = predict(policy, x, t.expand(len(x)), condition, experts[step])
        x, _ = policy.transition(x, v=v, t=t, t_next=t_next, eta=0.0)
    t = grid[-2]
    visit(len(grid) - 2, x)
    v = predict(policy, x, t.expand(len(x)), condition, experts[-1])
    return policy.clean_estimate(x, v, t)


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
        own = sorted({slot // plan.sharing for slot in slots})
        for batch in batches(own, conditions, plan.prefixes_per_prompt, size):
            prefixes |= shared_prefixes(policy, plan, conditions, batch)
    parts = [
        sample(policy, plan=plan, conditions=conditions, slots=batch, prefixes=prefixes)
        for batch in batches(slots, conditions, plan.group_size, size)
    ]
    final = {slot: x for part in parts for slot, x in zip(part.slots, part.final, strict=True)}
    trajectories: dict[int, Trajectory] = {}
    for part in parts:
        trajectories |= part.trajectories
    return Drawn(list(slots), torch.stack([final[slot] for slot in slots]), trajectories)
