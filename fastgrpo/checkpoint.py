"""Checkpoints: sharded DCP folders, published atomically, and resuming from them.

A checkpoint is written to `step-N.partial`, flushed to disk and renamed to `step-N`; then `latest` is replaced. So a
folder named `step-N` is whole, whenever the process was killed, and no folder is ever written twice. Randomness is
keyed, so no generator's state is stored.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastgrpo.config import Checkpoint
from fastgrpo.distributed import World
from fastgrpo.errors import UserError
from fastgrpo.update import Trainer


@dataclass
class Progress:
    """Where a run stands, beside weights and optimizer state."""

    iteration: int = 0  # iterations done
    best_reward: float | None = None  # the highest mean training reward between two checkpoints
    best: str | None = None  # the checkpoint that ended that span
    rewards: tuple[float, ...] = ()  # of the iterations since the last checkpoint
    seconds: float = 0.0  # of training, over all attempts

    def close_span(self, checkpoint: str) -> None:
        """Note the checkpoint as the best if the mean reward since the one before is the highest."""
        rewards = [reward for reward in self.rewards if math.isfinite(reward)]
        if rewards:
            mean = sum(rewards) / len(rewards)
            if self.best_reward is None or mean > self.best_reward:
                self.best_reward, self.best = mean, checkpoint
        self.rewards = ()


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, settings: Checkpoint, world: World) -> None:
        self.folder = folder
        self.settings = settings
        self.world = world

    def newest(self) -> Path | None:
        """The newest published checkpoint."""
        return max(self._published(), key=number, default=None)

    def _published(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("step-*") if path.name[5:].isdecimal()), key=number)

    def load(self, trainer: Trainer) -> Progress:
        """Continue from the newest checkpoint, on every rank; a fresh Progress where there is none.

        Raises UserError naming a file that is missing or truncated.
        """
        path = self.world.on_main(self._newest_intact)
        if path is None:
            return Progress()
        state = _state(trainer)
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(trainer.policy.network, state["model"])
        set_optimizer_state_dict(trainer.policy.network, trainer.optimizer, optim_state_dict=state["optimizer"])
        numbers = json.loads((path / "progress.json").read_text())
        trainer.updates, trainer.skipped = numbers.pop("updates"), numbers.pop("skipped")
        return Progress(**numbers | {"rewards": tuple(numbers["rewards"])})

    def save(self, trainer: Trainer, progress: Progress) -> Path:
        """Write, publish and prune, on every rank. Raises UserError where the disk refuses; the last one stays."""
        path = self.folder / f"step-{progress.iteration}"
        partial = path.with_suffix(".partial")
        progress.close_span(path.name)
        self.world.on_main(lambda: _fresh(partial))
        try:
            dcp.save(_state(trainer), checkpoint_id=partial)
        except CheckpointException as failure:  # a BaseException, raised on every rank
            self.world.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            cause = next(iter(failure.failures.values()))[0]
            raise UserError(
                f"run.dir={self.folder.parent}: checkpoint {path.name} could not be written ({cause}); free space "
                "there and start again: the run resumes from the checkpoint before."
            ) from None
        self.world.on_main(lambda: self._publish(partial, path, trainer, progress))
        return path

    def _publish(self, partial: Path, path: Path, trainer: Trainer, progress: Progress) -> None:
        """On the main rank: manifest, flush, rename, replace `latest`, prune."""
        try:
            numbers = vars(progress) | {"updates": trainer.updates, "skipped": trainer.skipped}
            (partial / "progress.json").write_text(json.dumps(numbers, indent=1))
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            (partial / "manifest.json").write_text(json.dumps(sizes, indent=1))
            for file in partial.iterdir():
                _flush(file)
            _flush(partial)
            os.rename(partial, path)
            latest = self.folder / "latest.tmp"
            latest.write_text(path.name + "\n")
            _flush(latest)
            os.replace(latest, self.folder / "latest")
            _flush(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"run.dir={self.folder.parent}: checkpoint {path.name} could not be published ({error.strerror}); "
                "free space there and start again: the run resumes from the checkpoint before."
            ) from None
        self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        """Remove all but the newest ones and the best. Renamed first: a half-removed folder must not look whole."""
        for path in self._published()[: -self.settings.keep]:
            if not (self.settings.keep_best and path.name == progress.best):
                doomed = path.with_suffix(".partial")
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _newest_intact(self) -> Path | None:
        """The newest checkpoint, its files compared with its manifest."""
        for partial in self.folder.glob("step-*.partial"):
            shutil.rmtree(partial)
        path = self.newest()
        if path is None:
            return None
        remedy = f"remove the folder {path} to resume from the one before, or choose another run.dir."
        try:
            sizes = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"checkpoint={path}: manifest.json is missing or unreadable; {remedy}") from None
        for name, size in sizes.items():
            file = path / name
            if not file.is_file():
                raise UserError(f"checkpoint={path}: {name} is missing; {remedy}")
            if file.stat().st_size != size:
                raise UserError(
                    f"checkpoint={path}: {name} has {file.stat().st_size} bytes instead of {size}; {remedy}"
                )
        return path


def _state(trainer: Trainer) -> dict[str, Any]:
    """What is stored: sharded tensors, by the names of the unsharded network."""
    network = trainer.policy.network
    return {
        "model": get_model_state_dict(network),
        "optimizer": get_optimizer_state_dict(network, trainer.optimizer),
        "ema": trainer.ema,
    }


def number(checkpoint: Path) -> int:
    """The iterations that a checkpoint's folder names."""
    return int(checkpoint.name.removeprefix("step-"))


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
