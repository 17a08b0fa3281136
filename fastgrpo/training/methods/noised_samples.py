"""The common part of methods that noise finished samples again: no noisy steps, no trajectories.

A policy draws with the ODE, each sample from noise of its own, and x_0 alone is kept. The update
noises each selected sample at its chosen times, x_t = (1 - t) x_0 + t e with keyed noise e, so that
the policies it compares are evaluated at the same x_t whoever asks and as often as it asks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.algorithm.samplers import is_flow
from fastgrpo.core.config import Objective
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.training.method import Batch, Experience, LossesOf
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix, Trajectory, sample_ode, stored
from fastgrpo.training.trainer import Trainer, averaged_weights


@dataclass(frozen=True)
class NoisedSamples:
    """A `Method` of samples noised again; methods differ in who draws and in the loss."""

    name: str  # as objective.kind
    losses_of: Callable[[Experience, Objective], LossesOf]
    average_draws: bool  # the moving average of the weights; else the trained ones
    zero_teaches: Callable[[Objective], bool]  # whether a sample of advantage 0 has a gradient

    def check_policy(self, policy: Policy, device: torch.device) -> None:
        """Raise UserError where the policy is no rectified flow."""
        if not is_flow(policy, device):
            raise UserError(
                f"objective.kind={self.name}: is made for rectified flows, which this model is "
                "not; use grpo."
            )

    def plan(self, plan: Plan, objective: Objective) -> Plan:
        """The plan with every step in its window: any may be trained, since none is noisy."""
        return replace(plan, window=range(plan.steps))

    def drawing_weights(self, trainer: Trainer) -> AbstractContextManager[None]:
        """A context inside which the network has the weights of the policy that draws."""
        return averaged_weights(trainer) if self.average_draws else nullcontext()

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        plan: Plan,
        conditions: Sequence[Condition],
        slots: list[int],
        prefixes: Mapping[int, SharedPrefix],
    ) -> Drawn:
        """Draw a batch with the ODE.

        conditions: one per prompt of the iteration;  prefixes: not used
        returns trajectories with x_0 alone, as the state after the last step
        """
        condition = stack([conditions[slot // plan.group_size] for slot in slots])
        noise_at_one = plan.initial_noise(slots, plan.grid.device)
        final = sample_ode(policy, noise_at_one, plan.grid, condition, experts=plan.experts)
        trajectories = {
            slot: Trajectory({plan.steps: stored(x_0, plan)})
            for slot, x_0 in zip(slots, final, strict=True)
        }
        return Drawn(slots, final, trajectories)

    def losses(self, policy: Policy, experience: Experience, objective: Objective) -> LossesOf:
        """The losses of an update's noised samples."""
        return self.losses_of(experience, objective)

    def zero_advantage_teaches(self, objective: Objective) -> bool:
        """Whether a sample of advantage 0 has a gradient."""
        return self.zero_teaches(objective)


@dataclass(frozen=True)
class NoisedLosses:
    """The common part of their losses: the noised samples, and the average's velocities there."""

    experience: Experience
    objective: Objective

    def states(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The samples noised again, [B, C, F, H, W] float32."""
        slots, steps = [slot for slot, _ in transitions], [step for _, step in transitions]
        x_0 = self.samples(transitions)
        return noised(self.experience.plan, self.noise_of(slots), steps, x_0)[0]

    def noise_of(self, slots: list[int]) -> list[int]:
        """The slots by whose noise the samples of some slots are noised: their own."""
        return slots

    def evaluate_average(self, batch: Batch) -> None:
        """Keep the average's velocities at the batch's states."""
        for (slot, step), v in zip(batch.transitions, batch.v, strict=True):
            kept = self.experience.trajectories[slot].velocities
            kept[step] = stored(v, self.experience.plan)

    def samples(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The samples x_0, [B, C, F, H, W] float32."""
        plan, kept = self.experience.plan, self.experience.trajectories
        return self.experience.stacked([kept[slot].states[plan.steps] for slot, _ in transitions])

    def average(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The average's velocities, [B, C, F, H, W] float32, as `evaluate_average` kept them."""
        kept = self.experience.trajectories
        return self.experience.stacked([kept[slot].velocities[step] for slot, step in transitions])

    def times(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The times t of the states, [B]."""
        grid = self.experience.plan.grid
        return torch.stack([grid[step] for _, step in transitions])

    def advantages(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The samples' advantages, [B]."""
        return torch.stack([self.experience.advantages[slot] for slot, _ in transitions])


def noised(
    plan: Plan,
    slots: Sequence[int],
    steps: Sequence[int],
    x_0: Tensor,
) -> tuple[Tensor, Tensor]:
    """x = (1 - t) x_0 + t e with keyed noise e, each sample at the time before its step.

    slots, steps: of the noise, one per sample;  x_0: [B, C, F, H, W] float32
    returns x like x_0, and t [B]
    """
    keys: list[noise.Key] = [
        ("noised", plan.seed, plan.iteration, *divmod(slot, plan.group_size), step)
        for slot, step in zip(slots, steps, strict=True)
    ]
    t = torch.stack([plan.grid[step] for step in steps])
    column = t.reshape(-1, 1, 1, 1, 1)
    return (1 - column) * x_0 + column * noise.normal(keys, plan.latent_shape, x_0.device), t


def squared_distance(v: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of velocities over all dimensions but the first.

    v, other: [B, ...] float32;  returns [B]
    """
    return (v - other).square().flatten(1).mean(1)
