"""Every command by what may become of its output, and by Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fastgrpo.cli.main import parser
from fastgrpo.core.processes import INTERRUPTED
from tests import ROOT
from tests.harness import forks, runs

pytestmark = pytest.mark.slow  # a process for every command and ending

LIMIT_S = 120.0
ENDLESS = ("serve-rewards", "watch")  # end by a signal alone


def closed(rank: int) -> None:
    """As `>&-`."""
    os.close(1)
    sys.stdout = None


def broken(rank: int) -> None:
    """As `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)


def ascii_only(rank: int) -> None:
    """As PYTHONIOENCODING=ascii."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


def interrupt(after_s: float, rank: int) -> None:
    """As Ctrl-C, so long after the command has begun to hear it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            time.sleep(0.001)
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


FAULTS = {"closed": closed, "broken": broken, "ascii": ascii_only}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose prompts and folder have letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("läufe") / "läuft"
    runs.succeed(folder, runs.SMALLER)
    return folder


def commands(run: Path, scratch: Path) -> dict[str, list[str]]:
    """A command line for each command, which ends well."""
    recipe = [str(runs.RECIPE), *runs.SMALL, *runs.SMALLER]
    fresh = f"run.dir={scratch / 'rün'}"
    clip = next((ROOT / "tests").rglob("*.mp4"), None) or make_clip(scratch)
    return {
        "train": [*recipe, fresh],
        "check": [*recipe, fresh],
        "preflight": [*recipe, fresh],
        "embed": [*recipe, fresh],
        "plan": [str(runs.RECIPE), "--gpus", "1", "--gpu", "h100"],
        "sample": [str(run), "--out", str(scratch / "bilder"), "--limit", "1"],
        "export": [str(run), str(scratch / "exportiert")],
        "check-reward": ["tiny_world"],
        "score": [str(clip), "--reward", "video_stats"],
        "evaluate": [str(run), "--limit", "1", "--set", "rewards.0.where=process"],
        "keys": [],
        "serve-rewards": ["tiny_world", "--port", "0"],
        "convert-videoalign": ["--help"],
        "report": [str(run)],
        "status": [str(run)],
        "watch": [str(run), "--port", "0"],
        "init": [str(scratch / "begonnen")],
        "fetch": [str(runs.RECIPE), fresh, "--dry-run"],
        "study": [str(run), "--pairs", "1", "--out", str(scratch / "paare")],
        "reproduce": ["table5", "--weights", str(run.parent), "--dry-run"],
    }


def make_clip(folder: Path) -> Path:
    """A clip of six frames."""
    import torch

    from fastgrpo.data.video import write_mp4

    folder.mkdir(parents=True, exist_ok=True)
    clip = torch.arange(6 * 32 * 32 * 3).reshape(6, 32, 32, 3) % 251
    write_mp4(folder / "ein clip.mp4", clip.to(torch.uint8), 8.0)
    return folder / "ein clip.mp4"


def end(words: list[str], first: Callable[[int], None], folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    errors = folder / "errors"
    started = forks.start(
        "fastgrpo.cli", arguments=words, output=folder / "out", errors=errors, first=first
    )
    return started.wait(LIMIT_S), errors.read_text()


NAMES = list(commands(Path(), Path(os.devnull).parent / "shm"))
LONG = (
    "train",
    "preflight",
    "embed",
    "check-reward",
    "sample",
    "evaluate",
    "study",
    "serve-rewards",
)
BY_NAME = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NAMES]


def test_no_command_is_left_out() -> None:
    (choices,) = (action.choices for action in parser()._actions if action.dest == "command")
    assert choices is not None and set(choices) == set(NAMES)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [one for one in BY_NAME if one.values[0] not in ENDLESS])
def test_no_output_ends_a_command(name: str, fault: str, run: Path, tmp_path: Path) -> None:
    words = [name, *commands(run, tmp_path / "scratch")[name]]
    code, errors = end(words, FAULTS[fault], tmp_path)
    assert code == 0, errors
    told = "fastgrpo: standard output: Broken pipe; " if fault == "broken" else None
    for line in errors.splitlines():
        assert told is not None and line.startswith(told) and name in ("train", "embed"), errors
    if name == "train":
        assert len(runs.metrics(tmp_path / "scratch" / "rün")) == 2


@pytest.mark.parametrize(
    ("name", "after_s"),
    [(name, 0.0) for name in NAMES]
    + [pytest.param(name, 1.0, marks=[pytest.mark.slow]) for name in LONG],
)
def test_ctrl_c_is_one_line(
    name: str, after_s: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGRPO_TOKEN", "made-up-for-a-test")
    words = [name, *commands(run, tmp_path / "scratch")[name]]
    code, errors = end(words, partial(interrupt, after_s), tmp_path)
    if after_s and code == 0:
        pytest.skip("the command had ended before")  # on a quick machine
    lines = [line for line in errors.splitlines() if not line.startswith("{")]  # a server's log
    assert (code, lines) == (INTERRUPTED, ["fastgrpo: ended by Ctrl-C"]), errors


def test_ctrl_c_while_the_command_is_imported_is_one_line() -> None:
    """In a real process, whose imports take most of its time."""
    code = """
import os, signal, sys
module, sys.argv[1:] = sys.argv[1], ["check", "launch/t2v_tiny.toml"]
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
from fastgrpo.cli.__main__ import console
console()
"""
    for module in ("fastgrpo.cli.main", "argparse", "fastgrpo.cli.plan", "pydantic"):
        done = subprocess.run(
            [sys.executable, "-c", code, module],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (130, "fastgrpo: ended by Ctrl-C\n"), module
