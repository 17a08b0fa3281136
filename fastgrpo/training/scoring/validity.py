"""The end of a run where too many samples of an iteration have no valid score."""

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import Exploded
from fastgrpo.training.scoring.scorer import Scored
from fastgrpo.training.scoring.sources import NoScores


def check_validity(recipe: Recipe, scored: Scored, iteration: int, hint: str) -> None:
    """End the run where too many samples have no score."""
    share = 1.0 - scored.valid.float().mean().item()
    limit = recipe.server.max_invalid
    if share <= limit:
        return
    lost = [
        1.0 - own.float().mean().item() for own in (scored.latents_finite, scored.pixels_finite)
    ]
    what = "latents" if lost[0] > limit else "pixels"
    if max(lost) > limit and not iteration:
        raise NoScores(
            f"model.dtype={recipe.model.dtype}: before any training the {what} of {max(lost):.0%} of "
            "the samples are not finite; try float32, or compare model.path with the published files."
        )
    if max(lost) > limit:
        raise Exploded(
            f"optimizer.lr={recipe.optimizer.lr:g}: the weights have exploded: the {what} of "
            f"{max(lost):.0%} of the samples of iteration {iteration + 1} are not finite; lower it.",
            drawn=True,
        )
    raise NoScores(
        f"server.max_invalid={limit}: {share:.0%} of the samples of iteration {iteration + 1} have "
        f"no valid score ({hint}); correct that. The newest checkpoint is intact."
    )
