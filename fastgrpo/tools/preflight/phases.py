"""The measured seconds and memory of each phase, scaled to an iteration, as a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fastgrpo.parallel.world import World
from fastgrpo.tools.preflight.finding import Parts, gathered
from fastgrpo.tools.preflight.iteration import Iteration, Meter
from fastgrpo.training import rollout


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase's seconds on the slowest rank, and the largest of the ranks' peaks."""

    name: str
    of: str  # the measured work
    seconds: float
    times: float  # repetitions in an iteration
    peak_gib: float | None  # the GPU's tensors; without a GPU the process; None: not measured


@dataclass(frozen=True)
class Planned:
    """A phase's seconds and memory by the planner."""

    seconds: float  # per iteration
    peak_gib: float


def measured(parts: Parts, done: Iteration, meter: Meter, saving_s: float) -> list[Phase]:
    """The phases of the iteration that was measured, and a checkpoint, on every rank."""
    recipe, world = parts.recipe, parts.world
    batch, steps = len(done.drawn.slots), done.plan.steps
    shares = [world.share(parts.total, group) for group in range(world.groups)]
    size, group_size = recipe.rollout.at_once, done.plan.group_size
    dealt = [rollout.batches(share, parts.conditions, group_size, size) for share in shares]
    rounds = max(len(list(batches)) for batches in dealt)
    own = dict(meter.seconds) | {"update": statistics.median(done.micro_batches), "save": saving_s}
    seconds, peaks = _largest(own, world), _largest(meter.peaks, world)
    clips, scouting = len(done.decoded.pixels), scout_rounds(parts)
    of_rollout = rounds + scouting * recipe.rollout.scout_steps / steps
    work = {
        "rollout": (f"{batch} samples, {steps} steps", of_rollout),
        "decode": (f"{clips} clips", float(rounds + scouting)),
        "reward": (f"{clips} clips per rank", float(rounds + scouting)),
        "update": (f"a micro-batch of {recipe.optimizer.batch_size}", float(micro_batches(parts))),
        "save": ("a checkpoint", 1 / recipe.checkpoint.every),
    }
    return [
        Phase(name=name, of=of, seconds=seconds[name], times=times, peak_gib=peaks.get(name))
        for name, (of, times) in work.items()
    ]


def _largest(values: Mapping[str, float], world: World) -> dict[str, float]:
    """The largest of the ranks' values, by name."""
    everyone = gathered(values, world)
    return {name: max(of_rank[name] for of_rank in everyone) for name in values}


def scout_rounds(parts: Parts) -> int:
    """The most batches of scouts of an iteration and rank."""
    settings = parts.recipe.rollout
    own = math.ceil(len(parts.texts) * (settings.scouts or 0) / parts.world.groups)
    return math.ceil(own / settings.at_once)


def micro_batches(parts: Parts) -> int:
    """The most micro-batches of an iteration and rank; states that a group shares make it fewer."""
    recipe = parts.recipe
    updates = recipe.optimizer.updates_per_iteration
    samples = len(parts.texts) * recipe.samples_trained
    transitions = samples * recipe.steps_trained / parts.world.groups
    return updates * math.ceil(transitions / updates / recipe.optimizer.batch_size)


def table(phases: Sequence[Phase], planned: Mapping[str, Planned]) -> Table:
    """The phases as rows.  planned: by phase; empty: no columns of the plan"""
    rows = Table(title="seconds and peak memory, the largest of the ranks")
    columns = ["phase", "measured on", "seconds", "per iteration", "peak GiB"]
    for column in columns + (["planned s", "planned GiB"] if planned else []):
        rows.add_column(column, justify="left" if column in columns[:2] else "right")
    for phase in phases:
        scaled = f"x {phase.times:g} = {phase.seconds * phase.times:.2f} s"
        row = [phase.name, phase.of, f"{phase.seconds:.3f}", scaled]
        row.append("" if phase.peak_gib is None else f"{phase.peak_gib:.2f}")
        expected = planned.get(phase.name)
        if expected is not None:
            row += [f"{expected.seconds:.2f}", f"{expected.peak_gib:.2f}"]
        rows.add_row(*row)
    total = sum(phase.seconds * phase.times for phase in phases)
    note = "scoring hides behind the rollout where there is time"
    rows.add_row("sum", note, "", f"{total:.2f} s")
    return rows
