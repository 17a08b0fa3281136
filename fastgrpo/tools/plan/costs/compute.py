"""What a rank computes and sends: FLOPs and bytes of a forward and of a micro-batch, in closed
form.

FLOPs are those of the matrix products and of attention, two for each multiplication and addition;
what is made of the text is made on each rank of a sequence group. Bytes are what one rank sends in
a ring, (n - 1) / n of a gathered or scattered tensor: docs/guides/cluster/parallelism.md has the
same formulas for whole tensors, and the tests count both.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fastgrpo.core.config import Recipe
from fastgrpo.models.sizes.units import (
    BOTH,
    IMAGE,
    SAMPLE,
    TEXT,
    VIDEO,
    Attention,
    Block,
    Network,
    Unit,
    adapters,
)
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import methods

BACKWARD = 2.0  # products per product of the forward: the gradients of inputs and of weights
ATTENTION_BACKWARD = 2.5  # five products for two


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe on a number of GPUs: all that the closed forms want to know."""

    recipe: Recipe
    network: Network
    latent: tuple[int, int, int, int]  # (C, F, H, W) of a sample
    video: int  # tokens of a sample, on all ranks of a sequence group
    text: int  # tokens of the text, the longest
    gpus: int
    ranks_per_node: int
    replicas: int
    shards: int

    @property
    def text_in_blocks(self) -> int:
        """Tokens beside the video's in a block."""
        return self.text + (self.network.image if self.network.image_joins else 0)

    @property
    def sp(self) -> int:
        return self.recipe.distributed.sp

    @property
    def local(self) -> int:
        """Video tokens of a rank: the most that falls to one."""
        return math.ceil(self.video / self.sp)

    @property
    def groups(self) -> int:
        """Groups of ranks that work on different samples."""
        return self.gpus // self.sp

    @property
    def element(self) -> int:
        """Bytes of a number in compute precision."""
        return 2 if self.recipe.model.dtype == "bfloat16" else 4

    @property
    def branches(self) -> int:
        """Forwards that classifier-free guidance makes of one, in one batch."""
        return 2 if self.recipe.model.cfg > 1 else 1

    @property
    def lora(self) -> bool:
        return self.recipe.lora.rank > 0

    @property
    def second_network(self) -> bool:
        """Whether the initial policy is a network of its own: with adapters it is the one at
        rest.
        """
        return self.reference and not self.lora

    @property
    def reference(self) -> bool:
        """Whether the update asks the initial policy too."""
        return methods.needs_initial_policy(self.recipe)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank, by what makes them."""

    products: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.adapters

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.products + other.products,
            self.attention + other.attention,
            self.adapters + other.adapters,
        )


@dataclass(frozen=True)
class _Tokens:
    """What FLOPs of a unit depend on, beside the unit."""

    video: int
    local: int
    text: int
    image: int
    sp: int


def forward(job: Job, batch: int, units: Iterable[Unit] | None = None) -> Flops:
    """One forward over `batch` states, guidance's second branch included."""
    samples, found, lora = batch * job.branches, Flops(), job.recipe.lora
    for unit in job.network.units if units is None else units:
        whole = unit is job.network.rest
        tokens = _seen(job, unit)
        products, attention = _of_unit(unit, whole, tokens)
        extra = (
            _of_unit(adapters(unit, lora.rank, lora.targets), whole, tokens)[0]
            if lora.rank
            else 0.0
        )
        found = found + Flops(samples * products, samples * attention, samples * extra)
    return found


def _seen(job: Job, unit: Unit) -> _Tokens:
    """What a unit sees."""
    text = job.text_in_blocks if isinstance(unit, Block) else job.text
    return _Tokens(job.video, job.local, text, job.network.image, job.sp)


@lru_cache(maxsize=1024)  # a search asks ten thousand times
def _of_unit(unit: Unit, whole: bool, tokens: _Tokens, linear: bool = False) -> tuple[float, float]:
    """FLOPs of a sample's products and attention.

    whole: outside the blocks, where the patch embedding sees the tokens before they are split
    linear: of linear layers alone, without convolutions
    """
    products = 0.0
    for product in unit.products:
        if linear and not product.linear:
            continue
        video = tokens.video if whole and not product.name.endswith("proj_out") else tokens.local
        count = {VIDEO: video, TEXT: tokens.text, BOTH: video + tokens.text, SAMPLE: 1}
        count[IMAGE] = tokens.image
        products += product.flops * count[product.where]
    return products, sum(_attention(attention, tokens) for attention in unit.attentions)


def _attention(attention: Attention, tokens: _Tokens) -> float:
    counts = {VIDEO: tokens.video, TEXT: tokens.text, BOTH: tokens.video + tokens.text}
    counts[IMAGE] = tokens.image
    queries = counts[attention.queries] * attention.area
    keys = counts[attention.keys] * (attention.area if attention.keys == VIDEO else 1.0)
    return 4.0 * queries * keys * attention.width / (tokens.sp if attention.shared else 1)


def update(job: Job, batch: int) -> Flops:
    """Forward, recomputation and backward of a micro-batch; frozen weights have no gradients of
    their own.
    """
    found, backward = Flops(), 1.0 if job.lora else BACKWARD
    for number, unit in enumerate(job.network.units):
        once, again = forward(job, batch, [unit]), recomputed(job, batch, unit, number)
        found = found + Flops(
            once.products * (1 + backward) + again.products,
            once.attention * (1 + ATTENTION_BACKWARD) + again.attention,
            once.adapters * (1 + BACKWARD) + again.adapters,
        )
    return found


def recomputed(job: Job, batch: int, unit: Unit, number: int) -> Flops:
    """What the backward of a unit computes again.  number: of the unit

    Linear layers' results that are kept leave a UNet's convolutions.
    """
    settings = job.recipe.model
    share = 0.0 if unit is job.network.rest else unit.repeated(settings, number)
    once = forward(job, batch, [unit])
    if not share or settings.keep == "nothing":
        return Flops(share * once.products, share * once.attention, share * once.adapters)
    if settings.keep == "attention":
        return Flops(share * once.products, 0.0, share * once.adapters)
    linear = batch * job.branches * _of_unit(unit, False, _seen(job, unit), linear=True)[0]
    return Flops(max(0.0, share * once.products - linear))


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends, by collective."""

    gather: float = 0.0
    scatter: float = 0.0
    reduce: float = 0.0  # between replicas
    exchange: float = 0.0  # between the ranks of a sequence group: tokens for heads, and back
    collect: float = 0.0  # between them: the text's heads, and the velocity
    dealt: float = 0.0  # between groups of ranks: states that another group evaluates

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(
            self.gather + other.gather, scatter=self.scatter + other.scatter, reduce=self.reduce + other.reduce,
            exchange=self.exchange + other.exchange, collect=self.collect + other.collect,
            dealt=self.dealt + other.dealt,
        )  # fmt: skip

    def times(self, count: float) -> "Sent":
        return Sent(
            self.gather * count,
            scatter=self.scatter * count,
            reduce=self.reduce * count,
            exchange=self.exchange * count,
            collect=self.collect * count,
            dealt=self.dealt * count,
        )


def gathered_bytes(job: Job, unit: Unit) -> float:
    """Bytes of a unit's whole weights in compute precision, adapters included."""
    found = frozen_bytes(job, unit)
    if job.lora:
        beside = adapters(unit, job.recipe.lora.rank, job.recipe.lora.targets)
        found += job.element * beside.padded(job.shards)
    return found


def frozen_bytes(job: Job, unit: Unit) -> float:
    """Bytes of a unit's weights in compute precision, but for those that stay in float32; without
    adapters.
    """
    staying = unit.padded(job.shards, job.network.float32) if job.network.float32 else 0
    return float(job.element * unit.padded(job.shards) + (4 - job.element) * staying)


def reduced_bytes(job: Job, unit: Unit) -> float:
    """Bytes of a unit's whole gradient in float32."""
    trained = adapters(unit, job.recipe.lora.rank, job.recipe.lora.targets) if job.lora else unit
    return 4.0 * trained.padded(job.shards)


def gather_whole(job: Job) -> Sent:
    """The weights gathered once for a rollout."""
    return Sent(
        gather=_ring(job) * sum(gathered_bytes(job, unit) for unit in job.network.all_units)
    )


def gather_blocks(job: Job, forwards: int) -> Sent:
    """The weights gathered block by block in each of several forwards; what is outside stays after
    the first.
    """
    blocks = sum(
        gathered_bytes(job, unit) for unit in job.network.units if unit is not job.network.rest
    )
    return Sent(gather=_ring(job) * (forwards * blocks + gathered_bytes(job, job.network.rest)))


def micro_batch(job: Job, batch: int) -> Sent:
    """One micro-batch of the update: gathers for forward and backward, the scattered gradient,
    exchanged tokens.

    The initial policy's forward gathers the blocks once more; the root is whole by then, see
    `memory.states`.
    """
    blocks = sum(
        gathered_bytes(job, unit) for unit in job.network.units if unit is not job.network.rest
    )
    gradient = sum(reduced_bytes(job, unit) for unit in job.network.units)
    gathered = (2 + job.reference) * blocks + gathered_bytes(job, job.network.rest)
    sent = Sent(gather=_ring(job) * gathered, scatter=_ring(job) * gradient)
    return sent + tokens_of_update(job, batch)


def tokens_of_update(job: Job, batch: int) -> Sent:
    """What a micro-batch of `batch` states sends inside the sequence group.

    Forward, recomputation and backward, and the initial policy's forward.
    """
    blocks = range(len(job.network.blocks))
    again = sum(map(job.recipe.model.recomputes, blocks)) / len(blocks)
    return _tokens(job, batch, 2 + again + job.reference, 2 + job.reference)


def between_replicas(job: Job) -> Sent:
    """The gradient's shards, agreed between replicas once per optimizer step."""
    gradient = sum(reduced_bytes(job, unit) for unit in job.network.all_units) / job.shards
    return Sent(reduce=2 * gradient * (job.replicas - 1) / job.replicas)


def dealt_states(job: Job) -> Sent:
    """Latents that change ranks before an iteration's update: of each transition the state before
    it and after it, with DiffusionNFT the sample, a noised state and a velocity.

    Expected of a group of ranks that has its mean of an optimizer step's samples, for those above
    that mean.
    """
    recipe = job.recipe
    latents = 2 if methods.traits(recipe).noisy_steps else 3
    moving = network_calls.samples_moved(recipe, job.groups) * recipe.steps_trained
    return Sent(dealt=4.0 * math.prod(job.latent) * latents * moving)


def exchanged(job: Job, batch: int) -> Sent:
    """What a forward without gradients sends to the ranks of the sequence group."""
    return _tokens(job, batch, 1, 1)


def _ring(job: Job) -> float:
    return (job.shards - 1) / job.shards


def _tokens(job: Job, batch: int, passes: float, ends: int) -> Sent:
    """q, k, v and the output of each shared attention, `passes` times; the whole velocity, `ends`
    times.
    """
    if job.sp == 1:
        return Sent()
    width, share = job.network.width, (job.sp - 1) / job.sp
    samples = batch * job.branches * job.element
    shared = [
        a
        for unit in job.network.blocks
        for a in unit.attentions
        if a.shared and a.keys not in (TEXT, IMAGE)
    ]
    video = 4 * width * job.local * share * samples
    text = (
        width * job.text_in_blocks * share * samples if shared and shared[0].keys == BOTH else 0.0
    )
    out = next((p.outputs for p in job.network.rest.products if p.name.endswith("proj_out")), 0)
    velocity = job.local * out * (job.sp - 1) * samples
    return Sent(
        exchange=passes * len(shared) * video, collect=passes * len(shared) * text + ends * velocity
    )
