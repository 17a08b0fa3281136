"""The formula of network evaluations against the states that rollout and update really make."""

from collections import Counter
from itertools import product
from typing import Any, cast

import pytest
import torch

from fastgrpo.algorithm import selection, window
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.parallel.world import World
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import micro_batches
from fastgrpo.training.rollout import Dealing, Plan
from tests import ROOT

TINY = ROOT / "launch" / "t2v_tiny.toml"
BASE = (
    "prompts.per_iteration=5",
    "rollout.samples_per_prompt=6",
    "rollout.steps=8",
    "objective.best_of_n=none",
)


def recipe(*overrides: str) -> Recipe:
    return config.load(TINY, [*BASE, *overrides])


def plan_of(asked: Recipe, iteration: int) -> Plan:
    noisy = window.noisy_steps(asked.rollout, iteration, asked.run.seed)
    grid = window.shortened(
        torch.linspace(1, 0, asked.rollout.steps + 1), noisy, asked.rollout.tail_steps
    )
    return Plan(
        seed=asked.run.seed,
        iteration=iteration,
        group_size=asked.rollout.samples_per_prompt,
        grid=grid,
        eta=0.3,
        shared_noise=asked.rollout.shared_noise,
        latent_shape=(1,),
        noises=asked.rollout.seeds_per_prompt,
        window=noisy,
        own_steps=window.steps_of_prompts(
            asked.rollout, iteration, asked.run.seed, asked.prompts.per_iteration
        ),
        trained=asked.steps_trained,
        choice=asked.objective.timestep_choice,
    )


def states(asked: Recipe, plan: Plan, groups: int) -> int:
    """The update's states in an iteration, as `update` makes them, of all groups of ranks."""
    total = asked.prompts.per_iteration * plan.group_size
    key = ("minibatches", plan.seed, plan.iteration)
    count = 0
    for members in selection.minibatches(
        torch.ones(total, dtype=torch.bool),
        plan.group_size,
        asked.optimizer.updates_per_iteration,
        key,
    ):
        for group in range(groups):
            cpu, mesh = torch.device("cpu"), cast(Any, None)
            world = World(rank=0, size=groups, device=cpu, mesh=mesh)
            mine = world.share(total, group)
            count += len(
                micro_batches.states_of([(slot,) for slot in members if slot in mine], plan)
            )
    return count


SWITCHES = [
    (),
    ("rollout.shared_noise=false",),
    ("rollout.window=3", "rollout.window_schedule=first", "rollout.tail_steps=2"),
    ("rollout.window=2", "rollout.window_schedule=random"),
    ("rollout.seeds_per_prompt=3",),
    ("rollout.seeds_per_prompt=2", "rollout.window=2", "rollout.window_schedule=random"),
    ("rollout.window=1", "rollout.window_schedule=per_prompt", "rollout.seeds_per_prompt=3"),
    ("rollout.window=1", "rollout.window_schedule=per_prompt", "rollout.window_pool=3"),
    ("objective.timestep_choice=first",),
    ("objective.timestep_choice=last", "objective.timestep_fraction=0.3"),
    ("objective.timestep_fraction=1.0",),
]


@pytest.mark.parametrize(("switches", "updates"), list(product(SWITCHES, (1, 2))))
def test_states_of_the_update(switches: tuple[str, ...], updates: int) -> None:
    asked = recipe(*switches, f"optimizer.updates_per_iteration={updates}")
    for groups in (1, 4):
        counted = []
        for iteration in range(60):
            plan = plan_of(asked, iteration)
            told = network_calls.of_iteration(asked, plan.firsts.start, groups)
            counted.append(states(asked, plan, groups))
            assert told.update_least <= counted[-1] <= told.update_most
        assert sum(counted) / len(counted) == pytest.approx(told.update, rel=0.02)
        if groups == 1 and told.update_least == told.update_most:
            assert set(counted) == {told.update_least}


def test_states_of_the_rollout() -> None:
    """P [(f + 1) + G (S - f - 1)], by hand."""
    full = network_calls.of_iteration(recipe(), 0)
    assert (full.shared, full.single) == (5 * 1, 5 * 6 * 7)
    alone = network_calls.of_iteration(recipe("rollout.shared_noise=false"), 0)
    assert (alone.shared, alone.single) == (0, 5 * 6 * 8)
    middle = recipe("rollout.window=2", "rollout.tail_steps=1")
    assert network_calls.grid_steps(middle, 3) == 6
    assert network_calls.of_iteration(middle, 3).rollout == 5 * 4 + 5 * 6 * 2
    # two groups of ranks for each prompt
    assert network_calls.of_iteration(recipe(), 0, groups=10).shared == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_evaluated_for_selected_samples_alone(dtype: str) -> None:
    """DiffusionNFT: P G S in the rollout, P G' c of the average and of the update each."""
    asked = recipe(
        "objective.kind=nft",
        "rollout.shared_noise=false",
        "optimizer.ema_decay=0.5",
        "objective.best_of_n=2",
        f"model.dtype={dtype}",
    )
    told = network_calls.of_iteration(asked, 0)
    assert asked.steps_trained == 5
    assert (told.rollout, told.again, told.update) == (5 * 6 * 8, 5 * 2 * 5, 5 * 2 * 5)


@pytest.mark.parametrize(
    ("average", "updates", "again"), [(0.1, 1, 1.0), (0.1, 2, 1.5), (0, 2, 0.5)]
)
def test_awm_evaluates_the_average_and_the_old_policy_of_later_steps(
    average: float, updates: int, again: float
) -> None:
    asked = recipe(
        "objective.kind=awm",
        "rollout.shared_noise=false",
        "optimizer.ema_decay=0.9",
        "objective.best_of_n=2",
        f"objective.awm_average={average}",
        f"optimizer.updates_per_iteration={updates}",
    )
    told = network_calls.of_iteration(asked, 0)
    assert (told.rollout, told.again, told.update) == (5 * 6 * 8, again * 5 * 2 * 5, 5 * 2 * 5)


def test_windows_that_move_are_averaged() -> None:
    asked = recipe("rollout.window=2", "rollout.window_every=4", "run.iterations=10")
    assert network_calls.first_steps(asked) == pytest.approx({0: 0.4, 1: 0.4, 2: 0.2})
    places = network_calls.first_steps(recipe("rollout.window=2", "rollout.window_schedule=random"))
    assert list(places) == list(range(6)) and sum(places.values()) == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["first", "progressive", "random"])
def test_plan_and_rollout_agree_where_the_window_lies(schedule: str) -> None:
    """Over a run's iterations: the same steps, and as often as the plan says."""
    asked = recipe(
        f"rollout.window_schedule={schedule}",
        "rollout.window=3",
        "rollout.window_every=2",
        "rollout.window_stride=2",
        "run.iterations=300",
    )
    shares = network_calls.first_steps(asked)
    drawn = [window.noisy_steps(asked.rollout, n, asked.run.seed) for n in range(300)]
    assert {len(noisy) for noisy in drawn} == {3} and max(noisy.stop for noisy in drawn) < 8
    counts = Counter(noisy.start for noisy in drawn)
    assert set(counts) == set(shares) and sum(shares.values()) == pytest.approx(1)
    tolerance = 0.07 if schedule == "random" else 1e-9  # three standard deviations of a draw
    assert {start: count / 300 for start, count in counts.items()} == pytest.approx(
        shares, abs=tolerance
    )


def test_the_busiest_group_of_ranks() -> None:
    assert network_calls.busiest(recipe(), 1) == (30, 5)
    assert network_calls.busiest(recipe(), 4) == (8, 2)
    assert network_calls.busiest(recipe(), 60) == (1, 1)


PER_PROMPT = ("rollout.window=1", "rollout.window_schedule=per_prompt", "rollout.batch_size=4")


@pytest.mark.parametrize("noises", [1, 3])
def test_the_group_of_ranks_with_early_steps_is_waited_for(noises: int) -> None:
    """Of steps as the run draws them: the rows that the busiest group's rollout evaluates."""
    asked = recipe(*PER_PROMPT, f"rollout.seeds_per_prompt={noises}", "rollout.window_pool=4")
    conditions = [{"text": torch.zeros(1)}] * 5
    for groups in (1, 4):
        most = []
        for iteration in range(300):
            plan, rows = plan_of(asked, iteration), []
            for group in range(groups):
                cpu, mesh = torch.device("cpu"), cast(Any, None)
                world = World(rank=group, size=groups, device=cpu, mesh=mesh)
                dealing = Dealing(conditions=conditions, plan=plan, batch_size=4, world=world)
                slots = [slot for batch in dealing.samples_of(group) for slot in batch]
                prefixes = [prefix for batch in dealing.prefixes_of(group) for prefix in batch]
                ode = sum(plan.first_of(prefix // noises) + 1 for prefix in prefixes)
                rows.append(ode + sum(8 - plan.first_of(slot // 6) - 1 for slot in slots))
            most.append(max(rows))
            if groups == 1:
                assert dealing.metrics()["rollout/evaluations"] == rows[0]
        told, _ = network_calls.rollout_work(asked, groups)
        assert told == pytest.approx(sum(most) / len(most), rel=0.02)


def test_what_is_saved_is_in_the_plan() -> None:
    """A window of one step for all costs what it did, wherever the prompts' steps are equal."""
    one = recipe(*PER_PROMPT, "rollout.window_pool=1")
    first = recipe("rollout.window=1", "rollout.window_schedule=first", "rollout.batch_size=4")
    assert network_calls.rollout_work(one, 2) == network_calls.rollout_work(first, 2)
