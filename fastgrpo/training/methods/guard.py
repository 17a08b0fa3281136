"""GRPO-Guard (arXiv 2510.22319): a normalised ratio, which clips alike at every step."""

from fastgrpo.algorithm import objectives
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_noise
from fastgrpo.training.methods.policy_gradient import PolicyGradient

TRAITS = Traits(title="GRPO-Guard (arXiv 2510.22319)", clips_ratio=False, old_means=True)
METHOD = PolicyGradient(objectives.guard, objectives.outside_normalised, needs_old_mean=True)


def check(recipe: Recipe) -> None:
    """Raise UserError where the log-probability is not a Gaussian's."""
    check_noise(recipe)
    if recipe.rollout.sampler == "cps":
        raise UserError(
            "objective.kind=guard: normalises a Gaussian log-probability, which Flow-CPS does not "
            "use; choose rollout.sampler=dance or objective.kind=grpo."
        )
