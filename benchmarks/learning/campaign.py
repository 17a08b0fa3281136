"""Runs of one recipe with different switches, one after the other: started, resumed, and read back.

A finished run is not run again; one that was interrupted goes on from its newest checkpoint. A run
that a UserError ended, such as one whose gradients stay infinite, leaves `failed.txt` and is not
tried again either: that it ended is a result. Remove its folder to repeat a run.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.learning.intervals import Array, Clips, Gain, paired
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.run.tracker import Row
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.tools.report.run_data import Evaluation, Run, read_run
from fastgrpo.train import train
from fastgrpo.training import methods

COMPARED = ("video", "rollout", "objective", "optimizer", "rewards", "evaluate")
"""Sections in which a run's recipe must be the one that is asked for."""
BACKWARD = 2.0  # forwards that a backward is worth
EVALUATED = {
    "rollout/evaluations": 1.0,
    "scouts/evaluations": 1.0,
    "update/evaluated_again": 1.0,
    "update/evaluations": 1.0 + BACKWARD,
}
"""The metrics that count evaluations of the network, and how many forwards each stands for."""


@dataclass(frozen=True)
class Variant:
    """A recipe's switches."""

    name: str  # of its folder
    label: str  # in pictures and tables
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """The runs of one variant, one per seed."""

    variant: Variant
    runs: list[Run]
    failures: list[str]  # why runs ended early, one line each
    pace: Array | None = None
    """Seconds of each iteration, measured in turn with other variants'; None: as they ran."""

    def curve(self, parts: Sequence[str]) -> Array:
        """The sum of these parts' mean training rewards, mean of the runs.

        returns [iterations that all runs have]
        """
        return self._mean_row(lambda row: sum(row[f"reward/{part}"] for part in parts))

    def seconds(self) -> Array:
        """Seconds of training up to the end of each iteration, mean of the runs.

        returns as long as `curve`
        """
        if self.pace is not None:
            return np.cumsum(self.pace)[: min(len(run.rows) for run in self.runs)]
        return np.cumsum(self._mean_row(lambda row: row["seconds/total"]))

    def evaluations(self) -> Array:
        """Evaluations of the network up to the end of each iteration, mean of the runs; a backward
        counts as BACKWARD more.

        returns as long as `curve`
        """
        recipe = config.load(self.runs[0].folder / "recipe.toml")
        weights, always = dict(EVALUATED), 0.0
        if methods.needs_initial_policy(recipe):  # which no metric counts, at the states trained
            weights["update/evaluations"] += 1.0
        if not methods.traits(recipe).noisy_steps:  # nor a rollout without noise
            always = float(network_calls.of_iteration(recipe, first=0).rollout)
        return np.cumsum(
            self._mean_row(
                lambda row: always + sum(row.get(key, 0.0) * of for key, of in weights.items())
            )
        )

    def _mean_row(self, of_row: Callable[[Row], float]) -> Array:
        """A number of each iteration that all runs have, mean of the runs.  returns [iterations]"""
        common = min(len(run.rows) for run in self.runs)
        return np.mean([[of_row(row) for row in run.rows[:common]] for run in self.runs], axis=0)

    def heldout_at(self) -> list[int]:
        """The iterations after which all runs have a held-out evaluation."""
        return [one.iteration for one in self.runs[0].evaluations[: self._common()]]

    def heldout_curve(self, parts: Sequence[str]) -> Clips:
        """The sum of these parts in each of those evaluations, [evaluations, runs, clips]."""
        evaluations = [run.evaluations[: self._common()] for run in self.runs]
        scores = [[_sum(one, parts) for one in of_run] for of_run in evaluations]
        return Clips(self.runs[0].evaluations[0].prompts, np.stack(scores, axis=1))

    def _common(self) -> int:
        return min(len(run.evaluations) for run in self.runs)

    def metric(self, name: str) -> float:
        """Mean of a metric over all iterations of all runs that have it; NaN where none has."""
        found = [row[name] for run in self.runs for row in run.rows if name in row]
        return float(np.mean(found)) if found else float("nan")

    def gain(self, parts: Sequence[str]) -> Gain | None:
        """From the first held-out evaluation to the last, on the sum of these parts; None where a
        run ended early.
        """
        if not self.finished:
            return None
        return paired(
            self.runs[0].evaluations[0].prompts, self.heldout(parts, 0), self.heldout(parts)
        )

    def against(self, other: "Trained", parts: Sequence[str]) -> Gain | None:
        """From another variant's held-out clips after training to this one's, of the same prompts,
        noise and seeds; None where a run ended early or one has more seeds.
        """
        if not (self.finished and other.finished) or len(self.runs) != len(other.runs):
            return None
        return paired(
            self.runs[0].evaluations[0].prompts, other.heldout(parts), self.heldout(parts)
        )

    @property
    def finished(self) -> bool:
        """Whether every run has held-out scores of before and after."""
        return not self.failures and all(len(run.evaluations) > 1 for run in self.runs)

    def heldout(self, parts: Sequence[str], evaluation: int = -1) -> Array:
        """The sum of these parts in an evaluation, by default the last.  returns [runs, clips]"""
        return np.stack([_sum(run.evaluations[evaluation], parts) for run in self.runs])


def _sum(evaluation: Evaluation, parts: Sequence[str]) -> Array:
    """The sum of these parts' scores of each clip.  returns [clips]"""
    return np.sum([evaluation.scores[part] for part in parts], axis=0)


def train_all(
    file: Path,
    common: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    every: int = 0,
    tell: Callable[[str], None] = print,
) -> list[Trained]:
    """Every variant of a recipe with every seed, each run in a folder of its own below `folder`.

    every: `evaluate.every`
    Raises UserError where a folder holds another recipe's run, and KeyboardInterrupt where a run
    was asked to stop.
    """
    trained = []
    for variant in variants:
        runs, failures = [], []
        for seed in seeds:
            place = folder / f"{variant.name}-{seed}"
            cache = f"prompts.cache={folder / 'embeddings'}"
            own = [f"run.seed={seed}", f"run.dir={place}", f"evaluate.every={every}"]
            recipe = config.load(file, [*common, *variant.overrides, cache, *own])
            failure = ensure(recipe, tell)
            runs.append(read_run(place))
            failures += [failure] if failure else []
        trained.append(Trained(variant, runs, failures))
    return trained


def ensure(recipe: Recipe, tell: Callable[[str], None]) -> str:
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
            seconds = _train(recipe)
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise  # it never began: a mistake in the recipe
        replace_text(failed, f"{error}\n")
        tell(f"{folder.name}: {error}")
        return str(error)
    tell(f"{folder.name}: done, {seconds:.0f} s of training")
    return ""


def _train(recipe: Recipe) -> float:
    """Run the recipe to its end.  returns seconds of all iterations"""
    train(recipe)
    if not (recipe.run.dir / "summary.json").exists():
        raise KeyboardInterrupt
    return sum(row["seconds/total"] for row in read_run(recipe.run.dir).rows)
