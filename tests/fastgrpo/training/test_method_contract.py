"""Whatever method lies in training/methods keeps what the loop, the plan and preflight rely on."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.method import Traits
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.tools.plan.costs import memory
from fastgrpo.tools.plan.subject import subject
from fastgrpo.tools.preflight import largest_batch
from fastgrpo.training import methods
from fastgrpo.training.method import Batch, Experience, Losses, LossesOf, Method
from fastgrpo.training.rollout import Drawn, Plan, shared_prefixes
from fastgrpo.training.trainer import Trainer
from tests.harness import runs, tiny

MEMBERS = ("check_policy", "plan", "drawing_weights", "sample", "losses", "zero_advantage_teaches")
OVERRIDES = ["rollout.steps=5", "video.frames=9", "video.height=24", "video.width=40"]
FITTING: dict[str, list[str]] = {
    "ddpo": ["objective.normalise=global"],
    "awm": ["rollout.shared_noise=false", "optimizer.ema_decay=0.9"],
    "dpo": ["rollout.shared_noise=false", "objective.best_of_n=2"],
    "nft": ["rollout.shared_noise=false", "optimizer.ema_decay=0.5"],
    "refl": ["rollout.shared_noise=false", "rewards.0.where=process"],
}
"""Keys beside objective.kind with which a method works; none for one that takes the defaults."""


def recipe(name: str, *overrides: str) -> Recipe:
    return config.load(
        runs.RECIPE, [f"objective.kind={name}", *FITTING.get(name, []), *OVERRIDES, *overrides]
    )


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def draw(method: Method, policy: Policy, plan: Plan, conditions: list[Condition]) -> Drawn:
    """All samples of the first prompt."""
    slots = list(range(plan.group_size))
    with sharding.gathered(policy.network):
        prefixes = shared_prefixes(policy, plan, conditions, [0]) if plan.shared_noise else {}
        return method.sample(policy, plan, conditions, slots, prefixes)


def contract(method: Any, traits: Traits, policy: Policy, conditions: list[Condition]) -> list[str]:
    """What a method breaks of the contract; nothing for one that keeps it."""
    missing = [name for name in MEMBERS if not callable(getattr(method, name, None))]
    if missing:
        return [f"has no {name}" for name in missing]
    drawn_alike = replace(tiny.plan(policy, shared_noise=traits.noisy_steps), group_size=2)
    plan = method.plan(drawn_alike, Objective())
    drawn = draw(method, policy, plan, conditions)
    broken = []
    if list(drawn.slots) != [0, 1] or sorted(drawn.trajectories) != [0, 1]:
        broken.append("sample: not a trajectory for each slot")
    latents = [len(one.states) + len(one.velocities) for one in drawn.trajectories.values()]
    most = traits.latents_kept(plan.trained or len(plan.noisy), len(plan.noisy))
    if max(latents) > most:
        broken.append(f"TRAITS: {max(latents)} latents are kept of a sample, declared are {most}")
    again = draw(method, policy, plan, conditions)
    if not torch.equal(again.final, drawn.final):
        broken.append("sample: another result the second time; draw with the plan's keyed noise")
    return broken + _losses_broken(method, traits, policy, plan, conditions, drawn)


def _losses_broken(
    method: Any,
    traits: Traits,
    policy: Policy,
    plan: Plan,
    conditions: list[Condition],
    drawn: Drawn,
) -> list[str]:
    """What is wrong with the losses of two transitions whose advantages are 1 and -1."""
    steps = [(slot, plan.chosen(slot)[0]) for slot in (0, 1)]
    experience = Experience(
        plan=plan,
        conditions=conditions,
        trajectories=drawn.trajectories,
        advantages=torch.tensor([1.0, -1.0], device=tiny.device()),
        selected=torch.ones(2, dtype=torch.bool),
        judge=tiny.judge,
    )
    losses_of = method.losses(policy, experience, Objective())
    x = losses_of.states(steps)
    t = torch.stack([plan.grid[step] for _, step in steps])
    condition = {name: torch.stack([tensor, tensor]) for name, tensor in conditions[0].items()}
    with torch.no_grad(), sharding.gathered(policy.network):
        v = policy.velocity(x, t, condition)
    initial = v.clone() if traits.pairs else None
    predicted = Batch(transitions=steps, x=x, v=v.clone(), v_reference=None)
    if traits.average_key:
        losses_of.evaluate_average(predicted)
    if traits.has_ratio and not traits.noisy_steps:  # whose rollout keeps no log-probability
        losses_of.evaluate_old(predicted)
    v.requires_grad_()
    losses: Losses = losses_of(Batch(transitions=steps, x=x, v=v, v_reference=initial))
    broken = [
        f"losses: {name} is not one number per transition"
        for name, value in (vars(losses) | dict(losses.figures)).items()
        if name != "figures" and value.shape != (2,)
    ]
    if set(losses.figures) != set(traits.figures):
        broken.append(f"losses: figures are {sorted(losses.figures)}, not those declared")
    if broken:
        return broken
    if losses.log_ratio.abs().max() > 1e-5:
        broken.append("losses: log_ratio is not 0 before the first step")
    losses.loss.sum().backward()
    if v.grad is None or not v.grad.flatten(1).any(1).all():
        broken.append("losses: no gradient in the prediction of a transition that has an advantage")
    return broken


@pytest.mark.parametrize("name", methods.known())
def test_every_method_keeps_the_contract(
    name: str, policy: Policy, conditions: list[Condition]
) -> None:
    assert not contract(methods.of(name), methods.traits_of(name), policy, conditions)
    methods.check(recipe(name))
    title, others = methods.traits_of(name).title, {*methods.known()} - {name}
    assert title and title not in {methods.traits_of(other).title for other in others}


@pytest.mark.parametrize("name", methods.known())
def test_what_is_declared_is_what_an_import_gives(name: str) -> None:
    module = inspect.getmodule(type(methods.of(name)))
    assert module is not None
    imported = __import__(f"fastgrpo.training.methods.{name}", fromlist=["METHOD"])
    assert methods.traits_of(name) == getattr(imported, "TRAITS", Traits())
    assert methods.traits_of(name).reference_key in Objective.model_fields


def test_a_name_without_a_file_is_an_error_that_lists_the_others() -> None:
    asked = config.load(runs.RECIPE, ["objective.kind=gpro"])
    for ask in (methods.check, methods.traits, lambda recipe: methods.of(recipe.objective.kind)):
        with pytest.raises(
            UserError,
            match=r"^objective\.kind='gpro': no file training/methods/gpro\.py; use one of",
        ):
            ask(asked)


def test_a_new_file_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "FOLDER", tmp_path)
    (tmp_path / "mine.py").write_text(
        "from fastgrpo.core.method import Traits\nTRAITS = Traits(reference_key='nft_kl')\nMETHOD "
        "= object()\n"
    )
    assert methods.known() == ("mine",)
    asked = config.load(runs.RECIPE, ["objective.kind=mine", "objective.nft_kl=0.5"])
    methods.check(asked)
    assert methods.needs_initial_policy(asked)


class Faulty:
    """A method that passes all on to a sound one, but for what a test plants."""

    def __init__(self, **planted: Any) -> None:
        sound = methods.of("grpo")
        for name in MEMBERS:
            setattr(self, name, planted.get(name, getattr(sound, name)))


class Planted:
    """The losses of a sound method, but for those that a test plants."""

    def __init__(self, sound: LossesOf, losses: Callable[[Batch], Losses]) -> None:
        self.states, self.losses = sound.states, losses

    def __call__(self, batch: Batch) -> Losses:
        return self.losses(batch)


def constant_losses(policy: Policy, experience: Experience, objective: Objective) -> Any:
    zero = torch.zeros(2)
    sound = methods.of("grpo").losses(policy, experience, objective)
    losses = lambda batch: Losses(  # noqa: E731
        loss=0.0 * batch.v.flatten(1).sum(1),
        outside=zero,
        kl=zero,
        log_ratio=zero,
        drawn_log_ratio=zero,
        drawn_outside=zero,
    )
    return Planted(sound, losses)


def summed_losses(policy: Policy, experience: Experience, objective: Objective) -> Any:
    sound = methods.of("grpo").losses(policy, experience, objective)
    return Planted(sound, lambda batch: replace(sound(batch), loss=sound(batch).loss.sum()))


def unkeyed(
    policy: Policy, plan: Plan, conditions: list[Condition], slots: list[int], prefixes: Any
) -> Drawn:
    drawn = methods.of("grpo").sample(policy, plan, conditions, slots, prefixes)
    return replace(drawn, final=torch.randn_like(drawn.final))


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"losses": constant_losses}, "losses: no gradient"),
        ({"losses": summed_losses}, "losses: loss is not one number per transition"),
        ({"sample": unkeyed}, "sample: another result the second time"),
        ({"zero_advantage_teaches": None}, "has no zero_advantage_teaches"),
    ],
)
def test_a_faulty_method_is_named(
    planted: dict[str, Any], complaint: str, policy: Policy, conditions: list[Condition]
) -> None:
    assert any(
        one.startswith(complaint)
        for one in contract(Faulty(**planted), Traits(), policy, conditions)
    )


def test_a_method_that_declares_too_little_is_named(
    policy: Policy, conditions: list[Condition]
) -> None:
    wrong = replace(methods.traits_of("grpo"), noisy_steps=False)
    broken = contract(methods.of("grpo"), wrong, policy, conditions)
    assert broken == ["TRAITS: 5 latents are kept of a sample, declared are 1"]


# --- bytes of waiting trajectories: one source for the plan and for rollout.batch_size=auto
# ---------------------------


@pytest.mark.parametrize("name", methods.known())
@pytest.mark.parametrize("more", [[], ["rollout.window=2"], ["objective.timestep_fraction=0.3"]])
def test_plan_and_preflight_count_the_same_bytes_and_no_sample_holds_more(
    name: str, more: list[str], policy: Policy, conditions: list[Condition]
) -> None:
    asked = recipe(name, *(more if methods.traits_of(name).noisy_steps else []))
    window = range(asked.rollout.window) if asked.rollout.window else None
    plan = replace(
        tiny.plan(policy, shared_noise=False), window=window, trained=asked.steps_trained
    )
    plan = methods.of(name).plan(plan, asked.objective)
    parts: Any = SimpleNamespace(
        recipe=asked, plan=plan, world=SimpleNamespace(device=torch.device("cpu"))
    )
    samples = 4
    planned = memory.trajectories(subject(asked, 1, 8).job, samples)
    assert planned == largest_batch._waiting(parts, samples)
    held = [
        sum(tensor.nbytes for tensor in (*one.states.values(), *one.velocities.values()))
        for one in draw(methods.of(name), policy, plan, conditions).trajectories.values()
    ]
    assert max(held) <= planned / samples
    if not methods.traits_of(name).noisy_steps or asked.steps_trained == len(plan.noisy):
        assert max(held) == planned / samples  # nothing is left to which steps are chosen


def test_a_trainers_weights_are_its_own_again_after_any_drawing(policy: Policy) -> None:
    for name in methods.known():
        trainer = Trainer.create(policy, tiny.settings(2), None)
        before = [parameter.detach().clone() for parameter in policy.network.parameters()]
        with methods.of(name).drawing_weights(trainer):
            pass
        assert all(
            torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True)
        )
