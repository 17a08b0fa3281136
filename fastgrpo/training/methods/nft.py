"""DiffusionNFT: the update contrasts two policies' predictions for samples noised again.

Zheng et al., arXiv 2509.16117. There are no noisy steps, log-probabilities or trajectories, see
`noised_samples.py`. The old policy, which draws, is the moving average of the trained one's
weights; the update evaluates it at the selected samples' noised states before its first optimizer
step, and the trained policy once in its step.

Departures from the paper: the average moves with every optimizer step by a fixed decay, where the
paper's decay rises over the run; the times are those of the grid.
"""

import torch

from fastgrpo.algorithm import objectives
from fastgrpo.algorithm.objectives import Noised
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_without_noise
from fastgrpo.training.method import Batch, Losses
from fastgrpo.training.methods.noised_samples import NoisedLosses, NoisedSamples, squared_distance

TRAITS = Traits(
    title="DiffusionNFT (arXiv 2509.16117)",
    noisy_steps=False,
    has_ratio=False,
    average_key="nft_beta",  # which is always above 0
    average_draws=True,
    clips_ratio=False,
    reference_key="nft_kl",
    own_keys=("nft_beta", "nft_kl"),
)


def check(recipe: Recipe) -> None:
    """Raise UserError for keys of noisy steps, and where the average that draws is missing."""
    check_without_noise(recipe, "nft_kl")
    if not recipe.optimizer.ema_decay:
        raise UserError(
            "optimizer.ema_decay=0: with objective.kind=nft the moving average of the weights "
            "draws the samples; set e.g. optimizer.ema_decay=0.5."
        )


class Contrast(NoisedLosses):
    """A function from a micro-batch to its losses."""

    def __call__(self, batch: Batch) -> Losses:
        """Contrast the trained and the old policy's velocities at the batch's noised samples."""
        noised_samples = Noised(
            x=batch.x,
            x_0=self.samples(batch.transitions),
            t=self.times(batch.transitions),
            v=batch.v,
            v_old=self.average(batch.transitions),
            advantage=self.advantages(batch.transitions),
        )
        loss = objectives.nft(noised_samples, self.objective)
        distance = torch.zeros_like(loss)
        if batch.v_reference is not None:
            distance = squared_distance(batch.v, batch.v_reference)
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


METHOD = NoisedSamples(
    "nft",
    losses_of=Contrast,
    average_draws=TRAITS.average_draws,
    zero_teaches=lambda objective: True,  # the loss of advantage 0 has both reconstructions
)
