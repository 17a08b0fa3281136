"""Reward against seconds of training: every step noisy, a window of noisy steps, and no
trajectories at all (NFT and AWM).

    python -m benchmarks.learning.learning_curves           the demo's length, three seeds each
    python -m benchmarks.learning.learning_curves --iterations 20 --seeds 1 --only full window
    python -m benchmarks.learning.learning_curves --only full nft nft_clip_1 nft_clip_2 awm
    python -m benchmarks.learning.learning_curves --window rollout.window=2

Held-out prompts are evaluated on the way, outside the seconds that are counted. It prints how long
each recipe took to reach the held-out reward at which the full one ended, and draws
docs/pictures/learning_curves.png. Finished runs are not run again. What is learned does not depend
on what else the machine does, but the seconds do: so they are not the runs' own but those of
iterations that all recipes run in turn, at the end, spread over the length of a run.
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.learning import pictures
from benchmarks.learning.campaign import Array, Trained, Variant, train_all
from benchmarks.speed.ways import Ours, open_session
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import leave
from fastgrpo.parallel.world import open_world

RECIPE = Path("launch/t2v_tiny.toml")
PICTURE = Path("docs/pictures/learning_curves.png")
PARTS = ("VQ", "MQ", "TA")
COMMON = (
    "run.preflight=false",
    "checkpoint.keep_best=false",
    "evaluate.seeds=4",
    "evaluate.clips=0",
)
WINDOW = ("rollout.window=2", "rollout.window_every=19", "rollout.tail_steps=2")
NFT = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")
AWM = (
    "objective.kind=awm",
    "rollout.shared_noise=false",
    "optimizer.ema_decay=0.9",
    "objective.clip_range=1e-5",
)
USUAL = ("full", "window", "nft")
CLIPS = (1, 2)
"""NFT's objective.advantage_clip, beside the 5 that is its default."""


def paces(
    common: Sequence[str], variants: Sequence[Variant], cache: str, rounds: int
) -> list[Array]:
    """Seconds of every iteration of each variant, between `rounds` that are measured.

    A round is one iteration of each variant, one after the other, at the same place of the run,
    since what a window costs depends on where it lies.  returns [iterations] each
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        world = stack.enter_context(open_world())
        ways = []
        for variant in variants:
            overrides = [*common, *variant.overrides, cache, f"run.dir={folder}/{variant.name}"]
            ways.append(Ours(open_session(config.load(RECIPE, overrides), world, stack)))
        length = ways[0].session.recipe.run.iterations
        places = np.linspace(0, length - 1, rounds).round().astype(int)
        measured: list[list[float]] = [[] for _ in ways]
        for place in (0, *places):  # a warm-up first
            for way, seconds in zip(ways, measured, strict=True):
                way.session.progress.iteration = int(place)
                seconds.append(way.iterate()["total"])
        return [np.interp(np.arange(length), places, seconds[1:]) for seconds in measured]


def reached(trained: Trained, goal: float) -> float:
    """Seconds of training after which the held-out reward first reached the goal, between
    evaluations; NaN if never.
    """
    seconds, reward = trained.heldout_curve(PARTS)
    above = np.flatnonzero(reward >= goal)
    if not len(above):
        return float("nan")
    last = int(above[0])
    if last == 0:
        return 0.0
    first = last - 1
    share = (goal - reward[first]) / (reward[last] - reward[first])
    return float(seconds[first] + share * (seconds[last] - seconds[first]))


def table(trained: Sequence[Trained]) -> str:
    """Markdown: one row per recipe; the first one's end is everyone's goal."""
    seconds, reward = trained[0].heldout_curve(PARTS)
    goal, time = float(reward[-1]), float(seconds[-1])
    head = [
        "recipe",
        "seconds",
        "per iteration",
        "held-out gain",
        "95 % interval",
        f"seconds to {goal:.3f}",
        "share",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in trained:
        gain, spent = one.gain(PARTS), reached(one, goal)
        took = one.seconds()
        cells = [one.variant.label, f"{took[-1]:.0f}", f"{took[-1] / len(took):.2f}"]
        if gain is None:
            cells += [f"ended: {one.failures[0] if one.failures else 'unfinished'}"]
        else:
            cells += [f"{gain.difference:+.3f}", f"{gain.low:+.3f} .. {gain.high:+.3f}"]
            cells += (
                [f"{spent:.0f}", f"{spent / time:.0%}"] if np.isfinite(spent) else ["never", ""]
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variants(window: Sequence[str], nft: Sequence[str], awm: Sequence[str]) -> tuple[Variant, ...]:
    """All recipes that can be compared, with the overrides of each."""
    clips = [
        Variant(
            f"nft_clip_{clip}",
            f"DiffusionNFT, advantages within ±{clip}",
            (*nft, f"objective.advantage_clip={clip}"),
        )
        for clip in CLIPS
    ]
    return (
        Variant("full", "every step noisy"),
        Variant("window", "a window of noisy steps", tuple(window)),
        Variant("nft", "DiffusionNFT", tuple(nft)),
        *clips,
        Variant("awm", "AWM", tuple(awm)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=76)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--every", type=int, default=8, help="iterations between evaluations (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=16, help="iterations that are timed (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[variant.name for variant in variants(WINDOW, NFT, AWM)],
        default=USUAL,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--window", nargs="+", default=WINDOW, metavar="KEY=VALUE", help="overrides of that recipe"
    )
    parser.add_argument(
        "--nft", nargs="+", default=NFT, metavar="KEY=VALUE", help="overrides of those recipes"
    )
    parser.add_argument(
        "--awm", nargs="+", default=AWM, metavar="KEY=VALUE", help="overrides of that recipe"
    )
    parser.add_argument(
        "--common", nargs="+", default=(), metavar="KEY=VALUE", help="overrides of all recipes"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/learning_curves"),
        help="of the runs (%(default)s)",
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: %(default)s")
    arguments = parser.parse_args()
    cli.quiet_libraries()
    every = variants(arguments.window, arguments.nft, arguments.awm)
    length = (
        f"run.iterations={arguments.iterations}",
        f"optimizer.decay_updates={arguments.iterations}",
    )
    common, chosen = (
        [*COMMON, *length, *arguments.common],
        [v for v in every if v.name in arguments.only],
    )
    trained = train_all(
        RECIPE,
        common=common,
        variants=chosen,
        seeds=arguments.seeds,
        folder=arguments.folder,
        every=arguments.every,
    )
    cache = f"prompts.cache={arguments.folder / 'embeddings'}"
    load = os.getloadavg()[0]
    timed = paces(common, chosen, cache, arguments.rounds)
    trained = [replace(one, pace=pace) for one, pace in zip(trained, timed, strict=True)]
    pictures.over_time(trained, PARTS, arguments.picture)
    print(table(trained))
    print(
        f"{date.today()}, {os.cpu_count()} cores of {platform.machine()}, {arguments.seeds} seeds, "
        f"seconds of {arguments.rounds} paired iterations; load before {load:.1f}"
    )
    leave(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"learning_curves: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("learning_curves: stopped; start again to go on") from None
