"""Held-out evaluation: fixed prompts and seeds, the ODE sampler, before and after; and the paired difference.

The seeds do not depend on the run's seed, so that all runs of a recipe are judged on the same noise.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.data import video
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training import rollout
from fastgrpo.training.rollout import Plan, Round
from fastgrpo.training.scorer import Scorer
from fastgrpo.training.trainer import Trainer

RESAMPLES = 10_000


@dataclass(frozen=True)
class Evaluation:
    """Scores of the held-out clips, prompt by prompt and seed by seed."""

    iteration: int
    prompts: list[str]  # one per clip
    seeds: list[int]  # one per clip
    scores: dict[str, list[float]]  # part -> one per clip, NaN where invalid
    weights: dict[str, float]
    clips: list[str]  # files, relative to the folder evaluation/, of the first prompts' first seed

    @classmethod
    def read(cls, file: Path) -> "Evaluation":
        """Raises UserError where the file is missing or damaged."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{file}: missing or damaged; choose another run.dir, or remove the run's folder."
            ) from None

    def write(self, file: Path) -> None:
        replace_text(file, json.dumps(asdict(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """Each part and the weighted sum, float64 [clips]."""
        parts = {part: np.array(values, dtype=np.float64) for part, values in self.scores.items()}
        total = np.zeros(len(self.prompts))
        for part, weight in self.weights.items():
            if weight:  # a monitor without a score takes none from the sum
                total = total + weight * parts[part]
        return {"sum": total, **parts}


def evaluate(
    trainer: Trainer,
    recipe: Recipe,
    prompts: Sequence[str],
    conditions: Sequence[Condition],
    scorer: Scorer,
    world: World,
    iteration: int,
    device_grid: Tensor,
    shape: tuple[int, ...],
    between: Callable[[Iterable[Round]], Iterable[Round]] = iter,
) -> Evaluation:
    """Sample every (prompt, seed) with the averaged weights where there are any, score, keep some clips, write.

    between: gives the batches one by one, and may raise in place of one
    returns the evaluation on every rank; also in run.dir/evaluation/step-N.json
    """
    seeds = recipe.evaluate.seeds
    folder = recipe.run.dir / "evaluation"
    clips = folder / f"step-{iteration}"
    if world.main:
        clips.mkdir(parents=True, exist_ok=True)
    world.barrier()
    plan = Plan(0, -1, seeds, device_grid, 0.0, False, shape)
    total = len(prompts) * seeds
    kept = min(recipe.evaluate.clips, len(prompts))
    size, dtype = recipe.rollout.at_once, recipe.model.torch_dtype
    network = trainer.policy.network
    with (
        averaged_weights(trainer),
        sharding.rollout_weights(network, recipe.distributed, dtype, world) as whole,
    ):
        for batch, counts in between(rollout.rounds(total, conditions, seeds, size, world, not whole)):
            own = world.part(len(batch))
            latents = _latents(trainer.policy, plan, conditions, batch)[own.start : own.stop]
            slots = batch[own.start : own.stop]
            if not slots or not counts:
                continue
            pixels = trainer.policy.decode(latents)
            scorer.submit(slots, latents, pixels, [prompts[slot // seeds] for slot in slots])
            for slot, clip in zip(slots, pixels, strict=True):
                if slot % seeds == 0 and slot // seeds < kept:
                    video.write_mp4(clips / f"{slot // seeds:03d}.mp4", clip, recipe.video.fps)
    scored = scorer.collect(total)
    evaluation = Evaluation(
        iteration=iteration,
        prompts=[prompt for prompt in prompts for _ in range(seeds)],
        seeds=list(range(seeds)) * len(prompts),
        scores={part: values.tolist() for part, values in scored.values.items()},
        weights=dict(recipe.weights),
        clips=[f"step-{iteration}/{number:03d}.mp4" for number in range(kept)],
    )
    world.on_main(lambda: evaluation.write(folder / f"step-{iteration}.json"))
    return evaluation


def _latents(policy: Policy, plan: Plan, conditions: Sequence[Condition], slots: list[int]) -> Tensor:
    condition = stack([conditions[slot // plan.group_size] for slot in slots])
    x = plan.initial_noise(slots, plan.grid.device)
    return rollout.sample_ode(policy, x, plan.grid, condition)


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """The moving average in place of the policy's weights, where the recipe keeps one."""
    parameters = dict(trainer.policy.network.named_parameters())
    raw = {name: parameters[name].detach().clone() for name in trainer.ema}
    _copy(trainer.ema, parameters)
    try:
        yield
    finally:
        _copy(raw, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, object]]:
    """Means before and after, their paired difference and its bootstrap 95 % interval, for the sum and each part.

    Prompts are resampled, with all their seeds: clips of one prompt are not independent. Clips that are invalid on
    either side are left out.
    """
    if (before.prompts, before.seeds) != (after.prompts, after.seeds):
        raise UserError(
            "evaluation/step-0.json: was made of other held-out prompts; choose another run.dir, or restore the file "
            "of prompts.heldout."
        )
    result: dict[str, dict[str, object]] = {"before": {}, "after": {}, "difference": {}, "ci95": {}}
    names = list(dict.fromkeys(before.prompts))
    group = np.array([names.index(prompt) for prompt in before.prompts])
    resampled = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    later = after.columns()
    for part, first in before.columns().items():
        usable = np.isfinite(first) & np.isfinite(later[part])
        difference = np.where(usable, later[part] - first, 0.0)
        sums = np.bincount(group, weights=difference, minlength=len(names))
        counts = np.bincount(group, weights=usable, minlength=len(names))
        means = sums[resampled].sum(1) / np.maximum(counts[resampled].sum(1), 1)
        result["before"][part] = float(first[usable].mean())
        result["after"][part] = float(later[part][usable].mean())
        result["difference"][part] = float(difference[usable].mean())
        result["ci95"][part] = [float(bound) for bound in np.percentile(means, [2.5, 97.5])]
    return result
