"""A benchmark of a run: its blocks of prompts one after the other, each over all ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo import models
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import open_world
from fastgrpo.tools.evaluate import evaluate
from fastgrpo.tools.evaluate.benchmark import choosing, estimates, prompt_sets
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS
from fastgrpo.tools.evaluate.benchmark.choosing import Judge, Sources, Unknown
from fastgrpo.tools.evaluate.benchmark.estimates import Measured
from fastgrpo.tools.evaluate.benchmark.prompt_sets import GENEVAL_FILE, PromptSet
from fastgrpo.tools.evaluate.benchmark.protocols import PROTOCOLS, Block, Protocol
from fastgrpo.tools.evaluate.benchmark.sheet import Setting, Sheet, Taken, protocol_settings
from fastgrpo.tools.evaluate.evaluate import Plan, Result
from fastgrpo.tools.sample import sample
from fastgrpo.tools.sample.source import Asked, Source
from fastgrpo.tools.sample.work import Work
from fastgrpo.tools.score.judges import Servers

NEEDS_HPS = f"no prompts of the HPS benchmark: name their folder with {prompt_sets.HPS_OPTION}"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The benchmark and its options from the command line."""

    benchmark: str
    rewards: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    """COLUMN=REWARD.PART, each a stand-in."""
    weights: Path | None = None
    prompts: str | None = None
    """A file in place of the paper's test prompts; None: the recipe's held-out ones."""
    geneval: Path | None = None
    """evaluation_metadata.jsonl; None: the one that ships."""
    hps: Path | None = None
    """Folder of the HPS benchmark's prompts."""
    limit: int | None = None
    images: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class Prepared:
    """A benchmark, put together and not begun; the same on every rank."""

    protocol: Protocol
    source: Source
    recipe: Recipe
    blocks: list["Ready"]
    unknown: dict[str, Unknown] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A block with its prompts and judges."""

    block: Block
    prompts: PromptSet
    images: int
    judges: list[Judge]

    def plan(self, source: Source, batch_size: int) -> Plan:
        """The clips and rewards of the block."""
        clips, batches = sample.deal(self.prompts.prompts, range(self.images), batch_size)
        specs = choosing.merged(self.judges)
        return Plan(Work(source, clips, batches, True), specs, self.images)


def benchmark(asked: Asked, wanted: Wanted) -> Sheet | None:
    """Measure every column that has a judge and prompts; in this process or as one of torchrun's.

    Raises any rank's UserError on every rank; for settings before anything is sampled.

    returns the sheet on the main rank; None on the others
    """
    with open_world() as world:
        prepared = world.on_main(lambda: prepare(asked, wanted))
        found: dict[str, Measured | Unknown] = dict(prepared.unknown)
        clips: dict[str, list[dict[str, Any]]] = {}
        for ready in prepared.blocks:
            plan = ready.plan(prepared.source, wanted.batch_size)
            result = evaluate.measure(plan, Servers(), world)
            if result is not None:
                found |= _measured(ready, result)
                count = len(plan.work.clips)
                clips[ready.block.prompts] = [result.clip(n) for n in range(count)]
        if not world.main:
            return None
        return _sheet(wanted.benchmark, prepared, found, clips)


def prepare(asked: Asked, wanted: Wanted) -> Prepared:
    """Choose weights, prompts and judges without loading them.

    Raises UserError for options that do not go together, and where nothing could be measured.
    """
    protocol = PROTOCOLS[wanted.benchmark]
    source, recipe = evaluate.sides(asked), evaluate.recipe_of(asked)
    _check_use(protocol, wanted, source)
    sources = Sources(
        judges=choosing.parse_judges(wanted.judges),
        files=choosing.read_files(wanted.rewards),
        weights=wanted.weights,
        recipe=recipe.rewards,
    )
    blocks, unknown = list[Ready](), dict[str, Unknown]()
    for block in protocol.blocks:
        prompts = _prompts(block, wanted, source)
        chosen = {
            name: prompts
            if isinstance(prompts, Unknown)
            else choosing.choose(COLUMNS[name], sources, wanted.geneval or GENEVAL_FILE)
            for name in block.columns
        }
        unknown |= {name: one for name, one in chosen.items() if isinstance(one, Unknown)}
        judges = [one for one in chosen.values() if isinstance(one, Judge)]
        if judges and isinstance(prompts, PromptSet):
            images = wanted.images or block.images or recipe.evaluate.seeds
            blocks.append(Ready(block, prompts, images, judges))
    if not blocks:
        reasons = "; ".join(f"{name}: {one.reason}" for name, one in unknown.items())
        raise UserError(
            f"--benchmark={wanted.benchmark}: nothing of it can be measured ({reasons}); name "
            "what is missing."
        )
    return Prepared(protocol, source, recipe, blocks, unknown)


def _check_use(protocol: Protocol, wanted: Wanted, source: Source) -> None:
    """Raise UserError for an option without effect and for a model that the prompts do not fit."""
    used = {block.prompts for block in protocol.blocks}
    given = {
        "--prompts": (wanted.prompts, "test"),
        "--geneval-prompts": (wanted.geneval, "geneval"),
        prompt_sets.HPS_OPTION: (wanted.hps, "hps"),
    }
    for option, (value, name) in given.items():
        if value is not None and name not in used:
            raise UserError(
                f"{option}={value}: has no effect with --benchmark={wanted.benchmark}; leave it "
                "out."
            )
    if used - {"test"} and models.reads_image(source.snapshot.model.family):
        raise UserError(
            f"--benchmark={wanted.benchmark}: its prompts have no reference image, which "
            f"{source.snapshot.model.family} needs; use it on a text-to-image model."
        )


def _prompts(block: Block, wanted: Wanted, source: Source) -> PromptSet | Unknown:
    """The prompts of a block, or why there are none."""
    if block.prompts == "geneval":
        found = prompt_sets.geneval(wanted.geneval)
    elif block.prompts == "hps":
        if wanted.hps is None:
            return Unknown(NEEDS_HPS)
        found = prompt_sets.hps(wanted.hps)
    else:
        chosen = sample.choose_prompts(source, sample.Wanted(file=wanted.prompts))
        found = prompt_sets.test(chosen, wanted.prompts)
    return found.first(wanted.limit)


def _measured(ready: Ready, result: Result) -> Mapping[str, Measured]:
    """The numbers of a block's columns."""
    prompts = [n for n in range(len(ready.prompts.prompts)) for _ in range(ready.images)]
    groups = [group for group in ready.prompts.groups for _ in range(ready.images)]
    found = {}
    for judge in ready.judges:
        scores = result.scores[f"{judge.spec.name}.{judge.part}"].numpy()
        also: dict[str, tuple[float, float]] = {}
        if ready.block.prompts == "geneval" and not judge.stands_in:
            also = estimates.geneval_extras(scores, prompts)
        if ready.block.prompts == "hps":
            also = estimates.hps_extras(scores, groups)
        found[judge.column.name] = estimates.measured(scores, prompts, groups, also)
    return found


def _sheet(
    name: str,
    prepared: Prepared,
    found: Mapping[str, Measured | Unknown],
    clips: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Sheet:
    """The result with all that says how it was made."""
    protocol, source = prepared.protocol, prepared.source
    assert source.base is not None
    taken = {
        judge.column.name: Taken(judge.note(), judge.stands_in)
        for ready in prepared.blocks
        for judge in ready.judges
    }
    return Sheet(
        name=name,
        labels=(source.base.label, source.snapshot.label),
        columns={column: found[column] for column in protocol.columns},
        judges=taken,
        settings=list(_settings(prepared)),
        clips=clips,
        method=prepared.recipe.objective.kind,
    )


def _settings(prepared: Prepared) -> Iterable[Setting]:
    """How the numbers were made, and who says so."""
    for ready in prepared.blocks:
        name, official = ready.block.prompts, ready.block.images
        yield Setting(f"{name} prompts", ready.prompts.origin, "the benchmark" if official else "")
        if official in (None, ready.images):
            by = "the benchmark" if official else ""
            yield Setting(f"images per prompt, {name}", str(ready.images), by)
        else:
            told = f"{ready.images} in place of the benchmark's {official}"
            yield Setting(f"images per prompt, {name}", told, "--seeds")
        if name == "geneval":
            yield Setting("overall, geneval", "mean of the six tasks' means", "the benchmark")
        if name == "hps":
            yield Setting("overall, hps", "mean of the styles' means, assumed", "")
    yield from protocol_settings(prepared.protocol, prepared.source)
