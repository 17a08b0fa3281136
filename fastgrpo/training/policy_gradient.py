"""The common part of GRPO and its relatives: noisy trajectories and a loss per transition."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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

    def plan(self, plan: Plan) -> Plan:
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

    def __call__(self, batch: Batch) -> Losses:
        """Score the batch's transitions."""
        plan, objective = self.experience.plan, self.objective
        t = torch.stack([plan.grid[step] for _, step in batch.transitions])
        t_next = torch.stack([plan.grid[step + 1] for _, step in batch.transitions])
        terms = self._terms(batch, t, t_next)
        weights = torch.stack([self.step_weights[step] for _, step in batch.transitions])
        loss = weights * self.method.loss(terms, objective)
        kl = torch.zeros_like(loss)
        if batch.v_reference is not None:
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
        )

    def _terms(self, batch: Batch, t: Tensor, t_next: Tensor) -> Terms:
        """The transitions under the trained and the old policy.  t, t_next: [B]"""
        plan, trajectories = self.experience.plan, self.experience.trajectories
        transitions = batch.transitions
        states = [trajectories[slot].states[step + 1] for slot, step in transitions]
        x_next = self.experience.stacked(states)
        mean, std = self.sampler.transition(batch.x, batch.v, t=t, t_next=t_next, eta=plan.eta)
        old_mean = mean.detach()
        if self.method.needs_old_mean:  # x_next less its noise, which is keyed
            device = plan.grid.device
            injected = [plan.step_noise([slot], step, device) for slot, step in transitions]
            old_mean = x_next - std.detach() * torch.cat(injected)
        log_probs = [trajectories[slot].log_probs[step] for slot, step in transitions]
        return Terms(
            log_prob=self.sampler.log_prob(x_next, mean, std),
            old_log_prob=self.experience.stacked(log_probs),
            mean=mean,
            old_mean=old_mean,
            std=std,
            advantage=torch.stack([self.experience.advantages[slot] for slot, _ in transitions]),
            dt=t - t_next,
        )
