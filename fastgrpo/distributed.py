"""Ranks: the process group, sharding with FSDP2, gathered weights for the rollout, and the division of work.

PyTorch's own engine throughout: gloo on CPU, NCCL on GPU. A single process is a world of one and takes the same path.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastgrpo.errors import UserError
from fastgrpo.models import Policy

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's slow reward server


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, total: int, rank: int | None = None) -> range:
        """The contiguous part of range(total) that falls to a rank (default: this one); sizes differ by at most 1."""
        rank = self.rank if rank is None else rank
        return range(rank * total // self.size, (rank + 1) * total // self.size)

    def combine(self, rows: Tensor, positions: range, total: int) -> Tensor:
        """Every rank's rows, put together in order.  rows: [len(positions), ...];  returns [total, ...] on the CPU"""
        everything = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        everything[positions.start : positions.stop] = rows.to(self.device)
        dist.all_reduce(everything)  # each row is non-zero on one rank only, so the sum is exact
        return everything.cpu()

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main rank, on every rank; an error that it raises ends every rank.

        A UserError, and a full disk as one, is raised as it is; of another the other ranks are told only that.
        """
        result: T | Exception | None = None
        if self.main:
            try:
                result = action()
            except OSError as error:
                result = error if error.errno not in (errno.ENOSPC, errno.EDQUOT) else no_space(error.filename)
            except Exception as error:
                result = error
        told: T | Exception | None = result
        if isinstance(result, Exception) and not isinstance(result, UserError):
            told = RuntimeError(f"the main rank failed: {type(result).__name__}")
        box = [told]
        dist.broadcast_object_list(box, src=0)
        outcome = result if self.main else box[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[return-value]

    def agree(self, error: UserError | None) -> None:
        """Raise on every rank the first error that any rank has."""
        failed = torch.tensor(float(error is not None), device=self.device)
        dist.all_reduce(failed)
        if failed:
            errors: list[UserError | None] = [None] * self.size
            dist.all_gather_object(errors, error)
            raise next(found for found in errors if found is not None)

    def barrier(self) -> None:
        dist.barrier()


def no_space(file: str | None) -> UserError:
    """The error of a full disk."""
    return UserError(
        f"run.dir: no space left on the disk{f' for {file}' if file else ''}; free some and start again: the run "
        "resumes from its newest checkpoint."
    )


@contextmanager
def open_world() -> Iterator[World]:
    """Join the other ranks that torchrun started, or be a world of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()


def shard(policy: Policy, world: World, dtype: torch.dtype) -> None:
    """FSDP2 per block: float32 masters, `dtype` compute, float32 gradient reduction.

    Inputs are not cast, since bfloat16 timesteps and rotary tables would wreck the gradients.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    for module in (*policy.blocks, policy.network):
        fully_shard(module, mesh=world.mesh, mp_policy=precision)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Hold the whole weights in compute precision inside, gathered once; forwards then communicate nothing.

    They are resharded on leaving, before the masters change: what is held does not see such a change.
    """
    modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not network, recurse=False)  # FSDP2's default: all but the root
            module.reshard()
