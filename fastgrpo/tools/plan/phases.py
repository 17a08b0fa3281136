"""One iteration of a run, phase by phase: memory, FLOPs, bytes on the wire and seconds of the
busiest rank.

Seconds are the larger of computing and of gathering and scattering weights, which overlap, plus
what does not: the exchange of tokens inside a sequence group, and the optimizer's step. Shares of
the peaks are `gpus.Achieved`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastgrpo.core.units import GIB
from fastgrpo.tools.plan.costs import decoding, host, text_encoders
from fastgrpo.tools.plan.costs import memory as memory_costs
from fastgrpo.tools.plan.costs import rewards as reward_costs
from fastgrpo.tools.plan.costs.compute import (
    Job,
    Sent,
    between_replicas,
    dealt_states,
    exchanged,
    forward,
    gather_blocks,
    gather_whole,
    gathered_bytes,
    micro_batch,
    reduced_bytes,
    tokens_of_update,
    update,
)
from fastgrpo.tools.plan.gpus import Achieved, Gpu
from fastgrpo.tools.plan.subject import Subject
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import methods

# the rollout holds the whole weights where this many times their size is free, see
# fastgrpo.parallel.world
ROOM = 1.5
STEP_BYTES = (
    44  # per trained parameter: the gradient's norm and clipping, AdamW's reads and writes, float32
)
AVERAGE_BYTES = 12  # and of the moving average
RAM_SHARE = 0.9  # of a node's memory that a run's own states may take


@dataclass(frozen=True)
class Phase:
    """A phase of one rank and iteration; loading is once per run, saving once per checkpoint."""

    name: str
    memory: dict[str, float] = field(default_factory=dict)  # bytes on the GPU at the peak, by kind
    flops: float = 0.0
    link: float = 0.0  # bytes sent to GPUs of the same node
    network: float = 0.0  # bytes sent to other nodes
    seconds: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Machine:
    """What it runs on."""

    card: Gpu
    achieved: Achieved
    ram_gib: float | None = None  # of a node; None: not known, and whatever is needed is there
    nvme_gbs: float = 3.0  # what a node reads or writes of offloaded states, 10^9 bytes per second

    def has_ram(self, held: float) -> bool:
        """Whether a node's memory holds so many bytes beside libraries and cached files."""
        return self.ram_gib is None or held <= RAM_SHARE * self.ram_gib * GIB

    def usable(self) -> float:
        """Bytes that tensors may take: the rest is the context's, the libraries' and the
        allocator's.
        """
        return (
            (self.card.memory_gib - self.achieved.reserve_gib)
            * GIB
            / (1 + self.achieved.fragmentation)
        )

    def compute(self, flops: float, share: float) -> float:
        return flops / (self.card.tflops * 1e12 * share)

    def move(self, moved: float) -> float:
        """Seconds of work that waits for the GPU's own memory.  moved: bytes read and written"""
        return moved / (self.card.memory_gbs * self.achieved.memory * 1e9)

    def send(self, link: float, network: float) -> float:
        """Seconds of a transfer whose parts run beside each other."""
        card, achieved = self.card, self.achieved
        return (
            max(
                link / (card.link_gbs * achieved.link),
                network / (card.network_gbs * achieved.network),
            )
            / 1e9
        )


def iteration_phases(subject: Subject, machine: Machine) -> list[Phase]:
    """All phases in their order."""
    load, reward, save = other_phases(subject, machine)
    drawing = drawing_phases(subject, machine)
    return [load, *drawing, reward, update_phase(subject, machine), save]


def drawing_phases(subject: Subject, machine: Machine) -> tuple[Phase, Phase]:
    """Rollout and decoding, which share the rollout's weights."""
    whole = holds_whole(subject, machine)
    return _rollout(subject, machine, whole), _decode(subject, machine, whole)


def other_phases(subject: Subject, machine: Machine) -> tuple[Phase, Phase, Phase]:
    """Loading, rewards and saving: all but what computes with the network."""
    return _load(subject, machine), _reward(subject, machine), _save(subject, machine)


def holds_whole(subject: Subject, machine: Machine) -> bool:
    """Whether the rollout gathers the weights once."""
    choice, job = subject.job.recipe.distributed.rollout_weights, subject.job
    if choice != "auto":
        return choice == "gathered"
    needed = sum(gathered_bytes(job, unit) for unit in job.network.all_units)
    held = memory_costs.states(job) | memory_costs.raw_weights(job)
    return (
        ROOM * needed
        < machine.usable() - sum(held.values()) - _vae(subject) - reward_costs.of_node(job).staying
    )


def route(job: Job, sent: Sent) -> tuple[float, float]:
    """(bytes to GPUs of the node, bytes to other nodes) of a rank.

    A ring over shards on several nodes leaves a node once per byte: that part is shared by the
    cards of its ranks.
    """
    weights, tokens = sent.gather + sent.scatter, sent.exchange + sent.collect
    ranks = min(job.ranks_per_node, job.gpus)
    link, network = weights, weights / ranks if job.shards > ranks else 0.0
    for count, inside in (
        (sent.reduce + sent.dealt, job.gpus <= ranks),
        (tokens, job.sp <= ranks),
    ):
        link, network = (link + count, network) if inside else (link, network + count)
    return link, network


def _seconds(job: Job, machine: Machine, compute: float, sent: Sent) -> float:
    weights = Sent(sent.gather, sent.scatter, sent.reduce)
    apart = Sent(exchange=sent.exchange, collect=sent.collect, dealt=sent.dealt)
    return max(compute, machine.send(*route(job, weights))) + machine.send(*route(job, apart))


def _vae(subject: Subject) -> float:
    return subject.auxiliary.vae * _vae_element(subject)


def _vae_element(subject: Subject) -> int:
    """Bytes of a number in the VAE."""
    return subject.auxiliary.vae_bytes or subject.job.element


def _others(subject: Subject, scoring: bool) -> dict[str, float]:
    """Bytes that lie beside the network.

    scoring: between the first score of an iteration and the last
    """
    rewards = reward_costs.of_node(subject.job)
    return {
        "VAE": _vae(subject),
        "rewards": rewards.staying + (rewards.passing if scoring else 0.0),
    }


def _kept(subject: Subject) -> dict[str, float]:
    """What waits for the update: the chosen transitions of this rank's samples."""
    job = subject.job
    return {"trajectories": memory_costs.trajectories(job, _samples(job))}


def _samples(job: Job) -> int:
    """Samples of the busiest rank."""
    return network_calls.busiest(job.recipe, job.groups)[0]


def _load(subject: Subject, machine: Machine) -> Phase:
    """The text encoders, one after the other; then this rank's shards, read from files."""
    job, states = subject.job, memory_costs.states(subject.job)
    encoders = [one.memory for one in text_encoders_of(subject, machine)]
    memory = max(
        *encoders, {"weights": states.get("weights", 0.0)}, key=lambda parts: sum(parts.values())
    )
    of_node = min(job.ranks_per_node, job.gpus) / job.shards
    read = 2.0 * job.network.parameters * of_node  # files of bfloat16
    seconds = (read + 2 * subject.auxiliary.encoders) / (machine.achieved.disk_gbs * 1e9)
    return Phase("load", memory | _others(subject, scoring=False), seconds=seconds)


def text_encoders_of(subject: Subject, machine: Machine) -> list[text_encoders.Placed]:
    """The text encoders as the run places them: beside the VAE and the rewards."""
    others = sum(_others(subject, scoring=False).values())
    return text_encoders.placed(subject.auxiliary, subject.job, machine.usable() - others)


def encoding_seconds(subject: Subject, machine: Machine) -> float:
    """Seconds of `text_encoders.PROMPTS` prompts of the longest text, on all ranks."""
    job, total = subject.job, 0.0
    for one in text_encoders_of(subject, machine):
        moving = one.moved / (machine.card.host_gbs * 1e9)
        if one.way == "sharded":
            across = job.gpus > min(job.ranks_per_node, job.gpus)
            moving = machine.send(one.moved, one.moved / job.ranks_per_node if across else 0.0)
        total += max(machine.compute(one.flops, machine.achieved.rollout), moving)
    return total


def _rollout(subject: Subject, machine: Machine, whole: bool) -> Phase:
    job = subject.job
    batch = min(job.recipe.rollout.at_once, network_calls.busiest(job.recipe, job.groups)[0])
    states, forwards = network_calls.rollout_work(job.recipe, job.groups)
    flops = forward(job, 1).total * states
    weights = gather_whole(job) if whole else gather_blocks(job, math.ceil(forwards))
    sent = weights + exchanged(job, 1).times(states)
    memory = (
        memory_costs.rollout(job, batch, whole) | _kept(subject) | _others(subject, scoring=True)
    )
    compute = machine.compute(flops, machine.achieved.rollout)
    seconds = _seconds(job, machine, compute, sent)
    seconds += _reread(job, machine, 1 if whole else math.ceil(forwards))
    return Phase("rollout", memory, flops, *route(job, sent), seconds)


def _decode(subject: Subject, machine: Machine, whole: bool) -> Phase:
    """This rank's clips through the VAE, in tiles where the family decodes so."""
    job, vae, video = subject.job, subject.auxiliary, subject.job.recipe.video
    samples = network_calls.busiest(job.recipe, job.groups)[0]
    samples += network_calls.busiest_scouts(job.recipe, job.groups)
    own = math.ceil(samples / job.sp)
    size = (video.frames, video.height, video.width)
    tile = vae.tile or size
    flops = own * decoding.covered(vae, video) * vae.decode_flops
    at_once = min(math.ceil(min(samples, job.recipe.rollout.at_once) / job.sp), own)
    at_once = min(at_once, job.recipe.model.decode_batch or at_once)
    tile_pixels = math.prod(min(t, length) for t, length in zip(tile, size, strict=True))
    element = _vae_element(subject)
    working = at_once * vae.decode_bytes * element / 2 * tile_pixels
    clips = at_once * math.prod(size) * 3 * (2 * element + 4 + 1)
    rollout = memory_costs.rollout(job, 1, whole)
    rollout.pop("activations")
    if not whole:
        rollout["gathered"] = gathered_bytes(job, job.network.rest)
    memory = (
        rollout | {"activations": working + clips} | _kept(subject) | _others(subject, scoring=True)
    )
    return Phase("decode", memory, flops, seconds=machine.compute(flops, machine.achieved.decode))


def _reward(subject: Subject, machine: Machine) -> Phase:
    memory = memory_costs.states(subject.job) | _kept(subject) | _others(subject, scoring=True)
    flops = reward_costs.of_node(subject.job).flops
    return Phase("reward", memory, flops, seconds=machine.compute(flops, machine.achieved.reward))


def update_phase(subject: Subject, machine: Machine) -> Phase:
    """All optimizer steps of an iteration."""
    job, recipe = subject.job, subject.job.recipe
    states, batches = _update_work(job)
    batch = min(
        recipe.optimizer.batch_size, math.ceil(states / recipe.optimizer.updates_per_iteration)
    )
    flops = update(job, 1).total * states
    if job.reference:
        flops += forward(job, 1).total * states
    again = network_calls.share_again(recipe, job.groups)
    flops += forward(job, 1).total * states * again
    sent = micro_batch(job, 0).times(batches) + exchanged(job, 1).times(states * again)
    if again:
        sent = sent + gather_blocks(job, math.ceil(batches * again))
    sent = sent + tokens_of_update(job, 1).times(states)
    sent = sent + between_replicas(job).times(recipe.optimizer.updates_per_iteration)
    sent = sent + dealt_states(job)
    several = batches > recipe.optimizer.updates_per_iteration
    memory = memory_costs.update(job, batch, several)
    if methods.evaluates_average(recipe.objective):
        before = memory_costs.evaluation(job, batch)
        memory = max(memory, before, key=lambda parts: sum(parts.values()))
    kept = memory_costs.trajectories(job, _samples(job)) + memory_costs.old_means(job, states)
    memory |= memory_costs.velocities(job, states) | {"trajectories": kept}
    judged = methods.traits(recipe).differentiates
    memory |= _others(subject, scoring=judged)
    compute = machine.compute(flops, machine.achieved.update)
    if judged:
        memory["decoder's graph"], again_flops = _judging(subject, batch, states)
        compute += machine.compute(again_flops, machine.achieved.decode)
        flops += again_flops
    compute += machine.move(memory_costs.moved(job, 1) * states)
    seconds = _seconds(job, machine, compute, sent)
    seconds += recipe.optimizer.updates_per_iteration * _step_seconds(job, machine, batches)
    return Phase("update", memory, flops, *route(job, sent), seconds)


def _judging(subject: Subject, batch: int, states: float) -> tuple[float, float]:
    """(bytes, FLOPs) of decoding an update's estimates with their gradient.

    A micro-batch's, `model.decode_batch` at a time, all tiles at once; decoded twice, and gone back
    through once. The judge's own graph is not counted.
    """
    job, vae = subject.job, subject.auxiliary
    at_once = min(batch, job.recipe.model.decode_batch or batch)
    flops = 3 * states * decoding.covered(vae, job.recipe.video) * vae.decode_flops
    return at_once * decoding.graph(vae, job.recipe), flops


def _update_work(job: Job) -> tuple[float, int]:
    """(states evaluated, micro-batches) in an iteration, of the busiest rank.

    All ranks' states are dealt evenly in each optimizer step; for those that move, see
    `compute.dealt_states`.
    """
    updates = job.recipe.optimizer.updates_per_iteration
    batches, size = network_calls.dealt(job.recipe, job.groups)
    return float(updates * batches * math.ceil(size)), updates * batches


def _step_seconds(job: Job, machine: Machine, batches: int) -> float:
    """Seconds of clipping and AdamW, which wait for memory; with offloading also of the way to the
    host and back, and of a disk that is slower than the step.
    """
    trained = sum(reduced_bytes(job, unit) for unit in job.network.all_units) / 4 / job.shards
    count = STEP_BYTES + (AVERAGE_BYTES if job.recipe.optimizer.ema_decay else 0)
    if not job.recipe.distributed.offload:
        return machine.move(trained * count)
    # two gathers and the gradient
    per_step = batches / job.recipe.optimizer.updates_per_iteration
    moved = 3 * 4 * trained * per_step / (machine.card.host_gbs * 1e9)
    stepped = trained * count / (machine.card.host_gbs * 1e9)
    # what the disk reads and writes meanwhile
    return moved + max(stepped, nvme_seconds(job, machine)) + _reread(job, machine, 2 * per_step)


def nvme_seconds(job: Job, machine: Machine) -> float:
    """Seconds of reading and writing a node's masters and moments once; 0: they lie on no disk."""
    return 2 * sum(host.on_nvme(job).values()) / (machine.nvme_gbs * 1e9)


def _reread(job: Job, machine: Machine, gathers: float) -> float:
    """Seconds of reading the masters again for so many gathers, where memory does not keep them."""
    masters = host.on_nvme(job).get("masters", 0.0)
    if machine.has_ram(sum(host.of_node(job).values()) + masters):
        return 0.0
    return gathers * masters / (machine.nvme_gbs * 1e9)


def _save(subject: Subject, machine: Machine) -> Phase:
    """Masters, moments and the moving average, each value written once by the ranks together.

    Replicas share the writing: DCP gives each value to the one with the least to write so far. In
    the background the run waits until a rank's own part is in the host's memory.
    """
    job = subject.job
    trained = sum(reduced_bytes(job, unit) for unit in job.network.all_units) / 4
    count = 12 + (4 if job.recipe.optimizer.ema_decay else 0)
    nodes = max(1, job.gpus // job.ranks_per_node)
    seconds = trained * count / (machine.achieved.disk_gbs * 1e9 * nodes)
    if job.recipe.checkpoint.background:
        seconds = trained * count / job.shards / (machine.card.host_gbs * 1e9)
    memory = memory_costs.states(job) | _others(subject, scoring=False)
    return Phase("save", memory, seconds=seconds)


def evaluation_seconds(subject: Subject, found: Iterable[Phase]) -> float:
    """Seconds of a held-out evaluation: the iteration's drawing and scoring, by clips and steps.

    The sampler evaluates each clip at every step; nothing is shared. Where the optimizer keeps an
    average, its weights' way in and out, which is short, is not counted.
    """
    job, settings = subject.job, subject.job.recipe.evaluate
    own = math.ceil(settings.prompts * settings.seeds / job.groups)
    steps = settings.steps or job.recipe.rollout.steps
    drawn = network_calls.busiest(job.recipe, job.groups)[0]
    drawn += network_calls.busiest_scouts(job.recipe, job.groups)
    states = network_calls.rollout_work(job.recipe, job.groups)[0]
    shares = {"rollout": own * steps / states, "decode": own / drawn, "reward": own / drawn}
    return sum(phase.seconds * shares.get(phase.name, 0.0) for phase in found)


def iteration_seconds(found: Iterable[Phase], every: int) -> float:
    """Seconds of the phases that each iteration has, and its share of a checkpoint."""
    shares = {"load": 0.0, "save": 1.0 / every}
    return sum(phase.seconds * shares.get(phase.name, 1.0) for phase in found)
