"""Memory of one rank, in closed form: what lies on a GPU in the update, in the rollout and while
decoding.

The update's backward is walked block by block: what FSDP2 holds of weights and gradients at that
moment, the inputs of the blocks that are still to come, and what the block at work keeps and makes.
What a block keeps of its activations is its family's to say, see fastgrpo/models/sizes; all else
follows from shapes.
"""

import math

from fastgrpo.models.sizes.units import BOTH, IMAGE, SAMPLE, TEXT, VIDEO, Batch, Block, adapters
from fastgrpo.tools.plan.costs.compute import Job, frozen_bytes, gathered_bytes, reduced_bytes
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import methods

GRADIENT, MOMENTS, MASTER = 4, 8, 4  # bytes per trained parameter: all float32


def states(job: Job) -> dict[str, float]:
    """Bytes that a rank holds at all times: masters, AdamW's moments, the moving average, the
    initial policy.

    Of the initial policy's network what lies outside the blocks is whole, too: FSDP2 keeps the root
    so after a forward, and it has no backward to give it up.
    """
    root = gathered_bytes(job, job.network.rest) if job.second_network else 0.0
    if job.recipe.distributed.offload:
        return {"initial policy": root} if root else {}
    trained = _trained(job)
    frozen = (
        sum(frozen_bytes(job, unit) for unit in job.network.all_units) / job.shards
        if job.lora
        else 0.0
    )
    found = {"weights": MASTER * trained + frozen, "optimizer": MOMENTS * trained}
    if job.recipe.optimizer.ema_decay:
        found["average"] = MASTER * trained
    if job.second_network:
        found["initial policy"] = MASTER * trained + root
    return found


def raw_weights(job: Job) -> dict[str, float]:
    """Bytes of the trained weights, which DiffusionNFT sets aside while their moving average draws
    and decodes.
    """
    return _set_aside(job) if methods.traits(job.recipe).average_draws else {}


def _set_aside(job: Job) -> dict[str, float]:
    """Bytes of the trained weights while their moving average has their place."""
    if not job.recipe.optimizer.ema_decay or job.recipe.distributed.offload:
        return {}
    return {"raw weights": MASTER * _trained(job)}


def _trained(job: Job) -> float:
    """Trained parameters of a rank's shards."""
    return sum(reduced_bytes(job, unit) for unit in job.network.all_units) / GRADIENT / job.shards


def gradients(job: Job) -> float:
    """Bytes of a rank's whole gradient, which it holds from the first micro-batch of an optimizer
    step to its end.
    """
    return 0.0 if job.recipe.distributed.offload else GRADIENT * _trained(job)


def update(job: Job, batch: int, accumulated: bool = True) -> dict[str, float]:
    """Bytes at the peak of an update, by kind.

    batch: states in a micro-batch;  accumulated: several micro-batches per optimizer step, so that
    the whole gradient is there all the time
    """
    network, whole, depth = job.network, gradients(job), max(1, job.recipe.distributed.prefetch)
    passed = [
        _passed_back(job, block, number, batch) for number, block in enumerate(network.blocks)
    ]
    held = [
        block.stored(of) + _kept(job, block, of)
        for block, of in zip(network.blocks, passed, strict=True)
    ]
    in_order = (*network.apart, *network.blocks)
    still, outside, done = sum(held), _outside(job, batch), 0.0
    best: dict[str, float] = {}
    for number, unit in reversed(list(enumerate(network.blocks))):
        place = number + len(network.apart)
        still -= held[number]
        now = {
            "gathered": gathered_bytes(job, unit) + gathered_bytes(job, network.rest),
            "gathered ahead": sum(
                gathered_bytes(job, ahead) for ahead in in_order[max(0, place - depth) : place]
            ),
            "reduced": reduced_bytes(job, in_order[place + 1])
            if place + 1 < len(in_order)
            else 0.0,
            "gradients": _own_gradient(job, unit) + (whole if accumulated else done / job.shards),
            "activations": still + outside + unit.working(passed[number]),
        }
        if sum(now.values()) > sum(best.values()):
            best = now
        done += reduced_bytes(job, unit)
    return states(job) | best


def rollout(job: Job, batch: int, gathered: bool) -> dict[str, float]:
    """Bytes at the peak of the rollout, by kind.

    batch: samples per forward;  gathered: the rank holds the whole weights
    """
    return states(job) | raw_weights(job) | _forward(job, batch, gathered)


def evaluation(job: Job, batch: int) -> dict[str, float]:
    """Bytes at the peak of the moving average's forwards before the first optimizer step, by kind.

    batch: states in a micro-batch
    """
    return states(job) | _set_aside(job) | _forward(job, batch, gathered=False)


def _forward(job: Job, batch: int, gathered: bool) -> dict[str, float]:
    """Bytes of weights and activations at the peak of a forward without gradients.

    gathered: the rank holds the whole weights
    Else FSDP2 holds a block's weights and, until the next block's are there, the buffer that they
    were gathered into, beside the buffers of the blocks ahead.
    """
    network, depth = job.network, max(1, job.recipe.distributed.prefetch)
    whole, root = (
        sum(gathered_bytes(job, unit) for unit in network.all_units),
        gathered_bytes(job, network.rest),
    )
    passed = _passed(job, batch)
    outside, best = network.blocks[0].inputs(passed) + _outside(job, batch), (0.0, 0.0)
    for place, unit in enumerate(network.blocks):
        buffers = network.blocks[place : place + 1 + depth]
        weights = (
            root + gathered_bytes(job, unit) + sum(gathered_bytes(job, block) for block in buffers)
        )
        now = (whole if gathered else weights, unit.forward(passed) + outside)
        best = max(best, now, key=sum)
    return dict(zip(("gathered", "activations"), best, strict=True))


def _passed(job: Job, batch: int, recomputed: bool = False) -> Batch:
    """What `batch` states, guidance's second branch included, bring through a block."""
    rows = batch * job.branches
    return Batch(
        width=job.network.width,
        element=job.element,
        video=rows * job.local,
        text=rows * job.text_in_blocks,
        image=rows * job.network.image,
        shared=job.sp > 1,
        recomputed=recomputed,
    )


def _passed_back(job: Job, block: Block, number: int, batch: int) -> Batch:
    """The same in an update, where the number of a block says whether it is recomputed."""
    return _passed(job, batch, recomputed=block.repeated(job.recipe.model, number) > 0)


def moved(job: Job, batch: int) -> float:
    """Bytes that the recomputation in an update reads and writes where linear layers' results are
    kept.

    Elsewhere the share of the peak that is achieved stands for this as well: FLOPs are computed
    again.
    """
    if job.recipe.model.keep != "products":
        return 0.0
    passed = [_passed_back(job, b, number, batch) for number, b in enumerate(job.network.blocks)]
    return sum(
        block.moved(of)
        for block, of in zip(job.network.blocks, passed, strict=True)
        if of.recomputed
    )


def _kept(job: Job, block: Block, batch: Batch) -> float:
    """Bytes of what a recomputed block keeps beside its inputs: attention's outputs with the
    logarithms of sums, linear layers' outputs.
    """
    keep = job.recipe.model.keep
    if not batch.recomputed or keep == "nothing":
        return 0.0
    tokens = {VIDEO: batch.video, TEXT: batch.text, BOTH: batch.video + batch.text, SAMPLE: 0}
    tokens[IMAGE] = batch.image
    heads = job.network.heads
    found = sum(
        tokens[attention.queries] * attention.area * (job.element * attention.width + 4 * heads)
        for attention in block.attentions
    )
    if keep == "attention":
        return found
    lora = job.recipe.lora
    units = (block, adapters(block, lora.rank, lora.targets)) if job.lora else (block,)
    return found + sum(
        tokens[product.where] * product.area * job.element * product.outputs
        for unit in units
        for product in unit.products
        if product.linear
    )


def _own_gradient(job: Job, block: Block) -> float:
    """Bytes of the block's unreduced gradients that are there when its backward holds the most."""
    return 0.0 if job.lora else float(job.element * block.parameters * block.unreduced)


def _outside(job: Job, batch: int) -> float:
    """Bytes of what lies outside the blocks: the embedded tokens of all ranks, tables, latents in
    float32.
    """
    tokens = batch * job.branches * job.video
    latents = 4 * batch * math.prod(job.latent) * (2 + job.branches)
    # a rank's part is a view of all
    split = job.element * job.network.width * tokens if job.sp > 1 else 0
    tables = 8 * job.network.rotary * job.local
    return float(latents + split + tables)


def trajectories(job: Job, samples: int) -> float:
    """Bytes of what waits for the update of this rank's samples, float32: the most that its method
    may keep.
    """
    if job.recipe.rollout.store == "host":
        return 0.0
    return float(4 * math.prod(job.latent) * methods.latents_kept(job.recipe) * samples)


def velocities(job: Job, trained: float) -> dict[str, float]:
    """Bytes of the moving average's velocities, float32, which the update evaluates beforehand.

    trained: states of this rank in an iteration
    """
    recipe = job.recipe
    if recipe.rollout.store == "host" or not methods.evaluates_average(recipe.objective):
        return {}
    return {"velocities": float(4 * math.prod(job.latent) * trained)}


def old_means(job: Job, states: float) -> float:
    """Bytes of the old policy's means, float32, of what is evaluated again before the update.

    states: that this rank evaluates in an iteration, about one a transition
    """
    again = network_calls.share_again(job.recipe, job.groups)
    if job.recipe.rollout.store == "host" or not methods.traits(job.recipe).old_means:
        return 0.0
    return 4.0 * math.prod(job.latent) * again * states
