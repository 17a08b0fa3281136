"""Preflight's checks of the run's folder: all ranks see it, it has room, and a checkpoint comes back as it was."""

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress
from fastgrpo.core.units import GIB, MIB
from fastgrpo.parallel.world import World
from fastgrpo.tools.preflight.finding import Finding, Parts, gathered, largest, local
from fastgrpo.training.trainer import Trainer

ZEROED = 2**26  # bytes of this rank's weights that are set to zero before loading, and held twice meanwhile


@contextmanager
def scratch(folder: Path, world: World) -> Iterator[Path]:
    """An empty folder below `folder`, on every rank; removed at the end, with those above it that were made for it."""
    place = folder / "preflight.partial"
    made = world.on_main(lambda: _make(place))
    try:
        yield place
    finally:
        if world.main:  # no collective: another rank may have failed
            shutil.rmtree(place, ignore_errors=True)
            for one in made:
                if not any(one.iterdir()):
                    one.rmdir()


def _make(place: Path) -> list[Path]:
    """Make the folder anew.  returns the folders above it that were not there, the innermost first"""
    shutil.rmtree(place, ignore_errors=True)
    made = [one for one in place.parents if not one.exists()]
    place.mkdir(parents=True)
    return made


def checkpoint_bytes(trainer: Trainer) -> int:
    """Of a checkpoint: weights that are trained, AdamW's two moments and the moving average, of all ranks together."""
    trained = [p for p in trainer.policy.network.parameters() if p.requires_grad]
    return sum(p.numel() * p.element_size() for p in trained) * (4 if trainer.ema else 3)


def space(parts: Parts, folder: Path, size: int | None = None) -> Finding:
    """Every rank sees the run's folder, and it has room for the checkpoints that the run will hold at a time.

    folder: an empty one right in the run's folder;  size: bytes of a checkpoint, where one was written
    """
    world, keep = parts.world, parts.recipe.checkpoint.keep
    word = secrets.token_hex(8)
    free, word = world.on_main(lambda: (shutil.disk_usage(_with_word(folder, word)).free, word))
    blind = [rank for rank, sees in enumerate(gathered(_sees(folder, word), world)) if not sees]
    if blind:
        told = f"rank {blind[0]} does not see what rank 0 writes into {folder.parent}"
        return Finding("folder", False, told, "choose a run.dir on a file system that all nodes share")
    one = size or checkpoint_bytes(parts.trainer)
    needed = (keep + 2) * one
    told = f"{_told(free)} free in {folder.parent}, {keep + 2} checkpoints of {_told(one)} need {_told(needed)}"
    remedy = f"free {_told(needed - free)} there, choose another run.dir, or lower checkpoint.keep={keep}"
    return Finding("folder", free >= needed, told, remedy)


def _with_word(folder: Path, word: str) -> Path:
    (folder / "word").write_text(word)
    return folder


def _sees(folder: Path, word: str, patience_s: float = 5.0) -> bool:
    """Whether the main rank's file is there; a network file system may be late."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return (folder / "word").read_text() == word
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _told(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < GIB else f"{size / GIB:,.1f} GiB"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint took."""

    finding: Finding
    bytes: int
    seconds: float  # of saving it, on the slowest rank


def save_and_load(parts: Parts, probe: Trainer, folder: Path) -> Saved:
    """Write a checkpoint as the run will and read it back over changed weights and moments, which it must restore.

    probe: a trainer of the same weights with an optimizer of its own, whose moments are not needed
    """
    settings = parts.recipe.checkpoint.model_copy(update={"keep": 1, "keep_best": False})
    trial = folder / "trial"
    checkpoints = Checkpoints(trial, settings, parts.world)
    fill_moments(probe.optimizer, None)
    start = time.perf_counter()
    problem = checkpoints.save(probe, Progress(iteration=1, seconds=3.5)) or checkpoints.finish()
    seconds = largest(time.perf_counter() - start, parts.world)
    if problem is not None:
        return Saved(Finding("checkpoint", False, problem, "see that run.dir can be written"), 0, seconds)
    size = parts.world.on_main(lambda: sum(file.stat().st_size for file in trial.glob("step-1/*")))
    fill_moments(probe.optimizer, 0.0)
    zeroed = _zero_some(probe)
    try:
        progress = checkpoints.load(probe)
        restored = all(torch.equal(local(weight.detach()), before) for weight, before in zeroed)
    finally:
        for weight, before in zeroed:
            local(weight.detach()).copy_(before)
    restored = restored and moments_are_filled(probe.optimizer) and progress.seconds == 3.5
    wrong = [rank for rank, fine in enumerate(gathered(restored, parts.world)) if not fine]
    parts.world.on_main(lambda: shutil.rmtree(trial))  # which no rank reads any more
    told = f"{_told(size)} written in {seconds:.2f} s"
    finding = Finding("checkpoint", True, f"{told} and read back as it was")
    if wrong:
        remedy = "the file system does not give back what was written; choose another run.dir"
        finding = Finding("checkpoint", False, f"{told}, read back otherwise on rank {wrong[0]}", remedy)
    return Saved(finding, size, seconds)


def fill_moments(optimizer: torch.optim.Optimizer, value: float | None) -> None:
    """Give AdamW the state that its first step would make, both moments of the n-th parameter filled with a value.

    value: none = 1 / (n + 2)
    """
    for number, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state[parameter]
        state.setdefault("step", torch.zeros(()))
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter)).fill_(_moment(number) if value is None else value)


def moments_are_filled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether they are those of `fill_moments(optimizer, None)`."""
    return all(
        bool((local(optimizer.state[parameter][name]) == torch.tensor(_moment(number))).all())
        for number, parameter in enumerate(_parameters(optimizer))
        for name in ("exp_avg", "exp_avg_sq")
    )


def _moment(number: int) -> float:
    return 1.0 / (number + 2)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _zero_some(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Set the first of this rank's trained weights to zero.  returns them with what they were"""
    zeroed: list[tuple[torch.Tensor, torch.Tensor]] = []
    size = 0
    for weight in _parameters(trainer.optimizer):
        mine = local(weight.detach())
        size += mine.numel() * mine.element_size()
        if size > ZEROED and zeroed:
            break
        zeroed.append((weight, mine.clone()))
        mine.zero_()
    return zeroed
