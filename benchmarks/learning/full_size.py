"""What a tiny-world recipe would cost for HunyuanVideo: hours on 64 H800, as `fastgrpo plan` has them.

Decoding is a third of a tiny iteration and a fiftieth of a real one, so that seconds here mislead.
A recipe's switches, its differences from the demo in rollout, objective and optimizer, are put into
launch/t2v_hunyuan.toml. This file alone says how they are scaled:

- numbers of denoising steps by 25 / 6, the two recipes' grids, and the iterations between moves of a
  window by what keeps its passes over the grid; one noisy step of each prompt's own stays one
- samples trained per prompt by 12 / 8, in multiples of the optimizer steps of an iteration; samples
  drawn by 12 / 16, and as many as are trained at least; scouts keep their ratio to those drawn
- prompts per iteration by 32 / 10
- optimizer steps per iteration by 4 / 1, the learning rate by 1e-5 / 2.5e-4
- a run of the demo's length by its 76 iterations stands for t2v_hunyuan's 300
- the moving average's decay is copied where the method asks for the average, else left out
- all else is copied; what a batch holds at once stays t2v_hunyuan's
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan, plan
from fastgrpo.training import methods

DEMO = Path("launch/t2v_tiny.toml")
FULL = Path("launch/t2v_hunyuan.toml")
GPUS, CARD = 64, "h800"
SECTIONS = ("rollout", "objective", "optimizer")
STEPS = ("steps", "window", "window_pool", "window_stride", "tail_steps", "scout_steps")
KEPT = ("batch_size", "samples_per_prompt", "scouts", "best_of_n", "window_every", "decay_updates")
"""Keys that are not copied: scaled together with others, or of no consequence here."""


def recipe_of(demo: Recipe) -> Recipe:
    """t2v_hunyuan with a demo recipe's switches.  demo: launch/t2v_tiny.toml with overrides"""
    usual, full = config.load(DEMO), config.load(FULL)
    scales = _scales(usual, full)
    changed: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name in SECTIONS:
        for key, value in getattr(demo, name):
            if value != getattr(getattr(usual, name), key) and key not in KEPT:
                scale = scales.get(key) if isinstance(value, (int, float)) else None
                changed[name][key] = scale(value) if scale else value
    if demo.rollout.window_schedule == "per_prompt":
        changed["rollout"]["window"] = demo.rollout.window
    if not methods.traits(demo).noisy_steps:
        changed["optimizer"]["ema_decay"] = demo.optimizer.ema_decay
    updates = changed["optimizer"].get(
        "updates_per_iteration", full.optimizer.updates_per_iteration
    )
    drawn, trained, scouts = _samples(demo, usual, full, updates)
    changed["rollout"] |= {"samples_per_prompt": drawn, "scouts": scouts}
    changed["objective"]["best_of_n"] = trained if trained < drawn else None
    prompts = full.prompts.per_iteration / usual.prompts.per_iteration
    changed["prompts"] = {"per_iteration": round(demo.prompts.per_iteration * prompts)}
    iterations = demo.run.iterations * full.run.iterations / usual.run.iterations
    changed["run"] = {"iterations": max(1, round(iterations))}
    tree = full.model_dump()
    for name, values in changed.items():
        tree[name] |= values
    return config.parse(_with_passes(tree, demo))


def _scales(usual: Recipe, full: Recipe) -> dict[str, Callable[[Any], Any]]:
    """How the numbers of some keys become those of the full size."""
    steps = full.rollout.steps / usual.rollout.steps
    updates = full.optimizer.updates_per_iteration / usual.optimizer.updates_per_iteration
    rate = full.optimizer.lr / usual.optimizer.lr
    return {
        **dict.fromkeys(STEPS, lambda value: max(1, round(value * steps))),
        "updates_per_iteration": lambda value: max(1, round(value * updates)),
        "lr": lambda value: value * rate,
    }


def _samples(
    demo: Recipe, usual: Recipe, full: Recipe, updates: int
) -> tuple[int, int, int | None]:
    """(samples drawn per prompt, trained, scouts) of the full size."""
    trained = demo.samples_trained * full.samples_trained / usual.samples_trained
    trained = updates * math.ceil(trained / updates - 1e-9)
    groups = full.rollout.samples_per_prompt / usual.rollout.samples_per_prompt
    drawn = max(trained, round(demo.rollout.samples_per_prompt * groups))
    scouts = demo.rollout.scouts
    return drawn, trained, scouts and round(scouts / demo.rollout.samples_per_prompt * drawn)


def _with_passes(tree: dict[str, Any], demo: Recipe) -> dict[str, Any]:
    """The tree with the iterations between moves of a progressive window that keep the passes over
    the grid.
    """
    rollout = tree["rollout"]
    if demo.rollout.window is None or demo.rollout.window_schedule != "progressive":
        return tree
    places = demo.rollout.steps - demo.rollout.window
    passes = demo.run.iterations / demo.rollout.window_every / places
    moves = passes * (rollout["steps"] - rollout["window"])
    rollout["window_every"] = max(1, round(tree["run"]["iterations"] / moves))
    return tree


def planned(demo: Recipe) -> Plan:
    """The plan of that recipe."""
    return plan(recipe_of(demo), GPUS, Machine(gpu(CARD), Achieved()))


def hours(demo: Recipe) -> float:
    """Hours that one iteration of the demo stands for: of all 64 GPUs together, not GPU-hours."""
    found = planned(demo)
    return found.seconds * found.iterations / demo.run.iterations / 3600
