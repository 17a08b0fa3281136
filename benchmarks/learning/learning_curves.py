"""Reward against seconds of training: every step noisy, a window of noisy steps, and no
trajectories at all (NFT); by name also NFT's advantage clips, AWM, a noisy step of each prompt's
own, from one, two or four noises, and scouts before NFT.

    python -m benchmarks.learning.learning_curves                  the demo's length, three seeds each
    python -m benchmarks.learning.learning_curves --iterations 20 --seeds 1 --only full window
    python -m benchmarks.learning.learning_curves --only full nft nft-clip-1 nft-clip-2 awm
    python -m benchmarks.learning.learning_curves --only full prompt-1 prompt-2 prompt-4 scouts
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
PER_PROMPT = (
    "rollout.window=1",
    "rollout.window_schedule=per_prompt",
    "rollout.sampler=linear",
    "rollout.eta=1.0",
    "objective.step_weights=gradient",
)
SCOUTS = (
    *NFT,
    "rollout.scouts=24",
    "rollout.scout_steps=3",
    "rollout.samples_per_prompt=8",
    "objective.best_of_n=none",
)
ARMS = (
    Variant("full", "every step noisy"),
    Variant("window", "a window of noisy steps", WINDOW),
    Variant("nft", "DiffusionNFT", NFT),
    *(
        Variant(
            f"nft-clip-{clip}",
            f"DiffusionNFT, advantages within {clip}",
            (*NFT, f"objective.advantage_clip={clip}"),
        )
        for clip in (1, 2)  # beside the 5 that is the default
    ),
    Variant("awm", "AWM", AWM),
    Variant("prompt-1", "a noisy step per prompt, one noise", PER_PROMPT),
    *(
        Variant(
            f"prompt-{noises}",
            f"a noisy step per prompt, {noises} noises",
            (*PER_PROMPT, f"rollout.seeds_per_prompt={noises}"),
        )
        for noises in (2, 4)
    ),
    Variant("scouts", "DiffusionNFT, 8 of 24 scouts", SCOUTS),
)
USUAL = ("full", "window", "nft")


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
        choices=[arm.name for arm in ARMS],
        default=USUAL,
        help=f"recipes; the first one's end is everyone's goal (default: {' '.join(USUAL)})",
    )
    parser.add_argument(
        "--window", nargs="+", default=WINDOW, metavar="KEY=VALUE", help="overrides of that recipe"
    )
    parser.add_argument(
        "--nft", nargs="+", default=NFT, metavar="KEY=VALUE", help="overrides of that recipe"
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
    typed = {name: tuple(getattr(arguments, name)) for name in ("window", "nft", "awm")}
    arms = [replace(arm, overrides=typed.get(arm.name, arm.overrides)) for arm in ARMS]
    length = (
        f"run.iterations={arguments.iterations}",
        f"optimizer.decay_updates={arguments.iterations}",
    )
    common, chosen = (
        [*COMMON, *length, *arguments.common],
        [arm for arm in arms if arm.name in arguments.only],
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
