"""The images' files: what they copy is there, both run the same steps, and the steps are bash."""

import re
import subprocess

import pytest

from tests import ROOT

DOCKERFILE = (ROOT / "container" / "Dockerfile").read_text()
DEFINITION = (ROOT / "container" / "fastgrpo.def").read_text()
SCRIPT = ROOT / "container" / "install.sh"
STEPS = ["packages", "libraries", "fastgrpo"]


@pytest.mark.parametrize("text", [DOCKERFILE, DEFINITION], ids=["Dockerfile", "fastgrpo.def"])
def test_both_images_take_all_steps_in_order_on_the_same_base(text: str) -> None:
    assert re.findall(r"container/install.sh (\w+)$", text, re.MULTILINE) == STEPS
    assert re.findall(r"^F(?:ROM|rom:) (.*)$", text, re.MULTILINE) == ["python:3.11-slim-bookworm"]


def test_what_is_copied_is_there_before_the_step_that_reads_it() -> None:
    copied: set[str] = set()
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
        elif "install.sh libraries" in line:
            assert "requirements.lock" in copied
    assert copied == {"container/install.sh", "requirements.lock", "."}
    assert all((ROOT / name).exists() for name in copied)


def test_the_steps_install_the_locked_torch() -> None:
    locked = re.search(r"^torch==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None and locked[0] in SCRIPT.read_text()


def test_a_step_of_another_name_is_one_line_and_exit_code_2() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    for arguments in ([], ["library"], ["packages", "libraries"]):
        said = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
        assert said.returncode == 2
        assert said.stderr == ("install.sh: name one step: packages, libraries or fastgrpo\n")
