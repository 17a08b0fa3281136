"""Held-out evaluation before training, on the way and after it, and the paired difference.

Prompts and seeds are fixed and the sampler is the ODE's. The seeds do not depend on the run's seed,
so that all runs of a recipe are judged on the same noise; nor does anything that training draws
depend on them.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.core.policy import Condition, Policy, move, stack
from fastgrpo.data import video
from fastgrpo.parallel import sharding
from fastgrpo.training import rollout
from fastgrpo.training.evaluation import monitors
from fastgrpo.training.rollout import Dealing, Plan, Round
from fastgrpo.training.scoring.scorer import Scorer
from fastgrpo.training.trainer import Trainer, averaged_weights

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of the held-out clips, prompt by prompt and seed by seed."""

    iteration: int
    prompts: list[str]  # one per clip
    seeds: list[int]  # one per clip
    scores: dict[str, list[float]]  # part -> one per clip, NaN where it has no score
    weights: dict[str, float]
    clips: list[str]  # files, relative to the folder evaluation/, of the first prompts' first seed
    not_finite: int = 0  # clips whose latents or pixels were not finite, which have no score
    worse_when_higher: list[str] = field(default_factory=list)  # of the parts of weight 0

    @classmethod
    def read(cls, file: Path) -> "Evaluation":
        """Read what `write` wrote. Raises UserError where the file is missing or damaged."""
        try:
            evaluation = cls(**json.loads(file.read_text()))
            assert {len(column) for column in evaluation.columns().values()} == {
                len(evaluation.seeds)
            }
            return evaluation
        except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError):
            raise UserError(
                f"{file}: missing or damaged; restore it, or choose another run.dir.",
            ) from None

    def write(self, file: Path) -> None:
        """Write the evaluation as JSON."""
        replace_text(file, json.dumps(asdict(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """Each part and the weighted sum, float64 [clips]."""
        parts = {part: np.array(values, dtype=np.float64) for part, values in self.scores.items()}
        total = np.zeros(len(self.prompts))
        for part, weight in self.weights.items():
            if weight:  # a monitor without a score takes none from the sum
                total = total + weight * parts[part]
        return {"sum": total, **parts}

    def missing(self, column: str) -> int:
        """Clips without a score in a column of `columns`."""
        return int((~np.isfinite(self.columns()[column])).sum())

    def shortfalls(self) -> list[str]:
        """What the comparison leaves out, a line each."""
        clips, lines, invalid = len(self.prompts), [], self.missing("sum")
        if invalid:
            lines.append(
                f"{invalid} of {clips} held-out clips have no score, {self.not_finite} of them since "
                "their latents or pixels are not finite; they are left out of the comparison"
            )
        for part in [part for part, weight in self.weights.items() if not weight]:
            if (lacking := self.missing(part)) > invalid:
                lines.append(
                    f"{lacking} of {clips} held-out clips have no score of {part}, whose weight is "
                    "0; they are left out of its comparison alone"
                )
        return lines


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out prompts, and the grid and shape in which clips of them are drawn."""

    prompts: Sequence[str]
    conditions: Sequence[Condition]  # one per prompt, from the cache on demand
    grid: Tensor  # float32 [T + 1] from 1 to 0, on the device
    shape: tuple[int, ...]  # (C, F, H, W) of a latent
    experts: tuple[int, ...] = ()  # by step, as `Plan.experts`

    def first(self, count: int, device: torch.device) -> "HeldOut":
        """The first prompts, their conditions on the device."""
        count = min(count, len(self.prompts))
        conditions = [move(self.conditions[index], device) for index in range(count)]
        return replace(self, prompts=self.prompts[:count], conditions=conditions)


def evaluate(
    trainer: Trainer,
    recipe: Recipe,
    heldout: HeldOut,
    scorer: Scorer,
    iteration: int,
    poll_before: Callable[[Iterable[Round]], Iterable[Round]] = iter,
) -> Evaluation:
    """Sample and score every (prompt, seed), with the averaged weights where the recipe has them.

    poll_before: gives the batches one by one, and may raise in place of one
    returns the evaluation on every rank; written to run.dir/evaluation/step-N.json, beside some
      clips
    """
    world, seeds = scorer.world, recipe.evaluate.seeds
    folder = recipe.run.dir / "evaluation"
    clips = folder / f"step-{iteration}"
    if world.main:
        clips.mkdir(parents=True, exist_ok=True)
    world.barrier()
    clips_kept = min(recipe.evaluate.clips, len(heldout.prompts))
    watched = monitors.Monitors.of(recipe, scorer)

    def keep(slots: list[int], pixels: Tensor) -> None:
        """Measure clips, and write those that are shown.  pixels: uint8 [B, F, H, W, 3]"""
        if watched is not None:
            watched.see(slots, pixels)
        for slot, clip in zip(slots, pixels, strict=True):
            if slot % seeds == 0 and slot // seeds < clips_kept:
                video.write_mp4(clips / f"{slot // seeds:03d}.mp4", clip, recipe.video.fps)

    total = len(heldout.prompts) * seeds
    with averaged_weights(trainer):
        _draw(trainer.policy, recipe, heldout, scorer, keep=keep, poll_before=poll_before)
    scored = scorer.collect(total)
    finite = scored.latents_finite & scored.pixels_finite
    measured = {} if watched is None else watched.collect(world, total, seeds)
    own = {part: column for part, column in measured.items() if part not in recipe.weights}
    columns = scored.values | {part: c.masked_fill(~finite, math.nan) for part, c in own.items()}
    evaluation = Evaluation(
        iteration=iteration,
        prompts=[prompt for prompt in heldout.prompts for _ in range(seeds)],
        seeds=list(range(seeds)) * len(heldout.prompts),
        scores={part: values.tolist() for part, values in columns.items()},
        weights=dict(recipe.weights) | dict.fromkeys(own, 0.0),
        clips=[f"step-{iteration}/{number:03d}.mp4" for number in range(clips_kept)],
        not_finite=int((~finite).sum()),
        worse_when_higher=monitors.worse_when_higher(recipe),
    )
    world.on_main(lambda: evaluation.write(folder / f"step-{iteration}.json"))
    return evaluation


def _draw(
    policy: Policy,
    recipe: Recipe,
    heldout: HeldOut,
    scorer: Scorer,
    *,
    keep: Callable[[list[int], Tensor], None],
    poll_before: Callable[[Iterable[Round]], Iterable[Round]],
) -> None:
    """Draw this rank's share of the clips and submit them to the scorer.

    keep: called with a batch's slots and pixels, uint8 [B, F, H, W, 3]
    """
    world, seeds = scorer.world, recipe.evaluate.seeds
    plan, dtype = _plan(heldout, seeds), recipe.model.torch_dtype
    with sharding.rollout_weights(policy.network, recipe.distributed, dtype, world) as whole:
        dealing = Dealing(
            conditions=heldout.conditions,
            plan=replace(plan, lockstep=not whole),
            batch_size=recipe.rollout.at_once,
            world=world,
        )
        for batch, counts in poll_before(dealing.rounds()):
            latents = _latents(policy, plan, heldout.conditions, batch)
            own = world.part(len(batch))
            latents, slots = latents[own.start : own.stop], batch[own.start : own.stop]
            if not slots or not counts:
                continue
            about = stack([heldout.conditions[slot // seeds] for slot in slots])
            decoded = policy.decode(latents, about)
            scorer.submit(slots, latents, decoded, [heldout.prompts[n // seeds] for n in slots])
            keep(slots, decoded.pixels)


def _plan(heldout: HeldOut, seeds: int) -> Plan:
    """A plan whose initial noise does not depend on the run, without noisy steps."""
    return Plan(
        seed=0,
        iteration=-1,
        group_size=seeds,
        grid=heldout.grid,
        eta=0.0,
        shared_noise=False,
        latent_shape=heldout.shape,
        experts=heldout.experts,
    )


def _latents(
    policy: Policy,
    plan: Plan,
    conditions: Sequence[Condition],
    slots: list[int],
) -> Tensor:
    """The slots' final latents x_0, by the ODE.  returns [B, C, F, H, W] float32"""
    condition = stack([conditions[slot // plan.group_size] for slot in slots])
    # on the CPU: another GPU, or none, draws the same noise
    x = plan.initial_noise(slots, torch.device("cpu")).to(plan.grid.device)
    return rollout.sample_ode(policy, x, plan.grid, condition, experts=plan.experts)


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Means before and after, their paired difference and its bootstrap 95 % interval.

    For the weighted sum and for each part. Prompts are resampled with all their seeds, since clips
    of one prompt are not independent. Clips that are invalid or missing on either side, as after a
    change of evaluate.prompts, are left out, and a
    prompt without any other is not resampled. The interval is NaN where one prompt is left, which
    says nothing of other prompts; all is NaN where none is.

    returns before, after, difference, ci95 (low and high), and pairs (of clips that count) by part
    """
    before, after = _shared(before, after), _shared(after, before)
    if not before.prompts:
        raise UserError(
            "evaluation/step-0.json: was made of other held-out prompts; choose another run.dir, "
            "or restore the file of prompts.heldout."
        )
    result: dict[str, dict[str, Any]] = {
        name: {} for name in ("before", "after", "difference", "ci95", "pairs")
    }
    names = list(dict.fromkeys(before.prompts))
    group = np.array([names.index(prompt) for prompt in before.prompts])
    later = after.columns()
    for part, first in before.columns().items():
        if part not in later:  # a monitor of evaluations on the way, which the recipe had then
            continue
        usable = np.isfinite(first) & np.isfinite(later[part])
        difference = np.where(usable, later[part] - first, 0.0)
        sums = np.bincount(group, weights=difference, minlength=len(names))
        counts = np.bincount(group, weights=usable, minlength=len(names))
        result["before"][part] = _mean(first[usable])
        result["after"][part] = _mean(later[part][usable])
        result["difference"][part] = _mean(difference[usable])
        result["ci95"][part] = _interval(sums[counts > 0], counts[counts > 0])
        result["pairs"][part] = int(usable.sum())
    return result


def mean_interval(evaluation: Evaluation, part: str) -> list[float]:
    """The bootstrap's 95 % interval of a part's mean, over resampled prompts; NaN as `compare`."""
    values = evaluation.columns()[part]
    names = list(dict.fromkeys(evaluation.prompts))
    group = np.array([names.index(prompt) for prompt in evaluation.prompts])
    usable = np.isfinite(values)
    sums = np.bincount(group, weights=np.where(usable, values, 0.0), minlength=len(names))
    counts = np.bincount(group, weights=usable, minlength=len(names))
    return _interval(sums[counts > 0], counts[counts > 0])


def _shared(own: Evaluation, other: Evaluation) -> Evaluation:
    """The clips of an evaluation that another one has, too: of the same prompts and seeds."""
    there = set(zip(other.prompts, other.seeds, strict=True))
    kept = [n for n, pair in enumerate(zip(own.prompts, own.seeds, strict=True)) if pair in there]
    if len(kept) == len(own.seeds):
        return own
    return replace(
        own,
        prompts=[own.prompts[n] for n in kept],
        seeds=[own.seeds[n] for n in kept],
        scores={part: [values[n] for n in kept] for part, values in own.scores.items()},
    )


def _mean(values: np.ndarray) -> float:
    """The mean of float64 [n]; NaN where there is none."""
    return float(values.mean()) if len(values) else math.nan


def _interval(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """The bootstrap's 95 % interval of the clips' mean, over resampled prompts.

    sums, counts: float64 [prompts]: the sum over each prompt's clips, and their number, above 0
    """
    means = resampled_means(sums, counts, 0)
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Bootstrap means over resampled prompts, float64 [RESAMPLES]; NaN with fewer than two prompts,
    which say nothing of others.

    sums, counts: float64 [prompts]: the sum over each prompt's clips, and their number, above 0
    seed: the same one resamples the same prompts
    """
    if len(counts) < 2:
        return np.full(RESAMPLES, math.nan)
    shape = (RESAMPLES, len(counts))
    resampled = np.random.default_rng(seed).integers(len(counts), size=shape)
    means: np.ndarray = sums[resampled].sum(1) / counts[resampled].sum(1)
    return means
