"""Preflight's checks of the run's folder: shared by all ranks, with room for checkpoints.

A checkpoint that is written must read back unchanged.
"""

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

ZEROED = 2**26  # bytes of this rank's weights that are zero before loading, and held twice


@contextmanager
def scratch(folder: Path, world: World) -> Iterator[Path]:
    """Make an empty folder below `folder`, on every rank.

    The folder is removed at the end, with the empty parents that were made for it.
    """
    scratch_folder = folder / "preflight.partial"
    made = world.on_main(lambda: _make(scratch_folder))
    try:
        yield scratch_folder
    finally:
        if world.main:  # no collective: another rank may have failed
            shutil.rmtree(scratch_folder, ignore_errors=True)
            for parent in made:
                if not any(parent.iterdir()):
                    parent.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make the folder anew.  returns the parents that were missing, the innermost first"""
    shutil.rmtree(folder, ignore_errors=True)
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    return missing


def checkpoint_bytes(trainer: Trainer) -> int:
    """Bytes of a checkpoint of all ranks: trained weights, AdamW's two moments, the average."""
    trained = [p for p in trainer.policy.network.parameters() if p.requires_grad]
    return sum(p.numel() * p.element_size() for p in trained) * (4 if trainer.ema else 3)


def space(parts: Parts, folder: Path, size: int | None = None) -> Finding:
    """Check that every rank sees the run's folder, with room for the run's checkpoints.

    folder: an empty folder directly in the run's folder
    size: bytes of a checkpoint that was written; None: by `checkpoint_bytes`
    """
    world, keep = parts.world, parts.recipe.checkpoint.keep
    word = secrets.token_hex(8)
    free, word = world.on_main(lambda: (shutil.disk_usage(_with_word(folder, word)).free, word))
    blind = [rank for rank, sees in enumerate(gathered(_sees(folder, word), world)) if not sees]
    if blind:
        problem = f"rank {blind[0]} does not see what rank 0 writes into {folder.parent}"
        remedy = "choose a run.dir on a file system that all nodes share"
        return Finding("folder", False, problem, remedy)
    size = size or checkpoint_bytes(parts.trainer)
    needed = (keep + 2) * size
    checkpoints = f"{keep + 2} checkpoints of {_formatted(size)} need {_formatted(needed)}"
    message = f"{_formatted(free)} free in {folder.parent}, {checkpoints}"
    remedy = f"free {_formatted(needed - free)} there, choose another run.dir, "
    remedy += f"or lower checkpoint.keep={keep}"
    return Finding("folder", free >= needed, message, remedy)


def _with_word(folder: Path, word: str) -> Path:
    """The folder, in which the word is written."""
    (folder / "word").write_text(word)
    return folder


def _sees(folder: Path, word: str, patience_s: float = 5.0) -> bool:
    """Whether this rank sees the main rank's file; a network file system may be late."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return (folder / "word").read_text() == word
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _formatted(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < GIB else f"{size / GIB:,.1f} GiB"


@dataclass(frozen=True)
class Saved:
    """The finding of a checkpoint, with its size and time."""

    finding: Finding
    bytes: int
    seconds: float  # of saving, on the slowest rank


def save_and_load(parts: Parts, probe: Trainer, folder: Path) -> Saved:
    """Write a checkpoint as the run will, and read it back over changed weights and moments.

    probe: a trainer of the same weights with its own optimizer, whose moments are not needed
    """
    settings = parts.recipe.checkpoint.model_copy(update={"keep": 1, "keep_best": False})
    trial = folder / "trial"
    checkpoints = Checkpoints(trial, settings, parts.world)
    fill_moments(probe.optimizer, None)
    start = time.perf_counter()
    problem = checkpoints.save(probe, Progress(iteration=1, seconds=3.5)) or checkpoints.finish()
    seconds = largest(time.perf_counter() - start, parts.world)
    if problem is not None:
        finding = Finding("checkpoint", False, problem, "see that run.dir can be written")
        return Saved(finding, bytes=0, seconds=seconds)
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
    fill_moments(probe.optimizer, 0.0)  # the run's own, where they lie on a disk
    wrong = [rank for rank, fine in enumerate(gathered(restored, parts.world)) if not fine]
    parts.world.on_main(lambda: shutil.rmtree(trial))  # no rank reads it any more
    written = f"{_formatted(size)} written in {seconds:.2f} s"
    finding = Finding("checkpoint", True, f"{written} and read back as it was")
    if wrong:
        remedy = "the file system does not give back what was written; choose another run.dir"
        problem = f"{written}, read back otherwise on rank {wrong[0]}"
        finding = Finding("checkpoint", False, problem, remedy)
    return Saved(finding, bytes=size, seconds=seconds)


def fill_moments(optimizer: torch.optim.Optimizer, value: float | None) -> None:
    """Give AdamW the state that its first step would make, with both moments filled.

    value: of the moments; None: 1 / (n + 2) for the n-th parameter
    """
    for number, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state[parameter]
        state.setdefault("step", torch.zeros(()))
        moment = _moment(number) if value is None else value
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter)).fill_(moment)


def moments_are_filled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the moments are those of `fill_moments(optimizer, None)`."""
    return all(
        bool((local(optimizer.state[parameter][name]) == torch.tensor(_moment(number))).all())
        for number, parameter in enumerate(_parameters(optimizer))
        for name in ("exp_avg", "exp_avg_sq")
    )


def _moment(number: int) -> float:
    return 1.0 / (number + 2)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's parameters, each [...], in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _zero_some(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Set the first of this rank's trained weights to zero, in all at most ZEROED bytes.

    returns (weight [...], a copy of this rank's part) for each
    """
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
