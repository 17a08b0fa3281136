"""What a recipe's rewards take of the GPUs of a node: bytes of their weights, FLOPs per iteration.

A reward in the trainer's process (`where = "process"`) has a copy on every rank's GPU, which comes
with the first score of an iteration and leaves with the last; where `device` names a GPU it stays
there. Rewards behind a server that the recipe gives no address of are in one process beside the
first rank: their weights stay on one GPU, by default the first rank's, which scores the clips of
all ranks. One behind `urls` costs these GPUs nothing.
"""

import math
from collections import Counter
from dataclasses import dataclass

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import RewardSize
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.workload import network_calls


@dataclass(frozen=True)
class Load:
    """Weights and FLOPs on one GPU, each the most that any GPU of a node has: the other ranks wait
    for it.
    """

    passing: (
        float  # bytes of weights that are there from the first score of an iteration to the last
    )
    staying: float  # bytes of weights that are always there
    flops: float  # per iteration


def check(recipe: Recipe, gpus: int, ranks_per_node: int) -> None:
    """Raise UserError where a run would: a server beside the first rank serves its own node
    alone.
    """
    beside = [number for number, spec in enumerate(recipe.rewards) if _beside(spec, recipe)]
    if gpus > ranks_per_node and beside:
        raise UserError(
            f"server.urls: none, and the run spans {gpus // ranks_per_node} nodes, which a server "
            "beside the first "
            "rank cannot serve; start servers with `fastgrpo serve-rewards` and name them, or set "
            f"rewards.{beside[0]}.where=process."
        )


def _beside(spec: RewardSpec, recipe: Recipe) -> bool:
    """Whether the run starts the reward's server itself."""
    return spec.where == "server" and not (spec.urls or recipe.server.urls)


def of_node(job: Job) -> Load:
    """Weights and FLOPs of the rewards on the busiest GPU of a node."""
    recipe, ranks = job.recipe, min(job.ranks_per_node, job.gpus)
    samples = network_calls.busiest(recipe, job.groups)[0]
    own = math.ceil((samples + network_calls.busiest_scouts(recipe, job.groups)) / job.sp)
    of_prompt = recipe.rollout.samples_per_prompt + (recipe.rollout.scouts or 0)
    total = recipe.prompts.per_iteration * of_prompt
    passing, staying, flops = 0.0, Counter[int](), Counter[int]()
    for spec in recipe.rewards:
        beside = _beside(spec, recipe)
        size: RewardSize | None = rewards.declared(spec, "SIZE", None)
        if size is None or spec.device == "cpu" or (spec.where == "server" and not beside):
            continue
        weights = size.parameters * (2 if spec.dtype == "bfloat16" else 4)
        frames = size.frames_scored(spec, recipe.video.frames, spec.fps or recipe.video.fps)
        flops_per_clip = 2.0 * size.parameters * size.tokens * frames
        _, named, index = spec.device.partition(":")
        if beside:
            where, copies, clips = [int(index) if named else 0], 1, total
        elif named:
            where, copies, clips = [int(index)], ranks, ranks * own
        else:
            where, copies, clips = list(range(ranks)), 1, own
        flops.update(dict.fromkeys(where, clips * flops_per_clip))
        if beside or spec.device != "auto":
            staying.update(dict.fromkeys(where, copies * weights))
        else:
            passing += weights
    # others have no rank
    busiest = max((count for gpu, count in staying.items() if gpu < ranks), default=0.0)
    return Load(passing, busiest, max(flops.values(), default=0.0))
