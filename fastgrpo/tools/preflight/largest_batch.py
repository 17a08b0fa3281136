"""rollout.batch_size = "auto" on the real machine: forwards of one sample and of two tell what each takes.

Once, before the first iteration; a resumed run keeps the number of its checkpoint, so that it goes on bit for bit.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from fastgrpo.core.memory import Peaks, free_memory
from fastgrpo.core.policy import Condition, stack
from fastgrpo.core.processes import fail_alone
from fastgrpo.core.units import GIB
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.session import Session
from fastgrpo.tools.plan.workload import batch_size
from fastgrpo.tools.preflight.finding import Parts, local
from fastgrpo.training import methods


def choose(session: Session) -> None:
    """Put a number in the place of rollout.batch_size = "auto": the checkpoint's, or what the memory allows."""
    recipe, progress = session.recipe, session.progress
    if recipe.rollout.batch_size != "auto":
        return
    if not progress.rollout_batch:
        progress.rollout_batch, message = rollout_batch(Parts.of(session))
        session.tracker.message(message)
    settings = recipe.rollout.with_batch_size(progress.rollout_batch)
    session.recipe = recipe.model_copy(update={"rollout": settings})


def rollout_batch(parts: Parts) -> tuple[int, str]:
    """(samples per forward and rank, one line that says why), the same on every rank.

    The longest prompt of the first iteration stands for all. Two samples, which take at most twice what one does, are
    not tried where they would not fit: a forward that runs out of memory leaves other ranks waiting, and FSDP's state
    half-way. Raises OneRankError where one sample does not fit.
    """
    recipe, world, policy = parts.recipe, parts.world, parts.policy
    samples = max(len(world.share(parts.total, group)) for group in range(world.groups))
    condition = max(parts.conditions, key=_size)
    sharing = world.sp.size if world.sp else 1  # ranks that divide a batch's decoding

    @torch.no_grad()
    def forward(count: int) -> None:
        x = torch.zeros(count, *parts.plan.latent_shape, device=world.device)
        policy.velocity(x, parts.plan.grid[:1].expand(count), stack([condition] * count))

    def decode(count: int) -> None:
        policy.decode(torch.zeros(count, *parts.plan.latent_shape, device=world.device))

    with sharding.rollout_weights(policy.network, recipe.distributed, parts.dtype, world):
        _grown(forward, 1)  # libraries take their workspaces
        room = free_memory(world.device) - _kept(parts, samples) - _moments(parts)
        one, further = _costs(forward, room, world)
        fit = batch_size.fitting(room, one, further)
        if recipe.model.decode_batch is None:  # the decoder takes a batch whole
            fit = min(fit, sharing * batch_size.fitting(room, *_costs(decode, room, world)))
    size = batch_size.balanced(samples, _least(min(fit, samples), world))
    told = f"{one / GIB:.2f} GiB for one, {further / GIB:.2f} for each more, {room / GIB:.1f} free on rank 0"
    return size, f"rollout.batch_size=auto: {size} of a rank's {samples} samples at once ({told})"


def _costs(action: Callable[[int], None], room: float, world: World) -> tuple[float, float]:
    """Bytes that one sample takes, and that a second one adds; as much again where two might not fit on some rank."""
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
    """Bytes by which memory was higher at most: the GPU's tensors, or the process where there is no GPU."""
    peaks = Peaks()
    level = peaks.read()
    try:
        action(count)
    except torch.OutOfMemoryError:
        fail_alone(
            f"rollout.batch_size=auto: the GPU has no room for {count} of a rank's samples; set it to 1 or "
            "distributed.rollout_weights=sharded, or see what `fastgrpo plan` says of this recipe."
        )
    kind = 0 if peaks.gpu else 2
    return max(0.0, peaks.read()[kind] - level[kind]) * GIB


def _kept(parts: Parts, samples: int) -> float:
    """Bytes of what waits for the update on the device, of a rank's samples."""
    if parts.plan.store == "host" and parts.world.device.type == "cuda":
        return 0.0
    return 4.0 * samples * methods.latents_kept(parts.recipe) * math.prod(parts.plan.latent_shape)


def _moments(parts: Parts) -> float:
    """Bytes of AdamW's state, which the first optimizer step will make, where the weights lie on the device."""
    if parts.recipe.distributed.offload and parts.world.device.type == "cuda":
        return 0.0
    trained = (p for p in parts.policy.network.parameters() if p.requires_grad)
    return 8.0 * sum(local(p).numel() for p in trained)


def _size(condition: Condition) -> int:
    return sum(tensor.numel() for tensor in condition.values())
