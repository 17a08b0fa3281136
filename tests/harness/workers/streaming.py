"""One of two ranks that read a network too large for either.

argv: its folder, a small one's, file for the result

The peak is the kernel's own VmHWM, reset before: it counts the shard and all else that the process
has in memory, the mapped pages of the file under way included, though these the kernel could take
back. So it bounds what is held.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch.distributed.tensor import DTensor

from fastgrpo.core.processes import leave
from fastgrpo.models.loading import streaming
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World, open_world


def memory(entry: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def sharded(folder: Path, world: World) -> HunyuanVideoTransformer3DModel:
    network = streaming.outline(HunyuanVideoTransformer3DModel, folder, world.device)
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    policy: Any = SimpleNamespace(network=network, blocks=blocks)
    sharding.shard(policy, world, torch.bfloat16)
    streaming.fill(network, world.device)
    return network


def measured(folder: Path, world: World) -> dict[str, object]:
    """What loading took, and whether the marked rows lie where they should and all else is 0."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, begun = memory("VmRSS"), time.perf_counter()
    network = sharded(folder, world)
    seconds, peak = time.perf_counter() - begun, memory("VmHWM") - before
    wrong = []
    for name, tensor in network.state_dict().items():
        local, share = tensor.to_local(), -(-len(tensor) // 2)
        first = share * world.rank
        ends = [local[0].flatten()[0].item(), local[-1].flatten()[0].item()]
        marks = [first + 1, first + len(local)]
        if ends != marks or local.sum().item() != sum(set(marks)):
            wrong.append(name)
    shard = sum(tensor.to_local().nbytes for tensor in network.state_dict().values())
    largest = max(
        tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()
    )
    return {"seconds": seconds, "peak": peak, "shard": shard, "largest": largest, "wrong": wrong}


def differing(folder: Path, world: World) -> list[str]:
    """Tensors of a small network that are not what diffusers reads, put together from both
    ranks.
    """
    expected = HunyuanVideoTransformer3DModel.from_pretrained(
        folder, torch_dtype=torch.float32
    ).state_dict()
    found = sharded(folder, world).state_dict()
    assert found.keys() == expected.keys() and all(
        isinstance(tensor, DTensor) for tensor in found.values()
    )
    return [
        name
        for name, tensor in found.items()
        if not torch.equal(tensor.full_tensor().cpu(), expected[name])
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    large, small, file = (Path(argument) for argument in sys.argv[1:4])
    with open_world() as world:
        result = {"differing": differing(small, world)} | measured(large, world)
        file.with_suffix(f".{world.rank}.json").write_text(json.dumps(result))
    leave(0)
