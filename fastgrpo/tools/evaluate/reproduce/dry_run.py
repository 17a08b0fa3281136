"""What an entry takes: runs, GPU-hours by `plan`, checkpoints, downloads, evaluation, open points.

Nothing is fetched, loaded or written, and torch is not needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.config import Recipe, paths
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS, DOWNLOADS, MODELS, Column
from fastgrpo.tools.evaluate.benchmark.protocols import PROTOCOLS
from fastgrpo.tools.evaluate.reproduce.entries import Entry, Run
from fastgrpo.tools.evaluate.reproduce.recipes import Options, file_of, recipe_of
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.planner import Plan

PAPER = {
    "optimizer.lr": 1e-5,
    "prompts.per_iteration": 32,
    "rollout.samples_per_prompt": 12,
    "optimizer.updates_per_iteration": 4,
    "objective.clip_range": 1e-4,
    "rollout.eta": 0.3,
    "objective.timestep_fraction": 0.6,
}
"""Table 6, for flows; Stable Diffusion is DDIM with eta 1."""
STEPS = {"stable_diffusion": 50, "flux": 25, "hunyuan_video": 25}
"""Table 6's sampling steps, by family."""
SIZES = {"geneval": 553, "hps": 3200, "test": 1000}
"""Prompts of the benchmarks, and the paper's test prompts."""


@dataclass(frozen=True)
class Fleet:
    """The GPUs that are asked about."""

    gpu: str
    gpus: int | None = None
    """None: as many as the paper's run had."""


@dataclass(frozen=True)
class Planned:
    """A run with its recipe and plan, or why it has none."""

    run: Run
    recipe: Recipe | None
    plan: Plan | None
    problem: str = ""


def lines(name: str, entry: Entry, options: Options, fleet: Fleet) -> list[str]:
    """The answer, a line each. Raises UserError for GPUs and files that are not there."""
    gpu(fleet.gpu)
    planned = [_planned(run, options, fleet) for run in entry.runs]
    found = [f"{name}: {entry.title}"]
    if options.stands_in:
        found.append("stand-in: with what --recipe and --judge name this is not the paper's number")
    found += _block("the paper says", entry.stated)
    found += _block("runs", [line for one in planned for line in _run_lines(one, options)])
    hours = [one.plan.gpu_hours for one in planned if one.plan is not None]
    if planned and entry.output != "settings":
        left = len(planned) - len(hours)
        more = f", and {left} without a plan" if left else ""
        found.append(
            f"  in all {sum(hours):,.0f} GPU-hours by plan{more}; held-out evaluation, pictures and "
            "downloads are not counted"
        )
    if entry.output == "settings":
        found += _block("hyper-parameters", _hyper_parameters(planned))
    found += _block("checkpoints that are trained", _models(planned))
    found += _block("weights of judges", _judges(entry, options))
    found += _block("output", _output(entry))
    return found + _block("not stated by the paper", entry.open)


def _block(heading: str, body: Iterable[str]) -> list[str]:
    """A heading and what stands below; nothing where nothing does."""
    listed = [f"  {line}" for line in body]
    return [heading, *listed] if listed else []


def _planned(run: Run, options: Options, fleet: Fleet) -> Planned:
    """The recipe and plan of a run, as far as this version can have them."""
    file_of(run, options)
    try:
        recipe = recipe_of(run, options)
    except UserError as error:
        return Planned(run, None, None, f"no recipe: {error}")
    machine = Machine(gpu(fleet.gpu), Achieved())
    try:
        return Planned(run, recipe, planner.plan(recipe, fleet.gpus or run.gpus, machine))
    except UserError as error:
        return Planned(run, recipe, None, f"no plan: {error}")


def _run_lines(one: Planned, options: Options) -> list[str]:
    """A run in two lines."""
    run = one.run
    marked = f" [baseline: {run.baseline}]" if run.baseline else ""
    rewards = " & ".join(
        f"{column} {weight:g}"
        + (f" (1 from {run.thresholds[column]:g} on, else 0)" if column in run.thresholds else "")
        for column, weight in run.trained.items()
    )
    switches = f"; {' '.join(run.switches)}" if run.switches else ""
    first = f"{run.name}{marked}: {file_of(run, options)}, rewards {rewards}{switches}"
    if one.plan is None:
        return [first, f"  {one.problem}"]
    found = one.plan
    fits = "" if found.fits else "does not fit as it is, see plan --tune; "
    return [
        first,
        f"  {found.subject.job.gpus} x {found.machine.card.name}: {fits}{found.gpu_hours:,.0f} "
        f"GPU-hours, {found.seconds:,.3g} s per iteration, {found.iterations} iterations",
    ]


def _hyper_parameters(planned: Sequence[Planned]) -> list[str]:
    """Each recipe against Table 6."""
    found = []
    for one in planned:
        if one.recipe is None:
            continue
        tree, wanted = one.recipe.model_dump(), dict[str, float](PAPER)
        family = one.recipe.model.family
        if family in STEPS:
            wanted["rollout.steps"] = STEPS[family]
        if family == "stable_diffusion":
            wanted["rollout.eta"] = 1.0
        if one.recipe.model.cfg > 1:
            wanted["optimizer.updates_per_iteration"] = 1
        values = {key: tree[key.partition(".")[0]][key.partition(".")[2]] for key in wanted}
        others = [
            f"{key} {values[key]:g}, paper {wanted[key]:g}"
            for key in wanted
            if values[key] != wanted[key]
        ]
        found.append(
            f"{one.run.name} is as in Table 6{': but ' if others else ''}{'; '.join(others)}"
        )
    return found


def _models(planned: Sequence[Planned]) -> list[str]:
    """The generators, with sizes by plan and licences."""
    found: dict[str, str] = {}
    for one in sorted(planned, key=lambda one: one.plan is None):
        if one.recipe is None:
            continue
        model = one.recipe.model
        for named in filter(None, (model.path, model.network)):
            licence = MODELS.get(named, "that of the folder")
            there = "there" if Path(named).exists() else "missing"
            where = "to be fetched from the hub" if paths.is_hub_id(named) else there
            line = f"{named}: {_size(one, named)}; licence {licence}; {where}"
            found.setdefault(named, line)
    return [*found.values()]


def _size(one: Planned, named: str) -> str:
    """Parameters and bytes of what a run takes of a model's folder."""
    if one.plan is None or one.recipe is None:
        return "size not known here"
    subject, model = one.plan.subject, one.recipe.model
    network = subject.job.network.parameters
    beside = subject.auxiliary.encoders + subject.auxiliary.vae
    parts = {
        f"network {network / 1e9:.2f} B parameters": network if named == model.network else 0,
        f"encoders and VAE {beside / 1e9:.2f} B parameters": beside if named == model.path else 0,
    }
    if model.network is None:
        parts = dict(zip(parts, (network, beside), strict=True))
    total = 2 * sum(parts.values()) / 1e9
    told = ", ".join(text for text, size in parts.items() if size)
    return f"{told}: {total:.1f} GB in 16 bits, computed"


def _judges(entry: Entry, options: Options) -> list[str]:
    """What has to be downloaded for training and for the table, each once."""
    columns: dict[str, Column] = {}
    named = [column for run in entry.runs for column in run.trained]
    named += PROTOCOLS[entry.benchmark].columns if entry.benchmark else []
    named += ["CLIP"] if entry.diversity else []
    for name in dict.fromkeys(named):
        if name in options.judges:
            continue
        columns[name] = COLUMNS[name]
    uses: dict[str, list[str]] = {}
    for name, column in columns.items():
        for need in column.needs:
            uses.setdefault(need, []).append(name)
    found = [
        f"{name}: {'.'.join(judge)} stands in for {COLUMNS[name].reward}"
        for name, judge in options.judges.items()
        if name in named
    ]
    for need, names in uses.items():
        about = DOWNLOADS[need]
        there = "there" if (options.weights / need).exists() else "missing"
        found.append(
            f"{need}: for {', '.join(names)}; {about.source}; {about.size}; licence {about.licence}"
            f"; {there}"
        )
    return found


def _output(entry: Entry) -> list[str]:
    """What is made of the runs."""
    if entry.output == "table":
        assert entry.benchmark is not None
        protocol = PROTOCOLS[entry.benchmark]
        found = [f"a table as {protocol.title}, in Markdown and JSON"]
        for block in protocol.blocks:
            each = f"x {block.images}" if block.images else "x evaluate.seeds"
            found.append(
                f"{block.prompts} prompts, {SIZES[block.prompts]:,} {each} pictures of each model, "
                f"judged by {', '.join(block.columns)}"
            )
        return found
    if entry.output == "curves":
        return [f"curves of {', '.join(entry.curves)} over iterations, as picture and JSON"]
    if entry.output == "pictures":
        steps = f" at iterations {', '.join(map(str, entry.steps))}" if entry.steps else ""
        prompts = f"{len(entry.prompts)} prompts" if entry.prompts else "held-out prompts"
        return [f"sheets of {prompts} x {entry.seeds} seeds beside the base model's{steps}"]
    if entry.output == "study":
        return ["the trained runs, for a blind comparison of clips by people"]
    return ["the comparison above; nothing is trained"]


def exists(folder: Path) -> Path:
    """The folder of weights. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"--weights={folder}: no such folder; name one, an empty one for a start.")
    return folder
