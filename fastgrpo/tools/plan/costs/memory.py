"""Memory of one rank, in closed form: what lies on a GPU in the update, in the rollout and while decoding.

The update's backward is walked block by block: what FSDP2 holds of weights and gradients at that moment, the inputs of
the blocks that are still to come, and what the block at work keeps and makes. The bytes that a block keeps per token
and channel are those of diffusers' eager kernels, measured on one block of each kind by
`python -m benchmarks.plan.check --calibrate`; all else follows from shapes.
"""

import math
from dataclasses import dataclass

from fastgrpo.tools.plan.costs.compute import Job, gathered_bytes, reduced_bytes
from fastgrpo.tools.plan.network.units import Unit
from fastgrpo.training import methods

GRADIENT, MOMENTS, MASTER = 4, 8, 4  # bytes per trained parameter: all float32
UNET_WORKING = 1.16  # a level at work, over what it keeps
UNET_RECOMPUTED = 148.0  # bytes per place and channel of the first level of a whole UNet whose resnets and inner
# transformer blocks are recomputed, as diffusers does it: what lies between those is kept
UNET_FORWARD = 51.0  # bytes per place and channel of the first level: a transformer at work and the skips, bfloat16


@dataclass(frozen=True)
class Kept:
    """Bytes per token and channel, of video and of text tokens."""

    forward: tuple[float, float]  # the most at once without gradients
    saved: tuple[float, float]  # kept from the forward to the backward where the block is not recomputed
    working: tuple[float, float]  # the most at once in the block's backward, what is saved included
    exchange: float = 0.0  # more per video token with sequence parallelism: what is packed for the other ranks


KEPT = {  # by (family's kind of block, bytes per element)
    ("hunyuan dual", 2): Kept((22.0, 6.0), (56.1, 56.1), (66.1, 48.0), 2.0),
    ("hunyuan single", 2): Kept((34.0, 20.0), (54.1, 54.1), (68.1, 68.1)),
    ("hunyuan dual", 4): Kept((44.0, 12.0), (112.1, 96.1), (132.1, 75.0), 4.0),
    ("hunyuan single", 4): Kept((60.0, 60.0), (108.1, 100.1), (136.1, 128.1)),
    ("flux dual", 2): Kept((23.0, 28.0), (56.1, 56.1), (66.1, 58.0), 2.0),
    ("flux single", 2): Kept((32.0, 32.0), (52.1, 52.1), (66.1, 66.1)),
    ("flux dual", 4): Kept((48.0, 40.0), (112.1, 112.1), (132.1, 116.0), 4.0),
    ("flux single", 4): Kept((56.0, 56.0), (104.1, 104.1), (132.1, 132.1)),
    ("wan", 2): Kept((27.1, 0.0), (70.1, 12.0), (86.1, 12.0), 2.0),
    ("wan", 4): Kept((54.2, 0.0), (96.1, 24.0), (121.2, 24.0), 4.0),
}
"""Wan's without its feed-forward, whose width differs: WAN_HIDDEN more per element of it."""
WAN_HIDDEN = {2: 4.0, 4: 8.0}


def states(job: Job) -> dict[str, float]:
    """Bytes that a rank holds at all times: masters, AdamW's moments, the moving average, the initial policy.

    Of the initial policy's network what lies outside the blocks is whole, too: FSDP2 keeps the root so after a forward,
    and it has no backward to give it up.
    """
    root = gathered_bytes(job, job.network.rest) if job.second_network else 0.0
    if job.recipe.distributed.offload:
        return {"initial policy": root} if root else {}
    trained = _trained(job)
    frozen = job.element * sum(unit.padded(job.shards) for unit in job.network.units) / job.shards if job.lora else 0.0
    found = {"weights": MASTER * trained + frozen, "optimizer": MOMENTS * trained}
    if job.recipe.optimizer.ema_decay:
        found["average"] = MASTER * trained
    if job.second_network:
        found["initial policy"] = MASTER * trained + root
    return found


def raw_weights(job: Job) -> dict[str, float]:
    """Bytes of the trained weights, which DiffusionNFT sets aside while their moving average draws and decodes."""
    recipe = job.recipe
    if not methods.traits(recipe).average_draws or recipe.distributed.offload:
        return {}
    return {"raw weights": MASTER * _trained(job)}


def _trained(job: Job) -> float:
    """Trained parameters of a rank's shards."""
    return sum(reduced_bytes(job, unit) for unit in job.network.units) / GRADIENT / job.shards


def gradients(job: Job) -> float:
    """Bytes of a rank's whole gradient, which it holds from the first micro-batch of an optimizer step to its end."""
    return 0.0 if job.recipe.distributed.offload else GRADIENT * _trained(job)


def update(job: Job, batch: int, accumulated: bool = True) -> dict[str, float]:
    """Bytes at the peak of an update, by kind.

    batch: states in a micro-batch;  accumulated: several micro-batches per optimizer step, so that the whole gradient
    is there all the time
    """
    network, whole, depth = job.network, gradients(job), max(1, job.recipe.distributed.prefetch)
    held = [_stored(job, unit, number, batch) for number, unit in enumerate(network.blocks)]
    in_order = (*network.apart, *network.blocks)
    still, outside, done = sum(held), _outside(job, batch), 0.0
    best: dict[str, float] = {}
    for place in reversed(range(len(network.apart), len(in_order))):
        unit, number = in_order[place], place - len(network.apart)
        still -= held[number]
        now = {
            "gathered": gathered_bytes(job, unit) + gathered_bytes(job, network.rest),
            "gathered ahead": sum(gathered_bytes(job, ahead) for ahead in in_order[max(0, place - depth) : place]),
            "reduced": reduced_bytes(job, in_order[place + 1]) if place + 1 < len(in_order) else 0.0,
            "gradients": _own_gradient(job, unit) + (whole if accumulated else done / job.shards),
            "activations": still + outside + _working(job, unit, number, batch),
        }
        if sum(now.values()) > sum(best.values()):
            best = now
        done += reduced_bytes(job, unit)
    return states(job) | best


def rollout(job: Job, batch: int, gathered: bool) -> dict[str, float]:
    """Bytes at the peak of a forward without gradients.  gathered: the rank holds the whole weights

    Else FSDP2 holds a block's weights and, until the next block's are there, the buffer that they were gathered into,
    beside the buffers of the blocks ahead.
    """
    network, depth = job.network, max(1, job.recipe.distributed.prefetch)
    whole, root = sum(gathered_bytes(job, unit) for unit in network.units), gathered_bytes(job, network.rest)
    outside, best = _input(job, network.blocks[0], batch) + _outside(job, batch), (0.0, 0.0)
    for place, unit in enumerate(network.blocks):
        buffers = network.blocks[place : place + 1 + depth]
        weights = root + gathered_bytes(job, unit) + sum(gathered_bytes(job, block) for block in buffers)
        now = (whole if gathered else weights, _forward(job, unit, batch) + outside)
        best = max(best, now, key=sum)
    return states(job) | raw_weights(job) | dict(zip(("gathered", "activations"), best, strict=True))


def _tokens(job: Job, batch: int) -> tuple[int, int]:
    """(video tokens of this rank, text tokens) of a forward over `batch` states, guidance's second branch included."""
    return batch * job.branches * job.local, batch * job.branches * job.text


def _kind(job: Job, unit: Unit) -> Kept:
    family = {"hunyuan_video": "hunyuan ", "skyreels_i2v": "hunyuan ", "flux": "flux "}.get(job.recipe.model.family, "")
    kept = KEPT[(family + unit.kind, job.element)]
    if unit.kind != "wan":
        return kept
    more = WAN_HIDDEN[job.element] * next(p.outputs for p in unit.products if p.name.endswith("ffn.net.0.proj"))
    more /= job.network.width
    saved, working = (kept.saved[0] + more, kept.saved[1]), (kept.working[0] + more, kept.working[1])
    return Kept(kept.forward, saved, working, kept.exchange)


def _bytes(job: Job, per_token: tuple[float, float], exchange: float, batch: int) -> float:
    video, text = _tokens(job, batch)
    more = exchange if job.sp > 1 else 0.0
    return job.network.width * ((per_token[0] + more) * video + per_token[1] * text)


def _recomputed(job: Job, number: int) -> bool:
    every = int(job.recipe.model.gradient_checkpointing)
    return bool(every) and number % every == 0


def _stored(job: Job, unit: Unit, number: int, batch: int) -> float:
    """Bytes that a block keeps until its backward: its inputs where it is recomputed, else all that it will want."""
    video, _ = _tokens(job, batch)
    if unit.kind == "unet":
        return 0.0 if job.recipe.model.gradient_checkpointing else unit.saved * video * job.element / 2
    if not _recomputed(job, number):
        kind = _kind(job, unit)
        return _bytes(job, kind.saved, kind.exchange, batch)
    return _input(job, unit, batch)


def _input(job: Job, unit: Unit, batch: int) -> float:
    """Bytes of the tokens that go into a block."""
    video, text = _tokens(job, batch)
    return float(job.element * job.network.width * (video + (text if unit.kind in ("dual", "single") else 0)))


def _own_gradient(job: Job, unit: Unit) -> float:
    """Bytes of the block's gradients that are there, not yet reduced, when its backward holds the most: measured."""
    if job.lora or unit.kind in ("wan", "unet"):
        return 0.0
    return job.element * unit.parameters / 3


def _working(job: Job, unit: Unit, number: int, batch: int) -> float:
    """Bytes of a block in its backward, its inputs included where it is recomputed."""
    video, _ = _tokens(job, batch)
    if unit.kind == "unet":
        recomputed = UNET_RECOMPUTED * job.network.width
        kept = recomputed if job.recipe.model.gradient_checkpointing else UNET_WORKING * unit.saved
        return kept * video * job.element / 2
    kind = _kind(job, unit)
    inputs = _input(job, unit, batch) if _recomputed(job, number) else 0.0
    return inputs + _bytes(job, kind.working, kind.exchange, batch)


def _forward(job: Job, unit: Unit, batch: int) -> float:
    video, _ = _tokens(job, batch)
    if unit.kind == "unet":
        return UNET_FORWARD * job.network.width * video * job.element / 2
    kind = _kind(job, unit)
    return _bytes(job, kind.forward, kind.exchange, batch)


def _outside(job: Job, batch: int) -> float:
    """Bytes of what lies outside the blocks: the embedded tokens of all ranks, tables, latents in float32."""
    tokens = batch * job.branches * job.video
    latents = 4 * batch * math.prod(job.latent) * (2 + job.branches)
    split = job.element * job.network.width * tokens if job.sp > 1 else 0  # a rank's part is a view of all
    tables = 0 if job.network.blocks[0].kind == "unet" else 8 * (job.network.width // job.network.heads) * job.local
    return float(latents + split + tables)


def trajectories(job: Job, samples: int) -> float:
    """Bytes of what waits for the update of this rank's samples, float32: the most that its method may keep."""
    if job.recipe.rollout.store == "host":
        return 0.0
    return float(4 * math.prod(job.latent) * methods.latents_kept(job.recipe) * samples)
