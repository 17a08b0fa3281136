"""A recipe: one TOML file plus `section.key=value` overrides, as frozen, typed models.

Read `sections.py` first: the keys and what they mean. `checks.py` has what does not go together,
`loading.py` reads. Imports core.errors and core.files.
"""

from fastgrpo.core.config.base import Section
from fastgrpo.core.config.loading import (
    all_keys,
    describe,
    load,
    parse,
    read_tree,
    read_value,
    section,
)
from fastgrpo.core.config.reward_spec import RewardSpec
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
    Rollout,
    Run,
    Server,
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
    "parse",
    "read_tree",
    "read_value",
    "section",
]
