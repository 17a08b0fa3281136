"""Two ranks: the order of gathers with blocks prefetched, two optimizer steps with offload, to host
memory and to a disk, and a Wan whose compute precision is bfloat16.

argv: file
"""

import os
import socket
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.core.config import Lora, Model, Optimizer
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.core.processes import die_with, leave
from fastgrpo.models.loading import policies, streaming
from fastgrpo.parallel import sharding
from fastgrpo.parallel.nvme.adamw import States
from fastgrpo.parallel.nvme.state_file import StateFile
from fastgrpo.parallel.nvme.transfers import open_transfers
from fastgrpo.parallel.world import World, open_world
from fastgrpo.training.trainer import Trainer
from tests.harness import tiny
from tests.harness.folders import t5
from tests.harness.folders import wan as wan_folder

KINDS = {"c10d::_allgather_base_": "gather", "c10d::_reduce_scatter_base_": "reduce"}


class Order(TorchDispatchMode):
    """Collectives and blocks' forwards as they come: (what, bytes of the whole tensor or the
    block's number).
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[str, int]] = []
        for number, block in enumerate(policy.blocks):
            block.register_forward_pre_hook(
                lambda *_, number=number: self.events.append(("forward", number))
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in KINDS:
            whole = max(
                (a for a in args if isinstance(a, Tensor)), key=lambda tensor: tensor.numel()
            )
            self.events.append((KINDS[func._schema.name], whole.numel() * whole.itemsize))
        return func(*args, **(kwargs or {}))


def loss(policy: Policy) -> Tensor:
    """A number that depends on every weight."""
    draws, device = torch.Generator().manual_seed(0), tiny.device()
    x = torch.randn(2, *policy.latent_shape(tiny.VIDEO), generator=draws).to(device)
    text, pooled = (
        torch.randn(2, *shape, generator=draws).to(device) for shape in ((5, 64), (32,))
    )
    t = torch.tensor([0.7, 0.4], device=device)
    return policy.velocity(x, t, {"text": text, "pooled": pooled}).square().mean()


def sharded(world: World, offload: bool = False) -> Policy:
    policy = tiny.load_policy()
    sharding.shard(policy, world, torch.float32, offload)
    return policy


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu().clone()
        for name, t in tensors.items()
    }


def with_prefetch(world: World, blocks: int) -> dict[str, Any]:
    """One forward and backward."""
    policy = sharded(world)
    sharding.prefetch(policy, blocks)
    with Order(policy) as order:
        value = loss(policy)
        order.events.append(("backward", 0))
        value.backward()
    gradients = whole(
        {name: p.grad for name, p in policy.network.named_parameters() if p.grad is not None}
    )
    return {"events": order.events, "gradients": gradients, "blocks": len(policy.blocks)}


def with_offload(
    policy: Policy, offload: bool, states: States | None = None
) -> tuple[Trainer, dict[str, Tensor]]:
    """The weights after two optimizer steps."""
    trainer = Trainer.create(policy, Optimizer(lr=1e-4, weight_decay=0.5), None, offload, states)
    for _ in range(2):
        loss(policy).backward()
        trainer.step()
    return trainer, whole({name: p.detach() for name, p in policy.network.named_parameters()})


def on_a_disk(world: World, folder: Path) -> tuple[Policy, States]:
    """The policy as a run puts it on an NVMe, in records of some shards."""
    policy = policies.outline(Model(family="hunyuan_video", path=str(tiny.FOLDER)), tiny.device())
    sharding.shard(policy, world, torch.float32, "nvme")
    file = StateFile.of_network(policy.network, folder, largest=2**20)
    memory = partial(torch.empty_like, device="cpu")
    streaming.fill(
        policy.network, torch.device("cpu"), memory=file.memory_of(policy.network, memory)
    )
    return policy, States(file, *open_transfers(file, pinned=False))


def mapped(policy: Policy, trainer: Trainer, file: StateFile) -> dict[str, list[bool]]:
    """Whether each parameter's shard and both its moments lie in the file."""
    first = file.view(0, torch.Size([1])).data_ptr()
    inside = range(first, first + file.size)
    found = {}
    for name, parameter in policy.network.named_parameters():
        state = trainer.optimizer.state[parameter]
        tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        found[name] = [t.data_ptr() in inside for t in locals_]
    return found


def wan_in_bfloat16(world: World, folder: Path, lora: Lora | None = None) -> dict[str, Any]:
    """One forward and backward of Wan, which keeps some of its weights in float32."""
    policy = policies.outline(wan_settings(folder), world.device, lora)
    sharding.shard(policy, world, torch.bfloat16)
    streaming.fill(policy.network, world.device)
    x, t, condition = (move(value, world.device) for value in wan_inputs())
    v = policy.velocity(x, t, condition)
    v.square().mean().backward()
    parameters = dict(policy.network.named_parameters())
    gradients = whole({name: p.grad for name, p in parameters.items() if p.grad is not None})
    return {"velocity": v.detach().cpu(), "gradients": gradients}


def wan_settings(folder: Path) -> Model:
    return Model(family="wan", path=str(folder), dtype="bfloat16")


def wan_inputs() -> tuple[Tensor, Tensor, Condition]:
    """x [2, C, F, H, W], t [2] and the text of two samples, all float32."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, wan_folder.CHANNELS, 2, 4, 6, generator=draws)
    text = torch.randn(2, wan_folder.LONGEST, t5.WIDTH, generator=draws)
    return x, torch.tensor([0.9873, 0.3141]), {"text": text}


def move(value: Any, device: torch.device) -> Any:
    """A tensor [...], or a condition's tensors, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: tensor.to(device) for name, tensor in value.items()}


def rank(file: str) -> None:
    """What one rank does; the first writes the file."""
    torch.set_num_threads(1)
    with open_world() as world:
        found: dict[str, Any] = {
            "prefetch": {blocks: with_prefetch(world, blocks) for blocks in (0, 1, 2)}
        }
        found["initial"] = whole(
            {name: p.detach() for name, p in sharded(world).network.named_parameters()}
        )
        (plain, found["plain"]), (offloaded, found["offloaded"]) = (
            with_offload(sharded(world, by), by) for by in (False, True)
        )
        with TemporaryDirectory() as disk:
            policy, states = on_a_disk(world, Path(disk))
            trainer, found["nvme"] = with_offload(policy, True, states)
            found["records"] = len(states.file.records)
            found["mapped"] = mapped(policy, trainer, states.file)
        # of a run that did not offload
        offloaded.optimizer.load_state_dict(plain.optimizer.state_dict())
        found["fused"] = [
            trainer.optimizer.param_groups[0]["fused"] for trainer in (plain, offloaded)
        ]
        folder = Path(f"{file}.wan")  # which the test wrote
        found["wan"] = wan_in_bfloat16(world, folder)
        found["wan with adapters"] = wan_in_bfloat16(world, folder, Lora(rank=2))
        if world.main:
            torch.save(found, file)
    leave(0)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    first = os.getpid()
    for number in (1, 0):  # what is imported is imported once
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        if number and os.fork():
            continue
        if number:
            die_with(first)
        rank(sys.argv[1])
