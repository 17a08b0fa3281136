"""DPO for flows: a prompt's better sample is to be matched better than its worse one.

Diffusion-DPO (arXiv 2311.12908) on velocities (Flow-DPO, arXiv 2501.13918). There are no noisy
steps or trajectories, see `noised_samples.py`: the trained policy draws with the ODE, and the
samples of a group that `objective.best_of_n` selects are paired by advantage, the best with the
worst (online DPO, as OnlineVPO, arXiv 2412.15159), or they are those of a file of preferred pairs,
see `scoring/offline.py`. Both samples of a pair are noised by one noise
at one time, and the errors of their velocities are compared with those of the initial policy.

Departures: the times are those of the grid; the initial policy stays the reference for the run.
"""

import torch

from fastgrpo.algorithm import objectives
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_without_noise
from fastgrpo.data import preferred_pairs
from fastgrpo.training.method import Batch, Losses
from fastgrpo.training.methods.noised_samples import NoisedLosses, NoisedSamples, squared_distance

TRAITS = Traits(
    title="DPO for flows (arXiv 2311.12908, 2501.13918)",
    noisy_steps=False,
    pairs=True,
    has_ratio=False,
    clips_ratio=False,
    figures=("dpo_accuracy", "dpo_better", "dpo_worse"),
    reference_key="dpo_beta",  # which is always above 0
    own_keys=("dpo_beta", "dpo_weighting", "dpo_pairs"),
)


def check(recipe: Recipe) -> None:
    """Raise UserError for keys of noisy steps, and where there are no pairs."""
    check_without_noise(recipe, "dpo_beta")
    if recipe.objective.dpo_pairs is not None:
        _check_offline(recipe, recipe.objective.dpo_pairs)
    elif recipe.objective.best_of_n is None:
        raise UserError(
            "objective.best_of_n: missing; with objective.kind=dpo it says how many samples of a "
            "prompt make pairs; set objective.best_of_n=2 for the best and the worst."
        )
    size = recipe.optimizer.batch_size
    if size % 2:
        raise UserError(
            f"optimizer.batch_size={size}: objective.kind=dpo compares two samples in a "
            "micro-batch; use an even number."
        )


def _check_offline(recipe: Recipe, path: str) -> None:
    """Raise UserError for keys of drawn samples beside a file of pairs, and for its mistakes."""
    rollout = recipe.rollout
    if rollout.samples_per_prompt != 2:
        raise UserError(
            f"rollout.samples_per_prompt={rollout.samples_per_prompt}: with objective.dpo_pairs a "
            "prompt has one pair in an iteration; set 2."
        )
    if rollout.scouts is not None:
        raise UserError(
            f"rollout.scouts={rollout.scouts}: nothing is drawn with objective.dpo_pairs; leave it "
            "out."
        )
    preferred_pairs.read(path)


class Preference(NoisedLosses):
    """A function from a micro-batch of pairs to its losses."""

    def __call__(self, batch: Batch) -> Losses:
        """Compare each pair's errors with the initial policy's; both rows get the pair's loss."""
        assert batch.v_reference is not None
        t, x_0 = self.times(batch.transitions), self.samples(batch.transitions)
        trained = objectives.matching_error(batch.x, x_0=x_0, t=t, v=batch.v)
        initial = objectives.matching_error(batch.x, x_0=x_0, t=t, v=batch.v_reference)
        better, worse = (trained - initial).reshape(-1, 2).unbind(1)
        pairs = objectives.Preferred(better=better, worse=worse, t=t[::2])
        loss = objectives.dpo(pairs, self.objective).repeat_interleave(2)
        zero = torch.zeros_like(loss)
        figures = {
            "dpo_accuracy": (better < worse).float(),
            "dpo_better": better,
            "dpo_worse": worse,
        }
        return Losses(
            loss=loss,
            outside=zero,
            kl=squared_distance(batch.v, batch.v_reference),
            log_ratio=zero,
            drawn_log_ratio=zero,
            drawn_outside=zero,
            figures={name: of.detach().repeat_interleave(2) for name, of in figures.items()},
        )

    def noise_of(self, slots: list[int]) -> list[int]:
        """A pair has the noise of its first sample."""
        return [first for first in slots[::2] for _ in range(2)]

    def evaluate_old(self, batch: Batch) -> None:
        """Do nothing: there is no ratio."""


METHOD = NoisedSamples(
    "dpo",
    losses_of=Preference,
    average_draws=TRAITS.average_draws,
    zero_teaches=lambda objective: True,  # a pair is left out by what it prefers, not by this
)
