"""Where the seconds of one iteration go.

    python -m benchmarks.speed.breakdown launch/t2v_tiny.toml [section.key=value ...]

Runs a recipe in this process for a warm-up and five iterations in a temporary folder, and prints
the median seconds of each part. The parts are timed at their calls; `other` is what is left of the
iteration.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastgrpo import train
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.parallel.world import open_world
from fastgrpo.session import Session, claim, open_session
from fastgrpo.training import rollout

ITERATIONS = 5


class Timers:
    """Seconds by name; timing one call inside another counts in the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.inner = self.inner, 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.inner
                self.inner = before + spent

        return timed


def instrument(session: Session, timers: Timers) -> None:
    """Put timers around the parts of this session's iterations."""
    policy: Any = session.policy
    network = policy.velocity
    drawing, training = (
        timers.around(f"{phase}: network", network) for phase in ("rollout", "update")
    )

    def velocity(*args: Any) -> Any:
        return (training if torch.is_grad_enabled() else drawing)(*args)

    policy.velocity = velocity
    policy.decode = timers.around("decode: VAE", policy.decode)
    session.scorer.collect = timers.around("reward: waiting for scores", session.scorer.collect)  # type: ignore[method-assign]
    session.trainer.step = timers.around("update: clip and AdamW", session.trainer.step)  # type: ignore[method-assign]
    torch.Tensor.backward = timers.around("update: backward", torch.Tensor.backward)  # type: ignore[method-assign]
    rollout.Plan.step_noise = timers.around("rollout: noise", rollout.Plan.step_noise)  # type: ignore[method-assign]


def measure(recipe: config.Recipe) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of each iteration, in all and by part."""
    totals, parts = [], []
    with open_world() as world, ExitStack() as stack:
        session = open_session(recipe, world, stack, *claim(recipe, world, stack))
        timers = Timers()
        instrument(session, timers)
        for _ in range(ITERATIONS + 1):
            timers.seconds.clear()
            start = time.perf_counter()
            train.iterate(session)
            totals.append(time.perf_counter() - start)
            parts.append(dict(timers.seconds))
    return totals[1:], parts[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    cli.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        recipe = config.load(arguments.recipe, [*arguments.overrides, f"run.dir={folder}/run"])
        totals, parts = measure(recipe)
    total = statistics.median(totals)
    medians = {name: statistics.median(part.get(name, 0.0) for part in parts) for name in parts[0]}
    medians["other"] = total - sum(medians.values())
    samples = recipe.prompts.per_iteration * recipe.rollout.samples_per_prompt
    print(
        f"\n{date.today()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{platform.machine()}"
    )
    print(
        f"{samples} samples x {recipe.rollout.steps} steps, {recipe.steps_trained} trained; median "
        f"of {ITERATIONS} "
        f"iterations {total:.2f} s (from {min(totals):.2f} to {max(totals):.2f})"
    )
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"  {name:<28} {seconds:7.3f} s  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
