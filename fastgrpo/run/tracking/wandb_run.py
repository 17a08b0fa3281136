"""A run in Weights & Biases, as the user's own environment and settings of wandb want it.

What they say (WANDB_MODE, WANDB_PROJECT, WANDB_RUN_ID, WANDB_DIR, ...; wandb's settings file) goes
before what the recipe says: wandb itself would let arguments win, and send what was to stay here.
Nothing that wandb does later ends a run.
"""

import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.data.video import write_mp4
from fastgrpo.run.tracking.service import Service, kept_id, refused

if TYPE_CHECKING:
    from wandb import Run, Settings

QUIET = {"console": "off", "silent": True, "disable_git": True, "disable_code": True}
"""Settings of wandb's that the user may have chosen otherwise."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run's address in wandb.

    Mode "online" falls back to offline without a key, or where no server answers.
    """

    project: str
    name: str | None = None  # None: the name of the run's folder
    entity: str | None = None  # None: the user's default
    mode: Literal["online", "offline"] = "online"
    config: Mapping[str, object] = field(default_factory=dict)  # the resolved recipe


class WandbRun(Service):
    """The run in wandb."""

    name = "wandb"

    def __init__(self, run: "Run", tell: Callable[[str], None]) -> None:
        super().__init__(run, tell)
        if run.settings.mode == "offline":
            tell(f"wandb: offline; upload later with: wandb sync {run.settings.sync_dir}")

    def video(self, path: Path, clip: Tensor, caption: str, fps: float) -> object:
        """An mp4.  clip: uint8 [F, H, W, 3]"""
        import wandb

        file = path.with_suffix(".mp4")
        write_mp4(file, clip, fps)
        return wandb.Video(str(file), caption=caption, format="mp4")

    def summarise(self, values: Mapping[str, object]) -> None:
        self.attempt(lambda run: run.summary.update(dict(values)))


def start_wandb(run_dir: Path, wanted: Wandb) -> "Run | None":
    """Start wandb, or continue the run of run_dir/wandb_id.txt; its files are in run_dir/wandb.

    Returns None where the user has disabled wandb. Raises UserError where wandb takes a variable
    of its environment for a mistake.
    """
    here = run_dir.absolute() / "wandb"
    ours = {"WANDB_CACHE_DIR": str(here / "cache")}  # wandb's service logs there
    if os.path.expanduser("~") == "~":  # a user without a home, where wandb would look for settings
        ours["HOME"] = str(here)
    with _environment(**ours):
        import wandb

        try:
            users = wandb.setup().settings
        except ValueError as error:  # pydantic's
            raise UserError(refused("WANDB", error)) from None
        chosen = users.model_fields_set
        if users.mode == "disabled":
            return None
        run_id = kept_id(run_dir / "wandb_id.txt", users.run_id, secrets.token_hex(4))
        online = wanted.mode == "online" and has_wandb_key(users.base_url)
        if "mode" in chosen:
            online = users.mode not in ("offline", "dryrun")

        def begin(online: bool) -> "Run":
            ours = {
                "project": wanted.project,
                "run_name": wanted.name or run_dir.name,
                "entity": wanted.entity,
                "root_dir": str(run_dir),
                "resume": "allow" if online else None,
                **QUIET,
            }
            settings = {name: value for name, value in ours.items() if name not in chosen}
            settings |= {"run_id": run_id}
            if "mode" not in chosen or not online:
                settings["mode"] = "online" if online else "offline"
            return wandb.init(config=dict(wanted.config), settings=_settings(settings))

        try:
            return begin(online)
        except wandb.errors.Error:  # a key at hand, and no way out: the nodes of many clusters
            if not online:
                raise
            wandb.teardown()
            return begin(online=False)


def _settings(values: dict[str, Any]) -> "Settings":
    import wandb

    return wandb.Settings(**{name: value for name, value in values.items() if value is not None})


def has_wandb_key(base_url: str = "https://api.wandb.ai") -> bool:
    """Whether wandb could log in by itself: WANDB_API_KEY is set, or netrc names its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", base_url)).hostname or ""
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # raises nothing without home
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables that are not set yet, for the length of a block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
