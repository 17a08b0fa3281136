"""One of two ranks: preflight as it is, then with each planted fault.

argv: folder, file, replicas or shared

Writes what was said with each fault, by its name, and whether anything but that was changed.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.algorithm import noise, samplers
from fastgrpo.algorithm.transitions import gaussian_log_prob
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Decoded
from fastgrpo.core.processes import leave
from fastgrpo.core.reward import Scores
from fastgrpo.parallel import sequence_parallel
from fastgrpo.parallel.world import Group, World, open_world
from fastgrpo.rewards.tiny_world import TinyWorld
from fastgrpo.run.stopping import Signals, Stop
from fastgrpo.session import open_session
from fastgrpo.tools.preflight import checks, run_folder
from fastgrpo.tools.preflight.finding import Parts, fingerprints
from fastgrpo.tools.preflight.iteration import Probe
from fastgrpo.tools.preflight.run import elsewhere, first_prompts
from fastgrpo.tools.preflight.run_folder import scratch
from fastgrpo.training.conditions import encode
from tests.harness import runs

SETTINGS = [*runs.SMALL, "prompts.limit=20", "rewards.0.where=process"]


@contextmanager
def opened(world: World, settings: list[str], folder: Path) -> Iterator[Parts]:
    """A session of the small recipe, whose own folder is removed."""
    recipe = config.load(runs.RECIPE, [*SETTINGS, *settings, f"run.dir={folder}"])
    with ExitStack() as stack:
        place = stack.enter_context(scratch(folder, world))
        stop = Stop(place, stack.enter_context(Signals()), world)
        found = first_prompts(recipe, encode.read_prompts(recipe, world))
        yield Parts.of(open_session(elsewhere(recipe, place), world, stack, found, stop))


def said(parts: Parts) -> list[str]:
    """What quick says, and at the end the error's text where it raises."""
    lines: list[str] = []
    try:
        checks.quick(parts, lines.append)
    except UserError as error:
        lines.append(str(error))
    return lines


def state(parts: Parts) -> str:
    """Everything that a run would compute from, of this rank."""
    trainer = parts.trainer
    tensors = [*parts.policy.network.parameters(), *trainer.ema.values()]
    kept = fingerprints(tensors, parts.world).tolist(), torch.get_rng_state().sum().item()
    counts = (
        trainer.updates,
        trainer.skipped,
        len(trainer.optimizer.state),
        trainer.optimizer.param_groups[0]["lr"],
    )
    grads = [name for name, p in parts.policy.network.named_parameters() if p.grad is not None]
    folder = parts.recipe.run.dir
    # by the rank that makes and removes them
    files = parts.world.on_main(
        lambda: sorted(path.name for path in folder.rglob("*") if "heartbeats" not in path.parts)
    )
    return repr((kept, counts, grads, files))


def rounded(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return gaussian_log_prob(x_next, mean, std).bfloat16().float()


def rounded_in_the_update(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (rounded if torch.is_grad_enabled() else gaussian_log_prob)(x_next, mean, std)


def by_rank(key: noise.Key, device: torch.device | str = "cpu") -> torch.Generator:
    return generator((*key, int(os.environ["RANK"])), device)


def swapped(x: Tensor, dim: int, total: int, sp: Group) -> Tensor:
    """The ranks' parts in the wrong order."""
    return gather(x, dim, total, sp).roll(len(sp.part(total, 0)), dim)


def moved(rank: int) -> Callable[..., Scores]:
    """A reward that gives higher scores from that rank on."""

    def call(self: TinyWorld, pixels: Tensor, prompts: list[str], fps: float) -> Scores:
        scores = score(self, pixels, prompts, fps)
        higher = 0.01 * (int(os.environ["RANK"]) >= rank)
        return Scores(
            {part: values + higher for part, values in scores.values.items()}, scores.valid
        )

    return call


def only_small(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
    """Leaves each replica with its own gradients, and all else in order."""
    return None if tensor.numel() > 10_000 else all_reduce(tensor, *arguments, **options)


def plain(decoded: Decoded) -> Decoded:
    return replace(decoded, pixels=torch.full_like(decoded.pixels, 7))


def broken(output: Any) -> Any:
    """A VAE's output with one value of its first clip that is not a number."""
    output.sample[0, 0, 0, 0, 0] = float("nan")
    return output


all_reduce, generator = dist.all_reduce, noise.generator
gather, score = sequence_parallel.gather, TinyWorld.__call__


def faults(parts: Parts) -> dict[str, Any]:
    """What to plant, by the name that the test expects it under."""
    decode = parts.policy.decode
    vae: Any = parts.policy.vae
    decode_of = vae.decode
    return {
        "nothing": mock.patch.object(noise, "generator", generator),
        "a bf16 log-prob": mock.patch.object(samplers, "gaussian_log_prob", rounded),
        "a bf16 log-prob in the update": mock.patch.object(
            samplers, "gaussian_log_prob", rounded_in_the_update
        ),
        "a seed that depends on the rank": mock.patch.object(noise, "generator", by_rank),
        "a broken sp gather": mock.patch.object(sequence_parallel, "gather", swapped),
        "a moved golden clip": mock.patch.object(TinyWorld, "__call__", moved(0)),
        "a moved golden clip on one rank": mock.patch.object(TinyWorld, "__call__", moved(1)),
        "no room": mock.patch.object(
            shutil, "disk_usage", lambda folder: mock.Mock(free=30 * 2**20)
        ),
        "replicas that do not reduce": mock.patch.object(dist, "all_reduce", only_small),
        "a decoder that overflows": mock.patch.object(
            vae, "decode", lambda z: broken(decode_of(z))
        ),
        "a blank decoder": mock.patch.object(
            parts.policy, "decode", lambda *given: plain(decode(*given))
        ),
    }


def tried(parts: Parts, names: list[str]) -> dict[str, list[str]]:
    """What was said with each fault."""
    planted = faults(parts)
    found = {}
    for name in names:
        with planted[name]:
            found[name] = said(parts)
    return found


@contextmanager
def one_weight_moved(parts: Parts) -> Iterator[None]:
    """On the second rank."""
    weight = next(parts.policy.network.parameters()).detach().to_local().flatten()  # type: ignore[attr-defined]
    before = weight[0].clone()
    weight[0] += parts.world.rank * 1e-3
    yield
    weight[0] = before


def replicas(folder: Path, found: dict[str, Any]) -> None:
    """Two replicas: everything, with the whole of preflight."""
    with (
        open_world(config.Distributed(shard=1)) as world,
        opened(world, ["distributed.shard=1"], folder) as parts,
    ):
        before = state(parts)
        found["faults"] = tried(
            parts, [name for name in faults(parts) if name != "a broken sp gather"]
        )
        with one_weight_moved(parts):
            found["faults"]["another weight"] = said(parts)
        place = parts.recipe.run.dir / "whole"
        if world.main:
            place.mkdir()
        world.barrier()
        lines: list[str] = []
        green, phases = checks.thorough(parts, place, lambda finding: lines.append(finding.line))
        found["whole"] = {
            "green": green,
            "lines": lines,
            "phases": [vars(phase) for phase in phases],
        }
        with mock.patch("torch.distributed.checkpoint.load"):
            saved = run_folder.save_and_load(parts, Probe.of(parts.trainer, world), place)
            found["a load that reads nothing"] = saved.finding.line
        if world.main:
            shutil.rmtree(place)
        found["state"] = (before, state(parts))


def shared(folder: Path, found: dict[str, Any]) -> None:
    """Two ranks that share each sequence."""
    with (
        open_world(config.Distributed(sp=2)) as world,
        opened(world, ["distributed.sp=2"], folder) as parts,
    ):
        before = state(parts)
        found["faults"] = tried(
            parts, ["nothing", "a broken sp gather", "a seed that depends on the rank"]
        )
        found["state"] = (before, state(parts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    {"replicas": replicas, "shared": shared}[sys.argv[3]](Path(sys.argv[1]), told)
    Path(f"{sys.argv[2]}.{os.environ['RANK']}").write_text(json.dumps(told))
    leave(0)
