"""The missing parts of a cache: every prompt through one network of the encoder after the other.

A network is on the device for its pass alone. The ranks share the parts and go on in step, so that
an error of one rank ends all, and the progress is exact.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

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
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import policies
from fastgrpo.models.text_encoders.passes import Pass, joined, passes_of
from fastgrpo.parallel.world import World
from fastgrpo.run.terminal import duration, open_console
from fastgrpo.training.conditions import cut_prompts
from fastgrpo.training.conditions.cache import Cache, Step, write_negative, write_part

CUT = "cut.json"  # the list of prompts that an encoder cuts, in the cache's folder
LINE_EVERY_S = 10.0  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class Work:
    """What is to be encoded."""

    recipe: Recipe
    world: World
    cache: Cache
    missing: list[int]  # parts
    prompts: list[Prompt]  # of the whole cache

    @property
    def total(self) -> int:
        """Prompts of the missing parts."""
        return sum(len(self.cache.prompts_of(number)) for number in self.missing)


def make(work: Work) -> None:
    """Encode the missing parts, and the unconditional branch's text where it is missing."""
    begun = time.perf_counter()
    recipe, world, cache = work.recipe, work.world, work.cache
    wanted = recipe.model.cfg > 1 and world.main and not cache.intact([cache.negative])[0]
    negative: Condition = {}
    with ExitStack() as stack:
        opened = policies.encoder(recipe.model, recipe.video, world.device)
        encoder = world.run_on_all_ranks(lambda: stack.enter_context(opened))
        passes = passes_of(encoder)
        for place, one in enumerate(passes):
            for network in one.networks:
                network.work = network.work.of(work.prompts)
                line = network.place(together=True)
                if world.main and line:
                    say(line)
            found = _through(
                work, one, Step(encoder, one.run, not place, one is passes[-1]), wanted
            )
            negative = {**negative, **found}
            one.free()

    def publish_negative() -> None:
        if wanted:
            write_negative(cache, encoder, joined(encoder, negative), recipe)

    world.run_on_all_ranks(publish_negative)
    if world.main:
        cut_prompts.write_list(cut_prompts.of_cache(cache), work.prompts, cache.folder / CUT)
        size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors")) / 1e6
        took = duration(time.perf_counter() - begun)
        say(f"{work.total:,} prompts encoded in {took}; the cache has {size:,.1f} MB")


def _through(work: Work, one: Pass, step: Step, with_negative: bool) -> Condition:
    """Send the missing parts through a pass, one per rank and step.

    with_negative: whether this rank sends the unconditional branch's text, too
    returns what the pass gives for that
    """
    world, missing, found = work.world, work.missing, dict[str, Condition]()

    def make_negative() -> None:
        if with_negative:
            found["negative"] = one.of_negative(work.recipe.model.negative_prompt or "")

    with _progress(world, work.total) as show:
        _together(world, one, make_negative)
        done = 0
        for start in range(0, len(missing), world.size):
            now = missing[start : start + world.size]
            own = now[world.rank : world.rank + 1]  # empty where the last step has too few
            _together(world, one, partial(_make_parts, work, step, own))
            done += sum(len(work.cache.prompts_of(number)) for number in now)
            show(done)
    return found.get("negative", {})


def _together(world: World, one: Pass, action: Callable[[], None]) -> None:
    """Run an action on all ranks, each of which may call the pass's network as often as it likes."""

    def run() -> None:
        try:
            action()
        except (UserError, OSError):  # between two forwards: the others' are gone through
            finish()
            raise
        finish()

    def finish() -> None:
        for network in one.networks:
            network.finish()

    world.run_on_all_ranks(run)


def _make_parts(work: Work, step: Step, numbers: list[int]) -> None:
    """Send this rank's parts through a pass."""
    recipe, cache = work.recipe, work.cache
    for number in numbers:
        write_part(cache, number, step=step, prompts=work.prompts, recipe=recipe)
        refused = recipe.prompts.too_long == "refuse" and recipe.prompts.bad_rows == "error"
        if step.last and refused:
            for problem in cut_prompts.problems(cache.cut(number), work.prompts).values():
                raise UserError(f"{problem} Or set prompts.bad_rows=skip.")


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
                say(f"encoding prompts: {done:,} of {total:,}, about {left} left")
                last = now

        yield line


def say(line: str) -> None:
    """Print a line as it is."""
    open_console().print(line, highlight=False, markup=False, soft_wrap=True)
