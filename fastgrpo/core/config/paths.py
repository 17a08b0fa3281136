"""What people type as a path, turned into one: for the recipe's keys and every command's options.

`~` and `$NAME` stand for what a shell makes of them, `builtin:NAME` for what comes with the
package; what cannot be a path is refused in one line. A recipe's paths are recorded as whole paths,
so that a run's folder says where its files lie from any working folder, and no folder is taken for
a hub id. What comes with the package is recorded by its name, so that a run folder may be moved to
a machine that has the package elsewhere.
"""

import errno
import importlib.util
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from fastgrpo.core.errors import UserError

PATH, PATH_OR_HUB = "path", "path or hub id"
"""What marks a recipe's key as a path, recorded whole, or as a path or a hub id."""
LocalPath = Annotated[str, PATH]
LocalOrHub = Annotated[str, PATH_OR_HUB]
BUILTIN = "builtin:"
"""Begins the name of a prompt file or model that comes with the package, such as
builtin:prompts_video."""
VARIABLE = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILE_KINDS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".txt", ".gz", ".toml")
"""What ends so is a file, not a hub repository's name."""
LONGEST_HUB_NAME = 96
OWN_FILE = re.compile(r".*\.py(:[A-Za-z_]\w*)?", re.ASCII | re.DOTALL)
WRONG_PLACE = {
    errno.EACCES: "no permission",
    errno.EEXIST: "there is a file of that name",
    errno.EISDIR: "that is a folder",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of it is a file, not a folder",
    errno.EPERM: "no permission",
    errno.EROFS: "its file system is read-only",
    errno.ESTALE: "its file system has gone away",
    errno.EIO: "its disk gives errors",
}
"""What the operating system says of a path, in words; a full disk has a line of its own."""


def installed_folder(name: str) -> Path:
    """The folder of a part of the package, such as "data", as installed or in a checkout."""
    found = importlib.util.find_spec(f"fastgrpo.{name}")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]).resolve()


def builtins() -> dict[str, Path]:
    """Name -> prompt file or model folder that comes with the package."""
    return {
        entry.stem: entry
        for entry in sorted(installed_folder("data").iterdir())
        if entry.suffix in (".txt", ".jsonl") or (entry / "model_index.json").is_file()
    }


def _builtin(text: str, where: str) -> str:
    """The path of a `builtin:` name. Raises UserError for an unknown one."""
    known = builtins()
    name = text.removeprefix(BUILTIN)
    if name not in known:
        raise UserError(
            f"{where}={text}: nothing of that name comes with the package; use one of "
            f"{', '.join(BUILTIN + one for one in known)}."
        )
    return str(known[name])


def portable(value: Any) -> Any:
    """A tree of a recipe's values with what comes with the package by its `builtin:` name."""
    if isinstance(value, dict):
        return {key: portable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [portable(below) for below in value]
    if not isinstance(value, str) or not value.startswith(str(installed_folder("data"))):
        return value
    names = {str(path): BUILTIN + name for name, path in builtins().items()}
    return names.get(value, value)


def expanded(text: str, where: str) -> str:
    """The path that a person typed, with `~` and `$NAME` as a shell would have them.

    `builtin:NAME` is what comes with the package. A path with a `$` that exists as it is written is
    taken so.  where: the key or option
    Raises UserError for what is no path, an unset variable, and an unknown name or user's `~`.
    """
    if not text.strip():
        raise UserError(f"{where}: empty; give a path, and . for the working folder.")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise UserError(f"{where}={text!r}: has a control character; correct the path.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}={text!a}: is not UTF-8; rename that file or folder.")
    if text.startswith(BUILTIN):
        return _builtin(text, where)
    if "$" in text and not _exists(text):
        text = VARIABLE.sub(lambda match: _variable(match[1].strip("{}"), text, where), text)
    if text.startswith("~"):
        home = os.path.expanduser(text)
        if home.startswith("~"):
            raise UserError(
                f"{where}={text}: no home folder is known for {text.partition('/')[0]}; write the "
                "whole path, or ./~ for a name that begins so."
            )
        return home
    return text


def _exists(text: str) -> bool:
    return os.path.lexists(text)


def _variable(name: str, text: str, where: str) -> str:
    """The value of an environment variable within a path."""
    value = os.environ.get(name, "")
    if not value:
        raise UserError(
            f"{where}={text}: the environment variable {name} is not set; set it, or write the "
            "whole path."
        )
    return value


def whole(text: str, where: str, base: Path | None = None) -> str:
    """The absolute path of what a person typed.

    base: the recipe file's folder, which `./` and `../` begin at; None: the working folder
    """
    path = expanded(text, where)
    beside = path.startswith(("./", "../")) or path in (".", "..")
    start = base if base is not None and beside else Path.cwd()
    return os.path.normpath(start / path)


def whole_or_hub(text: str, where: str, base: Path | None = None) -> str:
    """The absolute path of a file or folder, or a hub id as it is; see `whole`."""
    if is_hub_id(text) and not _exists(text):
        return text
    return whole(text, where, base)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub repository's name, such as owner/name@revision."""
    match = HUB_ID.fullmatch(text)
    if match is None:
        return False
    name = match["name"]
    fits = len(name) <= LONGEST_HUB_NAME and "--" not in name and ".." not in name
    return fits and not name.endswith((".git", "-", ".", *FILE_KINDS))


def is_own_file(text: str) -> bool:
    """Whether a reward's name is a path: of a file of Python, or of a function in it, after a
    colon.
    """
    return OWN_FILE.fullmatch(text) is not None


def hub_name(text: str) -> tuple[str, str | None]:
    """(repository, revision) of a hub id; None: the repository's newest state."""
    name, _, revision = text.partition("@")
    return name, revision or None


def refusal(error: OSError, named: Mapping[str, str | Path]) -> UserError | None:
    """The one line for what the operating system says of a path that the user named.

    named: key or option -> its path
    None: the error is about no path, or about none that a user has named.
    """
    reason = WRONG_PLACE.get(error.errno or 0)
    if reason is None or not isinstance(error.filename, str | os.PathLike):
        return None
    file = Path(os.fsdecode(error.filename))
    within = [
        (key, path) for key, path in named.items() if path_in(file, path) or path_in(path, file)
    ]
    if within:
        key, path = max(within, key=lambda entry: len(os.path.abspath(entry[1])))
        beside = "" if _same(file, path) else f" ({file})"
        return UserError(f"{key}={path}: {reason}{beside}; choose another, or correct that.")
    if len(file.parts) > 1 and not path_in(file, Path(__file__).parents[2]):
        return UserError(f"{file}: {reason}; correct that.")
    return None


def path_in(file: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or lies below it, by their names alone."""
    inner, outer = Path(os.path.abspath(file)), Path(os.path.abspath(folder))
    return inner == outer or outer in inner.parents


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def folder_problem(folder: Path) -> str | None:
    """Why a run could not write into a folder, which need not exist; nothing is left there.

    None: it could.
    """
    try:
        os.stat(folder)
        if not folder.is_dir():
            return WRONG_PLACE[errno.EEXIST]
        return _refusal_of(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            return "its symbolic link leads nowhere"
    except OSError as error:
        return _reason(error)
    return _refusal_of(next(one for one in folder.absolute().parents if one.exists()))


def file_problem(file: Path) -> str | None:
    """Why a file could not be written; None: it could. Nothing is left there."""
    try:
        os.stat(file)
        if file.is_dir():
            return WRONG_PLACE[errno.EISDIR]
    except FileNotFoundError:
        pass
    except OSError as error:
        return _reason(error)
    above = file.absolute().parent
    return _refusal_of(above) if above.is_dir() else "its folder does not exist"


def _refusal_of(folder: Path) -> str | None:
    """Why nothing can be made in a folder that exists: tried, since permissions do not tell all."""
    trial = folder / f".fastgrpo-{secrets.token_hex(4)}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        return _reason(error, {errno.ENOENT: "nothing can be made there"})
    return None


def _reason(error: OSError, others: Mapping[int, str] = MappingProxyType({})) -> str:
    """What the operating system says, in words.  others: in place of the usual words"""
    number = error.errno or 0
    return others.get(number) or WRONG_PLACE.get(number) or error.strerror or str(error)
