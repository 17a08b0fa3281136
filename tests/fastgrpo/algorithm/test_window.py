"""Windows of noisy steps, and what a group has in common computed once: nothing but the work
changes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.algorithm.transitions import time_grid
from fastgrpo.algorithm.window import noisy_steps, shortened
from fastgrpo.core.config import Rollout
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training import rollout
from fastgrpo.training.rollout import Plan
from tests.fastgrpo.training.test_update import assert_gradients_equal
from tests.harness import tiny

TOTAL = len(tiny.PROMPTS) * tiny.GROUP


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def test_every_step_but_the_last_is_noisy_without_a_window() -> None:
    assert noisy_steps(Rollout(steps=25), 3, 0) == range(24)


def test_a_window_lies_where_its_schedule_says() -> None:
    first = Rollout(steps=10, window=3, window_schedule="first")
    assert {noisy_steps(first, iteration, 0) for iteration in range(20)} == {range(3)}

    # starts 0 .. 6 are possible
    moving = Rollout(steps=10, window=3, window_every=2, window_stride=2)
    starts = [noisy_steps(moving, iteration, 0).start for iteration in range(10)]
    assert starts == [0, 0, 2, 2, 4, 4, 6, 6, 1, 1]

    anew = Rollout(steps=10, window=3, window_schedule="random")
    drawn = [noisy_steps(anew, iteration, 7) for iteration in range(300)]
    assert drawn == [noisy_steps(anew, iteration, 7) for iteration in range(300)]
    counts = Counter(steps.start for steps in drawn)
    assert set(counts) == set(range(7)) and min(counts.values()) > 20  # 43 on average
    assert all(len(steps) == 3 for steps in drawn)


def test_a_shortened_tail_keeps_the_noisy_steps_and_the_end() -> None:
    grid = time_grid(25, 5.0)
    assert torch.equal(shortened(grid, range(4, 8), None), grid)
    assert torch.equal(shortened(grid, range(4, 8), 17), grid)
    for tail in (1, 2, 5, 16):
        short = shortened(grid, range(4, 8), tail)
        assert len(short) == 8 + tail + 1
        assert torch.equal(short[:9], grid[:9]) and short[-1] == 0
        assert (short.diff() < 0).all() and torch.isin(short, grid).all()


@dataclass(frozen=True)
class Apart(Plan):
    """The same noise, and nothing shared: every sample is computed on its own."""

    def initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        return replace(self, shared_noise=True).shared_initial_noise(slots, device)

    def shared_initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        return Plan.initial_noise(self, slots, device)


def apart(plan: Plan) -> Plan:
    return Apart(**{f.name: getattr(plan, f.name) for f in fields(plan)} | {"shared_noise": False})


WINDOWS = {
    "full": (None, 3),
    "at the start": (range(2), None),
    "in the middle": (range(1, 3), None),
    "at the end": (range(2, 4), None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_equal_states_computed_once_change_nothing_but_the_work(
    policy: Policy, conditions: list[Condition], world: World, name: str
) -> None:
    window, trained = WINDOWS[name]
    together = replace(tiny.plan(policy), window=window, trained=trained)
    # the samples alone, each with the noise that they share
    results = []
    for plan in (together, apart(together)):
        with counted(policy) as rollout_rows:
            drawn = tiny.draw(policy, plan, conditions, world, 5)
        trainer = tiny.Recorder.create(policy, tiny.settings(6, updates=2, lr=1e-30), None)
        assert isinstance(trainer, tiny.Recorder)
        kept = torch.ones(TOTAL, dtype=torch.bool)
        kept[[1, 2]] = False  # as Best-of-N leaves samples out
        with counted(policy) as update_rows:
            metrics = tiny.run_update(
                trainer,
                the_plan=plan,
                trajectories=drawn.trajectories,
                conditions=conditions,
                world=world,
                kept=kept,
            )
        assert metrics["update/max_log_ratio_first"] <= 1e-6
        results.append((drawn, trainer.gradients, sum(rollout_rows), sum(update_rows)))
    (one, gradients, once, trained_once), (other, expected, alone, trained_alone) = results
    difference = one.final - other.final
    assert difference.norm() <= 1e-6 * other.final.norm()
    for slot, trajectory in one.trajectories.items():
        assert trajectory.states.keys() == other.trajectories[slot].states.keys()
        for step, x in trajectory.states.items():
            assert (x - other.trajectories[slot].states[step]).norm() <= 1e-6 * x.norm()
        for step, log_prob in trajectory.log_probs.items():
            assert (log_prob - other.trajectories[slot].log_probs[step]).abs() <= 1e-6
    for actual, alone_gradient in zip(gradients, expected, strict=True):
        assert_gradients_equal(actual, alone_gradient, 1e-6)

    # docs/guides/algorithms/performance.md, "Evaluations of the network"
    shared = together.noisy.start + 1
    assert alone == TOTAL * together.steps
    assert once == len(tiny.PROMPTS) * shared + TOTAL * (together.steps - shared)
    count = len(together.chosen(0))
    assert trained_alone == (TOTAL - 2) * count
    if name == "full":  # each sample draws its steps, so that only some have the first
        assert trained_once < trained_alone
    else:  # each of the two optimizer steps sees every prompt
        assert trained_once == 2 * len(tiny.PROMPTS) + (TOTAL - 2) * (count - 1)


@contextmanager
def counted(policy: Policy) -> Iterator[list[int]]:
    """Gives the number of rows of each of the network's evaluations inside."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        rows.append(len(kwargs["hidden_states"]))

    handle = policy.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def test_steps_outside_the_window_follow_the_ode(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """Until the window a sample is its group's ODE; after it, the ODE from where the window left
    it.
    """
    plan = replace(tiny.plan(policy), window=range(1, 2), trained=None)
    drawn = tiny.draw(policy, plan, conditions, world, 4)
    slots = [4, 5]  # of the second prompt
    condition = {name: torch.stack([tensor] * 2) for name, tensor in conditions[1].items()}
    x = plan.initial_noise(slots, plan.grid.device)
    with sharding.gathered(policy.network):
        before = ode(policy, x, plan.grid[:2], condition)
        after = torch.stack([drawn.trajectories[slot].states[2] for slot in slots])
        end = rollout.sample_ode(policy, after, plan.grid[2:], condition)
    for row, slot in enumerate(slots):
        assert set(drawn.trajectories[slot].states) == {1, 2}
        torch.testing.assert_close(
            drawn.trajectories[slot].states[1], before[row], rtol=0, atol=2e-6
        )
        torch.testing.assert_close(drawn.final[slot], end[row], rtol=0, atol=5e-6)
    assert not torch.equal(drawn.final[4], drawn.final[5])


def ode(policy: Policy, x: Tensor, grid: Tensor, condition: Condition) -> Tensor:
    with torch.no_grad():
        return x + (grid[1] - grid[0]) * policy.velocity(x, grid[0].expand(len(x)), condition)


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU's host would wait for: reading a value, and shapes that
    depend on values.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in self.NAMES)
        return func(*args, **(kwargs or {}))


def test_no_wait_inside_the_loops(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """None per denoising step, none per micro-batch: only per optimizer step and for the
    metrics.
    """
    plan = replace(tiny.plan(policy), window=range(1, 3), trained=None)
    with Waits() as waits:
        drawn = tiny.draw(policy, plan, conditions, world, 4)
    assert waits.count == 0
    counts = []
    for size in (2, 24):
        trainer = tiny.Recorder.create(policy, tiny.settings(size, updates=2, lr=1e-30), None)
        with Waits() as waits:
            tiny.run_update(
                trainer,
                the_plan=plan,
                trajectories=drawn.trajectories,
                conditions=conditions,
                world=world,
            )
        counts.append(waits.count)
    assert counts[0] == counts[1]  # AdamW reads its step counters, which lie in host memory
