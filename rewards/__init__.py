"""Rewards: functions that look at pixels and prompts and give named scores.

The folder is the registry.
A file `rewards/<name>.py` with a function `load(spec) -> Reward` is the reward `<name>`; adding one
edits no other file. Where the reward cannot judge short clips, the file says so by
`LEAST_FRAMES = 2` at its top; `PARTS` names what it scores, and `check_spec(spec)` raises UserError for
settings and files with which it could not load.
common/ holds what several rewards share, networks/ what they look with, serving/ the way of scores
between processes. Nothing here imports torch before a reward is loaded. Read `tiny_world.py` first,
a reward without weights.
"""

import importlib
from pathlib import Path
from typing import Any

from fastgrpo.core import registry
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward

FOLDER = Path(__file__).parent


def known() -> tuple[str, ...]:
    """Names of the rewards in this folder: the files that define `load`."""
    return registry.names(FOLDER, "load")


def load(spec: RewardSpec) -> Reward:
    """The reward of the file `rewards/<spec.name>.py`, with the binary parts of `spec.threshold`.

    Raises UserError, a ValueError, where there is no such file, where its `load` finds a mistake in
    the spec, or where what `load` returns is no Reward.
    """
    check(spec.name)
    reward = importlib.import_module(f"fastgrpo.rewards.{spec.name}").load(spec)
    if not isinstance(reward, Reward):
        raise UserError(
            f"rewards.name={spec.name}: load() returned a {type(reward).__name__}, not a Reward; "
            "let it inherit fastgrpo.core.reward.Reward."
        )
    if spec.threshold:  # imported by name like the rewards: it imports torch
        threshold = importlib.import_module("fastgrpo.rewards.common.threshold")
        reward = threshold.wrap(reward, spec.threshold)
    return reward


def declared(name: str, constant: str, default: Any) -> Any:
    """A constant or function at the top of a reward's file, without importing torch.

    default: where the file has no such name, or the reward is not here, as of a server elsewhere
    """
    return (
        registry.declared(FOLDER / f"{name}.py", constant, default) if name in known() else default
    )


def least_frames(name: str) -> int:
    """The frames that a clip must have for a reward: LEAST_FRAMES in its file; 1 without it."""
    return int(declared(name, "LEAST_FRAMES", 1))


def parts(name: str) -> tuple[str, ...] | None:
    """The parts that a reward scores: PARTS in its file. None: its file does not say."""
    found: tuple[str, ...] | None = declared(name, "PARTS", None)
    return found


def check_settings(spec: RewardSpec) -> None:
    """Raise UserError for a setting, or a file named in one, with which `load` would fail.

    A file with a function `check_spec(spec)` does so; no weights are read.
    """
    check(spec.name)
    if spec.name in registry.names(FOLDER, "check_spec"):
        importlib.import_module(f"fastgrpo.rewards.{spec.name}").check_spec(spec)


def plain(name: str) -> RewardSpec:
    """A reward with all settings at their defaults, as one that has no weights needs."""
    return RewardSpec(name=name, weights={})


def check(name: str, where: str = "reward") -> None:
    """Raise UserError where there is no such reward.  where: the key or option that names it"""
    if name not in known():
        raise UserError(
            f"{where}='{name}': no such reward.{registry.nearest(name, known())} Use one of "
            f"{', '.join(known())}, "
            f"or add rewards/{name}.py with a function load(spec) -> Reward"
        )
