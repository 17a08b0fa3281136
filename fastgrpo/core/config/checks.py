"""Checks for keys of a recipe that do not go together, each with its remedy."""

import os

from fastgrpo.core.config.sections import Recipe
from fastgrpo.core.errors import UserError

LONGEST_WAIT_S = 1500.0  # below the time limit of a collective, fastgrpo.parallel.world.TIMEOUT


def check(recipe: Recipe) -> None:
    """Raise UserError, with the remedy, for the first combination of keys that cannot work.

    What a training method asks of a recipe is checked by `training.methods.check`.
    """
    _check_model(recipe)
    _check_rollout(recipe)
    _check_samples(recipe)
    _check_rewards(recipe)
    _check_server(recipe)


def _check_model(recipe: Recipe) -> None:
    if recipe.model.negative_prompt is not None and recipe.model.cfg == 1:
        raise UserError(
            "model.negative_prompt: has no effect without guidance; set model.cfg above 1 or leave "
            "it out."
        )
    if recipe.prompts.heldout is None and not recipe.prompts.heldout_share:
        raise UserError(
            "prompts.heldout: none, and prompts.heldout_share is 0; name a file or hold some "
            "prompts out."
        )


def _check_rollout(recipe: Recipe) -> None:
    rollout = recipe.rollout
    if rollout.window is not None and rollout.window >= rollout.steps:
        raise UserError(
            f"rollout.window={rollout.window}: must be below rollout.steps={rollout.steps}, whose "
            "last is never noisy."
        )
    if rollout.tail_steps is not None and rollout.window is None:
        raise UserError(
            "rollout.tail_steps: has no effect without a window; set rollout.window or leave it "
            "out."
        )
    if rollout.sampler == "cps" and rollout.eta > 1:
        raise UserError(
            f"rollout.eta={rollout.eta}: for rollout.sampler=cps it says how much noise is drawn "
            "anew, and 1 means all of it; use at most 1 (0.8 in Flow-CPS)."
        )


def _check_samples(recipe: Recipe) -> None:
    """The samples of a prompt that are trained, and how optimizer steps share them out."""
    group_size, trained = recipe.rollout.samples_per_prompt, recipe.samples_trained
    if trained > group_size or (trained % 2 and recipe.objective.best_of_n):
        raise UserError(
            f"objective.best_of_n={trained}: must be even and at most "
            f"rollout.samples_per_prompt={group_size} (it keeps the best and the worst half)."
        )
    updates = recipe.optimizer.updates_per_iteration
    if trained % updates:
        divisors = [k for k in range(1, trained + 1) if trained % k == 0]
        raise UserError(
            f"optimizer.updates_per_iteration={updates}: does not divide the {trained} samples "
            "trained per prompt, which are dealt out evenly; use one of "
            f"{', '.join(map(str, divisors))}."
        )


def _check_rewards(recipe: Recipe) -> None:
    names = [spec.name for spec in recipe.rewards]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"rewards: '{twice}' is listed twice; put its parts into one entry, with its settings."
        )
    parts = [part for spec in recipe.rewards for part in spec.weights]
    doubled = sorted({part for part in parts if parts.count(part) > 1})
    if doubled:
        raise UserError(
            f"rewards: the part '{doubled[0]}' is named by two rewards; leave it out of one of "
            "them."
        )
    if not any(weight > 0 for weight in recipe.weights.values()):
        raise UserError(
            "rewards: every weight is 0, so nothing would be learned; give one part a weight above "
            "0."
        )


def _check_server(recipe: Recipe) -> None:
    server = recipe.server
    patience = max(server.outage_s + 2 * server.request_timeout_s, server.start_timeout_s)
    if patience > LONGEST_WAIT_S:
        raise UserError(
            f"server: {patience:g} s of waiting for scores (outage_s + 2 request_timeout_s, or "
            f"start_timeout_s) are more than the {LONGEST_WAIT_S:g} s that ranks wait for each "
            "other; lower them."
        )
    named = server.urls or any(spec.urls for spec in recipe.rewards)
    if named and server.token_file is None and not os.environ.get("FASTGRPO_TOKEN"):
        raise UserError(
            "server.token_file: missing; running servers (urls) want a token: name its file, or "
            "set FASTGRPO_TOKEN."
        )
