"""The recipe of each run of an entry: a file of launch/ with its rewards, weights and switches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.config import Recipe, RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark import choosing
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS, Column
from fastgrpo.tools.evaluate.reproduce.entries import Run

Judges = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, as far as it concerns recipes."""

    weights: Path
    out: Path
    launch: Path = Path("launch")
    recipe: Path | None = None
    """In place of every recipe of launch/: a stand-in."""
    judges: Judges = field(default_factory=dict)
    """Column -> (reward, part) that stands in for its judge, in training, too."""
    files: Sequence[RewardSpec] = ()
    """Rewards of --rewards, for their settings."""
    settings: tuple[str, ...] = ()
    """section.key=value, for every run."""

    @property
    def stands_in(self) -> bool:
        """Whether the result is not the paper's by what was named in its place."""
        return self.recipe is not None or bool(self.judges)


def folder_of(run: Run, options: Options) -> Path:
    """The run's folder."""
    return options.out / "runs" / run.name


def file_of(run: Run, options: Options) -> Path:
    """The launch file, or what stands in for it. Raises UserError where there is none."""
    file = options.recipe or options.launch / f"{run.recipe}.toml"
    if not file.is_file():
        raise UserError(
            f"--launch={options.launch}: has no {file.name}; name the folder launch/ of a checkout."
        )
    return file


def recipe_of(run: Run, options: Options) -> Recipe:
    """The run's recipe. Raises UserError for keys that this version or the recipe cannot have."""
    base = config.load(file_of(run, options), [*run.switches, *options.settings])
    tree = base.model_dump()
    tree["run"]["dir"] = folder_of(run, options)
    tree["rewards"] = [spec.model_dump() for spec in _rewards(run, base, options)]
    for key in ("path", "network"):
        tree["model"][key] = _placed(tree["model"][key], options.weights)
    if not paths.is_hub_id(tree["model"]["path"]):
        tree["model"]["revision"] = None
    return config.parse(tree)


def _placed(named: str | None, folder: Path) -> str | None:
    """A model of the hub from the folder of weights, where it is there."""
    if named is None or not paths.is_hub_id(named):
        return named
    there = folder / paths.hub_name(named)[0].rpartition("/")[2]
    return str(there.resolve()) if there.is_dir() else named


def _rewards(run: Run, base: Recipe, options: Options) -> list[RewardSpec]:
    """The rewards that the run trains on, and those that its recipe watches."""
    found: dict[str, RewardSpec] = {}
    for column, weight in run.trained.items():
        spec, part = _reward(COLUMNS[column], base, options)
        thresholds = dict(spec.threshold)
        name = part
        if column in run.thresholds:
            thresholds[part], name = run.thresholds[column], f"{part}_above"
        before = found.get(spec.name, spec.model_copy(update={"weights": {}, "threshold": {}}))
        weights = {**before.weights, name: weight}
        if name != part:
            weights[part] = 0.0  # the score itself is watched
        update: dict[str, Any] = {
            "weights": weights,
            "threshold": {**before.threshold, **thresholds},
        }
        found[spec.name] = before.model_copy(update=update)
    if not options.judges:
        for spec in base.rewards:
            mine = found.get(spec.name, _from_folder(spec, options.weights))
            watched = dict.fromkeys(spec.weights, 0.0)
            kept = mine.weights if spec.name in found else {}
            found[spec.name] = mine.model_copy(update={"weights": {**watched, **kept}})
    return list(found.values())


def _reward(column: Column, base: Recipe, options: Options) -> tuple[RewardSpec, str]:
    """The reward of a column and its part, in the trainer's process."""
    known = {spec.name: spec for spec in (*base.rewards, *options.files)}
    if column.name in options.judges:
        name, part = options.judges[column.name]
        spec = known.get(name) or rewards.plain(name)
    else:
        part = column.part
        spec = _from_folder(known.get(column.reward), options.weights, column)
    return spec.model_copy(update={"where": "process", "urls": ()}), part


def _from_folder(spec: RewardSpec | None, folder: Path, column: Column | None = None) -> RewardSpec:
    """A reward with its weights from the folder, as far as the catalogue knows it."""
    if column is None:
        assert spec is not None
        known = [one for one in COLUMNS.values() if one.reward == spec.name]
        if not known:
            return spec
        column = known[0]
    return choosing.placed(column, spec, folder)
