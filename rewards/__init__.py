"""Rewards: functions that look at pixels and prompts and give named scores.

The folder is the registry.
A file `rewards/<name>.py` with a function `load(spec) -> Reward` is the reward `<name>`; adding one
edits no other file. A recipe may also name such a file anywhere else by its path, with
`:function` where that is not `load`, or a reward that an installed package has an entry point of in
the group `fastgrpo.rewards`. At a file's top `LEAST_FRAMES = 2` says that the reward cannot judge
shorter clips, `PARTS` names what it scores, and `check_spec(spec)` raises UserError for settings and
files with which it could not load, `FREE_OPTIONS` are those of its options that change no score, and
`DIFFERENTIABLE = True` says that it has `Reward.differentiable`.
common/ holds what several rewards share, networks/ what they look with, serving/ the way of scores
between processes. Nothing here imports torch before a reward is loaded. Read `tiny_world.py` first,
a reward without weights.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fastgrpo.core import registry
from fastgrpo.core.config import RewardSpec, paths
from fastgrpo.core.errors import UserError, blaming
from fastgrpo.core.reward import Reward

FOLDER = Path(__file__).parent
GROUP = "fastgrpo.rewards"
"""The group of entry points that other packages name their rewards in: name -> module:function."""


def known() -> tuple[str, ...]:
    """Names of the rewards in this folder, the files that define `load`, and of installed ones."""
    own = registry.names(FOLDER, "load")
    return (*own, *sorted(entry_points(group=GROUP).names - set(own)))


def _installed(spec: RewardSpec) -> EntryPoint | None:
    """The entry point of an installed package that a spec means. None: the reward is a file's.

    A file of this folder comes before an entry point of its name.
    """
    if spec.file is not None or _is_file(FOLDER / f"{spec.name}.py"):
        return None
    return next(iter(entry_points(group=GROUP, name=spec.name)), None)


def _is_file(file: Path) -> bool:
    """Whether a file is there; False for what cannot be a path."""
    try:
        return file.is_file()
    except OSError:
        return False


def _function(spec: RewardSpec) -> str:
    """The function that makes a spec's reward."""
    entry = _installed(spec)
    return spec.function or ("load" if entry is None else entry.attr)


def load(spec: RewardSpec) -> Reward:
    """The reward of a spec's file, with the binary parts of `spec.threshold`.

    Raises UserError, a ValueError, where there is no such file, where importing it or its `load`
    raises, or where what `load` returns is no Reward.
    """
    check(spec)
    where = f"rewards.name={spec.name}"
    with blaming(where, file_of(spec), "correct the file, or install what it imports."):
        reward = getattr(_module(spec), _function(spec))(spec)
    if not isinstance(reward, Reward):
        raise UserError(
            f"{where}: {_function(spec)}() returned a {type(reward).__name__}, not a Reward; "
            "let it inherit fastgrpo.core.reward.Reward."
        )
    if spec.threshold:  # imported by name like the rewards: it imports torch
        threshold = importlib.import_module("fastgrpo.rewards.common.threshold")
        reward = threshold.wrap(reward, spec.threshold)
    return reward


def _module(spec: RewardSpec) -> Any:
    """The file of a spec, imported. A file of the user's may import what lies beside it."""
    if spec.file is None:
        entry = _installed(spec)
        return importlib.import_module(entry.module if entry else f"fastgrpo.rewards.{spec.name}")
    folder = str(spec.file.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it takes no library's place
    about = importlib.util.spec_from_file_location(f"own_reward_{spec.file.stem}", spec.file)
    assert about is not None and about.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(about)
    sys.modules[about.name] = module  # where dataclasses look for it
    about.loader.exec_module(module)
    return module


def file_of(spec: RewardSpec) -> Path:
    """The file that defines a spec's reward; it need not be here, as of a server elsewhere."""
    entry = _installed(spec)
    if entry is not None:
        return registry.file_of_module(entry.module) or Path(f"{entry.module}.py")
    return FOLDER / f"{spec.name}.py" if spec.file is None else spec.file


def declared(spec: RewardSpec, constant: str, default: Any) -> Any:
    """A constant or function at the top of a reward's file, without importing torch.

    default: where the file has no such name, or the reward is not here, as of a server elsewhere
    Raises UserError where the file is here and not Python, or where what defines the name raises.
    """
    file = file_of(spec)
    if not _is_file(file):
        return default
    check(spec)
    where = f"rewards.name={spec.name}"
    with blaming(where, file, f"{constant} must need nothing that is not installed."):
        return registry.declared(file, constant, default)


def least_frames(spec: RewardSpec) -> int:
    """The frames that a clip must have for a reward: LEAST_FRAMES in its file; 1 without it."""
    return int(declared(spec, "LEAST_FRAMES", 1))


def parts(spec: RewardSpec) -> tuple[str, ...] | None:
    """The parts that a reward scores: PARTS in its file. None: its file does not say."""
    found: tuple[str, ...] | None = declared(spec, "PARTS", None)
    return found


def differentiable(spec: RewardSpec) -> bool:
    """Whether a reward gives gradients: DIFFERENTIABLE in its file."""
    return bool(declared(spec, "DIFFERENTIABLE", False))


def columns(spec: RewardSpec) -> tuple[str, ...]:
    """The columns of the prompts' rows that a reward cannot do without: of its file's COLUMNS, or
    of a function `columns(spec)` there; empty without either.
    """
    named = declared(spec, "columns", None)
    return tuple(named(spec) if named is not None else declared(spec, "COLUMNS", ()))


def check_settings(spec: RewardSpec) -> None:
    """Raise UserError for a setting, or a file named in one, with which `load` would fail.

    A file with a function `check_spec(spec)` does so; no weights are read.
    """
    check(spec)
    if "check_spec" in registry.top_level(file_of(spec)):
        with blaming(f"rewards.name={spec.name}", file_of(spec), "correct the file."):
            _module(spec).check_spec(spec)


def plain(name: str) -> RewardSpec:
    """A reward with all settings at their defaults, as one that has no weights needs.

    name: of a file of rewards/ or an installed reward, or the path of a file of the user's, as
    typed at a command line
    """
    own = paths.is_own_file(name)
    return RewardSpec(name=paths.whole(name, "NAME") if own else name, weights={})


def check(spec: RewardSpec, where: str = "rewards.name") -> None:
    """Raise UserError where there is no such reward, or its file is not one.

    where: the key or option that names it
    """
    file = file_of(spec)
    if spec.function is not None and spec.file is None:
        raise UserError(
            f"rewards.function={spec.function}: only a file of your own has another function than "
            "load; leave it out, or name the file."
        )
    if spec.file is not None and not _is_file(file):
        raise UserError(
            f"{where}={spec.file}: no such file; give the path of a Python file with a "
            "function load(spec) -> Reward."
        )
    if (entry := _installed(spec)) is not None and not _is_file(file):
        raise UserError(
            f"{where}={spec.name}: the entry point {entry.value} names a module that is not there; "
            "install its package again."
        )
    if not _is_file(file):
        raise UserError(
            f"{where}={spec.name!r}: no such reward.{registry.nearest(spec.name, known())} Use one "
            f"of {', '.join(known())}, or the path of a file of your own, such as ./my_reward.py, "
            "with a function load(spec) -> Reward."
        )
    registry.check(f"{where}={spec.name}", file, _function(spec))
