"""A noisy step of each prompt's own, and several initial noises of a prompt: the same samples as
with plain windows, whoever draws them, and no evaluation more than is counted.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo.algorithm import window
from fastgrpo.core import config
from fastgrpo.core.config import Rollout
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import Dealing, Drawn, Plan
from tests.fastgrpo.algorithm.test_window import counted
from tests.fastgrpo.training.test_update import assert_gradients_equal, run
from tests.harness import runs, tiny

TOTAL = len(tiny.PROMPTS) * tiny.GROUP
OWN = (2, 0, 3)  # noisy steps of the prompts
KINDS = {"one noise": (True, 1), "two noises": (True, 2), "independent": (False, 1)}
PER_PROMPT = ("rollout.window=1", "rollout.window_schedule=per_prompt")


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def plan_of(policy: Policy, kind: str, own_steps: tuple[int, ...]) -> Plan:
    shared, noises = KINDS[kind]
    return replace(
        tiny.plan(policy, shared_noise=shared),
        noises=noises,
        window=range(4),
        own_steps=own_steps,
        trained=1,
    )


def test_each_prompt_draws_its_step_from_the_pool_by_a_key_of_its_own() -> None:
    settings = Rollout(steps=10, window=1, window_schedule="per_prompt", window_pool=4)
    assert window.noisy_steps(settings, 3, 0) == range(4)
    drawn = [window.steps_of_prompts(settings, iteration, 7, 8) for iteration in range(100)]
    counts = Counter(step for steps in drawn for step in steps)
    assert set(counts) == set(range(4)) and min(counts.values()) > 150  # 200 on average
    assert len(set(drawn)) > 90 and all(len(set(steps)) > 1 for steps in drawn)
    # of the key alone: not of the number of prompts, nor of what was drawn before
    assert window.steps_of_prompts(settings, 42, 7, 3) == drawn[42][:3]
    assert window.steps_of_prompts(settings, 42, 8, 8) != drawn[42]
    everywhere = settings.model_copy(update={"window_pool": None})
    steps = {step for n in range(50) for step in window.steps_of_prompts(everywhere, n, 0, 8)}
    assert steps == set(range(9))  # never the last
    assert window.steps_of_prompts(Rollout(steps=10, window=1), 0, 0, 8) == ()


def assert_same(one: Drawn, other: Drawn, slots: range, tolerance: float) -> None:
    """The samples and all that the update takes from their trajectories."""
    for slot in slots:
        rows = one.final[one.slots.index(slot)], other.final[other.slots.index(slot)]
        assert (rows[0] - rows[1]).norm() <= tolerance * rows[1].norm()
        first, second = one.trajectories[slot], other.trajectories[slot]
        assert first.states.keys() == second.states.keys() and len(first.log_probs) == 1
        for step, x in second.states.items():
            assert (first.states[step] - x).norm() <= tolerance * x.norm()
        for step, log_prob in second.log_probs.items():
            assert (first.log_probs[step] - log_prob).abs() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_step_for_all_it_is_that_window_bit_for_bit(
    policy: Policy, conditions: list[Condition], world: World, kind: str
) -> None:
    own = plan_of(policy, kind, (2, 2, 2))
    plain = replace(own, window=range(2, 3), own_steps=())
    one, other = (tiny.draw(policy, plan, conditions, world, 5) for plan in (own, plain))
    assert_same(one, other, range(TOTAL), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_is_drawn_as_by_the_window_of_its_step(
    policy: Policy, conditions: list[Condition], world: World, kind: str
) -> None:
    plan = plan_of(policy, kind, OWN)
    with counted(policy) as rows:
        drawn = tiny.draw(policy, plan, conditions, world, 5)
    dealing = Dealing(conditions=conditions, plan=plan, batch_size=5, world=world)
    told = dealing.metrics()
    assert sum(rows) == told["rollout/evaluations"]
    steps = (told["rollout/noisy_step_min"], told["rollout/noisy_step_max"])
    assert steps == (0, 3) and told["rollout/noisy_step"] == pytest.approx(5 / 3)
    for prompt, step in enumerate(OWN):
        plain = replace(plan, window=range(step, step + 1), own_steps=())
        slots = range(prompt * tiny.GROUP, (prompt + 1) * tiny.GROUP)
        assert_same(drawn, tiny.draw(policy, plain, conditions, world, 5), slots, 1e-6)
    if kind != "independent":  # M (f + 1) + G (S - f - 1), by hand
        each = [KINDS[kind][1] * (step + 1) + tiny.GROUP * (4 - step) for step in OWN]
        assert sum(rows) == sum(each)


def test_samples_of_one_noise_are_equal_until_they_part(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = plan_of(policy, "two noises", OWN)
    drawn = tiny.draw(policy, plan, conditions, world, 4)
    for prompt, step in enumerate(OWN):
        before = [drawn.trajectories[prompt * 4 + n].states[step] for n in range(4)]
        after = [drawn.trajectories[prompt * 4 + n].states[step + 1] for n in range(4)]
        assert torch.equal(before[0], before[1]) and torch.equal(before[2], before[3])
        assert not torch.equal(before[0], before[2]) and not torch.equal(after[0], after[1])
    noise = plan.initial_noise(range(8), tiny.device())
    assert len({row.sum().item() for row in noise}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_is_one_and_a_shared_state_is_evaluated_once(
    policy: Policy, conditions: list[Condition], world: World, kind: str
) -> None:
    plan = plan_of(policy, kind, OWN)
    trajectories = tiny.draw(policy, plan, conditions, world, 5).trajectories
    trainer = tiny.Recorder.create(policy, tiny.settings(7, lr=1e-30), None)
    with counted(policy) as rows:
        metrics = tiny.run_update(
            trainer,
            the_plan=plan,
            trajectories=trajectories,
            conditions=conditions,
            world=world,
        )
    assert metrics["update/transitions"] == TOTAL
    assert metrics["update/max_log_ratio_first"] <= 1e-6
    expected = {"one noise": 3, "two noises": 6, "independent": TOTAL}[kind]
    assert sum(rows) == metrics["update/evaluations"] == expected


def test_rows_seen_at_once_are_those_of_the_forward(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """What the update compares its micro-batches with, so that bfloat16 rounds alike."""
    plan = plan_of(policy, "two noises", OWN)
    dealing = Dealing(conditions=conditions, plan=plan, batch_size=4, world=world)
    sizes = dealing.batch_sizes()
    for batch in dealing.prefixes_of(0):
        for prefix in batch:
            step = OWN[prefix // 2]
            here = sum(OWN[other // 2] >= step for other in batch)  # others are through
            assert sizes[prefix * 2] == (
                here,
                len(next(b for b in dealing.samples_of(0) if prefix * 2 in b)),
            )


@pytest.mark.slow
@pytest.mark.parametrize("noises", [1, 2])
def test_one_and_two_ranks_agree(tmp_path: Path, noises: int) -> None:
    other = {"window": [0, 4], "own_steps": list(OWN), "noises": [noises], "trained": [1]}
    alone, two = (run(tmp_path / str(ranks), ranks, 5, 3, other) for ranks in (1, 2))
    assert_gradients_equal(two["gradients"][0], alone["gradients"][0], 1e-6)
    for result in (alone, two):
        assert result["metrics"]["update/max_log_ratio_first"] <= 1e-6
    assert two["metrics"]["update/loss"] == pytest.approx(alone["metrics"]["update/loss"], abs=1e-6)


@pytest.mark.slow
def test_a_run_is_the_same_on_ranks_that_keep_step_and_when_it_is_resumed(tmp_path: Path) -> None:
    """Weights sharded in the rollout, where prompts of one iteration need different numbers of
    forwards; and a run of two halves.
    """
    branches = ["rollout.seeds_per_prompt=2", "objective.advantage_group=seed"]
    linear = ["rollout.sampler=linear", "objective.step_weights=gradient", "run.preflight=true"]
    settings = [*runs.SMALLER, *PER_PROMPT, *branches, *linear, "prompts.per_iteration=3"]
    runs.succeed(tmp_path / "one", [*settings, "run.iterations=1"])
    runs.succeed(tmp_path / "one", settings)  # goes on
    sharded = [*settings, "distributed.rollout_weights=sharded"]
    runs.succeed(tmp_path / "two", sharded, ranks=2)
    one, two = runs.metrics(tmp_path / "one"), runs.metrics(tmp_path / "two")
    assert [row["iteration"] for row in one] == [0, 1] == [row["iteration"] for row in two]
    for alone, ranks in zip(one, two, strict=True):
        assert ranks["reward/sum"] == pytest.approx(alone["reward/sum"], abs=1e-4)
        assert ranks["update/grad_norm"] == pytest.approx(alone["update/grad_norm"], rel=1e-3)
        assert ranks["update/max_log_ratio_first"] <= 1e-6
        for name in ("rollout/noisy_step", "rollout/noisy_step_min", "rollout/noisy_step_max"):
            assert ranks[name] == alone[name]
        # a group of four is of one rank or of two, which then both follow the ODE to its step
        assert ranks["rollout/evaluations"] >= alone["rollout/evaluations"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((PER_PROMPT[1],), "rollout.window=none: with rollout.window_schedule=per_prompt"),
        ((PER_PROMPT[1], "rollout.window=2"), "rollout.window=2: with"),
        ((*PER_PROMPT, "rollout.tail_steps=2"), "rollout.tail_steps=2: shortens one grid"),
        ((*PER_PROMPT, "rollout.window_pool=6"), "must be below rollout.steps=6"),
        (("rollout.window=1", "rollout.window_pool=3"), "rollout.window_pool=3: has no effect"),
        (("rollout.seeds_per_prompt=3",), "use one of 1, 2, 4, 8, or rollout.shared_noise=false."),
        (("rollout.seeds_per_prompt=16",), "rollout.seeds_per_prompt=16: must leave two or more"),
        (
            ("rollout.seeds_per_prompt=2", "rollout.shared_noise=false"),
            "has no effect with rollout.shared_noise=false",
        ),
        (("objective.advantage_group=seed",), "set rollout.seeds_per_prompt above 1"),
        (
            (
                "objective.advantage_group=seed",
                "rollout.seeds_per_prompt=2",
                "objective.normalise=global",
            ),
            "has no effect with objective.normalise=global",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(runs.RECIPE, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_advantages_compare_a_prompts_or_a_noises_samples() -> None:
    branches = [*PER_PROMPT, "rollout.seeds_per_prompt=4"]
    assert config.load(runs.RECIPE, branches).advantage_size == 16
    assert (
        config.load(runs.RECIPE, [*branches, "objective.advantage_group=seed"]).advantage_size == 4
    )
