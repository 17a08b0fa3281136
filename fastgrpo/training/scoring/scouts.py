"""Scouts: many candidates of a prompt drawn cheaply by the ODE, and the noises of the best and the
worst for the iteration's samples (Sol-RL, arXiv 2604.06916).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithm import scouts
from fastgrpo.algorithm.advantages import combined_advantages
from fastgrpo.core.config import Recipe
from fastgrpo.core.policy import Condition, stack
from fastgrpo.training import rollout
from fastgrpo.training.rollout import Dealing, Drawn, Plan, SharedPrefix
from fastgrpo.training.scoring.drawing import Rollouts
from fastgrpo.training.scoring.scorer import Scored


@dataclass(frozen=True)
class Scouted:
    """An iteration's candidates: their scores, and those that are drawn again."""

    scored: Scored  # N candidates of each prompt
    chosen: tuple[tuple[int, ...], ...]  # by prompt, M candidates

    def metrics(self, recipe: Recipe, scored: Scored) -> dict[str, float]:
        """How far the scouts foretold the rewards of what was drawn from the same noises.

        scored: of the samples, K from each of a prompt's M noises: their mean is compared. Of the
          extremes alone, so that both correlations are larger than those of all candidates would be.
        """
        of_scouts = self.scored.weighted_sum(recipe.weights)
        chosen = torch.tensor(self.chosen)
        foretold = of_scouts.reshape(len(chosen), -1).gather(1, chosen)
        each = scored.weighted_sum(recipe.weights).reshape(*chosen.shape, -1)
        valid = self.scored.valid
        found = {
            "scouts/correlation": scouts.correlation(foretold, each.nanmean(2)),
            "scouts/rank_correlation": scouts.rank_correlation(foretold, each.nanmean(2)),
            "scouts/reward": of_scouts[valid].mean().item(),
            "scouts/invalid": float((~valid).sum()),
            "scouts/evaluations": float(len(valid) * recipe.rollout.scout_steps),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def scout(rollouts: Rollouts, conditions: Sequence[Condition], plan: Plan) -> Scouted:
    """Draw and score the candidates of `plan`, and choose those whose noises are drawn again.

    conditions: one per prompt of the iteration
    """
    recipe, world = rollouts.recipe, rollouts.world
    settings = recipe.rollout
    dealing = Dealing(conditions=conditions, plan=plan, batch_size=settings.at_once, world=world)

    def sample(plan: Plan, slots: list[int], prefixes: Mapping[int, SharedPrefix]) -> Drawn:
        condition = stack([conditions[slot // plan.group_size] for slot in slots])
        x, device = plan.initial_noise(slots, plan.grid.device), plan.grid.device.type
        lower = settings.scout_dtype == "bfloat16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=lower):
            final = rollout.sample_ode(
                rollouts.policy, x, plan.grid, condition, experts=plan.experts
            )
        return Drawn(slots, final.float(), {})

    _, scored = rollouts.score(dealing, sample, then="rollout")
    objective = recipe.objective.model_copy(update={"advantage_clip": math.inf})
    scores = combined_advantages(  # of all rewards, as the update will compare them
        scored.values,
        valid=scored.valid,
        weights=recipe.weights,
        group_size=plan.group_size,
        objective=objective,
    )
    by_prompt: tuple[Tensor, Tensor] = (
        scores.reshape(len(conditions), -1),
        scored.valid.reshape(len(conditions), -1),
    )
    return Scouted(scored, scouts.choose(*by_prompt, keep=settings.noises_per_prompt))


def candidates(plan: Plan, count: int, grid: Tensor, experts: tuple[int, ...] = ()) -> Plan:
    """The plan of `count` candidates of each prompt, each from a noise of its own, by the ODE.

    grid: float32 [T + 1] from 1 to 0;  experts: by its steps, as `Plan.experts`
    """
    return replace(
        plan,
        group_size=count,
        grid=grid,
        experts=experts,
        eta=0.0,
        shared_noise=False,
        noises=1,
        window=None,
        own_steps=(),
    )
