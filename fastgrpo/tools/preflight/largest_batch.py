"""rollout.batch_size = "auto": the largest batch by the memory of forwards of one and two samples.

Measured once, before the first iteration; a resumed run keeps the number of its checkpoint, so that
it goes on bit for bit.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from fastgrpo.core.memory import Peaks, free_memory
from fastgrpo.core.policy import Condition, predict, stack
from fastgrpo.core.processes import fail_alone
from fastgrpo.core.units import GIB
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.session import Session
from fastgrpo.tools.plan.workload import batch_size
from fastgrpo.tools.preflight.finding import Parts, local
from fastgrpo.training import methods
from fastgrpo.training.scoring.sources import Source


def choose(session: Session) -> None:
    """Replace rollout.batch_size = "auto" by the checkpoint's number, or the largest that fits."""
    recipe, progress = session.recipe, session.progress
    if recipe.rollout.batch_size != "auto":
        return
    if not progress.rollout_batch:
        progress.rollout_batch, message = rollout_batch(Parts.of(session))
        session.tracker.message(message)
    settings = recipe.rollout.with_batch_size(progress.rollout_batch)
    session.recipe = recipe.model_copy(update={"rollout": settings})


def rollout_batch(parts: Parts) -> tuple[int, str]:
    """(samples per forward and rank, one line with the reason), the same on every rank.

    Measured as training has it: what rewards in the process take while they score is taken off. The
    longest prompt of the first iteration stands for all. Two samples take at most twice the
    memory of one, and are not tried where that would not fit: a forward that runs out of memory
    leaves other ranks waiting and FSDP's state half-way. Raises OneRankError where one sample does
    not fit.
    """
    recipe, world, policy = parts.recipe, parts.world, parts.policy
    samples = max(len(world.share(parts.total, group)) for group in range(world.groups))
    condition = max(parts.conditions, key=_size)
    sharing = world.sp.size if world.sp else 1  # ranks that divide a batch's decoding

    @torch.no_grad()
    def forward(count: int) -> None:
        x = torch.zeros(count, *parts.plan.latent_shape, device=world.device)
        t, expert = parts.plan.grid[:1].expand(count), parts.plan.expert(0)
        predict(policy, x, t, stack([condition] * count), expert)

    def decode(count: int) -> None:
        x = torch.zeros(count, *parts.plan.latent_shape, device=world.device)
        policy.decode(x, stack([condition] * count))

    scoring, arriving = _scoring(parts), parts.scorer.arriving
    with sharding.rollout_weights(policy.network, recipe.distributed, parts.dtype, world, arriving):
        _grown(forward, 1)  # libraries take their workspaces
        room = free_memory(world.device) - _waiting(parts, samples) - _moments(parts) - scoring
        one, further = _costs(forward, room, world)
        fit = batch_size.fitting(room, one, further)
        if recipe.model.decode_batch is None:  # the decoder takes a batch whole
            fit = min(fit, sharing * batch_size.fitting(room, *_costs(decode, room, world)))
    size = batch_size.balanced(samples, _least(min(fit, samples), world))
    costs = f"{one / GIB:.2f} GiB for one, {further / GIB:.2f} for each more"
    reason = f"{costs}, {room / GIB:.1f} free on rank 0"
    return size, f"rollout.batch_size=auto: {size} of a rank's {samples} samples at once ({reason})"


def _costs(action: Callable[[int], None], room: float, world: World) -> tuple[float, float]:
    """(bytes of one sample, bytes that a second adds); equal where two may not fit on some rank."""
    one = _grown(action, 1)
    if not _least(int(2 * one <= room), world):
        return one, one
    return one, _grown(action, 2) - one


def _least(number: int, world: World) -> int:
    """The smallest of the ranks' numbers."""
    agreed = torch.tensor(number, device=world.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def _grown(action: Callable[[int], None], count: int) -> float:
    """Bytes by which the peak memory rises: the GPU's tensors, or without a GPU the process."""
    peaks = Peaks()
    level = peaks.read()
    try:
        action(count)
    except torch.OutOfMemoryError:
        fail_alone(
            f"rollout.batch_size=auto: the GPU has no room for {count} of a rank's samples; set it "
            "to 1 or distributed.rollout_weights=sharded, or see what `fastgrpo plan` says of this "
            "recipe."
        )
    kind = 0 if peaks.gpu else 2
    return max(0.0, peaks.read()[kind] - level[kind]) * GIB


def _scoring(parts: Parts) -> float:
    """Bytes that rewards in this process take while they score: weights and activations."""
    return sum(_judging(source, parts) for source in parts.scorer.sources if source.shares_device)


def _judging(source: Source, parts: Parts) -> float:
    """Bytes that one source takes for as many clips as its largest reward scores at once."""
    recipe, text = parts.recipe, parts.texts[0]
    size = (recipe.video.frames, recipe.video.height, recipe.video.width, 3)
    most = max(spec.batch_size for spec in recipe.rewards if spec.where == "process")

    def score(count: int) -> None:
        source.score(torch.zeros(count, *size, dtype=torch.uint8), [text] * count, recipe.video.fps)

    taken = _grown(score, min(most, recipe.rollout.samples_per_prompt))
    source.release()
    return taken


def _waiting(parts: Parts, samples: int) -> float:
    """Bytes of the latents of a rank's samples that wait for the update on the device."""
    if parts.plan.store == "host" and parts.world.device.type == "cuda":
        return 0.0
    return 4.0 * samples * methods.latents_kept(parts.recipe) * math.prod(parts.plan.latent_shape)


def _moments(parts: Parts) -> float:
    """Bytes of AdamW's state on the device, which the first optimizer step will make."""
    if parts.recipe.distributed.offload and parts.world.device.type == "cuda":
        return 0.0
    trained = (p for p in parts.policy.network.parameters() if p.requires_grad)
    return 8.0 * sum(local(p).numel() for p in trained)


def _size(condition: Condition) -> int:
    """The number of a condition's elements."""
    return sum(tensor.numel() for tensor in condition.values())
