"""All commands x what people type as paths: one line, exit code 2, and nothing left behind."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.training.conditions import encode
from tests import ROOT
from tests.harness import runs

RECIPE = str(runs.RECIPE)
LONG = "n" * 300
KEYS = (  # of a recipe
    "run.dir",
    "run.start_from",
    "model.path",
    "model.network",
    "prompts.train",
    "prompts.heldout",
    "prompts.cache",
    "server.token_file",
)
FILES = ("prompts.train", "prompts.heldout", "server.token_file")
COMMANDS: dict[str, tuple[str, ...]] = {
    **{f"{command} recipe": (command, "PATH") for command in ("train", "check", "embed")},
    **{f"{command} {key}": (command, RECIPE, f"{key}=PATH")
       for command in ("train", "check") for key in KEYS},
    "preflight recipe": ("preflight", "PATH"),
    "preflight run.dir": ("preflight", RECIPE, "run.dir=PATH"),
    "embed run.dir": ("embed", RECIPE, "run.dir=PATH"),
    "embed prompts.cache": ("embed", RECIPE, "prompts.cache=PATH", "prompts.limit=200"),
    "plan recipe": ("plan", "PATH", "--gpus", "1", "--gpu", "h100"),
    "plan --calibration": ("plan", RECIPE, "--gpus", "1", "--gpu", "h100", "--calibration", "PATH"),
    "plan --picture": ("plan", RECIPE, "--gpus", "1", "--gpu", "h100", "--picture", "PATH.png"),
    "sample source": ("sample", "PATH", "--out", "OUT"),
    "sample --recipe": ("sample", "MODEL", "--recipe", "PATH", "--out", "OUT"),
    "sample --out": ("sample", RECIPE, "--prompt", "a", "--out", "PATH", "--steps", "2"),
    "sample --prompts": ("sample", RECIPE, "--prompts", "PATH", "--out", "OUT"),
    "sample --image": ("sample", RECIPE, "--prompt", "a", "--image", "PATH", "--out", "OUT"),
    "export run": ("export", "PATH", "OUT"),
    "export DST": ("export", "EXPORT", "PATH"),
    "check-reward NAME": ("check-reward", "PATH"),
    "check-reward FILE": ("check-reward", "PATH.py"),
    "check-reward FUNCTION": ("check-reward", "PATH.py:bright"),
    "check-reward --recipe": ("check-reward", "tiny_world", "--recipe", "PATH"),
    "check-reward --clips": ("check-reward", "tiny_world", "--no-server", "--clips", "PATH"),
    "check-reward --path": ("check-reward", "hps", "--path", "PATH"),
    "score FILES": ("score", "PATH", "--reward", "video_stats"),
    "score --recipe": ("score", "CLIP", "--recipe", "PATH"),
    "score --prompts": ("score", "CLIP", "--reward", "tiny_world", "--prompts", "PATH"),
    "score --path": ("score", "CLIP", "--reward", "hps", "--prompt", "a", "--path", "PATH"),
    "score --json": ("score", "CLIP", "--reward", "video_stats", "--json", "PATH"),
    "score --token-file": (
        "score", "CLIP", "--reward", "video_stats", "--server", "http://127.0.0.1:1",
        "--token-file", "PATH",
    ),
    "evaluate run": ("evaluate", "PATH"),
    "evaluate --json": ("evaluate", "OUT", "--json", "PATH"),
    "evaluate --markdown": ("evaluate", "OUT", "--markdown", "PATH"),
    "evaluate --prompts": ("evaluate", "EXPORT", "--prompts", "PATH"),
    "evaluate --rewards": ("evaluate", "EXPORT", "--rewards", "PATH.toml"),
    "evaluate --token-file": (
        "evaluate", "EXPORT", "--server", "http://127.0.0.1:1", "--token-file", "PATH",
    ),
    "evaluate --weights": ("evaluate", "EXPORT", "--benchmark", "geneval", "--weights", "PATH"),
    "evaluate --geneval-prompts": (
        "evaluate", "EXPORT", "--benchmark", "geneval", "--geneval-prompts", "PATH",
    ),
    "evaluate --hps-prompts": ("evaluate", "EXPORT", "--benchmark", "hps", "--hps-prompts", "PATH"),
    "reproduce --weights": ("reproduce", "table5", "--weights", "PATH", "--dry-run"),
    "reproduce --launch": (
        "reproduce", "table5", "--weights", "MODEL", "--dry-run", "--launch", "PATH",
    ),
    "reproduce --recipe": (
        "reproduce", "table5", "--weights", "MODEL", "--dry-run", "--recipe", "PATH",
    ),
    "reproduce --out": (
        "reproduce", "table5", "--weights", "MODEL", "--recipes-only", "--recipe", RECIPE,
        "--out", "PATH",
    ),
    "study run": ("study", "PATH"),
    "study --prompts": ("study", "EXPORT", "--prompts", "PATH", "--out", "OUT"),
    "study --read": ("study", "--read", "PATH"),
    "init FOLDER": ("init", "PATH"),
    "fetch recipe": ("fetch", "PATH", "--dry-run"),
    "watch run": ("watch", "PATH", "--port", "0"),
    "report run": ("report", "PATH"),
    "status run": ("status", "PATH"),
    "serve NAME": ("serve-rewards", "PATH.py"),
    "serve --recipe": ("serve-rewards", "--recipe", "PATH", "--token-file", "CLIP"),
    "serve --token-file": ("serve-rewards", "tiny_world", "--token-file", "PATH"),
    "serve --ready-file": ("serve-rewards", "tiny_world", "--ready-file", "PATH"),
    "convert SRC": ("convert-videoalign", "PATH", "OUT"),
    "convert DST": ("convert-videoalign", "EXPORT", "PATH"),
    "convert --base": ("convert-videoalign", "EXPORT", "OUT", "--base", "PATH"),
}  # fmt: skip


def _circle(folder: Path) -> str:
    (folder / "circle").symlink_to(folder / "circle")
    return str(folder / "circle")


def _file(folder: Path) -> str:
    (folder / "file").write_text("some text")
    return str(folder / "file")


def _shut(folder: Path) -> str:
    (folder / "shut").mkdir(mode=0o000)
    return str(folder / "shut" / "below")


KINDS: dict[str, Callable[[Path], str]] = {
    "empty": lambda folder: "",
    "blank": lambda folder: "  ",
    "NUL": lambda folder: f"{folder}/a\0b",
    "newline": lambda folder: f"{folder}/a\nb",
    "too long": lambda folder: f"{folder}/{LONG}",
    "too long, here": lambda folder: LONG,
    "below a file": lambda folder: f"{_file(folder)}/below",
    "unset variable": lambda folder: "$FASTGRPO_UNSET/a",
    "unknown user": lambda folder: "~no-such-user/a",
    "circle of links": _circle,
    "not there": lambda folder: f"{folder}/ä b/c",
    "a file": _file,
    "a folder": str,
    "in /proc": lambda folder: "/proc/fastgrpo/x",
    "no permission": _shut,
}


FOLDERS = {"run.dir", "model.path", "model.network", "prompts.cache", "--out", "run", "SRC", "DST"}
FOLDERS |= {"run.start_from", "FOLDER", "--read", "--weights", "--launch", "--hps-prompts"}
"""Paths of which a file is a mistake; of the others a folder is one."""
MADE = {"run.dir", "prompts.cache", "--out", "DST", "FOLDER"}
WRITTEN = MADE | {"--json", "--markdown", "--picture", "--ready-file"}
CAN = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h: root's way past permissions."""


def cases() -> Iterator[tuple[str, str]]:
    """Every command's path with every kind that is a mistake there."""
    for command, kind in product(COMMANDS, KINDS):
        path = command.split()[1]
        other = "a folder" if path in FOLDERS else "a file"
        if kind == other or (path in MADE and kind == "not there"):
            continue
        if (path == "--picture" and kind in ("blank", "circle of links", "a folder")) or (
            path == "--path" and kind in ("a file", "a folder")
        ):
            continue
        yield command, kind


def test_no_command_is_left_out() -> None:
    (choices,) = (action.choices for action in cli.parser()._actions if action.dest == "command")
    assert choices is not None
    named = {command for command, *_ in COMMANDS.values()}
    assert set(choices) - named == {"keys"}, "keys takes no path"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside which the clip and the model lie."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FASTGRPO_TOKEN", "secret")
    monkeypatch.delenv("FASTGRPO_UNSET", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


class Capabilities(ctypes.Structure):
    """struct __user_cap_data_struct, of 32 capabilities."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def permissions_count() -> Iterator[None]:
    """Have this thread obey permissions inside, also where it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    now = (Capabilities * 2)()
    assert not libc.capget(header, now)
    before = now[0].effective
    now[0].effective = before & ~CAN
    assert not libc.capset(header, now)
    try:
        yield
    finally:
        now[0].effective = before
        assert not libc.capset(header, now)


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is read-only."""
    disk = tmp_path_factory.mktemp("read_only")
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def export_in(folder: Path) -> Path:
    """What `fastgrpo export` writes: a whole model and the recipe, beside the working folder."""
    export = folder.parent / "export"
    export.mkdir()
    for entry in (ROOT / "data" / "tiny_hunyuan_video").iterdir():
        (export / entry.name).symlink_to(entry)
    (export / "recipe.toml").write_text(config.load(runs.RECIPE).to_toml())
    return export


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.split()[1] in WRITTEN])
def test_a_read_only_file_system_is_one_line(
    command: str, read_only: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(command, str(read_only / "below"), folder, capsys)
    assert "read-only" in said.lower() or "Read-only" in said, said


@pytest.mark.parametrize(("command", "kind"), cases())
def test_a_path_that_cannot_be_is_one_line_and_leaves_nothing(
    command: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(command, KINDS[kind](folder), folder, capsys)


def refused(command: str, path: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses a path, leaving nothing."""
    clip = folder.parent / "clip.png"
    clip.write_text("not read")
    before = sorted(folder.rglob("*"))
    stand_ins = {
        "PATH": path,
        "OUT": str(folder / "out"),
        "CLIP": str(clip),
        "MODEL": str(ROOT / "data" / "tiny_hunyuan_video"),
        "EXPORT": str(export_in(folder)),
    }
    arguments = list(COMMANDS[command])
    for word, text in stand_ins.items():
        arguments = [argument.replace(word, text) for argument in arguments]
    capsys.readouterr()
    with permissions_count():
        assert cli.main(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastgrpo: "), said.err
    assert not any(letter in lines[0] for letter in "\0\r\x1b")
    assert sorted(folder.rglob("*")) == before, lines[0]
    return lines[0]


def test_check_tells_every_mistake_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "rollout.batch_size=-4": "must be a whole number above 0, or auto.",
        "video.frames=10": "must be a multiple of 4, plus 1; use 9 or 13.",
        "video.height=33": "not a multiple of 8",
        "video.width=31": "not a multiple of 8",
        "distributed.sp=3": "does not divide the network's 4 heads; use one of 1, 2, 4.",
        "server.token_file=/nope": "No such file",
        "prompts.image_column=x": "takes no reference image",
        "rewards.0.weights={XX=1.0}": "has no part 'XX'; its parts are VQ, MQ, TA.",
        "rewards.0.options.x=3": "takes no options",
        "prompts.per_iteration=9999": "there are 1440 training prompts",
        "nonsense": "not of the form section.key=value",
    }
    del mistakes["prompts.image_column=x"]  # the file has no columns, which is another test's
    assert cli.main(["check", RECIPE, *mistakes]) == 2
    lines = capsys.readouterr().err.splitlines()
    for typed, said in mistakes.items():
        key = typed.partition("=")[0].replace(".0.options", ".options").removesuffix(".0.weights")
        assert [line for line in lines if said in line], (key, lines)
    assert len(lines) == len(mistakes)


def test_check_names_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("rewards.0.name=tiny_word", "model.family=hunyuan", "model.path=/nope")
    assert cli.main(["check", RECIPE, *wrong]) == 2
    said = capsys.readouterr().err
    assert "rewards.0.name='tiny_word': no such reward. Did you mean tiny_world?" in said
    assert "Did you mean hunyuan_video?" in said and "model.path=/nope: no such folder" in said


@pytest.mark.parametrize("command", ["train", "embed", "preflight"])
def test_what_check_refuses_is_told_before_anything_is_read_or_made(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encode, "read_prompts", lambda *_: pytest.fail("too late"))
    wrong = ("rewards.0.name=foo", "model.family=hunyuan_vidio", "rewards.0.weights={XX=1.0}")
    for mistake in wrong:
        assert cli.main([command, RECIPE, "run.dir=made", mistake]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(folder.iterdir())
