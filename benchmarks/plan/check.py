"""Is `fastgrpo plan` right: against real memory and bytes on this machine, and against the
simulation.

    python -m benchmarks.plan.check
    python -m benchmarks.plan.check --families
    python -m benchmarks.plan.check --table 1 8
    python -m benchmarks.plan.check --calibrate

The first: two networks that run here, memory by RSS, bytes on the wire. --families: each family's
published width, a few blocks, simulated and in closed form. --table: HunyuanVideo whole on 64 ranks
at these sp, minutes to an hour each. --calibrate: what a block keeps per token and channel, a
decoder per pixel, which are the numbers of a family's plan.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import ROOT
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.tools.plan.costs import compute
from fastgrpo.tools.plan.costs import memory as memory_costs
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.subject import family_plan, published

if TYPE_CHECKING:
    from fastgrpo.parallel.world import World

GIB, MIB = 2**30, 2**20
TINY = json.loads(
    (ROOT / "data" / "tiny_hunyuan_video" / "transformer" / "config.json").read_text()
)
HUNYUAN, FLUX_DEV, SD_1 = (
    published("hunyuan_video"),
    published("flux"),
    published("stable_diffusion"),
)
WAN_14B, WAN_1_3B = published("wan"), published("wan", "1.3b")
MIDDLE = HUNYUAN | {
    "num_attention_heads": 8,
    "num_layers": 4,
    "num_single_layers": 8,
    "num_refiner_layers": 1,
}
REAL: dict[
    str, tuple[Mapping[str, Any], tuple[int, int, int, int], int, int]
] = {  # latent, text tokens, batch
    "tiny": (TINY, (8, 3, 16, 16), 16, 32),
    "middle": (MIDDLE, (16, 3, 16, 16), 32, 1),
}
PLAIN = ("distributed.prefetch=0", "model.gradient_checkpointing=true", "model.keep=nothing")
FEW = {"num_layers": 2, "num_single_layers": 3}
FAMILIES: dict[
    str, tuple[str, Mapping[str, Any], tuple[int, int, int, int], int, Sequence[str]]
] = {
    "hunyuan_video": ("t2v_hunyuan", HUNYUAN | FEW, (16, 14, 60, 60), 256, ()),
    "hunyuan_video, sp 4": (
        "t2v_hunyuan",
        HUNYUAN | FEW,
        (16, 14, 60, 60),
        256,
        ("distributed.sp=4",),
    ),
    "hunyuan_video, all kept": (
        "t2v_hunyuan",
        HUNYUAN | FEW,
        (16, 5, 60, 60),
        256,
        ("model.gradient_checkpointing=false",),
    ),
    "skyreels_i2v, guided": (
        "i2v_skyreels",
        HUNYUAN | FEW | {"in_channels": 32},
        (16, 14, 50, 80),
        256,
        (),
    ),
    "flux": ("t2i_flux", FLUX_DEV | FEW, (16, 1, 90, 90), 512, ()),
    "wan 14 B": ("t2v_wan", WAN_14B | {"num_layers": 3}, (16, 9, 60, 104), 512, ()),
    "wan 1.3 B, sp 4": (
        "t2v_wan",
        WAN_1_3B | {"num_layers": 4},
        (16, 9, 60, 104),
        512,
        ("distributed.sp=4",),
    ),
    "stable_diffusion": (
        "t2i_sd",
        SD_1,
        (4, 1, 64, 64),
        77,
        ("model.gradient_checkpointing=false",),
    ),
    "stable_diffusion, recomputed": (
        "t2i_sd",
        SD_1,
        (4, 1, 64, 64),
        77,
        ("model.gradient_checkpointing=true",),
    ),
}


def job(
    recipe: Recipe,
    settings: Mapping[str, Any],
    latent: tuple[int, int, int, int],
    text: int,
    gpus: int,
) -> Job:
    """A job for a network that is in no folder."""
    planned = family_plan(recipe.model.family, settings)
    shards = mesh_shape(recipe.distributed, gpus, gpus)[1]
    return Job(
        recipe=recipe,
        network=planned.network,
        latent=latent,
        video=math.prod(latent[1:]) // planned.patch**2,
        text=text,
        gpus=gpus,
        ranks_per_node=8,
        replicas=gpus // shards,
        shards=shards,
    )


def real_recipe(batch: int) -> Recipe:
    recipe = ROOT / "launch" / "t2v_tiny.toml"
    overrides = [
        "model.gradient_checkpointing=true",
        "optimizer.ema_decay=0.0",
        f"optimizer.batch_size={batch}",
    ]
    return config.load(recipe, overrides)


def measure_memory(name: str) -> dict[str, float]:
    """Resident bytes that the network, its optimizer and one micro-batch add to this process."""
    from fastgrpo.parallel.world import open_world

    settings, latent, text, batch = REAL[name]
    with open_world() as world:
        # pages in the libraries
        _train(
            world,
            settings=TINY | {"num_layers": 1, "num_single_layers": 1},
            latent=(8, 1, 4, 4),
            text=4,
            batch=1,
        )
        gc.collect()
        return _train(world, settings=settings, latent=latent, text=text, batch=batch)


def _train(
    world: "World",
    settings: Mapping[str, Any],
    latent: tuple[int, int, int, int],
    text: int,
    batch: int,
) -> dict[str, float]:
    """Two micro-batches and optimizer steps, the first of which makes the optimizer's state."""
    import torch

    from fastgrpo.parallel import sharding
    from fastgrpo.tools.plan.simulation import rank
    from fastgrpo.tools.plan.simulation.rank import Sizes

    recipe, before = real_recipe(batch), _status("VmRSS")
    policy = rank.outline(recipe, settings)
    sharding.shard(policy, world, torch.float32)
    x, t, condition = rank.inputs(recipe, policy, Sizes(latent, text), batch)
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=1e-9)
    states = before
    for _ in range(2):
        states = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        rank.loss(policy, x, t, condition).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"states": states - before, "peak": _status("VmHWM") - before}


def _status(key: str) -> float:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) * 1024


def measure_bytes(name: str) -> dict[str, float] | None:
    """Bytes that one of two ranks sends in a micro-batch, counted at the collectives; of the first
    rank.
    """
    import torch

    from fastgrpo.parallel import sharding
    from fastgrpo.parallel.world import open_world
    from fastgrpo.tools.plan.simulation import rank
    from fastgrpo.tools.plan.simulation.counters import Sent
    from fastgrpo.tools.plan.simulation.rank import Sizes

    settings, _, text, _ = REAL[name]
    latent = (settings["in_channels"], 1, 8, 8)
    recipe = real_recipe(1)
    with open_world() as world:
        policy = rank.outline(recipe, settings)
        sharding.shard(policy, world, torch.float32)
        x, t, condition = rank.inputs(recipe, policy, Sizes(latent, text), 1)
        with Sent(1) as sent:
            rank.loss(policy, x, t, condition).backward()
        return dict(sent.sent) if world.main else None


def against_reality(names: Sequence[str]) -> None:
    """Print measured and planned memory and bytes of the networks that run here."""
    print(f"{'network':<8} {'':<22} {'measured':>12} {'planned':>12} {'difference':>11}")
    for name in names:
        settings, latent, text, batch = REAL[name]
        memory = _itself("--memory", name, ranks=0)
        alone = job(real_recipe(batch), settings, latent, text, 1)
        held, peak = (
            memory_costs.states(alone),
            memory_costs.update(alone, batch, accumulated=False),
        )
        _row(name, "states MiB", memory["states"] / MIB, sum(held.values()) / MIB)
        _row(name, "update's peak MiB", memory["peak"] / MIB, sum(peak.values()) / MIB)
        counted = _itself("--bytes", name, ranks=2)
        two = job(real_recipe(1), settings, (settings["in_channels"], 1, 8, 8), text, 2)
        planned = compute.micro_batch(two, 1)
        for kind, value in (("all-gather", planned.gather), ("reduce-scatter", planned.scatter)):
            _row(name, f"{kind} bytes", counted[kind], value)


def _row(name: str, what: str, measured: float, planned: float) -> None:
    difference = (planned - measured) / measured if measured else math.nan
    print(
        f"{name:<8} {what:<22} {measured:>12,.0f} {planned:>12,.0f} {difference:>+11.2%}",
        flush=True,
    )


def _itself(mode: str, name: str, ranks: int) -> dict[str, float]:
    """This script in processes of its own, whose allocator gives back what is freed."""
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    done = subprocess.run(
        [*start, "benchmarks.plan.check", mode, name],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return found


def against_simulation(names: Sequence[str]) -> None:
    """Print simulated and planned memory and FLOPs of each family, on 8 ranks."""
    from fastgrpo.tools.plan.simulation.rank import Ranks, Sizes, simulate

    head = ("update GiB", "forward TF", "update TF", "rollout GiB")
    print(
        f"{'':<30}" + "".join(f"{h:>26}" for h in head) + "   (simulated, closed form, difference)"
    )
    for name in names:
        recipe_name, settings, latent, text, overrides = FAMILIES[name]
        recipe = config.load(
            ROOT / "launch" / f"{recipe_name}.toml", [*PLAIN, "model.keep=attention", *overrides]
        )
        exact = simulate(recipe, settings, Sizes(latent, text), Ranks(8, 8))
        closed = job(recipe, settings, latent, text, 8)
        batch, drawn = recipe.optimizer.batch_size, recipe.rollout.at_once
        pairs = (
            (
                exact.update_peak / GIB,
                sum(memory_costs.update(closed, batch, False).values()) / GIB,
            ),
            (exact.forward_flops / 1e12, compute.forward(closed, batch).total / 1e12),
            (exact.update_flops / 1e12, compute.update(closed, batch).total / 1e12),
            (
                exact.rollout_peak / GIB,
                sum(memory_costs.rollout(closed, drawn, True).values()) / GIB,
            ),
        )
        cells = "".join(f"{a:>10,.2f}{b:>9,.2f}{(b - a) / a:>+7.1%}" for a, b in pairs)
        print(f"{name:<30}{cells}", flush=True)


def table(sizes: Sequence[int]) -> None:
    """Print the whole HunyuanVideo at 480 x 480 x 53 on 64 ranks: FSDP over all, and sp as
    asked.
    """
    from fastgrpo.tools.plan.simulation.rank import HELD, PASSES, Ranks, Sizes, simulate

    latent = (16, 14, 60, 60)
    for sp in sizes:
        overrides = [f"distributed.sp={sp}", "distributed.shard=64", *PLAIN]
        recipe = config.load(ROOT / "launch" / "t2v_hunyuan.toml", overrides)
        passes = (HELD, *PASSES[:2])
        exact = simulate(
            recipe,
            config=HUNYUAN,
            sizes=Sizes(latent, 256),
            ranks=Ranks(64, 8, units=("context_embedder",)),
            passes=passes,
        )
        closed = job(recipe, HUNYUAN, latent, 256, 64)
        closed = Job(**{**vars(closed), "network": closed.network.set_apart("context_embedder")})
        sent = compute.micro_batch(closed, 1)
        peak = sum(memory_costs.update(closed, 1, accumulated=False).values()) / GIB
        gib = {kind: count / GIB for kind, count in exact.update_sent.items()}
        rows = (
            ("peak GiB, tracker holding gradients", exact.held_peak / GIB, math.nan),
            ("peak GiB", exact.update_peak / GIB, peak),
            ("forward TF", exact.forward_flops / 1e12, compute.forward(closed, 1).total / 1e12),
            ("train TF", exact.update_flops / 1e12, compute.update(closed, 1).total / 1e12),
            ("gather GiB", gib.get("all-gather", 0.0), sent.gather / GIB),
            ("reduce-scatter GiB", gib.get("reduce-scatter", 0.0), sent.scatter / GIB),
            ("all-to-all GiB", gib.get("all-to-all", 0.0), sent.exchange / GIB),
            ("gather of tokens GiB", gib.get("gather of tokens", 0.0), sent.collect / GIB),
        )
        for what, simulated, planned in rows:
            print(
                f"sp {sp}  {what:<36} simulated {simulated:>10,.3f}  closed form {planned:>10,.3f}",
                flush=True,
            )


def main() -> None:
    # none is changed
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="networks, families, or sizes of sp; default: all")
    for mode in ("families", "table", "calibrate", "memory", "bytes"):
        parser.add_argument(f"--{mode}", action="store_true")
    asked = parser.parse_args()
    if asked.memory or asked.bytes:
        found = measure_memory(asked.names[0]) if asked.memory else measure_bytes(asked.names[0])
        if found is not None:
            print(json.dumps(found))
    elif asked.families:
        against_simulation(asked.names or list(FAMILIES))
    elif asked.table:
        table([int(name) for name in asked.names] or [1, 2, 4, 8])
    elif asked.calibrate:
        from benchmarks.plan import blocks, decoders

        blocks.calibrate()
        decoders.calibrate()
    else:
        against_reality(asked.names or list(REAL))


if __name__ == "__main__":
    main()
