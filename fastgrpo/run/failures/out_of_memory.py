"""A GPU or a machine without room: one line with the keys to change, in preflight and anywhere in training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastgrpo.core.config import Recipe
from fastgrpo.core.processes import fail_alone
from fastgrpo.run.heartbeat import WAIT


def remedy(recipe: Recipe, phase: str) -> str:
    """The key that most of a phase's memory follows, its value, and what to do."""
    rollout, decode = recipe.rollout.batch_size, recipe.model.decode_batch or "none"
    remedies = {
        "rollout": f"rollout.batch_size={rollout}: lower it, or set "
        "distributed.rollout_weights=sharded",
        "decode": f"model.decode_batch={decode}: set it to 1",
        "reward": "rewards: give them a device of their own, or a server",
        "update": f"optimizer.batch_size={recipe.optimizer.batch_size}: lower it, or set "
        "model.gradient_checkpointing=true",
        "evaluate": f"rollout.batch_size={rollout}: lower it, or set model.decode_batch=1",
        "save": "checkpoint.background=true: set it to false"
        if recipe.checkpoint.background
        else "distributed.offload=false: set it to true",
    }
    remedies[WAIT] = remedies["reward"]
    usual = "distributed.offload=false: set it to true, or use more GPUs"
    return remedies.get(phase, usual)


@contextmanager
def one_line(recipe: Recipe, phase: Callable[[], str], more: str = "") -> Iterator[None]:
    """Turn running out of memory inside into OneRankError, whose line this rank prints at once.

    phase: the phase at that moment;  more: said after it
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = _where(error)
        if where is None:
            raise
        name = phase()
        fail_alone(f"{remedy(recipe, name)}: {where} has no room for the {name}.{more}")


def _where(error: Exception) -> str | None:
    """The memory that an error says is full; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # PyTorch's on a CPU
        return "this machine's memory"
    return None
