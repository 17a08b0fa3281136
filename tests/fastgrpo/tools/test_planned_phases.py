"""What `fastgrpo preflight` says of the plan beside what it measures."""

from typing import Any

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.parallel.world import World
from fastgrpo.tools.preflight.run import planned
from tests.harness import runs


def test_a_family_without_a_plan_has_no_planned_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone's own file in models/ is run, and its phases are measured, all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recipe = config.load(runs.RECIPE)
    mesh: Any = None
    world = World(rank=0, size=8, device=torch.device("cuda"), mesh=mesh)
    assert list(planned(recipe, world)) == ["load", "rollout", "decode", "reward", "update", "save"]
    own = recipe.model_copy(update={"model": recipe.model.model_copy(update={"family": "my_own"})})
    assert planned(own, world) == {}
