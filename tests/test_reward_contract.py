"""The contract of every reward in the folder, whatever its name: a reward that breaks it is named with the rule."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastgrpo.rewards
from fastgrpo import rewards
from fastgrpo.core.errors import UserError

WITHOUT_BASE = """
class Plain:
    names = ("A",)

def load(spec):
    return Plain()
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Make `folder` the folder of rewards, with these files, for one test."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"fastgrpo.rewards.{name}", raising=False)
    monkeypatch.setattr(fastgrpo.rewards, "FOLDER", folder)
    monkeypatch.setattr(fastgrpo.rewards, "__path__", [str(folder), *fastgrpo.rewards.__path__])


def test_a_reward_without_the_base_class_is_refused_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, without_base=WITHOUT_BASE)
    assert rewards.known() == ("without_base",)
    message = (
        r"rewards\.name=without_base: load\(\) returned a Plain, not a Reward; "
        r"let it inherit fastgrpo\.core\.reward\.Reward\."
    )
    with pytest.raises(UserError, match=message):
        rewards.load(rewards.plain("without_base"))


def test_the_registry_of_rewards_needs_no_torch() -> None:
    code = (
        "import sys; from fastgrpo import rewards; "
        "[rewards.least_frames(name) for name in rewards.known()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
