"""Checks for keys of a recipe that do not go together, each with its remedy."""

import os
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from fastgrpo.core.config import paths
from fastgrpo.core.config.sections import Recipe
from fastgrpo.core.errors import UserError, UserErrors

LONGEST_WAIT_S = 1500.0  # below the time limit of a collective, fastgrpo.parallel.world.TIMEOUT


def check(recipe: Recipe) -> None:
    """Raise UserError, with the remedy, for the first combination of keys that cannot work.

    What a training method asks of a recipe is checked by `training.methods.check`.
    """
    for one in CHECKS:
        one(recipe)


def mistakes(recipe: Recipe) -> list[str]:
    """The lines of all checks that fail."""
    return failing([lambda one=one: one(recipe) for one in CHECKS])  # type: ignore[misc]


def failing(several: Sequence[Callable[[], object]]) -> list[str]:
    """The lines of all checks, of those that raise UserError."""
    found: list[str] = []
    for one in several:
        try:
            one()
        except UserError as error:
            found += error.lines if isinstance(error, UserErrors) else [str(error)]
    return found


def _check_model(recipe: Recipe) -> None:
    if recipe.model.negative_prompt is not None and recipe.model.cfg == 1:
        raise UserError(
            "model.negative_prompt: has no effect without guidance; set model.cfg above 1 or leave "
            "it out."
        )
    lora = recipe.lora
    for key, given in (("alpha", lora.alpha), ("targets", lora.targets)):
        if given and not lora.rank:
            raise UserError(
                f"lora.{key}: has no effect without adapters; set lora.rank above 0 or leave it "
                "out."
            )


def _check_source(recipe: Recipe) -> None:
    """The revision of a hub repository."""
    model = recipe.model
    if model.revision is None:
        return
    name, named = paths.hub_name(model.path)
    if not paths.is_hub_id(model.path):
        raise UserError(
            f"model.revision={model.revision}: is of a hub repository, and model.path={model.path} "
            "is none; leave it out."
        )
    if named is not None:
        raise UserError(
            f"model.revision={model.revision}: model.path={model.path} names a revision already; "
            f"use model.path={name}."
        )


def _check_prompts(recipe: Recipe) -> None:
    prompts = recipe.prompts
    if prompts.languages and prompts.language_column is None:
        raise UserError(
            "prompts.languages: no column to compare with; set prompts.language_column, too."
        )
    if prompts.language_column is not None and not prompts.languages:
        raise UserError(
            "prompts.language_column: has no effect without prompts.languages; name those to keep, "
            "or leave it out."
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


def _check_per_prompt(recipe: Recipe) -> None:
    """The keys of a noisy step of each prompt's own."""
    rollout = recipe.rollout
    if rollout.window_schedule != "per_prompt":
        if rollout.window_pool is not None:
            raise UserError(
                f"rollout.window_pool={rollout.window_pool}: has no effect without "
                "rollout.window_schedule=per_prompt; set that or leave it out."
            )
        return
    if rollout.window != 1:
        given = "none" if rollout.window is None else rollout.window
        raise UserError(
            f"rollout.window={given}: with rollout.window_schedule=per_prompt each prompt has one "
            "noisy step; set rollout.window=1."
        )
    if rollout.tail_steps is not None:
        raise UserError(
            f"rollout.tail_steps={rollout.tail_steps}: shortens one grid for all prompts, and with "
            "rollout.window_schedule=per_prompt their windows end at different steps; leave it out."
        )
    if rollout.window_pool is not None and rollout.window_pool >= rollout.steps:
        raise UserError(
            f"rollout.window_pool={rollout.window_pool}: must be below rollout.steps="
            f"{rollout.steps}, whose last is never noisy."
        )


def _check_seeds(recipe: Recipe) -> None:
    """Initial noises of a prompt that several of its samples share."""
    rollout, objective = recipe.rollout, recipe.objective
    group_size, seeds = rollout.samples_per_prompt, rollout.seeds_per_prompt
    if seeds > 1 and not rollout.shared_noise:
        raise UserError(
            f"rollout.seeds_per_prompt={seeds}: has no effect with rollout.shared_noise=false, "
            "where each sample has a noise of its own; leave one of them out."
        )
    if seeds > 1 and (group_size % seeds or group_size // seeds < 2):
        fitting = [str(n) for n in range(1, group_size // 2 + 1) if group_size % n == 0]
        raise UserError(
            f"rollout.seeds_per_prompt={seeds}: must leave two or more of the {group_size} samples "
            f"to each noise, and as many to all; use one of {', '.join(fitting)}, or "
            "rollout.shared_noise=false."
        )
    if objective.advantage_group == "prompt":
        return
    if seeds == 1:
        raise UserError(
            "objective.advantage_group=seed: a prompt's samples must come from several noises, each "
            "shared; set rollout.seeds_per_prompt above 1 or leave it out."
        )
    if objective.normalise == "global":
        raise UserError(
            "objective.advantage_group=seed: has no effect with objective.normalise=global, which "
            "knows no groups; leave it out."
        )


def _check_scouts(recipe: Recipe) -> None:
    """Candidates that are drawn cheaply, so that the best and the worst are drawn again."""
    rollout = recipe.rollout
    if rollout.scouts is None:
        if rollout.scout_dtype is not None:
            raise UserError(
                f"rollout.scout_dtype={rollout.scout_dtype}: has no effect without scouts; set "
                "rollout.scouts or leave it out."
            )
        return
    noises = rollout.noises_per_prompt
    if noises == 1:
        raise UserError(
            f"rollout.scouts={rollout.scouts}: a prompt's samples share one noise, so that there "
            "are no best and worst; set rollout.seeds_per_prompt above 1 or "
            "rollout.shared_noise=false."
        )
    if noises % 2 or rollout.scouts <= noises:
        raise UserError(
            f"rollout.scouts={rollout.scouts}: must be above the {noises} noises of a prompt that "
            "are drawn again, half of them the best, half the worst, so an even number "
            "(rollout.seeds_per_prompt, or rollout.samples_per_prompt without shared noise)."
        )
    if rollout.scout_steps >= rollout.steps:
        raise UserError(
            f"rollout.scout_steps={rollout.scout_steps}: a scout is to be cheaper than a sample of "
            f"rollout.steps={rollout.steps}; use fewer."
        )
    if rollout.scout_dtype == recipe.model.dtype:
        raise UserError(
            f"rollout.scout_dtype={rollout.scout_dtype}: is the precision of model.dtype already; "
            "leave it out."
        )


def _check_samples(recipe: Recipe) -> None:
    """The samples of a prompt that are trained."""
    group_size, trained = recipe.rollout.samples_per_prompt, recipe.samples_trained
    if trained > group_size or (trained % 2 and recipe.objective.best_of_n):
        raise UserError(
            f"objective.best_of_n={trained}: must be even and at most "
            f"rollout.samples_per_prompt={group_size} (it keeps the best and the worst half)."
        )


def _check_updates(recipe: Recipe) -> None:
    trained, updates = recipe.samples_trained, recipe.optimizer.updates_per_iteration
    if trained % updates:
        divisors = [k for k in range(1, trained + 1) if trained % k == 0]
        raise UserError(
            f"optimizer.updates_per_iteration={updates}: does not divide the {trained} samples "
            "trained per prompt, which are dealt out evenly; use one of "
            f"{', '.join(map(str, divisors))}."
        )


def _check_schedule(recipe: Recipe) -> None:
    settings = recipe.optimizer
    if settings.schedule == "constant" and settings.decay_updates:
        raise UserError(
            f"optimizer.decay_updates={settings.decay_updates}: has no effect with "
            "optimizer.schedule=constant; leave it out, or use linear or cosine."
        )


def _check_offload(recipe: Recipe) -> None:
    settings = recipe.distributed
    if settings.offload != "nvme":
        if settings.offload_path is not None:
            raise UserError(
                f"distributed.offload_path={settings.offload_path}: has no effect without "
                "distributed.offload=nvme; set that or leave it out."
            )
        return
    if settings.offload_path is None:
        raise UserError(
            "distributed.offload_path: missing; distributed.offload=nvme wants a folder on each "
            "node's NVMe."
        )
    if recipe.lora.rank:
        raise UserError(
            f"distributed.offload=nvme: adapters of lora.rank={recipe.lora.rank} have next to no "
            "masters and moments to put on a disk; set it to true or false."
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


def _check_weights(recipe: Recipe) -> None:
    if not any(weight > 0 for weight in recipe.weights.values()):
        raise UserError(
            "rewards: every weight is 0, so nothing would be learned; give one part a weight above "
            "0."
        )


def _check_waiting(recipe: Recipe) -> None:
    server = recipe.server
    patience = max(server.outage_s + 2 * server.request_timeout_s, server.start_timeout_s)
    if patience > LONGEST_WAIT_S:
        raise UserError(
            f"server: {patience:g} s of waiting for scores (outage_s + 2 request_timeout_s, or "
            f"start_timeout_s) are more than the {LONGEST_WAIT_S:g} s that ranks wait for each "
            "other; lower them."
        )


def _check_token(recipe: Recipe) -> None:
    server = recipe.server
    named = server.urls or any(spec.urls for spec in recipe.rewards)
    if named and server.token_file is None and not os.environ.get("FASTGRPO_TOKEN"):
        raise UserError(
            "server.token_file: missing; running servers (urls) want a token: name its file, or "
            "set FASTGRPO_TOKEN."
        )


def _check_addresses(recipe: Recipe) -> None:
    """The form of the servers' addresses."""
    named = {"server.urls": recipe.server.urls}
    named |= {f"rewards.{n}.urls": spec.urls for n, spec in enumerate(recipe.rewards)}
    for key, urls in named.items():
        for url in urls:
            check_address(key, url)


def check_address(key: str, url: str) -> None:
    """Raise UserError for what is no address of a reward server.  key: or option"""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port
        fits = False
    if not fits or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise UserError(
            f"{key}={url!r}: not the address of a server; write it as http://HOST:PORT, such as "
            "http://node7:8700."
        )


def _check_alarm(recipe: Recipe) -> None:
    """A run that is to go back needs a checkpoint of each evaluation."""
    every, saved = recipe.evaluate.every, recipe.checkpoint.every
    if recipe.evaluate.alarm != "return" or not every:
        return
    if every % saved:
        raise UserError(
            f"evaluate.every={every}: evaluate.alarm=return goes back to the checkpoint of an "
            f"evaluation; use a multiple of checkpoint.every={saved}, or set checkpoint.every to a "
            f"divisor of {every}."
        )
    if not recipe.checkpoint.keep_best:
        raise UserError(
            "checkpoint.keep_best=false: evaluate.alarm=return goes back to the best checkpoint; "
            "leave it out, or set evaluate.alarm=stop."
        )


CHECKS = (
    _check_model,
    _check_source,
    _check_prompts,
    _check_rollout,
    _check_per_prompt,
    _check_seeds,
    _check_scouts,
    _check_samples,
    _check_updates,
    _check_schedule,
    _check_offload,
    _check_rewards,
    _check_weights,
    _check_alarm,
    _check_waiting,
    _check_addresses,
    _check_token,
)
