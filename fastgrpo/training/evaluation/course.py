"""A run's held-out evaluations in their order: what is due, what is on file, what was alarmed.

The evaluations are the files `evaluation/step-N.json`, from which all else follows, so that a
resumed run needs no other state: files of iterations that it has not done yet are removed, as the
lines of metrics.jsonl are. `alarms.json` keeps each alarm, and by how much the learning rate was
lowered.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastgrpo.core.config import Recipe
from fastgrpo.core.files import read_json_or_none, replace_text
from fastgrpo.data import video_reader
from fastgrpo.run.tracker import Tracker
from fastgrpo.training.evaluation.alarm import Finding, judge, raised
from fastgrpo.training.evaluation.evaluation import Evaluation, compare

ALARMS = "alarms.json"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One alarm of a run."""

    iteration: int  # iterations done
    monitors: list[str]
    action: str  # as evaluate.alarm
    back_to: int | None = None  # iterations, where the run went back
    lr_factor: float = 1.0  # of the run's learning rate from here on


@dataclass(kw_only=True)
class Course:
    """The evaluations of a run, and the alarms."""

    recipe: Recipe
    before: Evaluation
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # on the way, ascending
    alarms: list[Alarm] = field(default_factory=list)
    _findings: dict[int, Finding] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, before: Evaluation, done: int) -> "Course":
        """The course of a run after `done` iterations, of the files that `clean` has left."""
        course = cls(recipe=recipe, before=before, alarms=read_alarms(recipe.run.dir))
        if not recipe.evaluate.every:
            return course
        for iteration in range(recipe.evaluate.every, done + 1, recipe.evaluate.every):
            file = course.file(iteration)
            if file.is_file():
                course.evaluations[iteration] = Evaluation.read(file)
        return course

    def file(self, iteration: int) -> Path:
        """The file of an evaluation."""
        return self.recipe.run.dir / "evaluation" / f"step-{iteration}.json"

    def due(self, done: int) -> bool:
        """Whether the recipe wants an evaluation after so many iterations."""
        every = self.recipe.evaluate.every
        return bool(every) and done > 0 and done % every == 0

    def add(self, evaluation: Evaluation) -> None:
        """Take in the evaluation of the newest weights."""
        self.evaluations[evaluation.iteration] = evaluation

    def finding(self, iteration: int) -> Finding:
        """An evaluation on the way compared with the one before training."""
        if iteration not in self._findings:
            self._findings[iteration] = judge(self.before, self.evaluations[iteration])
        return self._findings[iteration]

    def raised(self) -> list[str]:
        """The monitors for which the newest evaluation raises the alarm."""
        settings = self.recipe.evaluate
        if settings.alarm == "off":
            return []
        newest = sorted(self.evaluations)[-settings.alarm_after :]
        return raised([self.finding(iteration) for iteration in newest], settings.alarm_after)

    def answer(self, monitors: list[str], done: int, best: str | None) -> Alarm:
        """The alarm that the newest evaluation raises, and what the recipe wants done about it.

        best: the best checkpoint so far
        """
        settings = self.recipe.evaluate
        back = settings.alarm == "return" and self.returns < settings.alarm_returns
        return Alarm(
            iteration=done,
            monitors=monitors,
            action=settings.alarm,
            back_to=int(best.removeprefix("step-")) if back and best is not None else None,
            lr_factor=self.lr_factor * (settings.alarm_lr if back and best is not None else 1.0),
        )

    def told(self, alarm: Alarm) -> str:
        """An alarm in one clause, for messages."""
        monitors, after = " and ".join(alarm.monitors), self.recipe.evaluate.alarm_after
        return (
            f"iteration {alarm.iteration}: the held-out reward has risen and {monitors} got worse in "
            f"{after} evaluation{'' if after == 1 else 's in a row'}, so the reward may be hacked"
        )

    @property
    def lr_factor(self) -> float:
        """What the recipe's learning rate is multiplied by, since the run went back."""
        return self.alarms[-1].lr_factor if self.alarms else 1.0

    @property
    def returns(self) -> int:
        """How often the run went back."""
        return sum(one.back_to is not None for one in self.alarms)

    def rewind(self, done: int) -> None:
        """Forget the evaluations of iterations that the run went back over."""
        self.evaluations = {n: one for n, one in self.evaluations.items() if n <= done}
        self._findings = {n: one for n, one in self._findings.items() if n <= done}


def metrics(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """An evaluation's means by part, their change since before training, and its 95 % interval."""
    compared = compare(before, after)
    rows = {
        "heldout": compared["after"],
        "heldout_change": compared["difference"],
        "heldout_low": {part: bounds[0] for part, bounds in compared["ci95"].items()},
        "heldout_high": {part: bounds[1] for part, bounds in compared["ci95"].items()},
    }
    return {f"{name}/{part}": value for name, own in rows.items() for part, value in own.items()}


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms of a run's folder, an empty list without such a file or with a damaged one."""
    content = (read_json_or_none(folder / ALARMS) or {}).get("alarms", [])
    with suppress(TypeError):
        return [Alarm(**one) for one in content]
    return []


def write_alarms(folder: Path, alarms: Sequence[Alarm]) -> None:
    """Write the alarms of a run. On the main rank only."""
    text = json.dumps({"alarms": [asdict(one) for one in alarms]}, indent=1)
    replace_text(folder / ALARMS, f"{text}\n")


def clean(recipe: Recipe, done: int) -> list[str]:
    """Remove evaluations and alarms of iterations that are still to be done. On the main rank only.

    Also a damaged evaluation, and, where a finished run is started again, the last one, which is
    then made anew, as the report promises. An alarm by which the run went back stays.

    returns a notice for each evaluation that is lost
    """
    if not recipe.evaluate.every:
        return []
    folder, notices = recipe.run.dir / "evaluation", []
    again = done >= recipe.run.iterations and (recipe.run.dir / "summary.json").exists()
    for file in folder.glob("step-*.json"):
        name = file.stem.removeprefix("step-")
        if not name.isdecimal() or name == "0":
            continue
        doomed = int(name) > done or (again and int(name) == done)
        if not doomed and read_json_or_none(file) is None:
            doomed = True
            notices.append(f"evaluation/{file.name} is damaged: removed, charts go without it")
        if doomed:
            file.unlink()
            shutil.rmtree(folder / file.stem, ignore_errors=True)
    if alarms := read_alarms(recipe.run.dir):
        kept = [one for one in alarms if one.iteration <= done or one.back_to is not None]
        write_alarms(recipe.run.dir, kept)
    return notices


def log_clips(recipe: Recipe, tracker: Tracker, evaluation: Evaluation) -> None:
    """Show an evaluation's clips in the tracker's video panels."""
    if not evaluation.clips or not (recipe.track.wandb or recipe.track.swanlab):
        return
    folder = recipe.run.dir / "evaluation"
    clips = torch.stack([video_reader.read(folder / clip).pixels for clip in evaluation.clips])
    captions = list(dict.fromkeys(evaluation.prompts))[: len(clips)]
    tracker.videos(
        evaluation.iteration - 1,
        name="heldout",
        clips=clips,
        captions=captions,
        fps=recipe.video.fps,
    )
