"""DiffusionNFT: the update contrasts two policies' predictions for samples noised again.

Zheng et al., arXiv 2509.16117. There are no noisy steps, log-probabilities or trajectories. The old
policy, which is the moving average of the trained one's weights, draws with the ODE, each sample
from noise of its own. Of a sample x_0 alone is kept. The update noises the selected samples again,
at each of their chosen times, with keyed noise; it evaluates the old policy there before its first
optimizer step, and the trained policy once in its step.

Departures from the paper: the average moves with every optimizer step by a fixed decay, where the
paper's decay rises over the run; the times are those of the grid.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithm import noise, objectives
from fastgrpo.algorithm.objectives import Noised
from fastgrpo.algorithm.samplers import is_flow
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.training.method import Batch, Experience, Losses
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix, Trajectory, sample_ode, stored
from fastgrpo.training.trainer import Trainer, averaged_weights

TRAITS = Traits(
    noisy_steps=False,
    average_key="nft_beta",  # which is always above 0
    average_draws=True,
    clips_ratio=False,
    reference_key="nft_kl",
)


def check(recipe: Recipe) -> None:
    """Raise UserError for keys of noisy steps, and where the average that draws is missing."""
    rollout, objective = recipe.rollout, recipe.objective
    if rollout.shared_noise:
        raise UserError(
            "rollout.shared_noise=true: objective.kind=nft draws without noise on the way, so all "
            "samples of a group would be the same; set rollout.shared_noise=false."
        )
    if not recipe.optimizer.ema_decay:
        raise UserError(
            "optimizer.ema_decay=0: with objective.kind=nft the moving average of the weights "
            "draws the samples; set e.g. optimizer.ema_decay=0.5."
        )
    if rollout.window is not None:
        raise UserError(
            "rollout.window: has no effect with objective.kind=nft, where no step is noisy; "
            "leave it out."
        )
    if objective.step_weights != "equal":
        raise UserError(
            f"objective.step_weights={objective.step_weights}: has no effect with "
            "objective.kind=nft; leave it out."
        )
    if objective.kl_weight:
        raise UserError(
            f"objective.kl_weight={objective.kl_weight}: is of noisy steps, and objective.kind=nft "
            "has none; use objective.nft_kl."
        )


class DiffusionNFT:
    """The `Method` of samples noised again."""

    def check_policy(self, policy: Policy, device: torch.device) -> None:
        """Raise UserError where the policy is no rectified flow."""
        if not is_flow(policy, device):
            raise UserError(
                "objective.kind=nft: is made for rectified flows, which this model is not; "
                "use grpo."
            )

    def plan(self, plan: Plan) -> Plan:
        """The plan with every step in its window: any may be trained, since none is noisy."""
        return replace(plan, window=range(plan.steps))

    def drawing_weights(self, trainer: Trainer) -> AbstractContextManager[None]:
        """A context inside which the network has the old policy's weights."""
        return averaged_weights(trainer)

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        plan: Plan,
        conditions: Sequence[Condition],
        slots: list[int],
        prefixes: Mapping[int, SharedPrefix],
    ) -> Drawn:
        """Draw a batch with the weights of the old policy, which the network must have.

        conditions: one per prompt of the iteration;  prefixes: not used
        returns trajectories with x_0 alone, as the state after the last step
        """
        condition = stack([conditions[slot // plan.group_size] for slot in slots])
        noise_at_one = plan.initial_noise(slots, plan.grid.device)
        final = sample_ode(policy, noise_at_one, plan.grid, condition)
        trajectories = {
            slot: Trajectory({plan.steps: stored(x_0, plan)})
            for slot, x_0 in zip(slots, final, strict=True)
        }
        return Drawn(slots, final, trajectories)

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        objective: Objective,
    ) -> "NoisedLosses":
        """The losses of an update's noised samples."""
        return NoisedLosses(experience, objective)

    def zero_advantage_teaches(self, objective: Objective) -> bool:
        """True: the loss of advantage 0 still has both reconstructions."""
        return True


METHOD = DiffusionNFT()


@dataclass(frozen=True)
class NoisedLosses:
    """A function from a micro-batch to its losses."""

    experience: Experience
    objective: Objective

    def states(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The samples noised again, [B, C, F, H, W] float32."""
        slots, steps = [slot for slot, _ in transitions], [step for _, step in transitions]
        return noised(self.experience.plan, slots, steps, self._samples(slots))[0]

    def __call__(self, batch: Batch) -> Losses:
        """Contrast the trained and the old policy's velocities at the batch's noised samples."""
        plan, trajectories = self.experience.plan, self.experience.trajectories
        v_old = [trajectories[slot].velocities[step] for slot, step in batch.transitions]
        advantages = [self.experience.advantages[slot] for slot, _ in batch.transitions]
        noised_samples = Noised(
            x=batch.x,
            x_0=self._samples([slot for slot, _ in batch.transitions]),
            t=torch.stack([plan.grid[step] for _, step in batch.transitions]),
            v=batch.v,
            v_old=self.experience.stacked(v_old),
            advantage=torch.stack(advantages),
        )
        loss = objectives.nft(noised_samples, self.objective)
        distance = torch.zeros_like(loss)
        if batch.v_reference is not None:
            distance = (batch.v - batch.v_reference).square().flatten(1).mean(1)
        return Losses(
            loss=loss + self.objective.nft_kl * distance,
            outside=torch.zeros_like(loss),
            kl=distance,
            log_ratio=torch.zeros_like(loss),
            drawn_log_ratio=torch.zeros_like(loss),
            drawn_outside=torch.zeros_like(loss),
        )

    def evaluate_old(self, batch: Batch) -> None:
        """Do nothing: there is no ratio."""

    def evaluate_average(self, batch: Batch) -> None:
        """Keep the velocities of the old policy, which is the average."""
        for (slot, step), v_old in zip(batch.transitions, batch.v, strict=True):
            kept = self.experience.trajectories[slot].velocities
            kept[step] = stored(v_old, self.experience.plan)

    def _samples(self, slots: Sequence[int]) -> Tensor:
        """The samples x_0, [B, C, F, H, W] float32."""
        plan, kept = self.experience.plan, self.experience.trajectories
        return self.experience.stacked([kept[slot].states[plan.steps] for slot in slots])


def noised(
    plan: Plan,
    slots: Sequence[int],
    steps: Sequence[int],
    x_0: Tensor,
) -> tuple[Tensor, Tensor]:
    """x = (1 - t) x_0 + t e with keyed noise e, each sample at the time before its step.

    steps: one per slot;  x_0: [B, C, F, H, W] float32;  returns x like x_0, and t [B]
    """
    keys: list[noise.Key] = [
        ("noised", plan.seed, plan.iteration, *divmod(slot, plan.group_size), step)
        for slot, step in zip(slots, steps, strict=True)
    ]
    t = torch.stack([plan.grid[step] for step in steps])
    column = t.reshape(-1, 1, 1, 1, 1)
    return (1 - column) * x_0 + column * noise.normal(keys, plan.latent_shape, x_0.device), t
