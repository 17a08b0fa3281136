"""What must start at once does not import torch."""

import subprocess
import sys
from pathlib import Path

from fastgrpo import __version__
from fastgrpo.core import config
from fastgrpo.run.heartbeat import HeartbeatWriter
from tests import ROOT

FACES = (
    "fastgrpo",
    "fastgrpo.core",
    "fastgrpo.core.config",
    "fastgrpo.core.method",
    "fastgrpo.cli.main",
    "fastgrpo.models",
    "fastgrpo.rewards",
    "fastgrpo.run",
    "fastgrpo.tools",
    "fastgrpo.tools.plan.planner",
    "fastgrpo.tools.status",
    "fastgrpo.training",
    "fastgrpo.training.methods",
)
HEAVY = ("torch", "diffusers", "transformers", "numpy")
CODE = """
import importlib, sys
for name in {faces}:
    importlib.import_module(name)
    found = [heavy for heavy in {heavy} if heavy in sys.modules]
    assert not found, f"{{name}} imports {{found[0]}}"
from fastgrpo.cli.main import parser
top = parser()
(commands,) = (action for action in top._actions if action.dest == "command")
for name, command in commands.choices.items():
    assert command.format_help().startswith(f"usage: fastgrpo {{name}}")
    assert command.get_default("action") is not None, name
    assert command.epilog.startswith(f"example: fastgrpo {{name}}"), name
assert "torch" not in sys.modules, "a help text imports torch"
"""


def test_faces_and_help_texts_import_nothing_heavy() -> None:
    code = CODE.format(faces=FACES, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_recipe_is_checked_without_torch() -> None:
    code = (
        "import sys; from fastgrpo.cli import main as cli; "
        "code = cli.main(['plan', 'launch/t2v_tiny.toml', '--gpus', '1', '--gpu', 'h800', "
        "'--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_state_of_a_run_is_told_without_the_recipes_models(tmp_path: Path) -> None:
    """status runs on login nodes, again and again: it takes no pydantic, rich or torch."""
    with HeartbeatWriter(tmp_path, 0, 1):
        code = (
            "import sys; from fastgrpo.cli import main as cli; "
            f"code = cli.main(['status', {str(tmp_path)!r}]); "
            "found = {'pydantic', 'rich', 'numpy', 'torch'} & set(sys.modules); "
            "assert not found, found; sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_version_is_told_by_the_command_and_by_the_package() -> None:
    for module in ("fastgrpo", "fastgrpo.cli"):
        command = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"fastgrpo {__version__}\n")


def test_every_name_of_the_recipes_face_is_there() -> None:
    assert all(getattr(config, name).__name__ == name for name in config.__all__)
    named = [name for names in config.FILES.values() for name in names]
    assert set(named) <= set(config.__all__) and len(set(named)) == len(named)
