"""Which run a checkpoint belongs to, and what that run began with.

A run draws an identity before its first iteration. Its folder keeps it in identity.json, with the
name of the newest checkpoint; each checkpoint carries it in run.json, with the files that the run
began with. So a checkpoint of another run or recipe is refused, and what of these files is damaged
or missing in the folder is made again. A checkpoint of an older version has no run.json, and
belongs to every run.
"""

import json
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fastgrpo.checkpoint import reader
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json_or_none, replace_text, sha256

FILE = "run.json"  # in a checkpoint
OWN = "identity.json"  # in the run's folder
RECIPE = "recipe.toml"
RESTORED = ("inputs.json", "provenance.json", "evaluation/step-0.json")


@dataclass(frozen=True)
class Beginning:
    """What a checkpoint says of its run."""

    run: str  # the identity
    files: Mapping[str, str]  # path in the run's folder -> text

    def as_text(self) -> str:
        """The content of a checkpoint's run.json."""
        return json.dumps(asdict(self), indent=1)


def begin(folder: Path) -> Beginning:
    """The beginning of the run in a folder whose files are written; a new identity if it has none.

    On the main rank only.
    """
    known = of_folder(folder)
    if known is None:
        known = secrets.token_hex(8)
        note(folder, known, None)
    files = {}
    for name in (RECIPE, *RESTORED):
        with suppress(OSError, ValueError):
            files[name] = (folder / name).read_text(encoding="utf-8")
    return Beginning(known, files)


def of_folder(folder: Path) -> str | None:
    """The identity that a run's folder notes; None where it has none or the file is damaged."""
    known = (read_json_or_none(folder / OWN) or {}).get("run")
    return known if isinstance(known, str) else None


def newest_noted(folder: Path) -> str | None:
    """The checkpoint that a run's folder notes as its newest."""
    name = (read_json_or_none(folder / OWN) or {}).get("newest")
    named = isinstance(name, str) and name.startswith("step-") and name[5:].isdecimal()
    return str(name) if named else None


def note(folder: Path, run: str, newest: str | None) -> None:
    """Write a folder's identity and the name of its newest checkpoint."""
    replace_text(folder / OWN, json.dumps({"run": run, "newest": newest}, indent=1) + "\n")


def of_checkpoint(checkpoint: Path) -> Beginning | None:
    """What a checkpoint carries; None where it has no run.json that its manifest vouches for."""
    content = read_json_or_none(checkpoint / FILE)
    entry = (read_json_or_none(checkpoint / "manifest.json") or {}).get(FILE)
    try:
        assert content is not None and entry["sha256"] == sha256(checkpoint / FILE)  # type: ignore[index]
        return Beginning(str(content["run"]), {str(k): str(v) for k, v in content["files"].items()})
    except (AssertionError, OSError, TypeError, KeyError, AttributeError):
        return None


def recipe_of(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the folder of a run or of exported adapters, with overrides applied.

    Raises UserError as `config.load` does; where the file itself is wrong, the line names it
    """
    file = folder / RECIPE
    try:
        config.load(file)
    except UserError as error:
        if str(error).startswith(f"{file}"):
            raise
        raise UserError(
            f"{file}: not as the run wrote it ({str(error).rstrip('.')}); restore the file. Where "
            "the folder has a checkpoint, remove it: training makes it again."
        ) from None
    return config.load(file, overrides)


def check(folder: Path) -> None:
    """Refuse a checkpoint in a run's folder that another run has written."""
    known, first = of_folder(folder), OWN
    for path in reader.published(folder / "checkpoints"):
        carried = of_checkpoint(path)
        if carried is None:
            continue
        if known is None:
            known, first = carried.run, path.name
        if carried.run != known:
            raise UserError(
                f"run.dir={folder}: checkpoints/{path.name} is of another run ({carried.run}) than "
                f"{first} ({known}); move it out of the folder, or remove {OWN} where that was edited."
            )


def newest_beginning(folder: Path) -> tuple[Path, Beginning] | None:
    """The newest checkpoint of a run's folder that says what the run began with."""
    for path in reader.published(folder / "checkpoints"):
        if (carried := of_checkpoint(path)) is not None:
            return path, carried
    return None


def restore(folder: Path) -> list[str]:
    """Make again what a run began with, where the folder's files are not those.

    On the main rank only, which holds the folder's lock.  returns a notice for each file
    """
    found = newest_beginning(folder)
    if found is None:
        return []
    path, beginning = found
    notices = []
    if of_folder(folder) is None:
        note(folder, beginning.run, reader.published(folder / "checkpoints")[0].name)
        notices.append(OWN)
    for name, text in beginning.files.items():
        kept = _is_toml(folder / name) if name == RECIPE else _holds(folder / name, text)
        if name in (RECIPE, *RESTORED) and not kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_text(folder / name, text)
            notices.append(name)
    made = "was missing or not what the run wrote: made again from checkpoint"
    return [f"{name} {made} {path.name}" for name in notices]


def _holds(file: Path, text: str) -> bool:
    """Whether a file has this content."""
    with suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8") == text
    return False


def _is_toml(file: Path) -> bool:
    """Whether a file can be read as TOML: a recipe is written anew by each attempt."""
    with suppress(OSError, ValueError):
        return bool(tomllib.loads(file.read_text(encoding="utf-8")))
    return False
