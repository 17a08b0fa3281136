"""Runs of one recipe with different switches, one after the other: started, resumed, and read back.

A finished run is not run again; one that was interrupted goes on from its newest checkpoint. A run
that a UserError ended, such as one whose gradients stay infinite, leaves `failed.txt` and is not
tried again either: that it ended is a result. Remove its folder to repeat a run.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgrpo import train
from fastgrpo.checkpoint.checkpoints import Progress
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.parallel.world import open_world
from fastgrpo.session import claim, open_session
from fastgrpo.tools.report.run_data import Evaluation, Run, read_run
from fastgrpo.training.trainer import Trainer

Array = NDArray[np.float64]
RESAMPLES = 10_000
COMPARED = ("video", "rollout", "objective", "optimizer", "rewards", "evaluate")
"""Sections in which a run's recipe must be the one that is asked for."""


@dataclass(frozen=True)
class Variant:
    """A recipe's switches."""

    name: str  # of its folder
    label: str  # in pictures and tables
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gain:
    """Two means of held-out clips, and their paired difference with its 95 % interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Trained:
    """The runs of one variant, one per seed."""

    variant: Variant
    runs: list[Run]
    failures: list[str]  # why runs ended early, one line each
    pace: Array | None = (
        None  # seconds of each iteration, measured in turn with other variants'; none = as they ran
    )

    def curve(self, parts: Sequence[str]) -> Array:
        """The sum of these parts' mean training rewards, mean of the runs.

        returns [iterations that all runs have]
        """
        curves = [
            np.array([sum(row[f"reward/{p}"] for p in parts) for row in run.rows])
            for run in self.runs
        ]
        return np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)

    def seconds(self) -> Array:
        """Seconds of training up to the end of each iteration, mean of the runs.

        returns as long as `curve`
        """
        if self.pace is not None:
            return np.cumsum(self.pace)[: min(len(run.rows) for run in self.runs)]
        spent = [np.cumsum([row["seconds/total"] for row in run.rows]) for run in self.runs]
        return np.mean([one[: min(map(len, spent))] for one in spent], axis=0)

    def heldout_curve(self, parts: Sequence[str]) -> tuple[Array, Array]:
        """Held-out reward over seconds of training, means of the runs.

        returns [evaluations] each
        """
        common = min(len(run.evaluations) for run in self.runs)
        reward = [
            [np.nanmean(_sum(one, parts)) for one in run.evaluations[:common]] for run in self.runs
        ]
        spent = np.concatenate([[0.0], self.seconds()])
        iterations = [one.iteration for one in self.runs[0].evaluations[:common]]
        return spent[iterations], np.mean(reward, axis=0)

    def metric(self, name: str) -> float:
        """Mean of a metric over all iterations of all runs that have it; NaN where none has."""
        found = [row[name] for run in self.runs for row in run.rows if name in row]
        return float(np.mean(found)) if found else float("nan")

    def gain(self, parts: Sequence[str]) -> Gain | None:
        """From the first held-out evaluation to the last, on the sum of these parts; none where a
        run ended early.
        """
        if not self.finished:
            return None
        return paired(
            self.runs[0].evaluations[0].prompts, self.heldout(parts, 0), self.heldout(parts)
        )

    def against(self, other: "Trained", parts: Sequence[str]) -> Gain | None:
        """From another variant's held-out clips after training to this one's, of the same prompts
        and noise.
        """
        if not (self.finished and other.finished):
            return None
        return paired(
            self.runs[0].evaluations[0].prompts, other.heldout(parts), self.heldout(parts)
        )

    @property
    def finished(self) -> bool:
        """Whether every run has held-out scores of before and after."""
        return not self.failures and all(len(run.evaluations) > 1 for run in self.runs)

    def heldout(self, parts: Sequence[str], evaluation: int = -1) -> Array:
        """The sum of these parts in an evaluation, by default the last, mean of the runs.

        returns [clips]
        """
        return np.mean([_sum(run.evaluations[evaluation], parts) for run in self.runs], axis=0)


def _sum(evaluation: Evaluation, parts: Sequence[str]) -> Array:
    """Of each clip.  returns [clips]"""
    return np.sum([evaluation.scores[part] for part in parts], axis=0)


def paired(prompts: Sequence[str], before: Array, after: Array) -> Gain:
    """Clips' scores before and after, as one gain: prompts are resampled with all their clips
    (bootstrap, 10,000).

    prompts: one per clip;  before, after: [clips], NaN where a clip has no score
    """
    usable = np.isfinite(before) & np.isfinite(after)
    names = list(dict.fromkeys(prompts))
    group = np.array([names.index(prompt) for prompt in prompts])
    difference = np.where(usable, after - before, 0.0)
    sums = np.bincount(group, weights=difference, minlength=len(names))
    counts = np.bincount(group, weights=usable, minlength=len(names))
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1), [2.5, 97.5])
    first, last = float(before[usable].mean()), float(after[usable].mean())
    return Gain(first, after=last, difference=last - first, low=float(low), high=float(high))


def train_all(
    file: Path,
    common: Sequence[str],
    variants: Sequence[Variant],
    seeds: int,
    folder: Path,
    every: int = 0,
    tell: Callable[[str], None] = print,
) -> list[Trained]:
    """Every variant of a recipe with seeds 0 ..

    seeds - 1, each run in a folder of its own below `folder`.

    every: evaluate the held-out prompts also after each so many iterations; 0 = only before and
    after
    Raises UserError where a folder holds another recipe's run, and KeyboardInterrupt where a run
    was asked to stop.
    """
    trained = []
    for variant in variants:
        runs, failures = [], []
        for seed in range(seeds):
            place = folder / f"{variant.name}-{seed}"
            cache = f"prompts.cache={folder / 'embeddings'}"
            recipe = config.load(
                file, [*common, *variant.overrides, cache, f"run.seed={seed}", f"run.dir={place}"]
            )
            failure = ensure(recipe, every, tell)
            runs.append(read_run(place))
            failures += [failure] if failure else []
        trained.append(Trained(variant, runs, failures))
    return trained


def ensure(recipe: Recipe, every: int, tell: Callable[[str], None]) -> str:
    """Run a recipe unless its folder holds its end.

    returns why it failed, in one line; empty where it did not
    """
    folder = recipe.run.dir
    failed = folder / "failed.txt"
    if failed.exists() or (folder / "summary.json").exists():
        found = config.load(folder / "recipe.toml")
        other = [name for name in COMPARED if getattr(found, name) != getattr(recipe, name)]
        if other or found.run.iterations != recipe.run.iterations:
            raise UserError(
                f"{folder}: a run of another recipe ({', '.join(other) or 'run'}); choose another "
                "folder."
            )
        return failed.read_text(encoding="utf-8").strip() if failed.exists() else ""
    tell(f"{folder.name}: training")
    try:
        with redirect_stdout(io.StringIO()):
            seconds = _train(recipe, every)
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise  # it never began: a mistake in the recipe
        replace_text(failed, f"{error}\n")
        tell(f"{folder.name}: {error}")
        return str(error)
    tell(f"{folder.name}: done, {seconds:.0f} s of training")
    return ""


def _train(recipe: Recipe, every: int) -> float:
    """As fastgrpo.train.train, with held-out evaluations on the way.

    returns seconds of all iterations
    """
    with open_world(recipe.distributed) as world, ExitStack() as stack:
        session = open_session(recipe, world, stack, *claim(recipe, world, stack))
        save = session.checkpoints.save_if_due

        def save_and_evaluate(trainer: Trainer, progress: Progress, iterations: int) -> str | None:
            problem = save(trainer, progress, iterations)
            if every and progress.iteration % every == 0 and progress.iteration < iterations:
                train.evaluate_now(session)
            return problem

        session.checkpoints.save_if_due = save_and_evaluate  # type: ignore[method-assign]
        if train.run(session) is None:
            raise KeyboardInterrupt
        return session.progress.seconds
