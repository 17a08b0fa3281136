"""Which reward measures which column, with which settings; or why none does.

In this order: what --judge names, a file of --rewards, the folder of --weights, the run's recipe.
The options that put a number on the paper's scale are the protocol's, whoever names the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS, Column
from fastgrpo.tools.score import judges

ROWS = "rows"
"""The option of GenEval's rewards that names the benchmark's rows."""
BIG = ("hps", "clip_score", "pick_score", "geneval", "videoalign")
"""Rewards that have weights of their own."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What may name a judge."""

    judges: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Column -> (reward, part) that stands in for the paper's judge."""
    files: Sequence[RewardSpec] = ()
    """Rewards of --rewards."""
    weights: Path | None = None
    """Folder of weights by the names of the catalogue."""
    recipe: Sequence[RewardSpec] = ()


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The reward that measures a column."""

    column: Column
    spec: RewardSpec
    part: str

    @property
    def stands_in(self) -> bool:
        """Whether it is another judge than the paper's."""
        return (self.spec.name, self.part) != (self.column.reward, self.column.part)

    def note(self) -> str:
        """The judge and how it was set, in one line."""
        line = f"{self.spec.name}.{self.part}"
        if self.stands_in:
            own = f"{self.column.reward}.{self.column.part}"
            return f"{line}, a stand-in for {own}: not the paper's number"
        line += f", {self.spec.dtype}"
        return f"{line}; {self.column.note}" if self.column.note else line


@dataclass(frozen=True)
class Unknown:
    """A number that is not measured."""

    reason: str


def parse_judges(texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The values of --judge, `COLUMN=REWARD.PART`. Raises UserError for another form or column."""
    found: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, equals, judge = text.partition("=")
        reward, dot, part = judge.rpartition(".")
        if not (equals and dot and reward and part):
            raise UserError(
                f"--judge={text}: not of the form COLUMN=REWARD.PART, such as "
                "GenEval=geneval_hf.GenEval_hf."
            )
        if name not in COLUMNS:
            raise UserError(f"--judge={text}: no column '{name}'; use one of {', '.join(COLUMNS)}.")
        found[name] = (reward, part)
    return found


def read_files(names: Sequence[str]) -> list[RewardSpec]:
    """The rewards of --rewards: names with defaults, and files of [[rewards]]."""
    found: list[RewardSpec] = []
    for name in names:
        if name.endswith(".toml"):
            found += judges.read(Path(paths.expanded(name, "--rewards"))).values()
        else:
            spec = rewards.plain(name)
            rewards.check(spec)
            found.append(spec)
    return found


def choose(column: Column, sources: Sources, rows: Path) -> Judge | Unknown:
    """The judge of a column, or why there is none.

    rows: what GenEval's prompts ask
    Raises UserError for a judge that was named and cannot be loaded.
    """
    named = {spec.name: spec for spec in (*sources.recipe, *sources.files)}
    if column.name in sources.judges:
        reward, part = sources.judges[column.name]
        spec = named.get(reward) or rewards.plain(reward)
        return _checked(column, _with_rows(spec, rows), part, f"--judge={column.name}={reward}")
    filed = {spec.name: spec for spec in sources.files}.get(column.reward)
    if filed is not None:
        return _checked(column, _protocol(column, filed, rows), column.part, "--rewards")
    if sources.weights is not None and all(_there(sources.weights, n) for n in column.needs):
        spec = placed(column, named.get(column.reward), sources.weights)
        return _checked(column, _protocol(column, spec, rows), column.part, "--weights")
    if column.reward in named:
        spec = _protocol(column, named[column.reward], rows)
        try:
            return _checked(column, spec, column.part, "rewards")
        except UserError as error:
            return Unknown(f"the run's own {column.reward} cannot be loaded here: {error}")
    return Unknown(_missing(column, sources.weights))


def placed(column: Column, spec: RewardSpec | None, folder: Path) -> RewardSpec:
    """The column's reward with its weights from a folder.  spec: its other settings"""
    spec = spec or RewardSpec(name=column.reward, weights={})
    files = {option: str((folder / name).resolve()) for option, name in column.files.items()}
    update: dict[str, Any] = {"options": {**spec.options, **files}}
    if column.weights is not None:
        update["path"] = str((folder / column.weights).resolve())
    return spec.model_copy(update=update)


def _protocol(column: Column, spec: RewardSpec, rows: Path) -> RewardSpec:
    """The spec on the paper's scale."""
    spec = spec.model_copy(update={"options": {**spec.options, **column.options}, "threshold": {}})
    return _with_rows(spec, rows)


def _with_rows(spec: RewardSpec, rows: Path) -> RewardSpec:
    """A judge of GenEval is asked by the rows of the prompts that are drawn."""
    if not spec.name.startswith("geneval"):
        return spec
    return spec.model_copy(update={"options": {**spec.options, ROWS: str(rows)}})


def _checked(column: Column, spec: RewardSpec, part: str, where: str) -> Judge:
    """The judge, once its settings and files are such that it could be loaded."""
    try:
        rewards.check_settings(spec)
    except UserError as error:
        raise UserError(f"{where}: for {column.name}, {error}") from None
    has = rewards.parts(spec)
    if has is not None and part not in has:
        raise UserError(
            f"{where}: {spec.name} has no part '{part}'; its parts are {', '.join(has)}."
        )
    spec = config.section(RewardSpec, "rewards", spec.model_dump() | {"where": "process"})
    return Judge(column=column, spec=spec.model_copy(update={"weights": {part: 0.0}}), part=part)


def _there(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def _missing(column: Column, folder: Path | None) -> str:
    """Why a column has no judge."""
    if folder is None:
        return f"no weights of {column.reward}: name them with --weights or --rewards"
    lacking = [name for name in column.needs if not _there(folder, name)]
    return f"the folder of --weights has no {' and no '.join(lacking)}"


def merged(chosen: Sequence[Judge]) -> list[RewardSpec]:
    """One spec for each reward, with all the parts that are asked of it."""
    found: dict[str, RewardSpec] = {}
    for judge in chosen:
        before = found.get(judge.spec.name)
        weights = {} if before is None else before.weights
        spec = judge.spec.model_copy(update={"weights": {**weights, judge.part: 0.0}})
        found[judge.spec.name] = spec
    return list(found.values())
