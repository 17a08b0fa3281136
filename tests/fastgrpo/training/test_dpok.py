"""DPOK's objective by keys: DDPO's loss, and the KL divergence to the initial policy."""

from dataclasses import replace

import torch

from fastgrpo.algorithm.transitions import sde_transition
from fastgrpo.core import config
from fastgrpo.core.config import Objective
from fastgrpo.core.policy import stack
from fastgrpo.parallel.world import World
from fastgrpo.training import methods
from fastgrpo.training.method import Batch, Experience
from tests.harness import runs, tiny

DPOK = ["objective.kind=ddpo", "objective.normalise=global", "objective.kl_weight=0.01"]


def test_the_keys_are_ddpos_with_an_initial_policy() -> None:
    recipe = config.load(runs.RECIPE, [*DPOK, "rollout.shared_noise=false"])
    methods.check(recipe)
    assert methods.needs_initial_policy(recipe)
    assert not methods.needs_initial_policy(config.load(runs.RECIPE, DPOK[:2]))


def test_the_loss_is_ddpos_and_the_weighted_divergence(world: World) -> None:
    """Oracle: |mean - mean_initial|^2 / (2 std^2), a mean over dimensions, written out."""
    conditions, policy = tiny.encode(), tiny.load_policy(world)
    initial = tiny.moved_reference(world)
    plan = replace(tiny.plan(policy, shared_noise=False), trained=None)
    drawn = tiny.draw(policy, plan, conditions, world, 6)
    experience = Experience(
        plan=plan,
        conditions=conditions,
        trajectories=drawn.trajectories,
        advantages=tiny.advantages().to(tiny.device()),
        selected=torch.ones(len(drawn.slots), dtype=torch.bool),
    )
    transitions = [(0, 0), (2, 1), (5, 3)]
    losses = {}
    with torch.no_grad():
        for weight in (0.0, 0.01):
            objective = Objective(kind="ddpo", normalise="global", kl_weight=weight)
            losses_of = methods.of("ddpo").losses(policy, experience, objective)
            x = losses_of.states(transitions)
            t = torch.stack([plan.grid[step] for _, step in transitions])
            t_next = torch.stack([plan.grid[step + 1] for _, step in transitions])
            condition = stack([conditions[0]] * 3)
            v, v_initial = (one.velocity(x, t, condition) for one in (policy, initial))
            batch = Batch(transitions=transitions, x=x, v=v, v_reference=v_initial)
            losses[weight] = losses_of(batch)
        means = [sde_transition(x, one, t, t_next, plan.eta)[0] for one in (v, v_initial)]
        variance = plan.eta**2 * (t - t_next)
        divergence = (means[0] - means[1]).square().flatten(1).mean(1) / (2 * variance)
    assert (divergence > 0).all()
    torch.testing.assert_close(losses[0.01].kl, divergence, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        losses[0.01].loss - losses[0.0].loss, 0.01 * divergence, rtol=1e-3, atol=1e-7
    )
