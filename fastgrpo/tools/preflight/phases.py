"""What preflight measured of each phase, scaled to an iteration, as a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fastgrpo.tools.preflight.finding import Parts, gathered
from fastgrpo.tools.preflight.iteration import Iteration, Meter
from fastgrpo.training import rollout


@dataclass(frozen=True)
class Phase:
    """Of the slowest rank, and of the one that held most."""

    name: str
    of: str  # what was measured
    seconds: float
    times: float  # in an iteration
    peak_gib: float | None  # of the GPU's tensors; without a GPU of the process; none = not measured


@dataclass(frozen=True)
class Planned:
    """What the planner expects of a phase."""

    seconds: float  # per iteration
    peak_gib: float


def measured(parts: Parts, done: Iteration, meter: Meter, saving_s: float) -> list[Phase]:
    """The phases of the iteration that was measured, and a checkpoint, on every rank."""
    recipe, world = parts.recipe, parts.world
    batch, steps = len(done.drawn.slots), done.plan.steps
    shares = (world.share(parts.total, group) for group in range(world.groups))
    size = recipe.rollout.at_once
    rounds = max(
        sum(1 for _ in rollout.batches(share, parts.conditions, done.plan.group_size, size)) for share in shares
    )
    own = dict(meter.seconds) | {"update": statistics.median(done.micro_batches), "save": saving_s}
    seconds = {name: max(of_rank[name] for of_rank in gathered(own, world)) for name in own}
    peaks = {name: max(of_rank[name] for of_rank in gathered(meter.peaks, world)) for name in meter.peaks}
    clips = len(done.pixels)
    told = {
        "rollout": (f"{batch} samples, {steps} steps", float(rounds)),
        "decode": (f"{clips} clips", float(rounds)),
        "reward": (f"{clips} clips per rank", float(rounds)),
        "update": (f"a micro-batch of {recipe.optimizer.batch_size}", float(micro_batches(parts))),
        "save": ("a checkpoint", 1 / recipe.checkpoint.every),
    }
    return [Phase(name, of, seconds[name], times, peaks.get(name)) for name, (of, times) in told.items()]


def micro_batches(parts: Parts) -> int:
    """Of an iteration, per rank: at most so many, since states that a group shares are evaluated once."""
    recipe = parts.recipe
    updates = recipe.optimizer.updates_per_iteration
    transitions = len(parts.texts) * recipe.samples_trained * recipe.steps_trained / parts.world.groups
    return updates * math.ceil(transitions / updates / recipe.optimizer.batch_size)


def table(phases: Sequence[Phase], planned: Mapping[str, Planned]) -> Table:
    """planned: by phase; empty = no columns for it"""
    found = Table(title="seconds and peak memory, the largest of the ranks")
    columns = ["phase", "measured on", "seconds", "per iteration", "peak GiB"]
    for column in columns + (["planned s", "planned GiB"] if planned else []):
        found.add_column(column, justify="left" if column in columns[:2] else "right")
    for phase in phases:
        scaled = f"x {phase.times:g} = {phase.seconds * phase.times:.2f} s"
        row = [phase.name, phase.of, f"{phase.seconds:.3f}", scaled]
        row.append("" if phase.peak_gib is None else f"{phase.peak_gib:.2f}")
        expected = planned.get(phase.name)
        if expected is not None:
            row += [f"{expected.seconds:.2f}", f"{expected.peak_gib:.2f}"]
        found.add_row(*row)
    total = sum(phase.seconds * phase.times for phase in phases)
    found.add_row("sum", "scoring hides behind the rollout where there is time", "", f"{total:.2f} s")
    return found
