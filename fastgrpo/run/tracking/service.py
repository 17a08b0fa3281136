"""A run at a tracking service, whose client may fail at any time and never ends the run."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class Service(ABC):
    """The run, or nothing once the client has failed.

    run: what the client's `init` gave;  tell: shows a line
    """

    name: str  # in lines that are shown

    def __init__(self, run: Any, tell: Callable[[str], None]) -> None:
        self._run: Any = run
        self._tell = tell

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Do something with the run; an error of its client is told, and all later ones are
        spared.
        """
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # a service may end, its disk fill, its server refuse
            self._run = None
            self._tell(f"{self.name}: {reason_of(error)}; the run goes on without it")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send an iteration's numbers."""
        self.attempt(lambda run: run.log(dict(values), step=step))

    def videos(
        self, name: str, step: int, clips: Tensor, captions: Sequence[str], fps: float, folder: Path
    ) -> None:
        """Show clips as a panel.

        clips: uint8 [N, F, H, W, 3];  captions: N texts;  fps: frames per second
        folder: for a folder of files that is gone afterwards
        """

        def log(run: Any) -> None:
            with tempfile.TemporaryDirectory(dir=folder, prefix="videos-") as place:
                panel = [
                    self.video(Path(place) / f"{n:03d}", clip, caption, fps)
                    for n, (clip, caption) in enumerate(zip(clips, captions, strict=True))
                ]
                run.log({f"videos/{name}": panel}, step=step)  # copies the files

        self.attempt(log)

    @abstractmethod
    def video(self, path: Path, clip: Tensor, caption: str, fps: float) -> object:
        """The client's object for a clip.

        path: of its file, without a suffix;  clip: uint8 [F, H, W, 3]
        """

    @abstractmethod
    def summarise(self, values: Mapping[str, object]) -> None:
        """Put numbers of the whole run where the service shows them."""

    def finish(self) -> None:
        """End the run."""
        self.attempt(lambda run: run.finish())


def reason_of(error: Exception) -> str:
    """The first line of what a client says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def kept_id(file: Path, users: str | None, new: str) -> str:
    """A run's id at a service: the user's, else the file's, else a new one; the file keeps it."""
    known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    run_id = users or known or new
    if run_id != known:
        file.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def refused(service: str, error: ValueError) -> str:
    """The line for a setting that a client refuses, by the name of its environment variable.

    service: as its variables begin;  error: pydantic's
    """
    first: dict[str, Any] = next(iter(getattr(error, "errors", list)()), {})
    name = "_".join(map(str, first.get("loc", ("settings",)))).upper()
    reason = first.get("msg", str(error).partition("\n")[0])
    return f"{service}_{name}={first.get('input', '')}: {reason}; correct it or leave it out."
