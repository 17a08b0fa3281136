"""ReFL (reward feedback learning): gradient ascent on a differentiable reward of a late estimate.

ImageReward, arXiv 2304.05977. The trained policy draws with the ODE; of each sample the states
before some of the last steps are kept. The update predicts the velocity there, takes the estimate
x_0 = x - t v, decodes it and judges it in this process, all with the gradient. No advantages, no
ratio. The gradient in v is -t times that in x_0.

Departures: samples are followed to their end, since their scores are the run's metrics; the loss is
minus the reward, or its distance below `objective.refl_margin`; the pretraining loss, which the
published program lacks, is not there, and `objective.refl_kl` can hold the policy near the initial
one in its place.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_without_noise
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.training.method import Batch, Experience, Losses
from fastgrpo.training.methods.noised_samples import squared_distance
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix, Trajectory, sample_ode, stored
from fastgrpo.training.trainer import Trainer

TRAITS = Traits(
    title="ReFL (arXiv 2304.05977)",
    noisy_steps=False,
    keeps_states=True,
    differentiates=True,
    has_ratio=False,
    clips_ratio=False,
    figures=("refl_reward",),
    reference_key="refl_kl",
    own_keys=("refl_last", "refl_margin", "refl_kl"),
)


def check(recipe: Recipe) -> None:
    """Raise UserError for keys of noisy steps, and for rewards without a gradient here."""
    check_without_noise(recipe, "refl_kl")
    last, trained = recipe.objective.refl_last, recipe.steps_trained
    if trained > last:
        raise UserError(
            f"objective.refl_last={last}: {trained} steps of a sample are trained "
            f"(objective.timestep_fraction={recipe.objective.timestep_fraction:g}); for one step "
            f"set objective.timestep_fraction={1 / recipe.rollout.steps - 5e-5:.4f}."
        )
    for number, spec in enumerate(recipe.rewards):
        weighed = [part for part, weight in spec.weights.items() if weight]
        if not weighed:
            continue
        if not rewards.differentiable(spec):
            able = [name for name in rewards.known() if rewards.differentiable(rewards.plain(name))]
            raise UserError(
                f"rewards.{number}.name={spec.name}: objective.kind=refl needs the reward's "
                f"gradient, which it does not give; use {', '.join(able)}, or grpo."
            )
        if spec.where == "server":
            raise UserError(
                f"rewards.{number}.where=server: objective.kind=refl needs the reward's gradient, "
                f"which no server gives; set rewards.{number}.where=process."
            )
        binary = [part for part in weighed if part in {f"{one}_above" for one in spec.threshold}]
        if binary:
            raise UserError(
                f"rewards.{number}.weights.{binary[0]}: a binary part has no gradient, which "
                "objective.kind=refl needs; give the score itself the weight."
            )


@dataclass(frozen=True)
class RewardFeedback:
    """The `Method`."""

    def check_policy(self, policy: Policy, device: torch.device) -> None:
        """Accept every policy, since each has an estimate of x_0."""

    def plan(self, plan: Plan, objective: Objective) -> Plan:
        """The plan with the last steps in its window: those that may be trained."""
        return replace(plan, window=range(max(0, plan.steps - objective.refl_last), plan.steps))

    def drawing_weights(self, trainer: Trainer) -> AbstractContextManager[None]:
        """A context that changes nothing: the trained policy draws."""
        return nullcontext()

    def sample(
        self,
        policy: Policy,
        plan: Plan,
        conditions: Sequence[Condition],
        slots: list[int],
        prefixes: Mapping[int, SharedPrefix],
    ) -> Drawn:
        """Draw a batch with the ODE; of each sample the states before its chosen steps are kept.

        conditions: one per prompt of the iteration;  prefixes: not used
        """
        chosen = {slot: plan.chosen(slot) for slot in slots}
        trajectories = {slot: Trajectory() for slot in slots}

        def keep(step: int, x: Tensor) -> None:
            """Keep the chosen ones of states [B, C, F, H, W]."""
            for row, slot in enumerate(slots):
                if step in chosen[slot]:
                    trajectories[slot].states[step] = stored(x[row], plan)

        condition = stack([conditions[slot // plan.group_size] for slot in slots])
        noise_at_one = plan.initial_noise(slots, plan.grid.device)
        final = sample_ode(policy, noise_at_one, plan.grid, condition, keep, plan.experts)
        return Drawn(slots, final, trajectories)

    def losses(self, policy: Policy, experience: Experience, objective: Objective) -> "Feedback":
        """The losses of an update's states."""
        return Feedback(policy, experience, objective)

    def zero_advantage_teaches(self, objective: Objective) -> bool:
        """Every sample has a gradient: advantages are not looked at."""
        return True


@dataclass(frozen=True)
class Feedback:
    """A function from a micro-batch to its losses."""

    policy: Policy
    experience: Experience
    objective: Objective

    def states(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The states that the rollout kept, [B, C, F, H, W] float32."""
        kept = self.experience.trajectories
        return self.experience.stacked([kept[slot].states[step] for slot, step in transitions])

    def __call__(self, batch: Batch) -> Losses:
        """Judge the estimates of x_0 at the batch's states."""
        judge, grid = self.experience.judge, self.experience.plan.grid
        assert judge is not None
        t = torch.stack([grid[step] for _, step in batch.transitions])
        x_0 = self.policy.clean_estimate(batch.x, batch.v, t)
        reward = judge(x_0, [slot for slot, _ in batch.transitions])
        margin = self.objective.refl_margin
        loss = -reward if margin is None else (margin - reward).clamp(min=0)
        zero = torch.zeros_like(loss)
        distance = zero
        if batch.v_reference is not None:
            distance = squared_distance(batch.v, batch.v_reference)
        return Losses(
            loss=loss + self.objective.refl_kl * distance,
            outside=zero,
            kl=distance,
            log_ratio=zero,
            drawn_log_ratio=zero,
            drawn_outside=zero,
            figures={"refl_reward": reward.detach()},
        )

    def evaluate_old(self, batch: Batch) -> None:
        """Do nothing: there is no ratio."""

    def evaluate_average(self, batch: Batch) -> None:
        """Do nothing: the loss does not look at the average."""


METHOD = RewardFeedback()
