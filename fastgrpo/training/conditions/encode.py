"""Prompts to conditions over all ranks: `fastgrpo embed`, and `train` before its first iteration.

Ranks share the missing parts and go on in step, so that an error of one rank ends all, and the
progress is exact.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import take_lock
from fastgrpo.core.policy import Prompt
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import World
from fastgrpo.run.terminal import duration, open_console
from fastgrpo.training.conditions import cut_prompts
from fastgrpo.training.conditions.cache import Cache, Conditions, write_negative, write_part
from fastgrpo.training.conditions.fingerprint import fingerprint

CUT = "cut.json"  # the list of prompts that an encoder cuts, in the cache's folder
LINE_EVERY_S = 10.0  # between lines of progress where there is no terminal
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
        _say(f"the conditions of {count:,} prompts are in {folder}")


def read_prompts(recipe: Recipe, world: World) -> Split:
    """The recipe's prompts, read by the main rank, which reports the rows that it left out."""

    def read() -> Split:
        split = prompts.split(recipe.prompts)
        _say(split.summary)
        if (few := prompts.few_heldout(recipe, split)) is not None:
            _say(few)
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
                        _say(
                            f"prompts.cache={cache.folder}: {names}{more}: not what was written "
                            "for these prompts, made anew"
                        )
                _make(recipe, world=world, cache=cache, missing=missing, everything=everything)
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
            _say(negative)
    if recipe.prompts.too_long == "cut":
        cut = cut_prompts.of_cache(cache)
        line = cut_prompts.summary(cut, everything, cache.folder / CUT)
        if line is not None:
            _say(line)


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
            _say(f"prompts.cache={cache.folder}: {message}")
        waiting = True
        # not in a collective, which has a time limit and which Ctrl-C would not end
        time.sleep(LOOK_EVERY_S)
    return left


def _make(
    recipe: Recipe,
    world: World,
    cache: Cache,
    missing: list[int],
    everything: list[Prompt],
) -> None:
    """Encode the missing parts, one per rank and step."""
    total = sum(len(cache.prompts_of(number)) for number in missing)
    begun = time.perf_counter()
    with ExitStack() as stack:
        opened = policies.encoder(recipe.model, recipe.video, world.device)
        encoder = world.run_on_all_ranks(lambda: stack.enter_context(opened))
        show = stack.enter_context(_progress(world, total))

        def make(numbers: list[int]) -> None:
            for number in numbers:
                write_part(
                    cache,
                    number=number,
                    encoder=encoder,
                    prompts=everything,
                    recipe=recipe,
                )
                if recipe.prompts.too_long == "refuse" and recipe.prompts.bad_rows == "error":
                    for problem in cut_prompts.problems(cache.cut(number), everything).values():
                        raise UserError(f"{problem} Or set prompts.bad_rows=skip.")

        def make_negative() -> None:
            if world.main and recipe.model.cfg > 1:
                write_negative(cache, encoder, recipe)

        world.run_on_all_ranks(make_negative)
        done = 0
        for start in range(0, len(missing), world.size):
            now = missing[start : start + world.size]
            own = now[world.rank : world.rank + 1]  # empty where the last step has too few
            world.run_on_all_ranks(partial(make, own))
            done += sum(len(cache.prompts_of(number)) for number in now)
            show(done)
    if world.main:
        cut_prompts.write_list(cut_prompts.of_cache(cache), everything, cache.folder / CUT)
        size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors")) / 1e6
        took = duration(time.perf_counter() - begun)
        _say(f"{total:,} prompts encoded in {took}; the cache has {size:,.1f} MB")


@contextmanager
def _progress(world: World, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that shows on the main rank how many of `total` prompts are done.

    On a terminal a bar with the time left; elsewhere a line after the first step and one every
    LINE_EVERY_S.
    """
    console = open_console()
    if not world.main:
        yield lambda done: None
    elif console.is_terminal:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(TextColumn("encoding prompts"), *columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        begun = time.perf_counter()
        last = begun - LINE_EVERY_S

        def line(done: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= LINE_EVERY_S and done < total:
                left = duration((now - begun) / done * (total - done))
                _say(f"encoding prompts: {done:,} of {total:,}, about {left} left")
                last = now

        yield line


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
        _say(f"prompts: {count:,} more left out that cannot be encoded (such as {first})")
    usable, trained = set(conditions.indices), len(split.train)
    train = [prompt for index, prompt in enumerate(split.train) if index in usable]
    heldout = [prompt for index, prompt in enumerate(split.heldout, trained) if index in usable]
    prompts.check_counts(recipe.prompts, train, heldout)
    return Encoded(train, heldout, conditions)


def _say(line: str) -> None:
    open_console().print(line, highlight=False, markup=False, soft_wrap=True)
