"""`fastgrpo evaluate`: a base model against a model trained from it, by several rewards.

Both draw held-out prompts from the same noise with the deterministic sampler of `fastgrpo sample`;
the rewards see the pixels themselves, not a video file. The difference is paired, and its interval
the bootstrap of `training.evaluation.compare`.
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
from fastgrpo.checkpoint import identity
from fastgrpo.core import config
from fastgrpo.core.config import Recipe, RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.sample import sample
from fastgrpo.tools.sample.sample import Drawn
from fastgrpo.tools.sample.source import Asked, Source, find
from fastgrpo.tools.sample.work import UNCUT, Cut, Work
from fastgrpo.tools.score import judges
from fastgrpo.tools.score.judges import Judges, Servers
from fastgrpo.training.evaluation import RESAMPLES, Evaluation, compare

log = logging.getLogger(__name__)

SIDES = ("base", "trained")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The options of the comparison from the command line."""

    rewards: tuple[str, ...] = ()  # names, or files of [[rewards]]; empty: the recipe's
    file: str | None = None  # of prompts; None: the recipe's held-out prompts
    limit: int | None = None  # prompts; None: all
    seeds: int | None = None  # clips per prompt; None: the recipe's
    batch_size: int = 1
    servers: Servers = field(default_factory=Servers)


@dataclass(frozen=True)
class Plan:
    """The clips and rewards of a comparison, the same on every rank."""

    work: Work
    specs: list[RewardSpec]
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One part's means over the pairs of clips with a score on both sides; NaN without pairs."""

    base: float
    trained: float
    difference: float
    low: float
    """Low end of the difference's 95 % interval; NaN where all pairs are of one prompt, which says
    nothing of other prompts."""
    high: float
    pairs: int


@dataclass(frozen=True)
class Result:
    """The comparison over all ranks' clips, on the main rank."""

    plan: Plan
    columns: dict[str, Column]
    """By "reward.part"; and "sum", the weighted sum, where several parts were trained on."""
    scores: dict[str, Tensor]  # by "reward.part": float64 [clips, 2], NaN where invalid
    cut: Cut = UNCUT

    @property
    def labels(self) -> tuple[str, str]:
        """The names of the two sides."""
        source = self.plan.work.source
        assert source.base is not None
        return source.base.label, source.snapshot.label

    def heading(self, key: str) -> str:
        """A column's name: its part alone where no other reward has such a part."""
        part = key.rpartition(".")[2]
        return part if sum(other.rpartition(".")[2] == part for other in self.columns) == 1 else key

    def caption(self) -> str:
        """One line that says how the figures were made."""
        work = self.plan.work
        seeds = self.plan.seeds
        each = f"{seeds} seeds" if seeds > 1 else "one seed"
        prompts = len(work.clips) // seeds
        line = f"{prompts} prompt{'s' * (prompts > 1)} with {each} each, the same noise on both "
        line += f"sides, {work.source.steps} ODE steps; 95 % intervals by {RESAMPLES:,} paired "
        line += "bootstrap resamples of the prompts"
        missing = []
        for key, column in self.columns.items():
            if lost := len(work.clips) - column.pairs:
                missing.append(f"{lost} for {self.heading(key)}")
        if missing:
            line += f"; without a score on both sides, left out: {', '.join(missing)}"
        if self.cut.prompts:
            line += f"; {len(self.cut.prompts)} of the prompts are longer than a text encoder sees"
        return line

    def to_json(self) -> str:
        """The comparison with every clip's scores; a missing score is null."""
        work = self.plan.work
        source = work.source
        model = source.snapshot.model.model_dump(
            include={"family", "path", "network", "dtype", "guidance", "cfg", "negative_prompt"}
        )
        sampling = {"steps": source.steps, "shift": source.shift}
        without = {"where", "urls"}
        content = {
            "weights": dict(zip(SIDES, self.labels, strict=True)),
            "checkpoint": str(source.snapshot.checkpoint) if source.snapshot.checkpoint else None,
            "settings": model | source.video.model_dump() | sampling,
            "caption": self.caption(),
            "rewards": [spec.model_dump(mode="json", exclude=without) for spec in self.plan.specs],
            "table": {key: _or_null(vars(column)) for key, column in self.columns.items()},
            "clips": [self.clip(number) for number in range(len(work.clips))],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def clip(self, number: int) -> dict[str, Any]:
        """The row of one clip, as JSON."""
        clip = self.plan.work.clips[number]
        row: dict[str, Any] = {"prompt": clip.prompt.text, "seed": clip.seed}
        row |= self.cut.marks(clip.prompt)
        for column, side in enumerate(SIDES):
            own = {key: float(pair[number, column]) for key, pair in self.scores.items()}
            row[side] = _or_null(own)
        return row


def _or_null(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values with None for those that are not finite, as JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def evaluate(asked: Asked, wanted: Wanted) -> Result | None:
    """Sample, judge and compare, in this process or as one of torchrun's ranks.

    Raises any rank's UserError on every rank, for a reward before sampling begins.

    returns the comparison on the main rank; None on the others
    """
    with open_world() as world:
        plan = world.on_main(lambda: prepare(asked, wanted))
        return measure(plan, wanted.servers, world)


def measure(plan: Plan, servers: Servers, world: World) -> Result | None:
    """Sample both sides and judge them; on every rank.  returns None on other than the main rank"""
    with ExitStack() as stack:
        opened = _open(plan, servers, world, stack)
        parts = {spec.name: _parts(spec, opened) for spec in plan.specs}
        drawn, cut = _draw(plan.work, world)
        gc.collect()  # the network's memory goes before the rewards need theirs
        rows = _judge(plan.work, drawn=drawn, opened=opened, parts=parts, world=world)
        table = world.combine(rows, [pair.number for pair in drawn], len(plan.work.clips))
        keys = [f"{name}.{part}" for name, own in parts.items() for part in own]
        scores = {key: table[:, :, column] for column, key in enumerate(keys)}
        return Result(plan, columns(plan, scores), scores, cut) if world.main else None


def prepare(asked: Asked, wanted: Wanted) -> Plan:
    """Choose weights, prompts, seeds and rewards without loading them.

    Raises UserError for options that do not go together.
    """
    source, recipe = sides(asked), recipe_of(asked)
    seeds = wanted.seeds or recipe.evaluate.seeds
    chosen = sample.choose_prompts(source, sample.Wanted(file=wanted.file, limit=wanted.limit))
    clips, batches = sample.deal(chosen, range(seeds), wanted.batch_size)
    return Plan(Work(source, clips, batches, True), _specs(recipe.rewards, wanted.rewards), seeds)


def sides(asked: Asked) -> Source:
    """The trained weights with their base; with step 0 the base on both sides.

    Raises UserError where there is no base.
    """
    itself = asked.step == 0
    source = find(replace(asked, step="newest") if itself else asked)
    if source.base is None:
        raise UserError(
            f"source={asked.source}: a base model, or a folder without a recipe that names its "
            "own; give a run folder or an export."
        )
    if itself:
        source = replace(source, snapshot=replace(source.base, label="step 0"))
    return source


def recipe_of(asked: Asked) -> Recipe:
    """The recipe that was named, or the one in the folder."""
    if asked.recipe is None:
        return identity.recipe_of(Path(asked.source), asked.overrides)
    return config.load(asked.recipe, asked.overrides)


def _specs(own: Sequence[RewardSpec], wanted: Sequence[str]) -> list[RewardSpec]:
    """The wanted rewards: the run's with its settings, those of files, others with defaults."""
    known = {spec.name: spec for spec in own}
    if not wanted:
        return list(known.values())
    chosen: dict[str, RewardSpec] = {}
    for name in wanted:
        if name.endswith(".toml"):
            chosen |= judges.read(Path(paths.expanded(name, "--rewards")))
        elif name in known:
            chosen[name] = known[name]
        else:
            spec = rewards.plain(name)
            rewards.check(spec)
            chosen[spec.name] = spec
    return list(chosen.values())


def _open(plan: Plan, servers: Servers, world: World, stack: ExitStack) -> Judges:
    """The rewards on every rank. Rewards that share a GPU leave it until they score."""
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
    """The parts that the table shows: those in the spec's weights, also of 0; else all."""
    has = opened.parts[spec.name]
    unknown = [part for part in spec.weights if part not in has]
    if unknown:
        raise UserError(
            f"rewards.weights: {spec.name} has no part '{unknown[0]}'; "
            f"its parts are {', '.join(has)}."
        )
    return list(spec.weights or has)


def _draw(work: Work, world: World) -> tuple[list[Drawn], Cut]:
    """This rank's clips of both models, in host memory; and the prompts that are cut."""
    drawn, cut, mistake = list[Drawn](), UNCUT, None
    try:
        share = sample.encoded(work, world)
        drawn, cut = list(sample.generate(share, world)), share.cut
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    return drawn, cut


def _judge(
    work: Work,
    drawn: Sequence[Drawn],
    opened: Judges,
    parts: Mapping[str, Sequence[str]],
    world: World,
) -> Tensor:
    """This rank's scores.  returns float64 [own clips, 2, parts of all rewards], NaN: no score"""
    rows = torch.full((len(drawn), 2, sum(map(len, parts.values()))), math.nan, dtype=torch.float64)
    mistake = None
    try:
        for n, pair in enumerate(drawn):
            prompt = work.clips[pair.number].prompt.for_rewards
            for side, (pixels, finite) in enumerate(zip(pair.rows, pair.finite, strict=True)):
                clip = f"{SIDES[side]}, clip {pair.number}"
                if not finite:
                    log.warning("%s: latents or pixels are not finite: no score", clip)
                    continue
                verdicts = opened.score(pixels, prompt, work.source.video.fps)
                for name, verdict in verdicts.items():
                    if verdict.kind is not None:
                        why = f"{verdict.kind}: {verdict.reason}"
                        log.warning("%s: no score of %s: %s", clip, name, why)
                scores: list[float] = []
                for name, own in parts.items():
                    scores += [verdicts[name].scores[part] for part in own]
                rows[n, side] = torch.tensor(scores, dtype=torch.float64)
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    return rows


def columns(plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, Column]:
    """The table's columns by name.  scores: by "reward.part", float64 [clips, 2]: base, trained"""
    weights: dict[str, float] = {}
    for spec in plan.specs:
        weights |= {f"{spec.name}.{part}": weight for part, weight in spec.weights.items()}
    weighed = {key: weight for key, weight in weights.items() if weight and key in scores}
    table = {key: _column(plan, {key: pair}, {key: 1.0}) for key, pair in scores.items()}
    if len(weighed) > 1:
        table["sum"] = _column(plan, {key: scores[key] for key in weighed}, weighed)
    return table


def _column(plan: Plan, scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Column:
    """The weighted sum of these parts.  scores: by "reward.part", float64 [clips, 2]"""
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
    result: dict[str, Any] = {name: values["sum"] for name, values in compare(*sides).items()}
    low, high = result["ci95"]
    return Column(
        base=result["before"],
        trained=result["after"],
        difference=result["difference"],
        low=low,
        high=high,
        pairs=result["pairs"],
    )
