"""A run in SwanLab, as the user's own environment and settings of SwanLab want it.

What they say (SWANLAB_MODE, SWANLAB_PROJ_NAME, SWANLAB_WORKSPACE, ...; SwanLab's settings files)
goes before what the recipe says: SwanLab itself would let arguments win. Its client is an extra.
"""

import io
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.run.tracking.service import Service, kept_id, reason_of, refused

FOLDERS = ("SWANLAB_LOG_DIR", "SWANLAB_LOGDIR")  # either names the folder of its files


@dataclass(frozen=True, kw_only=True)
class SwanLab:
    """A run's address in SwanLab."""

    project: str
    name: str | None = None  # None: the name of the run's folder
    entity: str | None = None  # its workspace; None: the user's own
    config: Mapping[str, object] = field(default_factory=dict)  # the resolved recipe


class SwanLabRun(Service):
    """The run in SwanLab."""

    name = "swanlab"

    def __init__(self, run: Any, tell: Callable[[str], None]) -> None:
        super().__init__(run, tell)
        if run.mode == "offline":
            tell(f"swanlab: offline; upload later with: swanlab sync {run.dir}")

    def video(self, path: Path, clip: Tensor, caption: str, fps: float) -> object:
        """A GIF, the one format of clips that it takes.  clip: uint8 [F, H, W, 3]"""
        import swanlab

        file = path.with_suffix(".gif")
        first, *others = map(Image.fromarray, clip.cpu().numpy())
        first.save(file, save_all=True, append_images=others, duration=1000 / fps, loop=0)
        return swanlab.Video(str(file), caption=caption)

    def summarise(self, values: Mapping[str, object]) -> None:
        """Into the run's settings, since SwanLab has no summary."""
        self.attempt(lambda run: run.config.update({"summary": dict(values)}))

    def finish(self) -> None:
        with _aside():
            super().finish()


def start_swanlab(run_dir: Path, wanted: SwanLab, tell: Callable[[str], None]) -> SwanLabRun | None:
    """Start SwanLab, or continue the run of run_dir/swanlab_id.txt; its files are in
    run_dir/swanlab.

    Offline without a key, or where no server answers. Returns None where the user has disabled
    SwanLab. Raises UserError where SwanLab takes a variable of its environment for a mistake.
    """
    import swanlab

    try:
        users = swanlab.Settings()
    except ValueError as error:  # pydantic's
        raise UserError(refused("SWANLAB", error)) from None
    if users.mode == "disabled":
        return None
    run_id = kept_id(run_dir / "swanlab_id.txt", users.run.id, secrets.token_hex(4))
    ours = {
        "project": None if users.project.name else wanted.project,
        "name": None if users.experiment.name else wanted.name or run_dir.resolve().name,
        "workspace": None if users.project.workspace else wanted.entity,
        "log_dir": None if any(map(os.environ.get, FOLDERS)) else str(run_dir / "swanlab"),
        "settings": _quiet(swanlab.Settings),
    }

    def begin(mode: str) -> SwanLabRun:
        with _aside():
            run = swanlab.init(
                mode=mode, id=run_id, resume="allow", config=dict(wanted.config), **ours
            )
        return SwanLabRun(run, tell)

    mode = "offline" if users.mode == "online" and users.api_key is None else users.mode
    try:
        return begin(mode)
    except Exception as error:  # a key at hand, and no way out: the nodes of many clusters
        if mode != "online":
            raise
        tell(f"swanlab: {reason_of(error)}")
        return begin("offline")


def _quiet(settings: Any) -> object:
    """No question at a terminal, no copy of what is printed, no list of packages, no git."""
    return settings(
        interactive=False,
        terminal=settings.Terminal(proxy_type="none"),
        probe=settings.Probe(requirements=False, git=False),
    )


@contextmanager
def _aside() -> Iterator[None]:
    """Keep Ctrl-C, the printing of traces and the display as they are: SwanLab takes all three."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.excepthook = hook
