"""A run whose weights have exploded: a note in its folder, so that it does not explode again alike."""

import json
from pathlib import Path

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json, replace_text

NOTE = "exploded.json"
FREE = ("lr", "max_grad_norm", "schedule", "warmup_updates", "decay_updates")
"""Keys of [optimizer] that a run may change after an explosion."""


def write_note(recipe: Recipe, iteration: int) -> None:
    """Note the settings with which the run exploded.  iteration: counted from 1"""
    note = {"iteration": iteration, "optimizer": _settings(recipe)}
    replace_text(recipe.run.dir / NOTE, json.dumps(note, indent=1) + "\n")


def noted(folder: Path) -> bool:
    """Whether a run in the folder has exploded."""
    return (folder / NOTE).is_file()


def check(recipe: Recipe) -> None:
    """Raise UserError where the run would explode as it did."""
    file = recipe.run.dir / NOTE
    if not noted(recipe.run.dir):
        return
    note = read_json(file, "run.dir", "remove it")
    if note.get("optimizer") == _settings(recipe):
        raise UserError(
            f"optimizer.lr={recipe.optimizer.lr:g}: with it the weights of the run in "
            f"{recipe.run.dir} exploded in iteration {note.get('iteration')}, and would again; lower "
            f"it ({', '.join(FREE)} may change now), or remove {NOTE} to try as before."
        )


def _settings(recipe: Recipe) -> dict[str, object]:
    return {key: getattr(recipe.optimizer, key) for key in FREE}
