"""The keys that change speed and memory alone, with the values that are worth trying.

Grouped by what they touch, for `search`: keys of the frame reach into all phases, the others into
one. No key is among them that a run could not change when it resumes (checkpoint/resume.py), which
a test compares.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fastgrpo import models
from fastgrpo.core.config import Recipe
from fastgrpo.parallel.mesh import divisors
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.subject import Subject
from fastgrpo.tools.plan.workload import network_calls

Choice = Mapping[str, Any]
"""Values by the names of their keys."""
ROLLOUT_BATCH, UPDATE_BATCH = "rollout.batch_size", "optimizer.batch_size"
RECOMPUTED, KEPT = "model.gradient_checkpointing", "model.keep"
LARGEST_BATCH = 64
SHARES = 20  # of the blocks that are recomputed
FRUGAL: Choice = {
    "distributed.offload": True,
    "distributed.prefetch": 1,
    "distributed.rollout_weights": "sharded",
    "rollout.store": "host",
    "model.decode_batch": 1,
    ROLLOUT_BATCH: 1,
    UPDATE_BATCH: 1,
    RECOMPUTED: True,
    KEPT: "nothing",
}
"""What takes the least of a GPU's memory, for any number of ranks that share a sequence."""
QUICKEST: Choice = {
    "distributed.offload": False,
    "distributed.rollout_weights": "gathered",
    "rollout.store": "device",
    RECOMPUTED: False,
}
"""What takes the least time, whatever its memory."""


def changed(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with these values, which are not validated: all are from this file."""
    sections: dict[str, dict[str, Any]] = {}
    rewards = list(recipe.rewards)
    for key, value in choice.items():
        section, *place, name = key.split(".")
        if section == "rewards":
            number = int(place[0])
            rewards[number] = rewards[number].model_copy(update={name: value})
        else:
            sections.setdefault(section, {})[name] = value
    update: dict[str, Any] = {
        section: getattr(recipe, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return recipe.model_copy(update=update | {"rewards": tuple(rewards)})


def value(recipe: Recipe, key: str) -> Any:
    """What the recipe has for a key."""
    found: Any = recipe
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def override(key: str, chosen: Any) -> str:
    """A key and its value as a command line takes them."""
    text = str(chosen).lower() if isinstance(chosen, bool | None) else str(chosen)
    return f"{key}={text}"


def adapters(recipe: Recipe, rank: int) -> Choice:
    """Adapters of a rank, whose states go to host memory where the recipe has them on a disk."""
    memory: Choice = {"distributed.offload": True, "distributed.offload_path": None}
    return {"lora.rank": rank, **(memory if recipe.distributed.offload == "nvme" else {})}


def frames(given: Subject) -> Iterator[Choice]:
    """Values of the keys that reach into all phases, one of each.

    Whether a node has an NVMe is the recipe's to say: masters on one stay there.
    """
    job, recipe = given.job, given.job.recipe
    inside = min(job.ranks_per_node, job.gpus)
    keys: dict[str, Sequence[Any]] = {
        "distributed.sp": sequence_ranks(given),
        "distributed.shard": _shards(job, inside),
        "distributed.offload": ["nvme"] if recipe.distributed.offload == "nvme" else [False, True],
        "distributed.prefetch": sorted({recipe.distributed.prefetch, 1}),
        "rollout.store": ["device", "host"],
    }
    for values in product(*keys.values()):
        for placed in _placements(recipe):
            yield {**dict(zip(keys, values, strict=True)), **placed}


def _shards(job: Job, inside: int) -> list[int | str]:
    """Ranks of a part of a node, of whole nodes, all of them.  inside: ranks of a node"""
    parts = [n for n in divisors(job.gpus) if n % inside == 0 or inside % n == 0]
    return ["all" if n == job.gpus else n for n in parts]


def sequence_ranks(given: Subject) -> list[int]:
    """Numbers of ranks of a node that may share a sequence."""
    job = given.job
    if job.recipe.model.family not in models.with_function("share_sequence"):
        return [job.sp]
    inside = min(job.ranks_per_node, job.gpus)
    return [n for n in divisors(inside) if job.network.heads % n == 0]


def _placements(recipe: Recipe) -> Iterator[Choice]:
    """Rewards where the recipe has them, all with the trainer, or all behind a server beside it.

    Servers that a recipe names stay as they are: what they run on is not the planner's to say.
    """
    movable = [
        number
        for number, spec in enumerate(recipe.rewards)
        if not (spec.urls or recipe.server.urls) and spec.device == "auto"
    ]
    seen: list[Choice] = [{}]
    for where in ("process", "server"):
        placed = {f"rewards.{n}.where": where for n in movable if recipe.rewards[n].where != where}
        if placed:
            seen.append(placed)
    yield from seen


@dataclass(frozen=True)
class Batches:
    """Batch sizes of rollout and update."""

    together: list[Choice]  # of both at once; one empty choice where they are free of each other
    drawn: list[Choice]  # of the rollout by itself, likewise
    trained: list[Choice]  # of the update by itself, likewise


def batches(recipe: Recipe, samples: int) -> Batches:
    """Batch sizes that are worth trying.  samples: of a rank

    In bfloat16 the same for both where old log-probabilities count: else states would be evaluated
    once more, see `network_calls.share_again`.
    """
    sizes = [2**n for n in range(LARGEST_BATCH.bit_length()) if 2**n <= samples]
    drawn = sorted({*sizes, min(recipe.rollout.at_once, samples)})
    trained = sorted({*sizes, recipe.optimizer.batch_size})
    apart = changed(recipe, {ROLLOUT_BATCH: 1, UPDATE_BATCH: 2})
    if network_calls.share_again(apart) == 0:
        return Batches(
            [{}], [{ROLLOUT_BATCH: n} for n in drawn], [{UPDATE_BATCH: n} for n in trained]
        )
    pairs = [(size, size) for size in sorted({*drawn, *trained})]
    given = (recipe.rollout.at_once, recipe.optimizer.batch_size)
    together: list[Choice] = [
        {ROLLOUT_BATCH: drawn_one, UPDATE_BATCH: trained_one}
        for drawn_one, trained_one in dict.fromkeys([given, *pairs])
    ]
    return Batches(together, [{}], [{}])


def drawing(recipe: Recipe) -> Iterator[Choice]:
    """Values of the keys that only rollout and decoding feel."""
    for weights in ("gathered", "sharded"):
        for decoded in dict.fromkeys((recipe.model.decode_batch, 1)):
            yield {"distributed.rollout_weights": weights, "model.decode_batch": decoded}


def recomputing() -> Iterator[list[Choice]]:
    """Values of the keys that only the update feels: lists from the least recomputed to the most.

    Further on in a list a plan takes more time and less memory.
    """
    shares = [share / SHARES for share in range(1, SHARES)]
    for kept in ("products", "attention", "nothing"):
        yield [{RECOMPUTED: share, KEPT: kept} for share in (False, *shares, True)]
