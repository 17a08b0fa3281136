"""Prompts to conditions over all ranks: `fastgrpo embed`, and `train` before its first iteration.

Ranks share the missing parts and go on in step, so that an error of one rank ends all, and the
progress is exact.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import take_lock
from fastgrpo.core.policy import Prompt
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.parallel.world import World
from fastgrpo.training.conditions import cut_prompts
from fastgrpo.training.conditions.cache import Cache, Conditions
from fastgrpo.training.conditions.fingerprint import fingerprint
from fastgrpo.training.conditions.make import CUT, Work, make, say

LOOK_EVERY_S = 2.0  # between looks whether another process has ended with the cache


@dataclass(frozen=True)
class Encoded:
    """A run's prompts and their conditions, without the prompts that bad_rows=skip left out."""

    train: list[Prompt]
    heldout: list[Prompt]
    conditions: Conditions  # of `train`, then of `heldout`


def embed(recipe: Recipe, world: World) -> None:
    """Complete a recipe's cache of conditions, and say where it is."""
    encoded = encode(recipe, world, read_prompts(recipe, world))
    count, folder = len(encoded.conditions), cache_folder(recipe)
    if world.main:
        say(f"the conditions of {count:,} prompts are in {folder}")


def read_prompts(recipe: Recipe, world: World) -> Split:
    """The recipe's prompts, read by the main rank, which reports the rows that it left out."""

    def read() -> Split:
        split = prompts.split(recipe.prompts)
        say(split.summary)
        if (few := prompts.few_heldout(recipe, split)) is not None:
            say(few)
        return split

    return world.on_main(read)


def encode(recipe: Recipe, world: World, split: Split) -> Encoded:
    """Every prompt's condition from the cache, whose missing parts all ranks make first.

    Waits for another process that is making them. Raises UserError, on every rank, for a cache of
    other conditions and for prompts that cannot be encoded.
    """
    everything = [*split.train, *split.heldout]
    folder = cache_folder(recipe)

    def describe() -> Cache:
        made_of = fingerprint(recipe, everything, folder / "hashes.json")
        return Cache(folder, made_of, len(everything))

    cache = world.on_main(describe)
    with_negative = recipe.model.cfg > 1
    if not world.on_main(lambda: cache.complete(with_negative)):
        with ExitStack() as stack:
            if _claim(cache, with_negative, world, stack):
                missing = world.on_main(cache.open)
                if wrong := world.on_main(cache.wrong):
                    names, more = (
                        ", ".join(wrong[:3]),
                        f" and {len(wrong) - 3} more" * (len(wrong) > 3),
                    )
                    if world.main:
                        say(
                            f"prompts.cache={cache.folder}: {names}{more}: not what was written "
                            "for these prompts, made anew"
                        )
                work = Work(recipe, world, cache, missing, everything)
                make(work)
    conditions = Conditions(cache, with_negative)
    world.on_main(lambda: _tell_cut(recipe, cache, everything))
    if recipe.prompts.too_long == "refuse":
        conditions.leave_out(cut_prompts.problems(cut_prompts.of_cache(cache), everything))
    return _without_skipped(recipe, world, split, conditions)


def _tell_cut(recipe: Recipe, cache: Cache, everything: list[Prompt]) -> None:
    """Report the prompts that are longer than an encoder sees, unless they are refused."""
    if recipe.model.cfg > 1:
        negative = cut_prompts.refuse_negative(cache, recipe.prompts.too_long)
        if negative is not None:
            say(negative)
    if recipe.prompts.too_long == "cut":
        cut = cut_prompts.of_cache(cache)
        line = cut_prompts.summary(cut, everything, cache.folder / CUT)
        if line is not None:
            say(line)


def cache_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's conditions."""
    return recipe.prompts.cache or recipe.run.dir / "embeddings"


def _claim(cache: Cache, with_negative: bool, world: World, stack: ExitStack) -> bool:
    """Take the cache's lock for as long as `stack` is open, once no other process holds it.

    Returns False, on every rank, where others have completed the cache meanwhile.
    """

    def look() -> bool | None:
        """Whether parts are missing; None: another process is making them. On the main rank."""
        lock = take_lock(cache.folder, "prompts.cache")
        if lock is not None:
            stack.enter_context(lock)
        if cache.complete(with_negative):
            return False
        return None if lock is None else True

    waiting = False
    while (left := world.on_main(look)) is None:
        if world.main and not waiting:
            message = "another process is encoding there; waiting until it ends"
            say(f"prompts.cache={cache.folder}: {message}")
        waiting = True
        # not in a collective, which has a time limit and which Ctrl-C would not end
        time.sleep(LOOK_EVERY_S)
    return left


def _without_skipped(recipe: Recipe, world: World, split: Split, conditions: Conditions) -> Encoded:
    """Leave out the prompts that have no condition, and report their number."""
    if not conditions.skipped:
        return Encoded(split.train, split.heldout, conditions)
    first = next(iter(conditions.skipped.values()))
    if recipe.prompts.bad_rows == "error":  # the cache was made by a run that skips
        raise UserError(f"{first} Or set prompts.bad_rows=skip.")
    if not len(conditions):
        raise UserError(first)
    if world.main:
        count = len(conditions.skipped)
        say(f"prompts: {count:,} more left out that cannot be encoded (such as {first})")
    usable, trained = set(conditions.indices), len(split.train)
    train = [prompt for index, prompt in enumerate(split.train) if index in usable]
    heldout = [prompt for index, prompt in enumerate(split.heldout, trained) if index in usable]
    prompts.check_counts(recipe.prompts, train, heldout)
    return Encoded(train, heldout, conditions)
