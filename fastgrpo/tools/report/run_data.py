"""A run's folder as data: what the report needs from its files.

All but metrics.jsonl may be missing.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import load_json
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
    def comparison(self) -> Comparison | None:
        if self.summary is None:
            return None
        try:
            return Comparison(
                *(self.summary[key] for key in ("before", "after", "difference", "ci95"))
            )
        except KeyError as error:
            raise UserError(
                f"{self.folder / 'summary.json'}: no {error}; remove it and finish the run again"
            ) from error

    @property
    def compared_iterations(self) -> int:
        """Iterations between the two sides of the comparison."""
        return int((self.summary or {}).get("iterations", len(self.rows)))

    def colour(self, part: str) -> str:
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
    }
    summary, recipe, environment = (
        run_dir / name for name in ("summary.json", "recipe.toml", "environment.json")
    )
    return Run(
        folder=run_dir,
        rows=[merged[iteration] for iteration in sorted(merged)],
        evaluations=[read_evaluation(files[iteration]) for iteration in sorted(files)],
        summary=read_json(summary) if summary.exists() else None,
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        environment=read_json(environment) if environment.exists() else {},
        hosts=hosts_of(run_dir),
        failure=failure_of(run_dir),
    )


def failure_of(run_dir: Path) -> str:
    """The error by which a rank left the run, as its heartbeat has it; empty where none did."""
    ends = [beat.end for beat in heartbeat.read(run_dir)]
    return next((end for end in ends if end not in ("", "done")), "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run. Raises UserError where the file holds none."""
    try:
        return load_json(path)
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
        # no monitors
        weighted = [weights[part] * values for part, values in scores.items() if weights[part]]
        return Evaluation(
            iteration=int(content["iteration"]),
            prompts=list(content["prompts"]),
            scores={"sum": np.sum(weighted, axis=0), **scores},
            clips=[path.parent / clip for clip in content["clips"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not an evaluation ({error!r}); run the evaluation again"
        ) from error
