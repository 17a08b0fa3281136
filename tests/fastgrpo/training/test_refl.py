"""ReFL: the reward's gradient through the decoder against finite differences, the update's
gradient, and what is refused.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.core import config
from fastgrpo.core.config import Objective, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import stack
from fastgrpo.data.tiny_world import shapes
from fastgrpo.parallel.world import World
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.training import methods
from fastgrpo.training.scoring.differentiable import InProcessJudge
from tests.fastgrpo.training.test_nft import TOTAL, assert_same_gradient
from tests.harness import runs, tiny

SETTINGS = Objective(kind="refl", refl_last=2)
REFL = ["objective.kind=refl", "rollout.shared_noise=false", "rewards.0.where=process"]
OWN = """
from collections.abc import Sequence
import torch
from fastgrpo.core.reward import Reward, Scores
DIFFERENTIABLE = True
class Bright(Reward):
    names = ("bright",)
    def __call__(self, pixels, prompts, fps):
        values = pixels.float().flatten(1).mean(1)
        return Scores({"bright": values}, values.isfinite())
    def differentiable(self, frames, prompts, fps):
        return {"bright": frames.flatten(1).mean(1)}
def load(spec):
    return Bright()
"""
"""A reward of a user's own that has a gradient."""


@pytest.fixture(scope="module")
def judge() -> InProcessJudge:
    """The tiny world's reward behind the tiny VAE in float64, a sample at a time."""
    policy = tiny.load_policy()
    policy.vae.double()
    weights = ["rewards.0.weights={VQ=1.0, MQ=0.5, TA=2.0}", "rollout.samples_per_prompt=2"]
    recipe = config.load(
        runs.RECIPE, [*REFL, *weights, "model.decode_batch=1", "objective.best_of_n=none"]
    )
    sources = [ScorerInProcess(recipe.rewards, tiny.device())]
    return InProcessJudge(
        policy=policy,
        recipe=recipe,
        texts=tiny.PROMPTS,
        conditions=tiny.encode(),
        sources=sources,
    )


def latents(count: int) -> Tensor:
    """Latents of square clips, as the tiny world's judge wants them, float64."""
    recipe = config.load(runs.RECIPE, REFL)
    shape = tiny.load_policy().latent_shape(recipe.video)
    keys: list[noise.Key] = [("refl", number) for number in range(count)]
    return noise.normal(keys, shape, tiny.device()).double()


def test_the_gradient_through_judge_and_decoder_is_that_of_finite_differences(
    judge: InProcessJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks of shapes that stay: they jump from pixel to pixel, and the gradient passes by."""
    mask = shapes.shape_mask
    monkeypatch.setattr(
        shapes,
        "shape_mask",
        lambda shape, at, *more, **keys: mask(shape, 0 * at + 16, *more, **keys),
    )
    x_0, (along,) = latents(2), latents(3)[2:]
    x_0.requires_grad_()
    reward = judge(x_0, [0, 4])
    (gradient,) = torch.autograd.grad(reward.sum(), x_0)
    assert reward.shape == (2,) and gradient.flatten(1).any(1).all()
    small = 1e-4
    with torch.no_grad():
        for row, slot in enumerate((0, 4)):
            ends = [judge(x_0[row : row + 1] + s * small * along, [slot]) for s in (1, -1)]
            expected = (ends[0] - ends[1]).item() / (2 * small)
            found = (gradient[row] * along).sum().item()
            assert found == pytest.approx(expected, rel=0.02, abs=1e-3)
    # a prompt's own caption is asked for
    assert judge(x_0, [0, 2])[1] != reward[1]


def test_the_judge_gives_the_scores_of_rounded_pixels(judge: InProcessJudge) -> None:
    x_0 = latents(2)
    pixels = judge.policy.decode(x_0, {}).pixels
    scores = judge.sources[0].score(pixels, tiny.PROMPTS[:2], 8.0)["tiny_world"].values
    expected = scores["VQ"] + 0.5 * scores["MQ"] + 2.0 * scores["TA"]
    torch.testing.assert_close(judge(x_0, [0, 2]).cpu(), expected, atol=5e-3, rtol=0)


def test_gradient_equals_plain_autograd_and_falls_with_the_time(world: World) -> None:
    """Oracle: the estimate x - t v written out, at states of the ODE drawn once more."""
    conditions, method = tiny.encode(), methods.of("refl")
    policy = tiny.load_policy(world)
    trainer = tiny.Recorder.create(policy, tiny.settings(5), None)
    plan = method.plan(tiny.plan(policy, shared_noise=False), SETTINGS)
    plan = type(plan)(**vars(plan) | {"trained": 1})
    drawn = tiny.draw_by(method, trainer, plan, conditions, range(TOTAL), 4)
    metrics = tiny.run_update(
        trainer,
        the_plan=plan,
        trajectories=drawn.trajectories,
        conditions=conditions,
        world=world,
        objective=SETTINGS,
    )
    plain = tiny.load_policy()
    loss, seen = torch.zeros((), device=tiny.device()), set[int]()
    for slot in range(TOTAL):
        condition = stack([conditions[slot // tiny.GROUP]])
        (step,) = plan.chosen(slot)
        x, t = plan.initial_noise([slot], tiny.device()), plan.grid
        with torch.no_grad():
            for n in range(step):
                x = x - (t[n] - t[n + 1]) * plain.velocity(x, t[n][None], condition)
        v = plain.velocity(x, t[step][None], condition)
        loss = loss - tiny.judge(x - t[step] * v, [slot])[0] / TOTAL
        seen.add(step)
    loss.backward()
    assert seen == {plan.steps - 2, plan.steps - 1}  # the last two
    assert isinstance(trainer, tiny.Recorder)
    assert_same_gradient(trainer, plain)
    assert metrics["update/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["update/refl_reward"] == pytest.approx(-loss.item(), abs=1e-5)


def test_a_sample_above_the_margin_teaches_nothing(world: World) -> None:
    conditions, method = tiny.encode(), methods.of("refl")
    policy = tiny.load_policy(world)
    plan = method.plan(tiny.plan(policy, shared_noise=False), SETTINGS)
    trainer = tiny.Recorder.create(policy, tiny.settings(6), None)
    drawn = tiny.draw_by(method, trainer, plan, conditions, range(TOTAL), 6)
    norms = []
    for margin in (-1e3, 1e3):
        metrics = tiny.run_update(
            trainer,
            the_plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions,
            world=world,
            objective=SETTINGS.model_copy(update={"refl_margin": margin}),
        )
        norms.append(metrics["update/grad_norm"])
    assert norms[0] == 0.0 < norms[1]


def own_reward(folder: Path) -> str:
    (folder / "bright.py").write_text(OWN)
    return f'rewards=[{{name="{folder}/bright.py", where="process", weights={{bright=1.0}}}}]'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.0.where=server"], "rewards.0.where=server: objective.kind=refl needs the"),
        (
            ['rewards=[{name="video_stats", where="process", weights={motion=1.0}}]'],
            "use clip_score, hps, pick_score, tiny_world, or grpo.",
        ),
        (
            ["rewards.0.threshold={VQ=0.5}", "rewards.0.weights={VQ_above=1.0}"],
            "rewards.0.weights.VQ_above: a binary part has no gradient",
        ),
        (["objective.refl_last=3"], "set objective.timestep_fraction=0.1666."),
        (["objective.kl_weight=0.1"], "use objective.refl_kl"),
    ],
)
def test_what_refl_cannot_train_on_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        methods.check(config.load(runs.RECIPE, [*REFL, *overrides]))


def test_a_monitor_needs_no_gradient_and_an_own_reward_may_have_one(tmp_path: Path) -> None:
    monitor = 'rewards=[{name="tiny_world", where="process", weights={VQ=1.0}}, '
    monitor += '{name="video_stats", weights={motion=0.0}}]'
    for rewards in (monitor, own_reward(tmp_path)):
        methods.check(config.load(runs.RECIPE, [*REFL, rewards]))


def test_one_step_is_what_the_remedy_gives() -> None:
    for steps in (3, 6, 7, 25, 28, 40, 50):
        asked = [*REFL, f"rollout.steps={steps}", "objective.refl_last=1"]
        try:
            methods.check(config.load(runs.RECIPE, asked))
        except UserError as error:
            remedy = re.search(r"set (objective.timestep_fraction=[\d.]+)\.$", str(error))
            assert remedy is not None
            better = config.load(runs.RECIPE, [*asked, remedy[1]])
            methods.check(better)
            assert better.steps_trained == 1


def test_rewards_of_weight_zero_are_not_differentiated() -> None:
    spec = RewardSpec(name="tiny_world", where="process", weights={"VQ": 0.0})
    source: Any = ScorerInProcess([spec], tiny.device())
    assert source.differentiable(torch.zeros(1, 9, 8, 8, 3), tiny.PROMPTS[:1], 8.0) == {}
