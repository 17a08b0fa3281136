"""Memory of the host that one rank takes: offloaded states, waiting trajectories, a checkpoint's
copy.

CUDA's allocator rounds a block of pinned memory up to a power of two.
"""

import math
from collections.abc import Iterator

from fastgrpo.models.sizes.units import Shape, Unit, adapters
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
    if recipe.distributed.offload:
        pinned = sum(map(_pinned, (MASTER * size for size in _trained(job))))
        frozen = sum(_pinned(job.element * size) for size in _frozen(job))
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


def _pinned(size: float) -> float:
    """Bytes of a block of pinned memory that holds so many."""
    return float(2 ** math.ceil(math.log2(size))) if size > 0 else 0.0


def _trained(job: Job) -> Iterator[int]:
    """Elements of a rank's shard of each trained parameter."""
    settings = job.recipe.lora
    for unit in job.network.all_units:
        trained = adapters(unit, settings.rank, settings.targets) if job.lora else unit
        yield from (_shard(shape, job.shards) for shape in trained.weights.values())


def _frozen(job: Job) -> Iterator[int]:
    """The same of what adapters stand beside."""
    units: list[Unit] = list(job.network.all_units) if job.lora else []
    for unit in units:
        yield from (_shard(shape, job.shards) for shape in unit.weights.values())


def _shard(shape: Shape, shards: int) -> int:
    """Elements of a shard: the first dimension is padded to divide, as FSDP2 does."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:])
