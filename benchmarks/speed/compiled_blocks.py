"""What torch.compile, block by block, does to the ratio, the gradients and the number of graphs.

    python -m benchmarks.speed.compiled_blocks FOLDER [--backend inductor] [--dtype float32]
    [--static]

The rollout runs without gradients and the update with them, so a block is compiled to two different
graphs. The ratio of an unchanged policy must be 1 all the same: the log-probability under no_grad,
in half batches, is compared with the one that the update sees, for texts of several lengths.
FOLDER: a HunyuanVideo one, such as data/tiny_hunyuan_video.
"""

import argparse
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgrpo.algorithm.transitions import gaussian_log_prob
from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.models.loading import policies

VIDEO = Video(frames=9, height=24, width=40)
TEXT_LENGTHS = (5, 7, 11)
SAMPLES = 8
ETA = 0.4


def condition(policy: Policy, length: int, draws: torch.Generator) -> Condition:
    """A made-up text of this many tokens for each sample."""
    config: Any = policy.network.config
    text = torch.randn(SAMPLES, length, config.text_embed_dim, generator=draws)
    pooled = torch.randn(SAMPLES, config.pooled_projection_dim, generator=draws)
    return {"text": text, "pooled": pooled}


def measure(policy: Policy, length: int) -> tuple[float, float, float]:
    """max |log ratio|, seconds of the rollout's forwards, seconds of forward and backward; adds to
    the gradients
    """
    draws = torch.Generator().manual_seed(length)
    shape = policy.latent_shape(VIDEO)
    x, noise = (torch.randn(SAMPLES, *shape, generator=draws) for _ in range(2))
    texts = condition(policy, length, draws)
    grid = policy.time_grid(6, None, shape)
    step = torch.arange(SAMPLES) % 4
    t, t_next = grid[step], grid[step + 1]
    begun = time.perf_counter()
    with torch.no_grad():
        halves = [slice(0, SAMPLES // 2), slice(SAMPLES // 2, SAMPLES)]
        v = torch.cat(
            [policy.velocity(x[h], t[h], {key: of[h] for key, of in texts.items()}) for h in halves]
        )
        mean, std = policy.transition(x, v=v, t=t, t_next=t_next, eta=ETA)
        x_next = mean + std * noise
        old = gaussian_log_prob(x_next, mean, std)
    drawn = time.perf_counter()
    mean, std = policy.transition(x, v=policy.velocity(x, t, texts), t=t, t_next=t_next, eta=ETA)
    new = gaussian_log_prob(x_next, mean, std)
    (new * torch.linspace(-1, 1, SAMPLES)).sum().backward()
    return (new - old).abs().max().item(), drawn - begun, time.perf_counter() - drawn


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of every parameter that has one, by name, in float32."""
    return {
        name: p.grad.float() for name, p in policy.network.named_parameters() if p.grad is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--static", action="store_true", help="a graph for each size, instead of one for all"
    )
    arguments = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, {arguments.backend}, "
        f"{arguments.dtype}"
    )
    settings = Model(family="hunyuan_video", path=str(arguments.folder), dtype=arguments.dtype)
    found = {}
    for name in ("eager", "compiled"):
        policy = policies.load(settings, torch.device("cpu"))
        policy.network.to(getattr(torch, arguments.dtype))
        counter = CompileCounterWithBackend(arguments.backend)
        if name == "compiled":
            for block in policy.blocks:
                block.compile(backend=counter, dynamic=not arguments.static)
        for length in TEXT_LENGTHS:
            ratio, rollout, update = measure(policy, length)
            print(
                f"  {name:<9} {length:>2} text tokens: max |log ratio| {ratio:.1e}, {rollout:.1f} "
                f"+ {update:.1f} s",
                end="",
            )
            print(
                f", {counter.frame_count} graphs so far" if name == "compiled" else "", flush=True
            )
        found[name] = gradients(policy)
    norm = torch.stack([grad.norm() for grad in found["eager"].values()]).norm()
    worst = max(
        (found["compiled"][name] - grad).norm() / norm for name, grad in found["eager"].items()
    )
    print(f"  gradients, compiled against eager: {worst.item():.1e} of the whole norm")


if __name__ == "__main__":
    main()
