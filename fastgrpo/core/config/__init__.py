"""A recipe: one TOML file plus `section.key=value` overrides, as frozen, typed models.

Read `sections.py` first: the keys and what they mean. `checks.py` has what does not go together,
`loading.py` reads, `paths.py` turns what people type into paths. Imports core.errors alone.
"""

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
    "load_with_mistakes",
    "parse",
    "read_tree",
    "section",
    "value_of",
]
