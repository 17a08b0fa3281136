"""Ranks: the mesh, sharding with FSDP2 or HSDP, gathered weights for the rollout, and the division of work.

Weights are sharded over `shard` ranks and replicated over the rest; sp consecutive ranks among them work on the same
samples. PyTorch's own engine throughout: gloo on CPU, NCCL on GPU. A single process is a world of one and takes the
same path.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgrpo.core.config import Distributed
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import die_with_torchrun, local_rank, local_world_size, under_torchrun
from fastgrpo.parallel import interface
from fastgrpo.parallel.mesh import mesh_shape

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's slow reward server


@dataclass(frozen=True)
class Group:
    """The ranks that share one sequence, and this one among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, tokens: int, rank: int | None = None) -> range:
        """The contiguous part of `tokens` that falls to a rank (default: this one); sizes differ by at most 1."""
        rank = self.rank if rank is None else rank
        return range(rank * tokens // self.size, (rank + 1) * tokens // self.size)

    def sizes(self, tokens: int) -> list[int]:
        """Every rank's number of tokens."""
        return [len(self.part(tokens, rank)) for rank in range(self.size)]


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # of the weights: ("shard",), or ("replicate", "shard") with HSDP
    sp: Group | None = None  # the ranks that share this one's sequences; none = it works alone

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def groups(self) -> int:
        """Groups of ranks that work on different samples."""
        return self.size // (self.sp.size if self.sp else 1)

    @property
    def group(self) -> int:
        """This rank's group."""
        return self.rank // (self.sp.size if self.sp else 1)

    def share(self, total: int, group: int | None = None) -> range:
        """The contiguous part of range(total) that falls to a group (default: ours); sizes differ by at most 1."""
        group = self.group if group is None else group
        return range(group * total // self.groups, (group + 1) * total // self.groups)

    def part(self, count: int) -> range:
        """This rank's part of `count` things that its group has in common: what is decoded and scored here."""
        return self.sp.part(count) if self.sp else range(count)

    def combine(self, rows: Tensor, positions: Sequence[int], total: int) -> Tensor:
        """Every rank's rows, put together in order.  rows: [len(positions), ...];  returns [total, ...] on the CPU

        A position may be given by one rank only; one that no rank gives is zero.
        """
        everything = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        everything[list(positions)] = rows.to(self.device)
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

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank; a user's mistake, or a full disk, of any rank is raised on every rank.

        The action must not talk to other ranks: one of them may not get there.
        """
        mistake, result = None, None
        try:
            result = action()
        except UserError as error:
            mistake = error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            mistake = no_space(error.filename)
        self.raise_if_any_failed(mistake)
        return result  # type: ignore[return-value]

    def raise_if_any_failed(self, error: UserError | None) -> None:
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
def open_world(settings: Distributed | None = None) -> Iterator[World]:
    """Join the other ranks that torchrun started, or be a world of one. Ends with torchrun, however that ends.

    Raises UserError where sp and shard do not divide the ranks, or a node has fewer GPUs than ranks.
    """
    die_with_torchrun()
    interface.choose()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        ranks, gpus = local_world_size(), torch.cuda.device_count()
        if ranks > gpus:
            raise UserError(
                f"--nproc-per-node={ranks}: {ranks} processes for {gpus} GPUs; start {gpus}, or set "
                "CUDA_VISIBLE_DEVICES= to train on the CPU."
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # offloaded gradients are reduced on the CPU
    if under_torchrun():
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        settings = settings or Distributed()
        rank, size = dist.get_rank(), dist.get_world_size()
        replicas, shards = mesh_shape(settings, size, local_world_size(size))
        if replicas == 1:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
        yield World(rank, size, device, mesh, _sequence_group(rank, size, settings.sp))
    finally:
        dist.destroy_process_group()


def _sequence_group(rank: int, size: int, sp: int) -> Group | None:
    """The consecutive ranks that share sequences with this one."""
    if sp == 1:
        return None
    own, _ = dist.new_subgroups(group_size=sp, timeout=TIMEOUT)
    return Group(own, rank % sp, sp)
