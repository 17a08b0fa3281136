"""A wheel in a fresh environment: from an empty folder to a run and its clips, by what it installs."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests import ROOT
from tests.harness import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOURCES = ("fastgrpo", "models", "rewards", "data", "launch")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SMALLER = {
    "check-reward": ["--no-server"],
    "check": [],
    "t2v_tiny.sh": [*runs.SMALL, *runs.SMALLER, "run.iterations=1"],
    "watch": ["--port", "0"],
    "sample": ["--limit", "1"],
    "evaluate": ["--limit", "1"],
}
"""What the commands of the quick start, in order, are given here, to take seconds."""


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


@dataclass
class QuickStart:
    """The section of docs/getting_started.md from an empty folder on, taken apart."""

    commands: list[str]  # in order, as a person types them
    files: dict[str, str]  # language of a fenced block -> what it holds

    @classmethod
    def read(cls) -> "QuickStart":
        page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
        section = page.partition("\n## From an empty folder")[2].partition("\n## ")[0]
        files = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
        prose = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
        return cls(re.findall(r"^    (\S.*)$", prose, re.MULTILINE), files)


class Shell:
    """A person's shell: commands in a folder, with the installed programs."""

    def __init__(self, folder: Path, programs: Path) -> None:
        outer = ("PYTHONPATH", "FASTGRPO_", "SLURM_", "TORCHELASTIC_")
        self.folder = folder
        self.environment = {k: text for k, text in os.environ.items() if not k.startswith(outer)}
        path = f"{programs}{os.pathsep}{self.environment['PATH']}"
        self.environment |= {"PATH": path, "HOME": str(folder)}
        self.environment |= {"FASTGRPO_PROCESSES": "1", "OMP_NUM_THREADS": "1"}

    def say(self, *command: str) -> str:
        """Run a command to its good end.  returns what it printed"""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    def look(self, *command: str) -> str:
        """Start `fastgrpo watch`, open the address that it prints, and end it.  returns the page"""
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            page = httpx.get(address, follow_redirects=True).text
            process.terminate()
        return page


def with_blocks(recipe: str, blocks: str) -> str:
    """A recipe with [prompts] and the block of my_reward.py as the quick start has them."""
    prompts, reward = re.split(r"\n(?=\[\[rewards)", blocks)
    recipe = re.sub(r"\[prompts\][^[]*", f"{prompts}\n", recipe)
    return re.sub(r'\[\[rewards\]\]\nname = "./my_reward.py"[^[]*', f"{reward}\n", recipe)


def test_a_new_user_goes_from_an_empty_folder_to_clips(programs: Path, tmp_path: Path) -> None:
    """By every line of the quick start, the training made smaller."""
    start, shell = QuickStart.read(), Shell(tmp_path, programs)
    where = shell.say("python", "-c", "import fastgrpo.data as it; print(*it.__path__)").strip()
    assert Path(where).is_relative_to(programs.parent)
    first, into, *rest = start.commands
    shell.say(*first.split())
    assert into == "cd mine"
    mine = shell.folder = tmp_path / "mine"
    (mine / "my_reward.py").write_text(start.files["python"])
    (mine / "prompts.jsonl").write_text(start.files["json"])
    recipe = (mine / "t2v_tiny.toml").read_text()
    (mine / "t2v_tiny.toml").write_text(with_blocks(recipe, start.files["toml"]))
    said = {}
    for line in rest:
        _, what, *_ = words = line.split()
        said[what] = (shell.look if what == "watch" else shell.say)(*words, *SMALLER[what])
    run = mine / "runs" / "t2v_tiny"
    assert [*said] == [*SMALLER]
    assert "BROKEN" not in said["check-reward"] and "6 to train on, 2 held out" in said["check"]
    assert "fastgrpo run t2v_tiny" in said["watch"]
    assert "coloured" in said["evaluate"] and "coloured" in (run / "metrics.jsonl").read_text()
    assert 'path = "builtin:tiny_hunyuan_video"' in (run / "recipe.toml").read_text()
    assert list((run / "samples").glob("step-1*/*.mp4"))
