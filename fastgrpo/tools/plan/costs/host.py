"""Memory of the host that one rank takes: offloaded states, waiting trajectories, a checkpoint's
copy.

CUDA's allocator rounds a block of pinned memory up to a power of two.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from fastgrpo.models.sizes.units import Shape, Unit, adapters, has_part
from fastgrpo.parallel.nvme.folder import BUFFERS, RECORD_BYTES
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.costs.memory import GRADIENT, MASTER, MOMENTS
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import methods


def of_node(job: Job) -> dict[str, float]:
    """Bytes of all ranks of a node, by kind; libraries and the reading of files come on top."""
    ranks = min(job.ranks_per_node, job.gpus)
    return {kind: size * ranks for kind, size in _of_rank(job).items() if size}


def _of_rank(job: Job) -> dict[str, float]:
    recipe = job.recipe
    trained, average = sum(_trained(job)), MASTER if recipe.optimizer.ema_decay else 0
    found: dict[str, float] = {}
    if recipe.distributed.offload == "nvme":
        found |= _beside_nvme(job, average)
    elif recipe.distributed.offload:
        pinned = sum(map(_pinned, (MASTER * size for size in _trained(job))))
        frozen = sum(map(_pinned, _frozen(job)))
        networks = 2 if job.second_network else 1
        found["weights"] = networks * pinned + frozen
        found["gradients"] = sum(map(_pinned, (GRADIENT * size for size in _trained(job))))
        found["optimizer"] = MOMENTS * trained
        found["average"] = average * trained
    if recipe.rollout.store == "host":
        samples, _ = network_calls.busiest(recipe, job.groups)
        found["trajectories"] = _pinned(4 * math.prod(job.latent)) * (
            methods.latents_kept(recipe) * samples
        )
        if methods.evaluates_average(recipe.objective):
            batches, each = network_calls.dealt(recipe, job.groups)
            states = recipe.optimizer.updates_per_iteration * batches * math.ceil(each)
            found["velocities"] = _pinned(4 * math.prod(job.latent)) * states
    if recipe.checkpoint.background:
        found["checkpoint"] = (MASTER + MOMENTS + average) * trained
    return found


def _beside_nvme(job: Job, average: int) -> dict[str, float]:
    """What distributed.offload=nvme leaves in memory, which no page of a file can be pinned with.

    The masters are mapped, so that the kernel takes their pages back where memory is short; not
    those whose rows FSDP2 pads.
    """
    trained = sum(_trained(job))
    padded = sum(size for size, even in _trained_rows(job) if not even)
    record = max(RECORD_BYTES, MOMENTS * max(_trained(job), default=0))
    return {
        "weights": MASTER * (padded + (trained if job.second_network else 0)),
        "gradients": GRADIENT * trained,
        "optimizer": BUFFERS * _pinned(record),
        "average": average * trained,
    }


def saved_by_nvme(job: Job) -> float:
    """Bytes of a node's memory that distributed.offload=nvme leaves free, compared with true."""
    section = job.recipe.distributed.model_copy(update={"offload": True})
    other = replace(job, recipe=job.recipe.model_copy(update={"distributed": section}))
    return sum(of_node(other).values()) - sum(of_node(job).values())


def on_nvme(job: Job) -> dict[str, float]:
    """Bytes of a node's file of masters and moments, by kind; empty: it has none."""
    if job.recipe.distributed.offload != "nvme":
        return {}
    ranks = min(job.ranks_per_node, job.gpus)
    mapped = sum(size for size, even in _trained_rows(job) if even)
    return {"masters": MASTER * mapped * ranks, "moments": MOMENTS * sum(_trained(job)) * ranks}


def _pinned(size: float) -> float:
    """Bytes of a block of pinned memory that holds so many."""
    return float(2 ** math.ceil(math.log2(size))) if size > 0 else 0.0


def _trained(job: Job) -> Iterator[int]:
    """Elements of a rank's shard of each trained parameter."""
    yield from (size for size, _ in _trained_rows(job))


def _trained_rows(job: Job) -> Iterator[tuple[int, bool]]:
    """The same, and whether the shards divide the rows."""
    settings = job.recipe.lora
    for unit in job.network.all_units:
        trained = adapters(unit, settings.rank, settings.targets) if job.lora else unit
        for shape in trained.weights.values():
            yield _shard(shape, job.shards), shape[0] % job.shards == 0


def _frozen(job: Job) -> Iterator[int]:
    """Bytes of a rank's shard of each parameter that adapters stand beside."""
    units: list[Unit] = list(job.network.all_units) if job.lora else []
    for unit in units:
        for name, shape in unit.weights.items():
            element = MASTER if has_part(name, job.network.float32) else job.element
            yield element * _shard(shape, job.shards)


def _shard(shape: Shape, shards: int) -> int:
    """Elements of a shard: the first dimension is padded to divide, as FSDP2 does."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:])
