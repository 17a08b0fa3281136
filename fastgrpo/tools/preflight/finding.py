"""The parts of a run that preflight checks, a check's finding, and values of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.core.config import Recipe
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.parallel.world import World
from fastgrpo.session import Session
from fastgrpo.training.rollout import Plan
from fastgrpo.training.scoring.scorer import Scorer
from fastgrpo.training.trainer import Trainer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run before its first iteration, with the plan of that iteration."""

    recipe: Recipe
    world: World
    trainer: Trainer
    scorer: Scorer
    plan: Plan  # of the first iteration
    texts: Sequence[str]  # of its prompts
    conditions: Sequence[Condition]  # of its prompts, on the device

    @classmethod
    def of(cls, session: Session) -> "Parts":
        """The parts of a session before its first iteration."""
        texts, conditions = session.training.batch(session.recipe, 0)
        return cls(
            recipe=session.recipe,
            world=session.world,
            trainer=session.trainer,
            scorer=session.scorer,
            plan=session.training.plan(session.recipe, 0),
            texts=texts,
            conditions=conditions,
        )

    @property
    def policy(self) -> Policy:
        """The policy that is trained."""
        return self.trainer.policy

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's forward."""
        return self.recipe.model.torch_dtype

    @property
    def total(self) -> int:
        """Samples of an iteration, of all ranks."""
        return len(self.texts) * self.plan.group_size


@dataclass(frozen=True)
class Finding:
    """The result of one check, the same on every rank."""

    check: str
    green: bool
    measured: str
    remedy: str = ""  # what to do where it is red or yellow
    yellow: bool = False  # green with a doubt, which ends no run

    @property
    def line(self) -> str:
        """The finding as one line for the user."""
        if self.yellow:
            return f"yellow {self.check}: {self.measured}; {self.remedy}"
        if self.green:
            return f"green  {self.check}: {self.measured}"
        return f"red    {self.check}: {self.measured}; {self.remedy}"


def gathered(value: T, world: World) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[T] = [value] * world.size
    dist.all_gather_object(values, value)
    return values


def largest(value: float, world: World) -> float:
    """The largest of the ranks' values; NaN where any is NaN, which a maximum may hide."""
    values = gathered(value, world)
    return next((other for other in values if math.isnan(other)), max(values))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor [n, ...]; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fingerprints(tensors: Sequence[Tensor], world: World) -> Tensor:
    """The sum of the bits of this rank's part of each tensor, as integers of the element's size.

    returns int64 [len(tensors)] on the world's device
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        bits = local(tensor.detach()).contiguous().view(integers[tensor.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    if not sums:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([total.to(world.device) for total in sums])


def replicas_differ(tensors: dict[str, Tensor], world: World) -> str:
    """The name of a tensor whose bits differ between replicas on any rank; empty: none differs.

    tensors: by name, of any shapes [...]
    """
    if world.mesh.ndim == 1:
        return ""
    group = world.mesh.get_group("replicate")
    low = fingerprints(list(tensors.values()), world)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    names = [name for name, other in zip(tensors, (low != high).tolist(), strict=True) if other]
    return next((name for of_rank in gathered(names, world) for name in of_rank), "")
