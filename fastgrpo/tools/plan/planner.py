"""Does a recipe fit on so many GPUs, and how long will it take: the answer of `fastgrpo plan`.

What to change is `tuning/`'s to say.

In closed form by default, in about a second and without torch; `--simulate` runs one rank with the
full-size network and no memory behind it (simulation/rank.py) and puts its figures beside.
docs/guides/planning.md compares the two.
"""

import math
from bisect import bisect
from dataclasses import dataclass, replace

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB
from fastgrpo.parallel.mesh import divisors
from fastgrpo.tools.plan.costs import compute, decoding, host
from fastgrpo.tools.plan.costs.compute import frozen_bytes
from fastgrpo.tools.plan.phases import (
    Machine,
    Phase,
    evaluation_seconds,
    iteration_phases,
    iteration_seconds,
)
from fastgrpo.tools.plan.subject import Subject, subject
from fastgrpo.tools.plan.workload import batch_size, network_calls
from fastgrpo.training import methods

CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# share of the parameters outside the blocks, from which a plan warns
LEAST_WAITING = 0.005  # share of the update, from which a plan tells it
LARGE_REST, LARGE_REST_GIB = (
    0.02,
    0.25,
)


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of GPUs."""

    subject: Subject
    machine: Machine
    phases: list[Phase]
    iterations: int
    every: int  # iterations per checkpoint

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def fits(self) -> bool:
        return self.worst.peak <= self.machine.usable() and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether a node's own memory has room, where it is known."""
        return self.machine.has_ram(sum(self.host.values()))

    @property
    def host(self) -> dict[str, float]:
        """Bytes of a node's own memory, by kind; empty: nothing of the run waits there."""
        return host.of_node(self.subject.job)

    @property
    def evaluation(self) -> float:
        """Seconds of a held-out evaluation on the way; 0 where the recipe has none."""
        wanted = self.subject.job.recipe.evaluate.every
        return evaluation_seconds(self.subject, self.phases) if wanted else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of an iteration, and its share of a checkpoint and of an evaluation."""
        every = self.subject.job.recipe.evaluate.every or 1
        return iteration_seconds(self.phases, self.every) + self.evaluation / every

    @property
    def gpu_hours(self) -> float:
        """Seconds of the run with loading and evaluations on the way, on all GPUs.

        The evaluations before and after, and the encoding of prompts, are not in it.
        """
        load = sum(phase.seconds for phase in self.phases if phase.name == "load")
        return (self.seconds * self.iterations + load) * self.subject.job.gpus / 3600


def plan(
    recipe: Recipe, gpus: int, machine: Machine, ranks_per_node: int = 8, text: int | None = None
) -> Plan:
    """The closed form; rollout.batch_size = "auto" comes to the largest that fits, and a note says
    so.

    text: tokens of the longest text, in place of the family's limit
    Raises UserError for what a run would refuse, and for GPUs that are no whole nodes.
    """
    methods.check(recipe)
    if gpus > ranks_per_node and gpus % ranks_per_node:
        raise UserError(
            f"--gpus={gpus}: not a multiple of the {ranks_per_node} of a node; use a multiple, "
            "or set --ranks-per-node."
        )
    if recipe.rollout.batch_size != "auto":
        return _plan(recipe, gpus=gpus, machine=machine, ranks_per_node=ranks_per_node, text=text)

    def sized(size: int) -> Plan:
        settled = recipe.model_copy(update={"rollout": recipe.rollout.with_batch_size(size)})
        return _plan(settled, gpus=gpus, machine=machine, ranks_per_node=ranks_per_node, text=text)

    samples, _ = network_calls.busiest(recipe, sized(1).subject.job.groups)
    fit = bisect(range(2, samples + 1), 0, key=lambda size: 0 if _has_room(sized(size)) else 1)
    size = batch_size.balanced(samples, 1 + fit)
    found = sized(size)
    note = f"rollout.batch_size=auto comes to {size} of a rank's {samples} samples at once"
    return replace(found, subject=replace(found.subject, notes=(*found.subject.notes, note)))


def _plan(
    recipe: Recipe, gpus: int, machine: Machine, ranks_per_node: int, text: int | None
) -> Plan:
    found = subject(recipe, gpus, ranks_per_node, text)
    return Plan(
        found,
        machine,
        iteration_phases(found, machine),
        recipe.run.iterations,
        recipe.checkpoint.every,
    )


def _has_room(found: Plan) -> bool:
    """Whether the rollout's batch is one that a run with rollout.batch_size = "auto" would take."""
    gaps = 1 / batch_size.SHARE - 1
    drawing = (phase for phase in found.phases if phase.name in ("rollout", "decode"))
    return all(
        one.peak + gaps * one.memory["activations"] <= found.machine.usable() for one in drawing
    )


@dataclass(frozen=True)
class Scaled:
    """A recipe on another number of GPUs."""

    gpus: int
    plan: Plan | None  # None: a run would refuse it
    override: str = ""  # without which it would
    refused: str = ""  # why

    @property
    def label(self) -> str:
        """The GPUs, with what has to be changed for them."""
        changed = self.override.removeprefix("distributed.")
        return f"{self.gpus}, {changed}" if changed else str(self.gpus)


def curve(recipe: Recipe, machine: Machine, ranks_per_node: int, text: int | None) -> list[Scaled]:
    """The same recipe on 1 to 512 GPUs.

    Where there are more ranks than samples, the fewest ranks that share a sample's sequence.
    """

    def scaled(gpus: int) -> Scaled:
        shared = (n for n in divisors(min(gpus, ranks_per_node)) if n > recipe.distributed.sp)
        refused = ""
        for sp in (recipe.distributed.sp, *shared):
            section = recipe.distributed.model_copy(update={"sp": sp})
            changed = recipe.model_copy(update={"distributed": section})
            override = f"distributed.sp={sp}" if sp != recipe.distributed.sp else ""
            try:
                found = plan(changed, gpus, machine, ranks_per_node=ranks_per_node, text=text)
            except UserError as error:
                refused = refused or str(error)
            else:
                return Scaled(gpus, found, override)
        return Scaled(gpus, None, refused=refused)

    return [scaled(gpus) for gpus in CURVE]


def warnings(found: Plan) -> list[str]:
    """What a person should know beside the numbers."""
    job, lines = found.subject.job, list(found.subject.notes)
    settings = job.recipe.evaluate
    rest = job.network.rest.parameters
    whole = frozen_bytes(job, job.network.rest) / GIB
    if rest > LARGE_REST * job.network.parameters and whole > LARGE_REST_GIB and not job.lora:
        modules = {name.split(".")[0] for name in job.network.rest.weights}
        largest = max(sorted(modules), key=lambda module: _module_size(job, module))
        lines.append(
            f"{rest / 1e6:,.1f} M parameters ({rest / job.network.parameters:.1%}) lie outside the "
            "sharded blocks, "
            f"most in {largest}: {whole:.2f} GiB are whole on each GPU during the update"
        )
    waiting = network_calls.waiting(job.recipe, job.groups)
    if waiting > LEAST_WAITING:
        lines.append(
            f"{waiting:.1%} of the update the ranks wait for each other: states are dealt whole"
        )
    if settings.every:
        clips = settings.prompts * settings.seeds
        lines.append(
            f"an evaluation of {clips} held-out clips takes {found.evaluation:,.1f} s, every "
            f"{settings.every} iterations: {found.evaluation / settings.every / found.seconds:.1%} "
            "of the run"
        )
    traits = methods.traits(job.recipe)
    if traits.noisy_steps:
        lines.append(_old_log_probs(found))
    if traits.differentiates:
        lines.append(_graph(found))
    return lines


def _graph(found: Plan) -> str:
    """What it takes to go back through the decoder."""
    vae, recipe = found.subject.auxiliary, found.subject.job.recipe
    kept = decoding.graph(vae, recipe) / GIB
    if not kept:
        return "the decoder's graph: not counted for this family"
    line = f"the decoder's graph of one clip takes {kept:,.1f} GiB in the update"
    return f"{line}; model.decode_batch says how many there are at once"


def _old_log_probs(found: Plan) -> str:
    """Where the update takes the old policy's log-probabilities from, and what that costs."""
    job = found.subject.job
    recipe, own = job.recipe, "old log-probabilities: the update's own in the first optimizer step"
    share = network_calls.share_again(recipe, job.groups)
    if recipe.optimizer.updates_per_iteration == 1:
        return own.replace(" in the first optimizer step", "")
    if not share:
        return f"{own}, then the rollout's"
    line = f"{own}, then the rollout's where batches are alike; {share:.0%} of the states are "
    line += "evaluated once more"
    if recipe.rollout.at_once != recipe.optimizer.batch_size:
        line += ": rollout.batch_size equal to optimizer.batch_size avoids it"
    return line


def _module_size(job: compute.Job, module: str) -> int:
    """Parameters of a module outside the blocks."""
    sizes = job.network.rest.weights
    return sum(math.prod(shape) for name, shape in sizes.items() if name.split(".")[0] == module)
