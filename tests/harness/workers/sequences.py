"""One of two ranks that share each sequence: every family's network against its own on one rank.

argv: folder, file
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from fastgrpo.core.config import Distributed, Lora, Model, Video
from fastgrpo.core.policy import Policy, Prompt, move, stack
from fastgrpo.core.processes import leave
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World, open_world

# frames, height, width: numbers of video tokens that two ranks do not divide, or divide unevenly
SIZES = {
    "hunyuan_video": (5, 40, 24),
    "hunyuan_video_15": (9, 20, 12),  # 45 tokens; one branch has quoted text
    "hunyuan_video_15_i2v": (9, 20, 12),  # the same beside the image's places
    "skyreels_i2v": (5, 40, 24),
    "flux": (1, 36, 28),
    "flux_2": (1, 36, 28),  # 9 x 7 tokens, through dual-stream and fused single-stream blocks
    "qwen_image": (1, 40, 24),  # 5 x 3 tokens
    "z_image": (1, 40, 24),  # 5 x 3 tokens, which learned ones make 32
    "stable_diffusion_3": (1, 36, 28),  # 9 x 7 tokens
    "wan": (5, 40, 24),
    "wan_a14b": (5, 40, 24),  # rows of both networks' times
    "wan_a14b_i2v": (5, 40, 24),  # the same, and a given clip
    "wan_i2v_14b": (5, 40, 24),  # 2 x 5 x 3 tokens
    "wan_i2v": (9, 48, 16),  # 9 tokens, of which 3 have time 0
}
TEXT = 'a red boat "A" sails over the sea behind the hills, and many birds fly'


def compare(family: str, folder: Path, lora: Lora, world: World) -> dict[str, float]:
    """Largest difference of the velocity, and of a parameter's gradient over the whole gradient's
    norm.
    """
    frames, height, width = SIZES[family]
    video = Video(frames=frames, height=height, width=width)
    network = str(folder / family / "transformer") if family == "skyreels_i2v" else None
    cfg = 1.0 if family == "flux" else 3.0  # with texts of two lengths, so that one is padded
    settings = Model(
        family=family,
        path=str(folder / family),
        network=network,
        cfg=cfg,
        gradient_checkpointing=bool(lora.rank),
    )
    with policies.encoder(settings, video, world.device) as encode:
        condition = move(stack(encode([Prompt(TEXT, folder / "image.png")]) * 2), world.device)
        negative = move(encode.negative(""), world.device) if cfg > 1 else None
    alone, shared = (prepared(settings, lora, world.device) for _ in range(2))
    sharding.shard(shared, world, torch.float32)
    shape = alone.latent_shape(video)
    draws = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, *shape, generator=draws).to(world.device) for _ in range(2))
    results = []
    for policy in (alone, shared):
        policy.negative = negative
        v = policy.velocity(x, torch.tensor([0.7, 0.4], device=world.device), condition)
        (v * weight).mean().backward()
        grads = {
            name: p.grad for name, p in policy.network.named_parameters() if p.grad is not None
        }
        whole = {
            name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()
        }
        results.append((v.detach(), whole))
    (expected, grads), (actual, others) = results
    assert grads.keys() == others.keys()
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    worst = max(((others[name] - grad).norm() / norm).item() for name, grad in grads.items())
    return {"velocity": (actual - expected).abs().max().item(), "gradient": worst}


def prepared(settings: Model, lora: Lora, device: torch.device) -> Policy:
    """The policy, its adapters moved from their start, where they change nothing."""
    policy = policies.load(settings, device, lora)
    draws = torch.Generator().manual_seed(1)
    for name, parameter in policy.network.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws).to(device)
    return policy


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with open_world(Distributed(sp=2)) as world:
        if world.main:
            Image.new("RGB", (40, 32), (10, 200, 90)).save(folder / "image.png")
            for family in SIZES:
                importlib.import_module(f"tests.harness.folders.{family}").write(folder / family)
        world.barrier()
        found = {
            f"{family} rank {lora.rank}": compare(family, folder, lora, world)
            for family in SIZES
            for lora in (Lora(), Lora(rank=2))
        }
        if world.main:
            Path(sys.argv[2]).write_text(json.dumps(found))
    leave(0)
