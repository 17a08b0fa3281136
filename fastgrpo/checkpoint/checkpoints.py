"""Checkpoints: sharded DCP folders, published atomically, and resuming from them.

A checkpoint is written to `step-N.partial`, flushed to disk and renamed to `step-N`; then `latest`
is replaced. So a folder named `step-N` is whole, whenever the process was killed, and no folder is
ever written twice. Its manifest holds each file's size and SHA-256; a folder that does not fit it
is set aside and the one before is taken. In the background the state is copied to host memory
first, and training goes on while it is written. A save that fails is reported, and training goes
on. Randomness is keyed, so no generator's state is stored: any number of ranks and any mesh
resumes.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastgrpo.checkpoint import background, disk, identity, reader
from fastgrpo.checkpoint.identity import Beginning
from fastgrpo.checkpoint.progress import Progress as Progress
from fastgrpo.checkpoint.reader import number, published
from fastgrpo.checkpoint.stored_state import StoredState, ValuesWithoutCode
from fastgrpo.core.config import Checkpoint
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import flush, problem_of, read_json
from fastgrpo.parallel.world import World
from fastgrpo.training.trainer import Trainer

T = TypeVar("T")


@dataclass(kw_only=True)
class Pending:
    """A save that is under way."""

    path: Path
    progress: str  # JSON, as of the save
    kept: set[str]  # checkpoints that are kept for what they are
    forget_best: Callable[[], None]  # for a save that fails: what is not there cannot be the best
    written: "Future[Any] | None"  # None: this rank's parts are written already
    problem: str | None = None  # what went wrong on this rank


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, settings: Checkpoint, world: World) -> None:
        self.folder = folder
        self.settings = settings
        self.world = world
        self.notices: list[str] = []
        """Messages about the folder for the user, such as of a checkpoint that was set aside."""
        self.beginning: Beginning | None = None
        """What each checkpoint carries of its run; None: nothing, as in a trial."""
        self._pending: Pending | None = None
        # its own, since a save in the background must not meet the collectives of training
        self._group = dist.new_group(backend="gloo") if settings.background else None

    def newest(self) -> Path | None:
        """The newest published checkpoint."""
        return next(iter(published(self.folder)), None)

    def load(self, trainer: Trainer) -> Progress:
        """Continue from the newest intact checkpoint, on every rank.

        A fresh Progress where there is no checkpoint. A damaged checkpoint is set aside as
        `step-N.damaged`, and `notices` names the file. Raises UserError where all are.
        """
        self.world.on_main(lambda: disk.sweep(self.folder))
        damaged = []
        while (path := self.world.on_main(self.newest)) is not None:
            problem = self._problem(path)
            if problem is None:
                break
            damaged.append(problem)
            aside = path.with_suffix(".damaged")
            self.world.on_main(lambda path=path, aside=aside: disk.set_aside(path, aside))  # type: ignore[misc]
            self.notices.append(
                f"checkpoint {path.name} is damaged ({problem}): set aside as {aside.name}"
            )
        self._compare_with_noted(path, damaged)
        self.world.on_main(lambda: disk.name_latest(self.folder, path))
        if path is None:
            return Progress()
        state = _state(trainer)
        try:
            dcp.load(state, storage_reader=StoredState(path), planner=ValuesWithoutCode())
        except CheckpointException as failure:  # a BaseException, raised on every rank
            raise UserError(
                f"checkpoint={path}: does not fit this run ({_cause(failure)}); move it out of the "
                "folder to take the one before."
            ) from None
        set_model_state_dict(
            trainer.policy.network, state["model"], options=StateDictOptions(strict=False)
        )
        set_optimizer_state_dict(
            trainer.policy.network, trainer.optimizer, optim_state_dict=state["optimizer"]
        )
        numbers = read_json(path / "progress.json", "checkpoint", "choose another run.dir")
        trainer.updates, trainer.skipped = numbers.pop("updates"), numbers.pop("skipped")
        return Progress.read(numbers)

    def _compare_with_noted(self, path: Path | None, damaged: Sequence[str]) -> None:
        """Compare the checkpoint to load with the newest that the run's folder notes.

        Raises UserError where there is none to load, and has been.
        """
        run = self.folder.parent
        noted = self.world.on_main(lambda: identity.newest_noted(run))
        if path is None and damaged:
            raise UserError(
                f"checkpoint={self.folder}: none is intact ({'; '.join(damaged)}); they were "
                "set aside: restore one from a copy, or start again for a run from the "
                "beginning."
            )
        if path is None and noted is not None:
            raise UserError(
                f"run.dir={run}: checkpoints/ has none, and {noted} was saved there; restore "
                "checkpoints/ from a copy, or remove the run's folder to begin again."
            )
        later = path is not None and noted is not None and number(Path(noted)) > number(path)
        if path is not None and later and not damaged:
            self.notices.append(
                f"checkpoint {noted} was saved and is not there: going on from {path.name}"
            )

    def save(self, trainer: Trainer, progress: Progress) -> str | None:
        """Write a checkpoint, on every rank; in the background where the settings say so.

        Returns what went wrong, with this save or with one before it in the background, the same on
        every rank; the last published checkpoint stays in place.
        """
        problem = self.finish()
        path = self.folder / f"step-{progress.iteration}"
        if not trainer.all_finite(self.world):
            return (
                f"checkpoint {path.name}: the weights are not finite, so that it is not written; "
                "lower optimizer.lr and go on from the checkpoint before."
            )
        best_before = progress.best_without(path.name)

        def forget_best() -> None:
            progress.best_reward, progress.best = best_before
            progress.best_before = None

        progress.close_span(path.name)
        numbers = json.dumps(
            vars(progress) | {"updates": trainer.updates, "skipped": trainer.skipped}, indent=1
        )
        state = _state(trainer)
        needed = disk.bytes_of(state, self.world.size)
        lacking = self.world.on_main(lambda: disk.fresh(path.with_suffix(".partial"), needed))
        if lacking is not None:
            forget_best()
            return self._could_not(path, lacking)
        self._pending = pending = Pending(
            path=path,
            progress=numbers,
            kept=progress.kept(self.settings.keep_best),
            forget_best=forget_best,
            written=None,
        )
        try:
            if self.settings.background:
                pending.written = background.save(state, path.with_suffix(".partial"), self._group)
                return problem
            dcp.save(state, checkpoint_id=path.with_suffix(".partial"))
        except CheckpointException as failure:  # a BaseException, raised on every rank
            pending.problem = _cause(failure)
        return self.finish() or problem

    def save_if_due(self, trainer: Trainer, progress: Progress, iterations: int) -> str | None:
        """Save where the settings want it and after the last of `iterations`.

        returns what went wrong, as `save`
        """
        problem = self.poll()
        if self.due(progress.iteration, iterations):
            problem = self.save(trainer, progress) or problem
        return problem

    def due(self, done: int, iterations: int) -> bool:
        """Whether a checkpoint is saved after so many iterations of the run's."""
        return done % self.settings.every == 0 or done == iterations

    def go_back(self, trainer: Trainer, name: str) -> Progress:
        """Remove the checkpoints after one of them and continue from that, on every rank."""
        self.finish()

        def remove_later() -> None:
            """Newest first: what a kill leaves is a run that goes on from where it was."""
            for path in published(self.folder):
                if number(path) > number(Path(name)):
                    disk.remove_checkpoint(path)
            if self.beginning is not None:
                identity.note(self.folder.parent, self.beginning.run, name)

        self.world.on_main(remove_later)
        return self.load(trainer)

    def end_saving(self, trainer: Trainer, progress: Progress) -> None:
        """Wait for the save that is under way.

        Raises UserError where the last iteration's checkpoint is not there.
        """
        problem = self.finish()
        published = self.world.on_main(self.newest)
        if progress.iteration and (published is None or number(published) < progress.iteration):
            problem = problem or self.save(trainer, progress) or self.finish()
            if problem is not None:
                raise UserError(problem)

    def poll(self) -> str | None:
        """Publish a save in the background once every rank has written its part.

        returns what went wrong
        """
        if self._pending is None:
            return None
        written = self._pending.written
        done = torch.tensor(float(written is None or written.done()), device=self.world.device)
        dist.all_reduce(done, dist.ReduceOp.MIN)
        return self.finish() if done else None

    def finish(self) -> str | None:
        """Wait for the save that is under way, if any, and publish it.

        returns what went wrong, on every rank
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        hashes: dict[str, tuple[int, str]] = {}
        try:
            if pending.written is not None:
                pending.written.result()
            if pending.problem is None:
                partial = pending.path.with_suffix(".partial")
                hashes = disk.hashes(partial.glob(f"__{self.world.rank}_*"))  # written by this rank
        except CheckpointException as failure:
            pending.problem = _cause(failure)
        except OSError as error:
            pending.problem = problem_of(error)
        problems = self._gather(pending.problem)
        parts = self._gather(hashes)
        problem = next(filter(None, problems), None)
        if problem is None:
            problem = self.world.on_main(
                lambda: self._publish(pending, [entry for part in parts for entry in part.items()])
            )
        else:
            self.world.on_main(
                lambda: shutil.rmtree(pending.path.with_suffix(".partial"), ignore_errors=True)
            )
        if problem is None:
            return None
        pending.forget_best()
        return self._could_not(pending.path, problem)

    def _could_not(self, path: Path, problem: str) -> str:
        return (
            f"run.dir={self.folder.parent}: checkpoint {path.name} could not be written "
            f"({problem}); mend that (space, rights) and start again: the checkpoint before is "
            "intact."
        )

    def _gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values

    def _publish(
        self, pending: Pending, parts: Sequence[tuple[str, tuple[int, str]]]
    ) -> str | None:
        """On the main rank: progress, manifest, flush, rename, replace `latest`, prune.

        returns what went wrong
        """
        path, partial = pending.path, pending.path.with_suffix(".partial")
        extra = {"progress.json": pending.progress}
        if self.beginning is not None:
            extra[identity.FILE] = self.beginning.as_text()
        try:
            for name, text in extra.items():
                (partial / name).write_text(text, encoding="utf-8")
            manifest = dict(parts) | disk.hashes([partial / name for name in (*extra, ".metadata")])
            missing = {file.name for file in partial.iterdir()} - set(manifest)
            assert not missing, missing
            entries = {
                name: {"bytes": size, "sha256": digest}
                for name, (size, digest) in sorted(manifest.items())
            }
            (partial / "manifest.json").write_text(json.dumps(entries, indent=1))
            for file in partial.iterdir():
                flush(file)
            flush(partial)
            os.rename(partial, path)
            disk.name_latest(self.folder, path)
            flush(self.folder)
            if self.beginning is not None:
                identity.note(self.folder.parent, self.beginning.run, path.name)
            # one may be all that draws well
            disk.prune(self.folder, max(self.settings.keep, 2), pending.kept)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return problem_of(error)
        return None

    def prune(self, progress: Progress) -> None:
        """Remove what was kept while no sample was drawn with the newest checkpoint."""
        if self.world.main:
            disk.prune(self.folder, self.settings.keep, progress.kept(self.settings.keep_best))

    def newest_before(self, iteration: int) -> str | None:
        """The newest checkpoint of fewer iterations, once any save under way has ended."""
        self.finish()
        return self.world.on_main(
            lambda: next(
                (path.name for path in published(self.folder) if number(path) < iteration), None
            )
        )

    def reject(self, iteration: int) -> bool:
        """Set the checkpoint of so many iterations aside: the samples of its weights are lost.

        returns whether there was one
        """
        self.finish()
        path = self.folder / f"step-{iteration}"

        def set_aside() -> bool:
            if not path.is_dir():
                return False
            disk.set_aside(path, path.with_suffix(".exploded"))
            disk.name_latest(self.folder, self.newest())
            return True

        return self.world.on_main(set_aside)

    def _problem(self, path: Path) -> str | None:
        """The first problem of a checkpoint, whose files the ranks compare with the manifest."""

        def look() -> tuple[str | None, dict[str, dict[str, Any]]]:
            try:
                return reader.wrong_size(path), reader.manifest(path)
            except UserError as error:
                return str(error).partition(": ")[2].partition(";")[0], {}
            except OSError as error:
                return problem_of(error), {}

        problem, entries = self.world.on_main(look)
        if problem is None:
            own = sorted(entries)[self.world.rank :: self.world.size]
            changed = self._gather(list(reader.changed(path, own, entries)))
            problem = next((one for of_rank in changed for one in of_rank), None)
        return problem or self.world.on_main(lambda: reader.unlisted(path))


def _cause(failure: CheckpointException) -> str:
    """The problem on the first rank that had one."""
    first = next(iter(failure.failures.values()))[0]
    if isinstance(first, OSError) and first.strerror:
        return problem_of(first)
    if "inline_container.cc" in str(first):  # torch's writer of files hides the system's error
        return "a file could not be written whole: disk full, quota used up, or a failing disk"
    return str(first)


def _state(trainer: Trainer) -> dict[str, Any]:
    """The stored tensors, sharded, by the names of the unsharded network; no frozen weights."""
    network = trainer.policy.network
    trainer.complete_moments()
    return {
        "model": get_model_state_dict(network, options=StateDictOptions(ignore_frozen_params=True)),
        "optimizer": get_optimizer_state_dict(network, trainer.optimizer),
        "ema": trainer.ema,
    }
