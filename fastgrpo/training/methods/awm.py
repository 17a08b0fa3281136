"""AWM (advantage-weighted matching): the pretraining loss, weighted by advantages, as a ratio.

arXiv 2509.25050. There are no noisy steps or trajectories, see `noised_samples.py`: the trained
policy draws with the ODE, and a sample's log-probability is how well its velocity is matched at a
noised state. The ratio to the old policy's, at the same time and noise, is clipped as GRPO's. Two
pulls keep the policy in place: to the moving average of its weights, without which, or without
clipping, it has been reported to collapse, and to the initial policy.

The old policy is the one at the beginning of the iteration: the update's own prediction in the
first optimizer step, where the ratio is 1 exactly, and evaluated before it for the later steps, in
the same micro-batches. The average is that of the beginning of the iteration, too.

Departures: the average moves with every optimizer step; the times are those of the grid.
"""

import torch
from torch import Tensor

from fastgrpo.algorithm import objectives
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_without_noise
from fastgrpo.training.method import Batch, Losses
from fastgrpo.training.methods.noised_samples import NoisedLosses, NoisedSamples, squared_distance

TRAITS = Traits(
    title="AWM (arXiv 2509.25050)",
    noisy_steps=False,
    average_key="awm_average",
    reference_key="awm_kl",
    own_keys=("clip_range", "awm_weighting", "awm_average", "awm_kl"),
)


def check(recipe: Recipe) -> None:
    """Raise UserError for keys of noisy steps, and where the average that pulls is missing."""
    check_without_noise(recipe, "awm_kl")
    weight = recipe.objective.awm_average
    if weight and not recipe.optimizer.ema_decay:
        raise UserError(
            f"optimizer.ema_decay=0: objective.awm_average={weight:g} pulls to the moving average "
            "of the weights; set e.g. optimizer.ema_decay=0.9, or objective.awm_average=0, with "
            "which AWM may collapse."
        )


class Matching(NoisedLosses):
    """A function from a micro-batch to its losses."""

    def __call__(self, batch: Batch) -> Losses:
        """Score how well the trained policy matches the batch's noised samples."""
        objective, transitions = self.objective, batch.transitions
        log_prob = self._log_prob(batch)
        old = log_prob.detach()
        if not batch.first:
            kept = self.experience.trajectories
            old = self.experience.stacked(
                [kept[slot].log_probs[step] for slot, step in transitions]
            )
        matched = objectives.Matched(
            log_prob=log_prob, old_log_prob=old, advantage=self.advantages(transitions)
        )
        loss = objectives.awm(matched, objective)
        if objective.awm_average:
            drift = squared_distance(batch.v, self.average(transitions))
            loss = loss + objective.awm_average * drift
        distance = torch.zeros_like(loss)
        if batch.v_reference is not None:
            distance = squared_distance(batch.v, batch.v_reference)
            loss = loss + objective.awm_kl * distance
        outside = objectives.outside_matched(matched, objective)
        return Losses(
            loss=loss,
            outside=outside,
            kl=distance,
            log_ratio=log_prob - old,
            drawn_log_ratio=log_prob - old,  # the rollout has no log-probability of its own
            drawn_outside=outside,
        )

    def evaluate_old(self, batch: Batch) -> None:
        """Keep the batch's log-probabilities as the old policy's."""
        for (slot, step), value in zip(batch.transitions, self._log_prob(batch), strict=True):
            self.experience.trajectories[slot].log_probs[step] = value.clone()

    def _log_prob(self, batch: Batch) -> Tensor:
        """[B]"""
        t = self.times(batch.transitions)
        x_0 = self.samples(batch.transitions)
        error = objectives.matching_error(batch.x, x_0=x_0, t=t, v=batch.v)
        return objectives.matching_log_prob(error, t, self.objective.awm_weighting)


METHOD = NoisedSamples(
    "awm",
    losses_of=Matching,
    average_draws=TRAITS.average_draws,
    zero_teaches=lambda objective: objective.awm_average > 0 or objective.awm_kl > 0,
)
