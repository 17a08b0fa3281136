"""Recipes for one node and for one card: what their heads say, and what they change."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import hardware
from fastgrpo.core import config
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from tests import ROOT

LAUNCH = ROOT / "launch"
MOST_S = {"one_card": 120, "one_node": 180}
HEAD = re.compile(
    r"^# Plan: (\d) x (\S+): (\d+) s per iteration, (\S+) GiB at the peak(.*)\.$", re.M
)
KEY = re.compile(r"(\w+) = .*# (one node|one card|plan --tune)$")
FILES = sorted(file for folder in MOST_S for file in (LAUNCH / folder).glob("*.toml"))
SYSTEMS = {"t2v_hunyuan", "i2v_skyreels", "t2i_flux", "t2i_hunyuan", "t2v_wan", "t2i_sd"}


def test_every_system_has_a_recipe_for_each() -> None:
    """Stable Diffusion's own is meant for one node."""
    of_card, of_node = ({f.stem for f in FILES if f.parent.name == name} for name in MOST_S)
    assert of_card == SYSTEMS and of_node | {"t2i_sd"} == SYSTEMS


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_heads_say_what_the_plan_says(file: Path) -> None:
    """It fits with 5 % left and is quick enough; one card trains adapters."""
    told, recipe = HEAD.search(file.read_text(encoding="utf-8")), config.load(file)
    assert told is not None
    found = planner.plan(recipe, int(told[1]), Machine(gpu(told[2]), Achieved()))
    held = sum(found.host.values()) / 2**30
    host = f", {held:.0f} GiB of the host's" if held >= 0.5 else ""
    said = (f"{found.seconds:.0f}", f"{found.worst.peak / 2**30:.1f}", host)
    assert said == (told[3], told[4], told[5])
    assert found.worst.peak <= 0.95 * found.machine.usable()
    assert found.seconds <= MOST_S[file.parent.name]
    assert (recipe.lora.rank > 0) == (file.parent.name == "one_card")
    assert int(told[1]) == {"one_card": 1, "one_node": 8}[file.parent.name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_they_are_the_papers_recipes_but_for_the_marked_lines(file: Path) -> None:
    paper, own = _values(LAUNCH / file.name), _values(file)
    changed = {key for key in own if own[key] != paper[key]}
    marked, section = set(), ""
    for line in file.read_text(encoding="utf-8").splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        if found := KEY.match(line):
            marked.add(f"{section}.{found[1]}")
    assert changed - {"run.dir"} <= marked
    assert own["run.dir"] != paper["run.dir"]


def test_the_page_on_hardware_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe whose head names a machine fits there; all but the demo's do name one."""
    assert {file.stem for file in LAUNCH.rglob("*.toml")} == {
        "t2v_tiny",
        *(file.stem for file in hardware.recipes()),
    }
    monkeypatch.setattr(sys, "argv", ["hardware", "--check"])
    assert hardware.main() == 0


def test_the_page_on_real_weights_has_the_figures_of_the_page_on_hardware() -> None:
    figures = {}
    for line in hardware.PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")]
        if len(cells) == 10:
            figures[cells[1]] = (cells[7], cells[8], cells[5])
    page = (hardware.PAGE.parent / "real_weights.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+)`[^|]*\| \d+ GB \| (\S+) \| (\S+) \| (\S+) \|", page)
    assert len(rows) >= 9
    assert {name: figures[name] for name, *_ in rows} == {name: tuple(own) for name, *own in rows}


def _values(file: Path) -> dict[str, Any]:
    """A recipe's values by key."""
    tree = config.load(file).model_dump()
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
