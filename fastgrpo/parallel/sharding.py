"""Weights over ranks: FSDP2 or HSDP per block, prefetching, and whole weights for the rollout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fastgrpo.core.config import Distributed
from fastgrpo.core.memory import free_memory
from fastgrpo.core.policy import Policy, networks_of
from fastgrpo.parallel import sequence_parallel
from fastgrpo.parallel.precision import stays_float32
from fastgrpo.parallel.world import World


def shard(
    policy: Policy, world: World, dtype: torch.dtype, offload: bool | Literal["nvme"] = False
) -> None:
    """Shard by FSDP2 per block: float32 masters, `dtype` compute, float32 gradient reduction.

    What the network keeps in float32 (`precision.stays_float32`) is computed with as its masters
    are. Sequences are shared where sp > 1. Inputs are not cast, since bfloat16 timesteps and rotary
    tables would wreck the gradients. Pages of a mapped file, offload = nvme, cannot be pinned.
    """
    if world.sp is not None:
        sequence_parallel.install(policy.network, world.sp, policy.share_sequence)
    pinned = world.device.type == "cuda" and offload != "nvme"
    where = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    staying = {
        parameter
        for name, parameter in policy.network.named_parameters()
        if dtype != torch.float32 and stays_float32(policy.network, name)
    }
    networks = networks_of(policy.network).values()
    for module in dict.fromkeys((*policy.blocks, *networks, policy.network)):
        apart = staying.intersection(module.parameters())  # those of its blocks are sharded already
        fully_shard(
            module,
            mesh=world.mesh,
            mp_policy=_precision(dtype),
            offload_policy=where,
            ignored_params=apart,
        )
        if apart:
            _shard_in_float32(module, apart)


def _precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )


def _shard_in_float32(module: nn.Module, parameters: set[nn.Parameter]) -> None:
    """Shard what stays in float32 of a module that is sharded without it, over the same mesh.

    FSDP2 has one precision per call and module, and what stays are single parameters of a module
    too. It gathers and reduces a module's groups one after the other: this is a second group.
    """
    groups = fully_shard.state(module)._fsdp_param_groups  # type: ignore[attr-defined]
    (first,) = groups
    for parameter in parameters:
        if not parameter.is_meta:  # as FSDP2 does with those that it is not told to ignore
            parameter.data = parameter.data.to(first.device)
    own = FSDPParamGroup(
        [one for one in module.parameters() if one in parameters],
        first.modules,
        first.mesh_info,
        first.post_forward_mesh_info,
        first.device,
        None,
        _precision(torch.float32),
        first.offload_policy,
    )
    groups.append(own)


def prefetch(policy: Policy, blocks: int) -> None:
    """Gather the weights of the next `blocks` blocks before a block computes, in both directions.

    Each of these blocks is held whole beside the computing block. 0 leaves PyTorch's default, which
    gathers one block ahead, in a forward only once the block before has been launched: late on a
    host that is slower than the device.
    """
    for network in networks_of(policy.network).values():
        inside = set(network.modules())
        own = [block for block in policy.blocks if block in inside]
        # Left to itself the last block of a backward gathers what the forward before this one ended
        # with: of two experts another network's. Its own is whole by then.
        cast(FSDPModule, own[0]).set_modules_to_backward_prefetch([network])
        if not blocks:
            continue
        forward, backward = (network, *own), (network, *reversed(own))
        for number in range(len(forward)):
            following = slice(number + 1, number + 1 + blocks)
            now, back = forward[number], backward[number]
            now.set_modules_to_forward_prefetch(list(forward[following]))
            if backward[following]:
                back.set_modules_to_backward_prefetch(list(backward[following]))


@contextmanager
def rollout_weights(
    network: nn.Module,
    settings: Distributed,
    dtype: torch.dtype,
    world: World,
    arriving: int = 0,
) -> Iterator[bool]:
    """Hold the weights as the recipe says for the rollout.  gives whether each rank has all of them

    Otherwise every forward gathers block by block, and all ranks must run the same number of
    forwards.

    arriving: bytes that others, the rewards, will bring to this rank's GPU meanwhile
    """
    whole = settings.rollout_weights == "gathered"
    if settings.rollout_weights == "auto":
        whole = _whole_weights_fit(network, dtype, world, arriving)
    if not whole:
        try:
            yield False
        finally:
            assert isinstance(network, FSDPModule)
            # FSDP2 keeps the root whole after a forward: it would not see the masters change
            network.reshard()
        return
    with gathered(network):
        yield True


def _whole_weights_fit(network: nn.Module, dtype: torch.dtype, world: World, arriving: int) -> bool:
    """Whether every rank has room for the whole weights, and half as much for activations."""
    if world.device.type != "cuda":
        return True
    needed = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    room = free_memory(world.device) - arriving
    fits = torch.tensor(float(1.5 * needed < room), device=world.device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Hold the whole weights in compute precision inside: gathered once, so forwards need no other.

    Leaving reshards the weights, before the masters change: a gathered copy would not follow.
    """
    modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            # FSDP2's default: all but the root
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()
