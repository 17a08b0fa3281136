"""Tokens of a recipe's longest prompt, against lengths that are known."""

from pathlib import Path

import pytest

from fastgrpo.core import config
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from tests import ROOT


def tokens(name: str, prompts: Path, text: int | None = None) -> tuple[int, str]:
    """(text tokens, the plan's note of them)."""
    recipe = config.load(ROOT / "launch" / f"{name}.toml", [f"prompts.train={prompts}"])
    found = planner.plan(recipe, 8, Machine(gpu("h800"), Achieved()), text=text).subject
    return found.job.text, next((n for n in found.notes if n.startswith("texts of")), "")


@pytest.mark.parametrize(
    ("longest", "expected"), [("a" * 90, 32), ("é" * 45, 32), ("a" * 91, 33), ("a" * 9000, 256)]
)
def test_texts_are_as_long_as_the_longest_prompt(
    longest: str, expected: int, tmp_path: Path
) -> None:
    """At three bytes a token and two that close it, up to what the encoder cuts."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"short\n\n  {longest}  \nshort\n", encoding="utf-8")
    found, note = tokens("t2v_hunyuan", file)
    assert found == expected and note.startswith(f"texts of {expected} tokens")


def test_where_nothing_can_be_counted_the_limit_holds(tmp_path: Path) -> None:
    """Another kind of file, none at all, and a family that pads every text."""
    other = tmp_path / "prompts.jsonl"
    other.write_text('{"prompt": "short"}\n', encoding="utf-8")
    padded = tmp_path / "prompts.txt"
    padded.write_text("short\n", encoding="utf-8")
    assert tokens("t2v_hunyuan", other)[0] == tokens("t2v_hunyuan", tmp_path / "no.txt")[0] == 256
    assert tokens("t2i_flux", padded)[0] == 512
    assert tokens("t2v_hunyuan", padded, text=77) == (77, "")
