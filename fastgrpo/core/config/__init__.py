"""A recipe: one TOML file plus `section.key=value` overrides, as frozen, typed models.

Read `sections.py` first: the keys and what they mean. `checks.py` has what does not go together,
`loading.py` reads, `paths.py` turns what people type into paths. Imports core.errors alone.

A name is imported from its file once it is asked for: commands that read no recipe use `paths.py`,
and start without pydantic.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.core.config.base import Section
    from fastgrpo.core.config.loading import (
        describe,
        load,
        load_with_mistakes,
        parse,
        read_tree,
        section,
    )
    from fastgrpo.core.config.messages import all_keys
    from fastgrpo.core.config.overrides import value_of
    from fastgrpo.core.config.reward_spec import RewardSpec, Server
    from fastgrpo.core.config.rollout import Rollout
    from fastgrpo.core.config.sections import (
        Checkpoint,
        Distributed,
        Evaluate,
        Lora,
        Model,
        Objective,
        Optimizer,
        Prompts,
        Recipe,
        Run,
        Track,
        Video,
    )

__all__ = [
    "Checkpoint",
    "Distributed",
    "Evaluate",
    "Lora",
    "Model",
    "Objective",
    "Optimizer",
    "Prompts",
    "Recipe",
    "RewardSpec",
    "Rollout",
    "Run",
    "Section",
    "Server",
    "Track",
    "Video",
    "all_keys",
    "describe",
    "load",
    "load_with_mistakes",
    "parse",
    "read_tree",
    "section",
    "value_of",
]

FILES = {
    "base": ("Section",),
    "loading": ("describe", "load", "load_with_mistakes", "parse", "read_tree", "section"),
    "messages": ("all_keys",),
    "overrides": ("value_of",),
    "reward_spec": ("RewardSpec", "Server"),
    "rollout": ("Rollout",),
}
"""The file of each name; of all others it is sections.py."""

if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> Any:
        """A name of `__all__`, from its file."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        file = next((file for file, names in FILES.items() if name in names), "sections")
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)
