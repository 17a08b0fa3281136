"""The trained and the initial policy: sharded without weights, then filled from files.

Each rank reads its own part of the weights.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor, nn

from fastgrpo.core.config import Distributed, Recipe
from fastgrpo.core.policy import Condition, Policy, predict
from fastgrpo.models.loading import streaming
from fastgrpo.models.loading.lora import at_rest
from fastgrpo.models.loading.policies import outline
from fastgrpo.models.loading.streaming import Bytes, Show
from fastgrpo.parallel import sharding
from fastgrpo.parallel.nvme.adamw import States
from fastgrpo.parallel.precision import to_compute_precision
from fastgrpo.parallel.world import World
from fastgrpo.run.terminal import duration, open_console


def shard_and_read(
    policy: Policy, recipe: Recipe, world: World, what: str = "weights"
) -> States | None:
    """Shard the network of `policies.outline` as the recipe says, read its weights, and report it.

    what: the weights' name in the line that says how long reading took
    returns what a trained network has on the node's NVMe; None: nothing
    Raises UserError on every rank where a rank's files have changed, or its disk has no room.
    """
    settings, network = recipe.distributed, policy.network
    sharding.shard(policy, world, recipe.model.torch_dtype, settings.offload)
    sharding.prefetch(policy, settings.prefetch)
    device = torch.device("cpu") if settings.offload else world.device
    memory: Callable[[Tensor], Tensor] = partial(torch.empty_like, device=device)
    trained = any(parameter.requires_grad for parameter in network.parameters())
    states = _states(network, settings, world) if trained else None
    if states is not None:
        memory = states.file.memory_of(network, memory)
    begun = time.perf_counter()
    with _progress(world, what) as show:
        read = world.run_on_all_ranks(lambda: streaming.fill(network, device, show, memory))
    took = duration(time.perf_counter() - begun)
    _tell(world, f"{what}: {_size(read.own)} of {_size(read.network)} read in {took}")
    return states


def _states(network: nn.Module, settings: Distributed, world: World) -> States | None:
    """This rank's masters and moments on the node's NVMe, where the recipe wants them there."""
    if settings.offload != "nvme":
        return None
    assert settings.offload_path is not None, "config.checks"
    folder, pinned = Path(settings.offload_path), world.device.type == "cuda"
    states = world.run_on_all_ranks(lambda: States.of_network(network, folder, pinned))
    _tell(world, f"distributed.offload=nvme: {states}")
    return states


def _tell(world: World, line: str) -> None:
    if world.main:
        open_console().print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress(world: World, what: str) -> Iterator[Show]:
    """Give a function that shows the main rank's reading: a bar on a terminal, else no output."""
    console = open_console()
    if not (world.main and console.is_terminal):
        yield lambda read: None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(f"reading {what}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(read: Bytes) -> None:
            bar.update(task, completed=read.done, total=read.own)

        yield show


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class Reference(Protocol):
    """The part of a `fastgrpo.core.policy.Policy` that the KL term needs of the initial policy."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction.  x: [B, C, F, H, W] float32;  t: [B];  returns like x"""


@dataclass(frozen=True)
class Unadapted:
    """The initial policy as the trained one with its adapters at rest, without a second network."""

    policy: Policy

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict without the adapters.  x: [B, C, F, H, W] float32;  t: [B];  returns like x"""
        return self.velocity_of(0, x, t, condition)

    def velocity_of(self, expert: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The same by one expert.  x: [B, C, F, H, W] float32;  t: [B];  returns like x"""
        with at_rest(self.policy.network):
            return predict(self.policy, x, t, condition, expert)


def initial_policy(
    recipe: Recipe, world: World, trained: Policy, start: Callable[[nn.Module], None]
) -> Reference:
    """The policy before training, for the KL term: a frozen network, or one without adapters.

    start: puts other weights than those of its files into a network, where the run began with such
    """
    if recipe.lora.rank:
        return Unadapted(trained)
    policy = world.run_on_all_ranks(lambda: outline(recipe.model, world.device))
    policy.network.requires_grad_(False)
    # without float32 masters: it is not trained
    to_compute_precision(policy.network, recipe.model.torch_dtype)
    policy.negative, policy.vae = trained.negative, trained.vae
    shard_and_read(policy, recipe, world, "weights of the initial policy")
    start(policy.network)
    return policy
