"""The ranks of a run: their mesh, the division of work over them, and what they tell each other.

Weights are sharded over `shard` ranks and replicated over the rest; sp consecutive ranks work on
the same samples. PyTorch's own engine throughout: gloo on CPU, NCCL on GPU. A single process is a
world of one and takes the same path.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgrpo.core.config import Distributed, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import (
    OneRankError,
    die_with_torchrun,
    local_rank,
    local_world_size,
    under_torchrun,
)
from fastgrpo.parallel import interface
from fastgrpo.parallel.mesh import contiguous_part, mesh_shape

T = TypeVar("T")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT_BY_MALLOC = ((-1, 128 << 20), (-3, 32 << 20))
"""Options of glibc's mallopt, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: up to so many bytes that are
free at the end of the heap stay there, and blocks below the second lie in it."""
TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's slow reward server


@dataclass(frozen=True)
class Group:
    """The ranks that share one sequence, with this rank's number among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, tokens: int, rank: int | None = None) -> range:
        """A rank's contiguous part of `tokens` (default: this rank's)."""
        return contiguous_part(tokens, self.size, self.rank if rank is None else rank)

    def sizes(self, tokens: int) -> list[int]:
        """Every rank's number of tokens."""
        return [len(self.part(tokens, rank)) for rank in range(self.size)]


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank, world size, device and mesh of this process."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # of the weights: ("shard",), or ("replicate", "shard") with HSDP
    sp: Group | None = None  # the ranks that share sequences with this one; None: no others do

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
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
        """A group's contiguous part of range(total) (default: this rank's group)."""
        return contiguous_part(total, self.groups, self.group if group is None else group)

    def part(self, count: int) -> range:
        """This rank's part of the `count` samples of its group, to decode and score."""
        return self.sp.part(count) if self.sp else range(count)

    def combine(self, rows: Tensor, positions: Sequence[int], total: int) -> Tensor:
        """Every rank's rows, put together in order.

        A position may come from one rank only; the row of a position that no rank has is zero.

        rows: [len(positions), ...];  returns [total, ...] on the CPU
        """
        everything = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        everything[list(positions)] = rows.to(self.device)
        dist.all_reduce(everything)  # each row is non-zero on one rank only, so the sum is exact
        return everything.cpu()

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main rank, on every rank; its error ends every rank.

        A UserError is raised unchanged, and what the system says against a file as a UserError. Of
        any other error the other ranks learn only its class.
        """
        result: T | Exception | None = None
        if self.main:
            try:
                result = action()
            except OSError as error:
                result = _mistake(error) or error
            except Exception as error:
                result = error
        payload: list[T | Exception | None] = [result]
        if isinstance(result, Exception) and not isinstance(result, UserError):
            payload = [RuntimeError(f"the main rank failed: {type(result).__name__}")]
        dist.broadcast_object_list(payload, src=0)
        outcome = result if self.main else payload[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[return-value]

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank; any rank's UserError or file error ends every rank.

        The action must not communicate with other ranks, which may fail before they answer.
        """
        mistake, result = None, None
        try:
            result = action()
        except UserError as error:
            mistake = error
        except OSError as error:
            mistake = _mistake(error)
            if mistake is None:
                raise
        self.raise_if_any_failed(mistake)
        return result  # type: ignore[return-value]

    def raise_if_any_failed(self, error: UserError | None) -> None:
        """Raise on every rank the first error that any rank has."""
        failed = torch.tensor(float(error is not None), device=self.device)
        dist.all_reduce(failed)
        if failed:
            errors: list[UserError | None] = [None] * self.size
            dist.all_gather_object(errors, error)
            raise next(error for error in errors if error is not None)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()


def _mistake(error: OSError) -> UserError | None:
    """The line for what the operating system says against a file; None: it names none."""
    if error.errno in DISK_FULL:
        return no_space(error.filename)
    refused = paths.refusal(error, {})
    if refused is not None or error.filename is None:
        return refused
    return UserError(
        f"{error.filename}: {error.strerror}; correct that and start again: a run resumes from its "
        "newest checkpoint."
    )


def no_space(file: str | None) -> UserError:
    """The error of a full disk."""
    target = f" for {file}" if file else ""
    return UserError(
        f"run.dir: no space left on the disk{target}; free some and start again: the run resumes "
        "from its newest checkpoint."
    )


@contextmanager
def open_world(settings: Distributed | None = None, deterministic: bool = False) -> Iterator[World]:
    """Join the other ranks that torchrun started, or be a world of one; end when torchrun ends.

    deterministic: have PyTorch use deterministic kernels alone inside
    Raises UserError where sp and shard do not divide the ranks, or a node has fewer GPUs than
    ranks.
    """
    die_with_torchrun()
    interface.choose()
    _choose_allocators()
    with _kernels(deterministic):
        yield from _joined(settings)


def _choose_allocators() -> None:
    """Let the GPU's allocator grow its segments, and the host's keep what is freed, unless the user
    has chosen otherwise.

    The rollout's whole weights, 26 GB of HunyuanVideo, come and go each iteration beside blocks of
    other sizes; in segments that cannot grow, the room between them is lost. Read by PyTorch when
    the GPU is first used.

    Without a GPU, activations come and go on the host; glibc would give them back to the system and
    have each page cleared again.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or torch.cuda.is_available() or any(map(_of_malloc, os.environ)):
        return
    for option, value in KEPT_BY_MALLOC:
        mallopt(option, value)


def _of_malloc(variable: str) -> bool:
    return variable.startswith(("MALLOC_", "GLIBC_TUNABLES"))


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Choose kernels whose rounding rollout and update can share.

    By default PyTorch lets cuBLAS sum products of bfloat16 in bfloat16 where it splits them, which
    depends on the batch's shape, and cuDNN round float32 convolutions to TF32 likewise: both would
    move the log-probabilities of an unchanged policy.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32 = False, False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32 = before[:2]
        torch.use_deterministic_algorithms(before[2])


def _joined(settings: Distributed | None) -> Iterator[World]:
    """Give the world once all ranks have joined, and destroy it where all ranks leave it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        ranks, gpus = local_world_size(), torch.cuda.device_count()
        if ranks > gpus:
            raise UserError(
                f"--nproc-per-node={ranks}: {ranks} processes for {gpus} GPUs; start {gpus}, "
                "or set CUDA_VISIBLE_DEVICES= to train on the CPU."
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    # gloo beside NCCL, since offloaded gradients are reduced on the CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if under_torchrun():
        _meet(backend)
    else:
        dist.init_process_group(
            backend,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=TIMEOUT,
        )
    try:
        settings = settings or Distributed()
        rank, size = dist.get_rank(), dist.get_world_size()
        replicas, shards = mesh_shape(settings, size, local_world_size(size))
        if replicas == 1:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(
                device.type,
                (replicas, shards),
                mesh_dim_names=("replicate", "shard"),
            )
        sp = _sequence_group(rank, settings.sp)
        yield World(rank=rank, size=size, device=device, mesh=mesh, sp=sp)
    except BaseException as error:
        if dist.get_world_size() == 1 or _raised_on_all_ranks(error):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the other ranks at the address that a launcher has set in the environment."""
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (dist.DistError, ValueError) as error:  # ValueError: a variable is missing or no number
        where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        busy = "EADDRINUSE" in str(error)
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT={where}: the ranks cannot meet there "
            f"({'the port is in use' if busy else _first_line(error)}); start them with torchrun "
            "and a free port, or unset RANK and WORLD_SIZE for a single process."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _raised_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank leaves the world by this error.

    NCCL's communicators are destroyed by all ranks together: a rank that fails alone would wait in
    there, its traceback unprinted, for others that wait for it in a collective. The process must
    then end without teardown, see `cli.main.console`.
    """
    return isinstance(error, UserError) and not isinstance(error, OneRankError)


def _sequence_group(rank: int, sp: int) -> Group | None:
    """The consecutive ranks that share sequences with this rank."""
    if sp == 1:
        return None
    own, _ = dist.new_subgroups(group_size=sp, timeout=TIMEOUT)
    return Group(own, rank % sp, sp)
