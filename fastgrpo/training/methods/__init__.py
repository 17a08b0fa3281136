"""Training methods: one file each, and the folder is the registry; `objective.kind` names one.

A file NAME.py has `METHOD`, a `training.method.Method`, and, where they differ from GRPO's,
`TRAITS` and `check(recipe)`, which are read without torch. Adding a method edits no other file.
Read `grpo.py` first.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.core import registry
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.config.rollout import noisy_count
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits, check_noise

if TYPE_CHECKING:
    from fastgrpo.training.method import Method

FOLDER = Path(__file__).parent
WITHOUT_BACKWARD = ("sage", "_sage", "_flash_3")
"""Beginnings of the names of attention kernels that autograd cannot go back through."""


def known() -> tuple[str, ...]:
    """Names of the methods: the files of this folder that define `METHOD`."""
    return registry.names(FOLDER, "METHOD")


def of(name: str) -> "Method":
    """The method of a recipe's objective.kind. Raises UserError for an unknown name."""
    _file(name)
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def traits_of(name: str) -> Traits:
    """A method's declared traits, read without torch. Raises UserError for an unknown name."""
    declared: Traits = registry.declared(_file(name), "TRAITS", Traits())
    return declared


def traits(recipe: Recipe) -> Traits:
    """The declared traits of the recipe's method."""
    return traits_of(recipe.objective.kind)


def check(recipe: Recipe) -> None:
    """Raise UserError, with the remedy, for keys with which the recipe cannot be trained."""
    attention = recipe.model.attention
    if attention is not None and attention.startswith(WITHOUT_BACKWARD):
        raise UserError(
            f"model.attention={attention}: has no backward, so that nothing before it would be "
            "trained; use flash, _native_cudnn or _native_efficient, or leave it out for torch's "
            "own choice."
        )
    registry.declared(_file(recipe.objective.kind), "check", check_noise)(recipe)
    rollout = recipe.rollout
    if rollout.scouts is not None and traits(recipe).noisy_steps and rollout.window is None:
        raise UserError(
            f"rollout.scouts={rollout.scouts}: with noise in every step a sample's initial noise "
            "decides little of it; set rollout.window=1 and rollout.window_schedule=per_prompt, or "
            "objective.kind=nft."
        )


def needs_initial_policy(recipe: Recipe) -> bool:
    """Whether the objective measures against the policy before training."""
    weights = recipe.objective.model_dump()
    return bool(weights[traits(recipe).reference_key])


def evaluates_average(objective: Objective) -> bool:
    """Whether the update evaluates the moving average of the weights at the states it trains."""
    key = traits_of(objective.kind).average_key
    return key is not None and bool(objective.model_dump()[key])


def latents_kept(recipe: Recipe) -> int:
    """The most latents of one sample that wait for the update, [C, F, H, W] in float32 each."""
    return traits(recipe).latents_kept(recipe.steps_trained, noisy_count(recipe.rollout))


def _file(name: str) -> Path:
    if name not in known():
        raise UserError(
            f"objective.kind='{name}': no file training/methods/{name}.py; "
            f"use one of {', '.join(known())}."
        )
    return FOLDER / f"{name}.py"
