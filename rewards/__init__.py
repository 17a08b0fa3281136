"""Rewards: functions that look at pixels and prompts and give named scores.

The folder is the registry.
A file `rewards/<name>.py` with a function `load(spec) -> Reward` is the reward `<name>`; adding one
edits no other file. A recipe may also name such a file anywhere else by its path. At its top
`LEAST_FRAMES = 2` says that the reward cannot judge shorter clips, `PARTS` names what it scores, and
`check_spec(spec)` raises UserError for settings and files with which it could not load.
common/ holds what several rewards share, networks/ what they look with, serving/ the way of scores
between processes. Nothing here imports torch before a reward is loaded. Read `tiny_world.py` first,
a reward without weights.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from fastgrpo.core import registry
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError, blaming
from fastgrpo.core.reward import Reward

FOLDER = Path(__file__).parent


def known() -> tuple[str, ...]:
    """Names of the rewards in this folder: the files that define `load`."""
    return registry.names(FOLDER, "load")


def load(spec: RewardSpec) -> Reward:
    """The reward of a spec's file, with the binary parts of `spec.threshold`.

    Raises UserError, a ValueError, where there is no such file, where importing it or its `load`
    raises, or where what `load` returns is no Reward.
    """
    check(spec)
    where = f"rewards.name={spec.name}"
    with blaming(where, file_of(spec), "correct the file, or install what it imports."):
        reward = _module(spec).load(spec)
    if not isinstance(reward, Reward):
        raise UserError(
            f"{where}: load() returned a {type(reward).__name__}, not a Reward; "
            "let it inherit fastgrpo.core.reward.Reward."
        )
    if spec.threshold:  # imported by name like the rewards: it imports torch
        threshold = importlib.import_module("fastgrpo.rewards.common.threshold")
        reward = threshold.wrap(reward, spec.threshold)
    return reward


def _module(spec: RewardSpec) -> Any:
    """The file of a spec, imported. A file of the user's may import what lies beside it."""
    if spec.file is None:
        return importlib.import_module(f"fastgrpo.rewards.{spec.name}")
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
    return FOLDER / f"{spec.name}.py" if spec.file is None else spec.file


def declared(spec: RewardSpec, constant: str, default: Any) -> Any:
    """A constant or function at the top of a reward's file, without importing torch.

    default: where the file has no such name, or the reward is not here, as of a server elsewhere
    Raises UserError where the file is here and not Python, or where what defines the name raises.
    """
    file = file_of(spec)
    if not file.is_file():
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

    name: of a file of rewards/, or the path of a file of the user's, as typed at a command line
    """
    own = name.endswith(".py")
    return RewardSpec(name=os.path.abspath(name) if own else name, weights={})


def check(spec: RewardSpec, where: str = "rewards.name") -> None:
    """Raise UserError where there is no such reward, or its file is not one.

    where: the key or option that names it
    """
    file = file_of(spec)
    if spec.file is not None and not file.is_file():
        raise UserError(
            f"{where}={spec.file}: no such file; give the path of a Python file with a "
            "function load(spec) -> Reward."
        )
    if not file.is_file():
        raise UserError(
            f"{where}='{spec.name}': no such reward.{registry.nearest(spec.name, known())} Use one "
            f"of {', '.join(known())}, or the path of a file of your own, such as ./my_reward.py, "
            "with a function load(spec) -> Reward."
        )
    registry.check(f"{where}={spec.name}", file, "load")
