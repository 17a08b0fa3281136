"""DDPO with importance sampling (arXiv 2305.13301).

The loss is GRPO's expression, with advantages over all samples of an iteration.
"""

from fastgrpo.algorithm import objectives
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_noise
from fastgrpo.training.methods.policy_gradient import PolicyGradient

TRAITS = Traits(title="DDPO (arXiv 2305.13301)")
METHOD = PolicyGradient(objectives.ddpo, objectives.outside_clip_range)


def check(recipe: Recipe) -> None:
    """Raise UserError where advantages are normalised within groups."""
    check_noise(recipe)
    if recipe.objective.normalise != "global":
        raise UserError(
            f"objective.normalise={recipe.objective.normalise}: DDPO's advantages are over all "
            "samples of an iteration; set objective.normalise=global."
        )
