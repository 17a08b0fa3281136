"""A run goes on where its files have moved: what is in them counts, not where they lie."""

import json
import shutil
from pathlib import Path

import pytest

from fastgrpo.checkpoint import resume
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from tests.harness import runs


def test_moved_prompts_and_weights_are_the_same_run(tmp_path: Path) -> None:
    began = config.load(runs.RECIPE, ["rewards.0.path=w/old"])
    moved = shutil.copy(began.prompts.train, tmp_path / "moved.txt")
    now = config.load(runs.RECIPE, [f"prompts.train={moved}", "rewards.0.path=w/new"])
    file = tmp_path / "inputs.json"
    file.write_text(json.dumps(resume.inputs(began)))
    resume.check_same_recipe(began, now)
    resume.check_same_inputs(file, now)
    Path(moved).write_text("another prompt\n")
    with pytest.raises(UserError, match=r"prompts.train: the file has changed"):
        resume.check_same_inputs(file, now)


def test_held_out_prompts_cannot_come_from_elsewhere_in_silence(tmp_path: Path) -> None:
    began = config.load(runs.RECIPE)
    now = config.load(runs.RECIPE, ["prompts.heldout=none", "prompts.heldout_share=0.05"])
    file = tmp_path / "inputs.json"
    file.write_text(json.dumps(resume.inputs(began)))
    with pytest.raises(UserError, match=r"prompts.heldout: the file has changed"):
        resume.check_same_inputs(file, now)


def test_a_moved_model_is_told_what_to_do() -> None:
    began, now = (config.load(runs.RECIPE, [f"model.path=/{place}"]) for place in ("a", "b"))
    with pytest.raises(UserError, match=r"model.path: /a -> /b.*a link at its old place"):
        resume.check_same_recipe(began, now)
