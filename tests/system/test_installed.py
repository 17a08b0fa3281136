"""A wheel in a fresh environment: from an empty folder to a run and its clips, by what it installs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests import ROOT
from tests.harness import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SOURCES = ("fastgrpo", "models", "rewards", "data", "launch")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, built without a network. It sees the libraries
    of this one, and not the package that is installed here.
    """
    folder = tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        copied = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=copied)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*pip, *build, "-w", str(folder)], cwd=folder / "source", check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    (site,) = folder.glob("env/lib/python3*/site-packages")
    # a folder of a .pth file is no site folder: the editable package's own .pth is not read
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env" / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, *install, "--ignore-installed", str(wheel)], check=True)
    return python.parent


def test_a_new_user_goes_from_an_empty_folder_to_clips(programs: Path, tmp_path: Path) -> None:
    outer = ("PYTHONPATH", "FASTGRPO_", "SLURM_", "TORCHELASTIC_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(outer)}
    environment |= {"PATH": f"{programs}{os.pathsep}{environment['PATH']}", "HOME": str(tmp_path)}
    environment |= {"FASTGRPO_PROCESSES": "1", "OMP_NUM_THREADS": "1"}

    def say(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    where = say("python", "-c", "import fastgrpo.data as it; print(*it.__path__)").strip()
    assert Path(where).is_relative_to(programs.parent)
    say("fastgrpo", "init", "~/mine")
    mine = tmp_path / "mine"
    small = [*runs.SMALL, *runs.SMALLER, "run.iterations=1", "run.dir=mine/runs/a"]
    say("bash", "mine/t2v_tiny.sh", *small)
    assert 'path = "builtin:tiny_hunyuan_video"' in (mine / "runs/a/recipe.toml").read_text()
    assert "brightness" in (mine / "runs/a/metrics.jsonl").read_text()
    shutil.move(mine / "runs/a", tmp_path / "moved")
    say("fastgrpo", "sample", "moved", "--limit", "1")
    assert list((tmp_path / "moved" / "samples").glob("step-1/*.mp4"))
