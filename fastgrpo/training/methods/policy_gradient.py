"""The common part of GRPO and its relatives: noisy trajectories and a loss per transition."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithm import objectives, samplers
from fastgrpo.algorithm.objectives import Terms
from fastgrpo.algorithm.transitions import gaussian_kl
from fastgrpo.core.config import Objective
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.training import rollout
from fastgrpo.training.method import Batch, Experience, Losses
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix
from fastgrpo.training.trainer import Trainer

PerTransition = Callable[[Terms, Objective], Tensor]
"""(terms, objective) -> [B]"""


@dataclass(frozen=True)
class PolicyGradient:
    """A `Method` on noisy trajectories; methods differ in the loss of a transition."""

    loss: PerTransition
    outside: PerTransition  # whether the transition is outside the region that the loss trusts
    needs_old_mean: bool = False  # the loss looks at Terms.old_mean

    def check_policy(self, policy: Policy, device: torch.device) -> None:
        """Accept every policy, since each has a noisy step of its own."""

    def plan(self, plan: Plan, objective: Objective) -> Plan:
        """The plan, unchanged."""
        return plan

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
        """Draw noisy trajectories; see `rollout.sample`."""
        return rollout.sample(
            policy,
            plan=plan,
            conditions=conditions,
            slots=slots,
            prefixes=prefixes,
        )

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        objective: Objective,
    ) -> "TransitionLosses":
        """The losses of an update's transitions."""
        plan = experience.plan
        sampler = samplers.of(policy, plan.sampler)
        weights = objectives.step_weights(
            objective.step_weights, grid=plan.grid, steps=plan.noisy, eta=plan.eta, sampler=sampler
        )
        return TransitionLosses(
            method=self,
            experience=experience,
            objective=objective,
            sampler=sampler,
            step_weights=weights,
        )

    def zero_advantage_teaches(self, objective: Objective) -> bool:
        """Only through the KL term."""
        return objective.kl_weight > 0


@dataclass(frozen=True, kw_only=True)
class TransitionLosses:
    """A function from a micro-batch to its losses, with one sampler for the whole update."""

    method: PolicyGradient
    experience: Experience
    objective: Objective
    sampler: samplers.Sampler
    step_weights: Tensor  # float32 [T]

    def states(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The states before the transitions, [B, C, F, H, W] float32, as the rollout kept them."""
        kept = self.experience.trajectories
        return self.experience.stacked([kept[slot].states[step] for slot, step in transitions])

    def __call__(self, batch: Batch) -> Losses:
        """Score the batch's transitions."""
        plan, objective = self.experience.plan, self.objective
        drawn = self._terms(batch)
        terms = drawn
        if batch.first:  # the same policy, whatever rounding says
            own = {"old_log_prob": drawn.log_prob.detach(), "old_mean": drawn.mean.detach()}
            terms = replace(drawn, **own)
        weights = torch.stack([self.step_weights[step] for _, step in batch.transitions])
        loss = weights * self.method.loss(terms, objective)
        kl = torch.zeros_like(loss)
        if batch.v_reference is not None:
            t, t_next = self._times(batch)
            reference_mean, _ = self.sampler.transition(
                batch.x,
                v=batch.v_reference,
                t=t,
                t_next=t_next,
                eta=plan.eta,
            )
            kl = gaussian_kl(terms.mean, reference_mean, terms.std)
            loss = loss + objective.kl_weight * kl
        return Losses(
            loss=loss,
            outside=self.method.outside(terms, objective),
            kl=kl,
            log_ratio=terms.log_prob - terms.old_log_prob,
            drawn_log_ratio=drawn.log_prob - drawn.old_log_prob,
            drawn_outside=self.method.outside(drawn, objective),
        )

    def evaluate_old(self, batch: Batch) -> None:
        """Take the batch's predictions for the old policy's, in place of the rollout's."""
        terms = self._terms(batch)
        for row, (slot, step) in enumerate(batch.transitions):
            trajectory = self.experience.trajectories[slot]
            trajectory.log_probs[step] = terms.log_prob[row].clone()
            if self.method.needs_old_mean:
                trajectory.means[step] = rollout.stored(terms.mean[row], self.experience.plan)

    def evaluate_average(self, batch: Batch) -> None:
        """Do nothing: the loss of a noisy step does not look at the average."""

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The times before and after the batch's steps, each [B]."""
        grid = self.experience.plan.grid
        t = torch.stack([grid[step] for _, step in batch.transitions])
        return t, torch.stack([grid[step + 1] for _, step in batch.transitions])

    def _terms(self, batch: Batch) -> Terms:
        """The transitions under the trained and the old policy."""
        plan, trajectories = self.experience.plan, self.experience.trajectories
        transitions, (t, t_next) = batch.transitions, self._times(batch)
        states = [trajectories[slot].states[step + 1] for slot, step in transitions]
        x_next = self.experience.stacked(states)
        mean, std = self.sampler.transition(batch.x, batch.v, t=t, t_next=t_next, eta=plan.eta)
        log_probs = [trajectories[slot].log_probs[step] for slot, step in transitions]
        return Terms(
            log_prob=self.sampler.log_prob(x_next, mean, std),
            old_log_prob=self.experience.stacked(log_probs),
            mean=mean,
            old_mean=self._old_mean(transitions, x_next, mean, std),
            std=std,
            advantage=torch.stack([self.experience.advantages[slot] for slot, _ in transitions]),
            dt=t - t_next,
        )

    def _old_mean(
        self, transitions: Sequence[tuple[int, int]], x_next: Tensor, mean: Tensor, std: Tensor
    ) -> Tensor:
        """The old policy's mean: as the update evaluated it, else x_next less its keyed noise.

        x_next, mean: [B, C, F, H, W] float32;  std: a scalar or [B, 1, ...];  returns like mean
        """
        if not self.method.needs_old_mean:
            return mean.detach()
        plan, std = self.experience.plan, std.detach().expand(len(mean), *[1] * (mean.ndim - 1))
        means = []
        for row, (slot, step) in enumerate(transitions):
            evaluated = self.experience.trajectories[slot].means.get(step)
            if evaluated is None:
                injected = plan.step_noise([slot], step, plan.grid.device)[0]
                evaluated = x_next[row] - std[row] * injected
            means.append(evaluated)
        return self.experience.stacked(means)
