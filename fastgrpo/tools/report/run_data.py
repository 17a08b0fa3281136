"""A run's folder as data: what the report needs from its files.

All but metrics.jsonl may be missing.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import load_json, null_to_nan, sha256
from fastgrpo.run import heartbeat
from fastgrpo.run.rank_times import hosts_of
from fastgrpo.run.terminal import PHASES, parts
from fastgrpo.run.tracker import Row, read_metrics
from fastgrpo.tools.report.charts import Series

Verdict = Literal["up", "down", "flat"]  # of a difference whose interval excludes 0, or does not


@dataclass(frozen=True)
class Evaluation:
    """The held-out clips' scores after some iterations.

    Every list has one entry per clip, NaN where invalid.
    """

    iteration: int
    prompts: list[str]
    scores: dict[str, NDArray[np.float64]]  # the parts, and first their weighted sum
    clips: list[Path]  # of the first prompts, in order
    monitors: dict[str, bool] = field(default_factory=dict)
    """The parts of weight 0, each with whether more of it is worse."""

    def means(self) -> dict[str, float]:
        return {
            part: float(np.nanmean(values))
            for part, values in self.scores.items()
            if np.isfinite(values).any()
        }

    def first_of(self, number: int) -> int:
        """Index of the scores of clip `number`: the first seed of the prompt of that number."""
        return self.prompts.index(list(dict.fromkeys(self.prompts))[number])


@dataclass(frozen=True)
class Comparison:
    """Held-out means before and after training, and the paired difference, by part."""

    before: dict[str, float]
    after: dict[str, float]
    difference: dict[str, float]
    ci95: dict[str, tuple[float, float]]

    def verdict(self, part: str) -> Verdict:
        low, high = self.ci95[part]
        return "up" if low > 0 else "down" if high < 0 else "flat"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything in a run's folder that the report shows."""

    folder: Path
    rows: list[Row]  # one per iteration, ascending
    evaluations: list[Evaluation]  # ascending; the first is before training
    summary: dict[str, Any] | None
    recipe: str
    environment: dict[str, Any]
    hosts: dict[int, str]  # the node of each rank that has a log
    failure: str  # what ended the newest attempt; empty where nothing did

    @property
    def parts(self) -> list[str]:
        return parts(list(dict.fromkeys(name for row in self.rows for name in row)))

    @property
    def total(self) -> int | None:
        """Iterations that the recipe asks for; None where it does not say."""
        try:
            return int(tomllib.loads(self.recipe)["run"]["iterations"])
        except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
            return None

    @property
    def monitors(self) -> dict[str, bool]:
        """The parts of weight 0, each with whether more of it is worse.

        Of the recipe, and of evaluations on the way, which have some of their own.
        """
        found = dict(self.evaluations[-1].monitors) if self.evaluations else {}
        try:
            for spec in tomllib.loads(self.recipe).get("rewards", ()):
                judge = RewardSpec.model_validate(spec)
                worse = rewards.declared(judge, "WORSE_WHEN_HIGHER", ())
                found |= {
                    part: part in worse for part, weight in spec["weights"].items() if not weight
                }
        except (tomllib.TOMLDecodeError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not a recipe of this version: nothing more is known
        return found

    def verdict(self, part: str) -> Verdict:
        """Whether a part's difference is good news ("up"), bad ("down"), or neither.

        Of a monitor, which was not trained on, a rise is no gain and a fall is bad; where more is
        worse, it is the other way round.
        """
        if self.comparison is None:
            return "flat"
        verdict = self.comparison.verdict(part)
        if part not in self.monitors:
            return verdict
        worse: Verdict = "up" if self.monitors[part] else "down"
        return "down" if verdict == worse else "flat"

    @property
    def comparison(self) -> Comparison | None:
        if self.summary is None:
            return None
        try:
            summary = null_to_nan(self.summary)
            before, after, difference = (
                {str(part): float(value) for part, value in summary[key].items()}
                for key in ("before", "after", "difference")
            )
            bounds = {part: map(float, pair) for part, pair in summary["ci95"].items()}
            ci95 = {str(part): (low, high) for part, (low, high) in bounds.items()}
            if "sum" not in before or not before.keys() == after.keys() == difference.keys():
                raise ValueError("no sum, or other parts before and after")
            int(self.summary.get("iterations", 0))
            return Comparison(before, after, difference, {part: ci95[part] for part in before})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.folder / 'summary.json'}: not what the run wrote ({error!r}); remove it "
                "and start the run again, which compares anew."
            ) from None

    @property
    def compared_iterations(self) -> int:
        """Iterations between the two sides of the comparison."""
        return int((self.summary or {}).get("iterations", len(self.rows)))

    def colour(self, part: str) -> str:
        """The CSS colour of a part on the whole page; a monitor has no colour of a gain."""
        if part in self.monitors:
            return "flat"
        return "sum" if part == "sum" else f"p{self.parts.index(part) % 6 + 1}"

    def curve(self, name: str, label: str, colour: str) -> Series:
        """A metric over iterations, counted from 1; two float64 [N]."""
        points = [(row["iteration"] + 1.0, row[name]) for row in self.rows if name in row]
        x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return Series(label, colour, x, y)

    def values(self, name: str) -> NDArray[np.float64]:
        """The finite values of a metric, float64 [N], in the order of iterations."""
        every = np.array([row.get(name, np.nan) for row in self.rows], dtype=np.float64)
        return every[np.isfinite(every)]

    def seconds(self) -> tuple[list[str], NDArray[np.float64]]:
        """Names of phases, and their seconds, float64 [iterations, phases].

        The last phase is whatever the others leave of the total.
        """
        rows = [row for row in self.rows if "seconds/total" in row]
        names = [phase for phase in PHASES if any(f"seconds/{phase}" in row for row in rows)]
        spent = np.zeros((len(rows), len(names)))
        for i, row in enumerate(rows):
            spent[i] = [row.get(f"seconds/{name}", 0.0) for name in names]
        rest = np.array([row["seconds/total"] for row in rows]) - spent.sum(1)
        if len(rows) and rest.sum() > 0.005 * spent.sum():
            return [*names, "other"], np.column_stack([spent, rest.clip(0)])
        return names, spent


def read_run(run_dir: Path) -> Run:
    """The files of a run.

    UserError: metrics.jsonl is missing, or a file does not hold what it should.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(
            f"{run_dir}: no metrics.jsonl, so this is not the folder of a run; give the recipe's "
            "run.dir"
        )
    merged: dict[int, Row] = {}
    for row in read_metrics(metrics):
        merged[int(row["iteration"])] = merged.get(int(row["iteration"]), {}) | row
    files = {
        int(file.stem.removeprefix("step-")): file
        for file in (run_dir / "evaluation").glob("step-*.json")
        if file.stem.removeprefix("step-").isdecimal()
    }
    summary, recipe, environment = (
        run_dir / name for name in ("summary.json", "recipe.toml", "environment.json")
    )
    compared = read_json(summary) if summary.exists() else None
    _check_compared(run_dir, compared or {})
    return Run(
        folder=run_dir,
        rows=[merged[iteration] for iteration in sorted(merged)],
        evaluations=[read_evaluation(files[iteration]) for iteration in sorted(files)],
        summary=compared,
        recipe=recipe.read_text("utf-8", errors="replace") if recipe.is_file() else "",
        environment=read_json(environment) if environment.exists() else {},
        hosts=hosts_of(run_dir),
        failure=failure_of(run_dir),
    )


def failure_of(run_dir: Path) -> str:
    """The error by which a rank first left the run, by its heartbeat; empty where none did."""
    first = heartbeat.first_failure(run_dir)
    return "" if first is None else first.end


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run. Raises UserError where the file holds none."""
    try:
        return load_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); remove it.") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); remove it or run the step that writes it again"
        ) from error
    except TypeError:
        raise UserError(
            f"{path}: not a JSON object; remove it or run the step that writes it again"
        ) from None


def read_evaluation(path: Path) -> Evaluation:
    content = read_json(path)
    try:
        scores = {
            part: np.array(values, dtype=np.float64) for part, values in content["scores"].items()
        }
        weights = {part: float(content["weights"].get(part, 1.0)) for part in scores}
        prompts, clips = list(content["prompts"]), [Path(clip) for clip in content["clips"]]
        if any(len(values) != len(prompts) for values in scores.values()):
            raise ValueError("not a score for each clip")
        if any(clip.is_absolute() or ".." in clip.parts for clip in clips):
            raise ValueError("a clip outside the folder")
        # no monitors
        weighted = [weights[part] * values for part, values in scores.items() if weights[part]]
        return Evaluation(
            iteration=int(content["iteration"]),
            prompts=prompts,
            scores={"sum": np.sum(weighted, axis=0), **scores},
            clips=[path.parent / clip for clip in clips],
            monitors=_monitors(content, weights),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not an evaluation ({error!r}); run the evaluation again"
        ) from error


def _monitors(content: dict[str, Any], weights: dict[str, float]) -> dict[str, bool]:
    """An evaluation's parts of weight 0, each with whether more is worse, where it says so."""
    if "worse_when_higher" not in content:  # of an earlier version
        return {}
    worse = list(content["worse_when_higher"])
    return {part: part in worse for part, weight in weights.items() if not weight}


def _check_compared(run_dir: Path, summary: dict[str, Any]) -> None:
    """Raise UserError where an evaluation is not the one that the summary has compared."""
    known = summary.get("evaluations", {})
    for name, digest in known.items() if isinstance(known, dict) else ():
        file = run_dir / "evaluation" / Path(name).with_suffix(".json").name
        if not file.is_file() or sha256(file) != digest:
            raise UserError(
                f"{file}: not the scores that summary.json has compared (edited, or gone); restore "
                "it, or start the run again, which makes both anew."
            )
