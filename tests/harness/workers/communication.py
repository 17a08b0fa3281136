"""One rank: counts the bytes of its collectives in a rollout and an update.

argv: file, distributed settings (JSON)
"""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.core.config import Distributed
from fastgrpo.core.processes import leave
from fastgrpo.parallel import sharding
from fastgrpo.parallel.sharding import shard
from fastgrpo.parallel.world import open_world
from fastgrpo.training import rollout
from tests.harness import tiny

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}


class Bytes(TorchDispatchMode):
    """Bytes of the whole tensor of each collective: what a gather gives, what a scatter or a
    reduction takes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in KINDS:
            whole = max(tensors(args), key=lambda tensor: tensor.numel())
            if whole.numel() > 64:  # not the totals of the metrics and the gradient's norm
                self.counts[KINDS[name]] += whole.numel() * whole.itemsize
        return func(*args, **(kwargs or {}))


def tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    return [t for a in arguments for t in tensors(a)] if isinstance(arguments, list | tuple) else []


def padded(network: torch.nn.Module, shards: int) -> tuple[int, int]:
    """Elements of the blocks' and of the root's parameters, each padded to divide over the
    shards.
    """
    blocks = {
        id(p)
        for m in network.modules()
        if isinstance(m, FSDPModule) and m is not network
        for p in m.parameters()
    }
    sizes = {True: 0, False: 0}
    for p in network.parameters():
        sizes[id(p) in blocks] += shards * math.ceil(p.shape[0] / shards) * math.prod(p.shape[1:])
    return sizes[True], sizes[False]


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = Distributed(**json.loads(sys.argv[2]))
    with open_world(settings) as world:
        policy, conditions = tiny.load_policy(), tiny.encode()
        shard(policy, world, torch.float32)
        blocks, root = padded(policy.network, world.mesh.size(-1))
        plan = tiny.plan(policy)
        with (
            Bytes() as in_rollout,
            sharding.rollout_weights(policy.network, settings, torch.float32, world) as whole,
        ):
            dealing = rollout.Dealing(
                conditions=conditions,
                plan=replace(plan, lockstep=not whole),
                batch_size=4,
                world=world,
            )
            prefixes: dict[int, rollout.SharedPrefix] = {}
            first_rounds, rounds = list(dealing.prefix_rounds()), list(dealing.rounds())
            for batch, _ in first_rounds:
                prefixes |= rollout.shared_prefixes(policy, plan, conditions, batch)
            drawn = [
                (
                    rollout.sample(
                        policy, plan=plan, conditions=conditions, slots=batch, prefixes=prefixes
                    ),
                    counts,
                )
                for batch, counts in rounds
            ]
        trainer = tiny.Recorder.create(policy, tiny.settings(8, updates=2), None)
        forwards: list[int] = []
        policy.network.register_forward_pre_hook(lambda module, inputs: forwards.append(1))
        trajectories = {
            slot: kept
            for part, counts in drawn
            if counts
            for slot, kept in part.trajectories.items()
        }
        with Bytes() as in_update:
            tiny.run_update(
                trainer,
                the_plan=plan,
                trajectories=trajectories,
                conditions=conditions,
                world=world,
            )
        if world.main:
            told = {
                "blocks": blocks,
                "root": root,
                "forwards": len(first_rounds) + len(rounds) * (plan.steps - 1),
                "micro_batches": len(forwards),
                "rollout": in_rollout.counts,
                "update": in_update.counts,
            }
            with open(sys.argv[1], "w") as file:
                json.dump(told, file)
    leave(0)
