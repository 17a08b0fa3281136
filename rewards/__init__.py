"""Rewards: functions that look at pixels and prompts and give named scores. The folder is the registry.

A file `rewards/<name>.py` with a function `load(spec) -> Reward` is the reward `<name>`; adding one edits no
other file. Where it cannot judge short clips, it says so by `LEAST_FRAMES = 2` at its top.
The other files carry scores between processes (`wire`: the bytes, `server`, `client`), make binary parts
(`threshold`), or hold what several rewards share.
"""

import importlib
import re
from pathlib import Path

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward


def known() -> tuple[str, ...]:
    """Names of the rewards in this folder: the files that define `load`."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return tuple(f.stem for f in files if re.search(r"^def load\(", f.read_text(encoding="utf-8"), re.MULTILINE))


def load(spec: RewardSpec) -> Reward:
    """The reward of the file `rewards/<spec.name>.py`, with the binary parts of `spec.threshold`.

    Raises UserError, a ValueError, where there is no such file, or where its own `load` finds a mistake in the spec.
    """
    check(spec.name)
    reward: Reward = importlib.import_module(f"fastgrpo.rewards.{spec.name}").load(spec)
    if spec.threshold:  # imported by name like the rewards: it imports this file
        reward = importlib.import_module("fastgrpo.rewards.common.threshold").wrap(reward, spec.threshold)
    return reward


def plain(name: str) -> RewardSpec:
    """A reward with all settings at their defaults, as one that has no weights needs."""
    return RewardSpec(name=name, weights={})


def check(name: str) -> None:
    """Raise UserError where there is no such reward."""
    if name not in known():
        raise UserError(
            f"reward='{name}': no such reward; use one of {', '.join(known())}, "
            f"or add rewards/{name}.py with a function load(spec) -> Reward"
        )


def least_frames(name: str) -> int:
    """The frames that a clip must have for a reward: LEAST_FRAMES in its file, which is not run; 1 without it."""
    if name not in known():  # of a server elsewhere
        return 1
    text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    found = re.search(r"^LEAST_FRAMES = (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 1
