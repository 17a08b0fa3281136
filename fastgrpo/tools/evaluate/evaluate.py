"""`fastgrpo evaluate`: a base model against what was trained from it, on held-out prompts, by several rewards.

Both draw the same prompts from the same noise with the deterministic sampler of `fastgrpo sample`; the rewards see the
pixels themselves, not a video file. The difference is paired, its interval the bootstrap of `evaluate.compare`.
"""

import gc
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.sample import sample
from fastgrpo.tools.sample.sample import Drawn, Work
from fastgrpo.tools.sample.source import Asked, find
from fastgrpo.tools.score import judges
from fastgrpo.tools.score.judges import Judges, Servers
from fastgrpo.training.evaluation import RESAMPLES, Evaluation, compare

log = logging.getLogger(__name__)

SIDES = ("base", "trained")


@dataclass(frozen=True)
class Wanted:
    """What to compare by, as the command line says it."""

    rewards: tuple[str, ...] = ()  # names, or files of [[rewards]]; none = the recipe's
    file: str | None = None  # of prompts; none = the recipe's held-out ones
    limit: int | None = None
    seeds: int | None = None  # clips per prompt; none = the recipe's
    batch_size: int = 1
    servers: Servers = field(default_factory=Servers)


@dataclass(frozen=True)
class Plan:
    """What is drawn and judged, the same on every rank."""

    work: Work
    specs: list[RewardSpec]
    seeds: int


@dataclass(frozen=True)
class Column:
    """One part of the table: means over the pairs of clips that have a score on both sides, NaN where none has."""

    base: float
    trained: float
    difference: float
    low: float  # of the 95 % interval of the difference; NaN where a single prompt has pairs: it says nothing of others
    high: float
    pairs: int


@dataclass(frozen=True)
class Result:
    """The comparison; of all ranks, but only on the main one."""

    plan: Plan
    columns: dict[str, Column]  # by "reward.part"; and "sum", the weighted sum, where several parts were trained on
    scores: dict[str, Tensor]  # by "reward.part": float64 [clips, 2], NaN where invalid

    @property
    def labels(self) -> tuple[str, str]:
        """Of the two sides."""
        source = self.plan.work.source
        assert source.base is not None
        return source.base.label, source.snapshot.label

    def heading(self, key: str) -> str:
        """A column's name: its part alone where no other reward has such a part."""
        part = key.rpartition(".")[2]
        return part if sum(other.rpartition(".")[2] == part for other in self.columns) == 1 else key

    def caption(self) -> str:
        """One line: of what the figures are."""
        work = self.plan.work
        seeds = self.plan.seeds
        each = f"{seeds} seeds" if seeds > 1 else "one seed"
        prompts = len(work.clips) // seeds
        line = (
            f"{prompts} prompt{'s' * (prompts > 1)} with {each} each, the same noise on both sides, "
            f"{work.source.steps} ODE steps; 95 % intervals by {RESAMPLES:,} paired bootstrap resamples of the prompts"
        )
        lost = {self.heading(key): len(work.clips) - column.pairs for key, column in self.columns.items()}
        holes = ", ".join(f"{count} for {name}" for name, count in lost.items() if count)
        return line + (f"; without a score on both sides, left out: {holes}" if holes else "")

    def to_json(self) -> str:
        work = self.plan.work
        source = work.source
        model = source.snapshot.model.model_dump(
            include={"family", "path", "network", "dtype", "guidance", "cfg", "negative_prompt"}
        )
        clips = [
            {
                "prompt": clip.prompt.text,
                "seed": clip.seed,
                **{side: {key: _or_null(float(v[n, i])) for key, v in self.scores.items()} for i, side in _sides()},
            }
            for n, clip in enumerate(work.clips)
        ]
        content = {
            "weights": dict(zip(SIDES, self.labels, strict=True)),
            "checkpoint": str(source.snapshot.checkpoint) if source.snapshot.checkpoint else None,
            "settings": model | source.video.model_dump() | {"steps": source.steps, "shift": source.shift},
            "caption": self.caption(),
            "rewards": [spec.model_dump(mode="json", exclude={"where", "urls"}) for spec in self.plan.specs],
            "table": {key: {k: _or_null(v) for k, v in vars(column).items()} for key, column in self.columns.items()},
            "clips": clips,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _sides() -> Sequence[tuple[int, str]]:
    return list(enumerate(SIDES))


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(asked: Asked, wanted: Wanted) -> Result | None:
    """Sample, judge and compare, in this process or as one of torchrun's ranks.  returns none on all but the main rank

    Raises UserError on every rank for a mistake that any rank meets; a reward's before anything is sampled.
    """
    with open_world() as world, ExitStack() as stack:
        plan = world.on_main(lambda: prepare(asked, wanted))
        opened = _open(plan, wanted.servers, world, stack)
        parts = {spec.name: _parts(spec, opened) for spec in plan.specs}
        drawn = _draw(plan.work, world)
        gc.collect()  # the network's memory goes before the rewards need theirs
        rows = _judge(plan.work, drawn, opened, parts, world)
        table = world.combine(rows, [one.number for one in drawn], len(plan.work.clips))
        keys = [f"{name}.{part}" for name, own in parts.items() for part in own]
        scores = {key: table[:, :, column] for column, key in enumerate(keys)}
        return Result(plan, columns(plan, scores), scores) if world.main else None


def prepare(asked: Asked, wanted: Wanted) -> Plan:
    """Settle weights, prompts, seeds and rewards; nothing is loaded. Raises UserError for what does not go together."""
    itself = asked.step == 0
    source = find(replace(asked, step="newest") if itself else asked)
    if source.base is None:
        raise UserError(
            f"source={asked.source}: a base model, or a folder without a recipe that names its own; give a run folder "
            "or an export."
        )
    recipe = config.load(_recipe_of(asked), asked.overrides)
    seeds = wanted.seeds or recipe.evaluate.seeds
    chosen = sample.choose_prompts(source, sample.Wanted(file=wanted.file, limit=wanted.limit))
    clips, batches = sample.deal(chosen, range(seeds), wanted.batch_size)
    if itself:
        source = replace(source, snapshot=replace(source.base, label="step 0"))
    return Plan(Work(source, clips, batches, True), _specs(recipe.rewards, wanted.rewards), seeds)


def _recipe_of(asked: Asked) -> Path:
    return asked.recipe or Path(asked.source) / "recipe.toml"


def _specs(own: Sequence[RewardSpec], wanted: Sequence[str]) -> list[RewardSpec]:
    """The rewards by name: those of the run, with its settings, of files, and others with their defaults."""
    known = {spec.name: spec for spec in own}
    if not wanted:
        return list(known.values())
    chosen: dict[str, RewardSpec] = {}
    for name in wanted:
        if name.endswith(".toml"):
            chosen |= judges.read(Path(name))
        elif name in known:
            chosen[name] = known[name]
        else:
            rewards.check(name)
            chosen[name] = rewards.plain(name)
    return list(chosen.values())


def _open(plan: Plan, servers: Servers, world: World, stack: ExitStack) -> Judges:
    """The rewards on every rank. Those that share a GPU leave it until they are asked."""
    opened, mistake = None, None
    try:
        opened = stack.enter_context(judges.opened(plan.specs, servers, world.device))
        for spec in plan.specs:
            _parts(spec, opened)
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    assert opened is not None
    return opened


def _parts(spec: RewardSpec, opened: Judges) -> list[str]:
    """The parts that the table shows: those that the spec weighs, also with 0, or else all of the reward."""
    has = opened.parts[spec.name]
    unknown = [part for part in spec.weights if part not in has]
    if unknown:
        raise UserError(f"rewards.weights: {spec.name} has no part '{unknown[0]}'; its parts are {', '.join(has)}.")
    return list(spec.weights or has)


def _draw(work: Work, world: World) -> list[Drawn]:
    """This rank's clips of both models, in host memory."""
    drawn, mistake = [], None
    try:
        drawn = list(sample.generate(work, world))
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    return drawn


def _judge(
    work: Work, drawn: Sequence[Drawn], opened: Judges, parts: Mapping[str, Sequence[str]], world: World
) -> Tensor:
    """This rank's scores, float64 [own clips, 2, parts of all rewards], NaN where there is none."""
    rows = torch.full((len(drawn), 2, sum(map(len, parts.values()))), math.nan, dtype=torch.float64)
    mistake = None
    try:
        for n, one in enumerate(drawn):
            clip = work.clips[one.number]
            for side, (pixels, finite) in enumerate(zip(one.rows, one.finite, strict=True)):
                if not finite:
                    log.warning("%s, clip %d: the latents are not finite", SIDES[side], one.number)
                    continue
                verdicts = opened.score(pixels, clip.prompt.text, work.source.video.fps)
                for name, verdict in verdicts.items():
                    if verdict.kind is not None:
                        log.warning(
                            "%s, clip %d: no score of %s: %s: %s",
                            SIDES[side],
                            one.number,
                            name,
                            verdict.kind,
                            verdict.reason,
                        )
                rows[n, side] = torch.tensor(
                    [verdicts[name].scores[part] for name, own in parts.items() for part in own], dtype=torch.float64
                )
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    return rows


def columns(plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, Column]:
    """The table.  scores: by "reward.part", float64 [clips, 2]: base, trained"""
    weights = {f"{spec.name}.{part}": weight for spec in plan.specs for part, weight in spec.weights.items() if weight}
    weighed = {key: weight for key, weight in weights.items() if key in scores}
    found = {key: _column(plan, {key: pair}, {key: 1.0}) for key, pair in scores.items()}
    if len(weighed) > 1:
        found["sum"] = _column(plan, {key: scores[key] for key in weighed}, weighed)
    return found


def _column(plan: Plan, scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Column:
    """One column: the weighted sum of these parts."""
    clips = plan.work.clips
    sides = [
        Evaluation(
            iteration=side,
            prompts=[clip.prompt.text for clip in clips],
            seeds=[clip.seed for clip in clips],
            scores={key: pair[:, side].tolist() for key, pair in scores.items()},
            weights=dict(weights),
            clips=[],
        )
        for side in (0, 1)
    ]
    usable = torch.isfinite(torch.cat(list(scores.values()), 1)).all(1).tolist()
    pairs = sum(usable)
    if not pairs:
        return Column(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    result: dict[str, Any] = {name: values["sum"] for name, values in compare(*sides).items()}
    several = len({clip.prompt.text for clip, counts in zip(clips, usable, strict=True) if counts}) > 1
    low, high = result["ci95"] if several else (math.nan, math.nan)
    return Column(result["before"], result["after"], result["difference"], low, high, pairs)
