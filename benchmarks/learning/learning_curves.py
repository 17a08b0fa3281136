"""Held-out reward against what it costs: seconds here, evaluations of the network, and hours on 64
H800, as `fastgrpo plan` prices the same switches for HunyuanVideo (full_size.py).

    python -m benchmarks.learning.learning_curves                  the demo's length, three seeds each
    python -m benchmarks.learning.learning_curves --prices             the plan's figures, no training
    python -m benchmarks.learning.learning_curves --iterations 20 --seeds 1 --only full window
    python -m benchmarks.learning.learning_curves --only full nft nft-clip-1 nft-clip-2 awm
    python -m benchmarks.learning.learning_curves --only full prompt-1 prompt-2 prompt-4 scouts
    python -m benchmarks.learning.learning_curves --first-seed 3 --seeds 1 --only nft --switches nft KEY=VALUE ...

The recipes are in arms.py. Held-out prompts are evaluated on the way, outside what is counted. It
prints what each recipe took to reach the held-out reward at which the first one ended, with
intervals over prompts and seeds, and draws docs/pictures/learning_curves.png. Whoever tunes a recipe
does so with another seed than those that are shown: --first-seed.

Finished runs are not run again. What is learned does not depend on what else the machine does, but
the seconds do: so they are not the runs' own but those of iterations that all recipes run in turn,
at the end, spread over the length of a run.
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.learning import full_size, pictures
from benchmarks.learning.arms import ARMS, COMMON, USUAL, Arm
from benchmarks.learning.campaign import Trained, Variant, train_all
from benchmarks.learning.intervals import LIMITS, Array, reached
from benchmarks.speed.ways import Ours, open_session
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import leave
from fastgrpo.parallel.world import open_world

RECIPE = full_size.DEMO
PICTURE = Path("docs/pictures/learning_curves.png")
PARTS = ("VQ", "MQ", "TA")
AXES = ("seconds here", "evaluations of the network", f"hours on {full_size.GPUS} H800")


@dataclass(frozen=True)
class Reached:
    """What a recipe had spent when it first had a held-out reward."""

    spent: float  # infinite: it never had it
    share: float  # of what the recipe whose reward it is spent in all
    low: float  # 95 % interval of that share
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.low):
            return "never"
        low, high = (f"{one:.0%}" if np.isfinite(one) else "never" for one in (self.low, self.high))
        if not np.isfinite(self.spent):
            return f"never ({low} .. {high})"
        return f"{number(self.spent)}, {self.share:.0%} ({low} .. {high})"


def number(value: float) -> str:
    """A number as tables show it: three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spent(one: Trained, hours: float) -> list[Array]:
    """What was spent up to the end of each iteration, on every axis.

    hours: on 64 H800, for an iteration;  returns [iterations] each
    """
    seconds = one.seconds()
    return [seconds, one.evaluations(), np.cumsum(np.full(len(seconds), hours))]


def at_evaluations(one: Trained, values: Array) -> Array:
    """What was spent up to each held-out evaluation.  values: [iterations]"""
    found: Array = np.concatenate([[0.0], values])[one.heldout_at()]
    return found


def goal_of(full: Trained, given: float | None) -> tuple[float, Array]:
    """The held-out reward to be reached, and in every draw of prompts and seeds, [RESAMPLES].

    given: a reward that is the same in all draws; None: that at which the recipe ended
    """
    curve = full.heldout_curve(PARTS)
    draws = curve.resampled()[:, -1]
    if given is not None:
        return given, np.full_like(draws, given)
    return float(curve.mean()[-1]), draws


def reach(one: Trained, values: Array, goal: tuple[float, Array], total: float) -> Reached:
    """What one recipe had spent when it had the reward of `goal_of`.

    values: what was spent, [iterations];  total: by the full recipe in all
    """
    axis, reward = at_evaluations(one, values), one.heldout_curve(PARTS)
    found = float(reached(axis, reward.mean(), np.asarray(goal[0])))
    draws = reached(axis, reward.resampled(), goal[1]) / total
    low, high = np.percentile(draws, LIMITS, method="inverted_cdf")
    return Reached(found, share=found / total, low=float(low), high=float(high))


def paces(
    common: Sequence[str], variants: Sequence[Variant], cache: str, rounds: int
) -> list[Array]:
    """Seconds of every iteration of each variant, between `rounds` that are measured.

    A round is one iteration of each variant, one after the other, at the same share of the run,
    since what a window costs depends on where it lies.  returns [iterations] each
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        world = stack.enter_context(open_world())
        ways = []
        for variant in variants:
            overrides = [*common, *variant.overrides, cache, f"run.dir={folder}/{variant.name}"]
            ways.append(Ours(open_session(config.load(RECIPE, overrides), world, stack)))
        lengths = [way.session.recipe.run.iterations for way in ways]
        places = [np.linspace(0, length - 1, rounds).round().astype(int) for length in lengths]
        measured: list[list[float]] = [[] for _ in ways]
        for number_of_round in (0, *range(rounds)):  # a warm-up first
            for way, seconds, place in zip(ways, measured, places, strict=True):
                way.session.progress.iteration = int(place[number_of_round])
                seconds.append(way.iterate()["total"])
        return [
            np.interp(np.arange(length), place, seconds[1:])
            for length, place, seconds in zip(lengths, places, measured, strict=True)
        ]


def table(trained: Sequence[Trained], hours: Sequence[float], given: float | None = None) -> str:
    """Markdown: one row per recipe; the first one's end is everyone's goal, or the reward given.

    hours: on 64 H800, for an iteration of each
    """
    totals = [values[-1] for values in spent(trained[0], hours[0])]
    goal = goal_of(trained[0], given)
    head = ["recipe", "iterations", "seconds each", "held-out gain", "95 % interval"]
    head += [f"{axis} to {goal[0]:.3f}" for axis in (*AXES[:2], "H800-hours")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one, of_iteration in zip(trained, hours, strict=True):
        gain, axes = one.gain(PARTS), spent(one, of_iteration)
        cells = [one.variant.label, str(len(axes[0])), f"{axes[0][-1] / len(axes[0]):.2f}"]
        if gain is None:
            cells += [f"ended: {one.failures[0] if one.failures else 'unfinished'}"]
        else:
            cells += [f"{gain.difference:+.3f}", f"{gain.low:+.3f} .. {gain.high:+.3f}"]
            for values, total, times in zip(axes, totals, (1, 1, full_size.GPUS), strict=True):
                found = reach(one, values, goal, total)
                cells.append(str(replace(found, spent=found.spent * times)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prices(variants: Sequence[Variant], recipes: Sequence[Recipe]) -> str:
    """Markdown: what the plan says of each recipe at the full size.  recipes: the demo's"""
    lines = ["| recipe | seconds per iteration | H800-hours | share |", "|---|---|---|---|"]
    plans = [full_size.planned(recipe) for recipe in recipes]
    for variant, plan in zip(variants, plans, strict=True):
        share = plan.gpu_hours / plans[0].gpu_hours
        cells = [variant.label, f"{plan.seconds:.0f}", f"{plan.gpu_hours:,.0f}", f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--iterations", type=int, default=76)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0, help="the others follow it (default: %(default)s)")
    add("--every", type=int, default=8, help="iterations between evaluations (%(default)s)")
    add(
        "--rounds",
        type=int,
        default=16,
        help="iterations that are timed; 0: the runs' own seconds, not drawn (default: %(default)s)",
    )
    add(
        "--only",
        nargs="+",
        choices=[arm.name for arm in ARMS],
        default=USUAL,
        help=f"recipes; the first one's end is everyone's goal (default: {' '.join(USUAL)})",
    )
    add(
        "--switches",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="other switches of the recipe of that name; may be repeated",
    )
    add("--common", nargs="+", default=(), metavar="KEY=VALUE", help="overrides of all recipes")
    add("--goal", type=float, help="a held-out reward to reach in place of the first one's last")
    add("--prices", action="store_true", help="print what the plan says of them, and train nothing")
    add(
        "--folder",
        type=Path,
        default=Path("runs/learning_curves"),
        help="of the runs (%(default)s)",
    )
    add("--picture", type=Path, default=PICTURE, help="default: %(default)s")
    return parser.parse_args(arguments)


def chosen(names: Sequence[str], switches: Sequence[Sequence[str]]) -> list[Arm]:
    """The arms of these names, in the order of ARMS.

    switches: (name, override, ...) in place of an arm's own
    Raises UserError for the switches of an arm that is not among them.
    """
    typed = {name: overrides for name, *overrides in switches}
    for name in typed:
        if name not in names:
            raise UserError(f"--switches {name}: not among the recipes; name it with --only, too.")
    arms = [arm for arm in ARMS if arm.name in names]
    return [arm.with_overrides(typed[arm.name]) if arm.name in typed else arm for arm in arms]


def main() -> None:
    arguments = parse()
    cli.quiet_libraries()
    arms = chosen(arguments.only, arguments.switches)
    common = [*COMMON, *arguments.common]
    variants = [arm.of_length(arguments.iterations) for arm in arms]
    recipes = [config.load(RECIPE, [*common, *variant.overrides]) for variant in variants]
    if arguments.prices:
        print(prices(variants, recipes))
        return
    hours = [full_size.hours(recipe) for recipe in recipes]
    trained = train_all(
        RECIPE,
        common=common,
        variants=variants,
        seeds=range(arguments.first_seed, arguments.first_seed + arguments.seeds),
        folder=arguments.folder,
        every=arguments.every,
    )
    load, how = os.getloadavg()[0], "the runs' own seconds"
    if arguments.rounds:
        cache = f"prompts.cache={arguments.folder / 'embeddings'}"
        timed = paces(common, variants, cache, arguments.rounds)
        trained = [replace(one, pace=pace) for one, pace in zip(trained, timed, strict=True)]
        how = f"seconds of {arguments.rounds} paired iterations"
    curves = [
        [at_evaluations(one, axis) for axis in spent(one, each)]
        for one, each in zip(trained, hours, strict=True)
    ]
    costs = dict(zip(AXES, zip(*curves, strict=True), strict=True))
    if not arguments.rounds:
        del costs[AXES[0]]  # seconds of runs at different times do not compare
    pictures.over_costs(trained, PARTS, costs, arguments.picture)
    print(table(trained, hours, arguments.goal))
    print(
        f"{date.today()}, {os.cpu_count()} cores of {platform.machine()}, {arguments.seeds} seeds "
        f"from {arguments.first_seed}, {how}; load before {load:.1f}"
    )
    leave(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"learning_curves: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("learning_curves: stopped; start again to go on") from None
