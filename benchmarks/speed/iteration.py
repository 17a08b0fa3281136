"""One iteration against the public trainer's way of working, and against ours with every saving
off.

    python -m benchmarks.speed.iteration
    python -m benchmarks.speed.iteration launch/t2v_tiny.toml rollout.steps=8
    python -m benchmarks.speed.iteration --runs 1 --window rollout.window=2
    torchrun --nproc-per-node 2 -m benchmarks.speed.iteration

The first is of the tiny HunyuanVideo; any flow model's recipe may be given, with overrides. With
two ranks the bytes really travel.

Contenders, in turn in each run, on the same prompts, noise and steps:

  public   public_way.py: batch 1, every state kept, weights gathered for each forward, rewards
           through files
  plain    our trainer with every saving off
  ours     our trainer as the recipe says
  window   the same with few noisy steps: another algorithm, so its rewards are others

A warm-up, in which bytes and evaluations are counted, is followed by the runs. A ratio is of two
times of one run.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.meters import KINDS, Counts, counted
from benchmarks.speed.ways import PHASES, Theirs, Way, open_ways
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import leave
from fastgrpo.parallel.world import World, open_world

TINY = Path("launch/t2v_tiny.toml")
SETTING = (
    "prompts.per_iteration=4",
    "prompts.limit=100",
    "rollout.samples_per_prompt=12",
    "rollout.steps=16",
    "rollout.batch_size=48",
    "objective.timestep_fraction=0.6",
    "objective.best_of_n=none",
)
WINDOW = ("rollout.window=4", "rollout.tail_steps=5")


@dataclass
class Result:
    """What was measured of one way of working."""

    counts: Counts
    kept: int
    # of the first rollout, [samples, parts]: as we score it, and as read from files
    rewards: dict[str, Tensor]
    seconds: list[dict[str, float]] = field(default_factory=list)  # of each run

    def median(self, phase: str) -> float:
        return statistics.median(run[phase] for run in self.seconds)

    def total(self, kind: str) -> int:
        return sum(counts[kind] for counts in self.counts.values())


def measure(ways: dict[str, Way], runs: int, world: World) -> dict[str, Result]:
    """A counted warm-up of each, then `runs` timed iterations of each in turn, forwards and
    backwards.
    """
    results = {}
    for name, way in ways.items():
        with counted(way.network) as counts:
            way.iterate()
        rewards = {name: way.rewards()}
        if isinstance(way, Theirs):
            rewards["public's files"] = way.rewards_of_files()
        results[name] = Result(counts, way.kept, rewards)
        tell(world, f"warmed up: {name}")
    for run in range(runs):
        for name in list(ways)[:: 1 if run % 2 == 0 else -1]:
            world.barrier()
            results[name].seconds.append(ways[name].iterate())
        tell(
            world,
            f"run {run + 1}: "
            + ", ".join(f"{n} {r.seconds[-1]['total']:.2f} s" for n, r in results.items()),
        )
    return results


def tell(world: World, line: str) -> None:
    if world.main:
        print(line, flush=True)


def ratios(results: dict[str, Result], slower: str, faster: str) -> list[float]:
    """How many times as long one takes as the other, in each run."""
    pairs = zip(results[slower].seconds, results[faster].seconds, strict=True)
    return [one["total"] / other["total"] for one, other in pairs]


def machine(world: World) -> str:
    """What it ran on; the load of others, asked beforehand, makes times doubtful."""
    name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    )
    return (
        f"{date.today()}, {name}, {os.cpu_count()} cores; {world.size} ranks of "
        f"{torch.get_num_threads()} threads; "
        f"load before {os.getloadavg()[0]:.1f}"
    )


def timing(results: dict[str, Result]) -> list[str]:
    """Median seconds, and the ratios of each run."""
    lines = [f"{'seconds':<10}" + "".join(f"{name:>10}" for name in (*PHASES, "total"))]
    for name, result in results.items():
        lines.append(
            f"{name:<10}"
            + "".join(f"{result.median(column):>10.3f}" for column in (*PHASES, "total"))
        )
    for slower, faster in (
        ("public", "ours"),
        ("public", "window"),
        ("plain", "ours"),
        ("public", "plain"),
    ):
        times = ratios(results, slower, faster)
        lines.append(
            f"{slower} takes {statistics.median(times):.2f} times as long as {faster} "
            f"(from {min(times):.2f} to {max(times):.2f})"
        )
    return lines


def counting(results: dict[str, Result]) -> list[str]:
    """What the first iteration moved, kept and evaluated."""
    head = (
        "MB moved",
        *(f"in {phase}" for phase in PHASES),
        "MB kept",
        "forwards",
        "samples",
        "trained",
    )
    lines = [f"{'rank 0':<10}" + "".join(f"{name:>11}" for name in head)]
    for name, result in results.items():
        moved = [result.counts.get(phase, Counter())["bytes"] / 1e6 for phase in PHASES]
        megabytes = "".join(f"{value:>11.2f}" for value in (sum(moved), *moved, result.kept / 1e6))
        lines.append(
            f"{name:<10}" + megabytes + "".join(f"{result.total(kind):>11}" for kind in KINDS[1:])
        )
    return lines


def comparing(results: dict[str, Result]) -> list[str]:
    """The rewards of the first rollout, which are equal where the algorithm and the pixels are."""
    ours = results["ours"].rewards["ours"]
    lines = ["rewards of the first rollout less ours, one by one"]
    for name, rewards in (results["public"].rewards | results["plain"].rewards).items():
        difference = (rewards - ours).abs()
        lines.append(f"{name:<16} largest {difference.max():.2g}, mean {difference.mean():.2g}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", nargs="?", type=Path, help="a TOML file; none = the setting named above"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--runs", type=int, default=5, help="paired runs (default: %(default)s)")
    parser.add_argument(
        "--window",
        nargs="+",
        metavar="KEY=VALUE",
        default=WINDOW,
        help="overrides of that contender",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    cli.quiet_libraries()
    file, overrides = arguments.recipe or TINY, arguments.overrides
    if arguments.recipe is None or "=" in str(arguments.recipe):
        first = [] if arguments.recipe is None else [str(arguments.recipe)]
        file, overrides = TINY, [*SETTING, *first, *overrides]
    recipe = config.load(file, overrides)
    with open_world(recipe.distributed) as world, ExitStack() as stack:
        folder = Path(world.on_main(tempfile.mkdtemp))
        stack.callback(lambda: world.on_main(lambda: shutil.rmtree(folder, ignore_errors=True)))
        where = machine(world)
        ways = open_ways(
            file,
            overrides=overrides,
            window=arguments.window,
            world=world,
            folder=folder,
            stack=stack,
        )
        results = measure(ways, arguments.runs, world)
        rollout = recipe.rollout
        lines = [
            "",
            where,
            f"{recipe.prompts.per_iteration} prompts x {rollout.samples_per_prompt} samples x "
            f"{rollout.steps} steps, "
            f"{recipe.steps_trained} trained, {recipe.optimizer.updates_per_iteration} optimizer "
            "steps; medians of "
            f"{arguments.runs} paired runs",
            "",
            *timing(results),
            "",
            *counting(results),
            "",
            *comparing(results),
        ]
        tell(world, "\n".join(lines))
        if arguments.json and world.main:
            told = {
                name: {"seconds": r.seconds, "counts": r.counts, "kept": r.kept}
                for name, r in results.items()
            }
            arguments.json.write_text(
                json.dumps({"where": where, **told}, indent=1) + "\n", encoding="utf-8"
            )
    leave(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"iteration: {error}") from None
