"""Wan 2.2 A14B against diffusers' own pipeline, which is the oracle: which network answers at which
step, guidance of both, ODE latents and pixels; and what an update trains.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress
from fastgrpo.core import config
from fastgrpo.core.config import Checkpoint, Model, Objective, Optimizer, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Experts, Prompt, experts_of, stack
from fastgrpo.models import wan, wan_a14b
from fastgrpo.models.loading import policies
from fastgrpo.models.wan import Wan
from fastgrpo.models.wan_a14b import WanExperts
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.tools.export.export import Export, export
from fastgrpo.tools.sample.source import Asked, find
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Plan, sample_ode
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.harness import backbone, runs
from tests.harness.backbone import CPU, GROUP, changed
from tests.harness.folders import wan as tiny_wan
from tests.harness.folders import wan_a14b as files
from tests.models import test_wan
from tests.models.test_wan import NEGATIVE, REAL_14B, first_order, noise_of, official, run

VIDEO = Video(frames=5, height=32, width=48)
TEXT = "a red circle"
SCALES = (4.0, 3.0)  # of high noise, of low noise: the authors'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan_a14b")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "wan_a14b", "path": str(path), "cfg": cfg, **more})


def encode(path: Path) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in test_wan.PROMPTS]), encoder.negative(NEGATIVE)


def load(path: Path, cfg: float = 1.0, **more: object) -> WanExperts:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, WanExperts)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def pipeline_of(path: Path, steps: int, shift: float) -> WanPipeline:
    """diffusers' pipeline with Euler steps of a shift, at times that are not rounded."""
    scheduler = first_order(path, steps)
    scheduler.register_to_config(flow_shift=shift)
    return official(path, scheduler)


def assert_equals_the_pipeline(
    path: Path, steps: int, scales: tuple[float, float | None], shift: float = 5.0
) -> None:
    """ODE latents with both scales of guidance, and pixels."""
    pipeline, (conditions, negative) = pipeline_of(path, steps, shift), encode(path)
    policy = load(path, scales[0], cfg_2=scales[1])
    policy.negative = negative
    x, condition = noise_of(policy, VIDEO), stack(conditions[:1])
    grid = policy.time_grid(steps, shift, policy.latent_shape(VIDEO))
    assert set(experts_of(policy.network, grid)) == {0, 1}
    ours = sample_ode(policy, x, grid, condition)

    def theirs(output_type: str) -> Tensor:
        return torch.as_tensor(
            pipeline(
                TEXT,
                negative_prompt=NEGATIVE,
                height=VIDEO.height,
                width=VIDEO.width,
                num_frames=VIDEO.frames,
                latents=x,
                num_inference_steps=steps,
                guidance_scale=scales[0],
                guidance_scale_2=scales[1],
                output_type=output_type,
                max_sequence_length=tiny_wan.LONGEST,
            ).frames
        )

    torch.testing.assert_close(ours, theirs("latent"), atol=1e-4, rtol=0)
    pixels = policy.decode(ours, condition).pixels
    assert (pixels.float() - theirs("np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "scales"), [(5, SCALES), (4, (1.0, None)), (5, (4.0, None))])
def test_ode_equals_the_pipeline(
    folder: Path, steps: int, scales: tuple[float, float | None]
) -> None:
    assert_equals_the_pipeline(folder, steps, scales)


def asked_of(pipeline: WanPipeline) -> list[int]:
    """The numbers of the networks that it will ask, in a list that grows."""
    asked: list[int] = []
    for number, part in enumerate(wan_a14b.NETWORKS):
        getattr(pipeline, part).register_forward_pre_hook(
            lambda *_, number=number: asked.append(number)
        )
    return asked


@pytest.mark.parametrize(("shift", "count"), [(3.0, 7), (5.0, 9), (12.0, 13)])
def test_every_step_has_the_network_that_the_pipeline_chooses(
    folder: Path, shift: float, count: int
) -> None:
    """As its own solver has the times, of second order and rounded to whole numbers, too."""
    policy, steps = load(folder), 20
    grid = policy.time_grid(steps, shift, policy.latent_shape(VIDEO))
    ours = experts_of(policy.network, grid)
    assert ours == (0,) * count + (1,) * (steps - count)
    usual = official(folder)
    usual.scheduler.register_to_config(flow_shift=shift)
    for pipeline in (pipeline_of(folder, steps, shift), usual):
        asked = asked_of(pipeline)
        small = VIDEO.model_copy(update={"frames": 1})
        x = noise_of(policy, small)
        run(pipeline, text=TEXT, x=x, steps=steps, cfg=1.0, video=small, output_type="latent")
        assert tuple(asked) == ours


def other_expert(self: WanExperts, expert: int, *rest: Any) -> Tensor:
    return velocity_of(self, 1 - expert, *rest)


def later(self: Experts, t: float) -> int:
    """The boundary of image-to-video."""
    return 0 if t >= 0.9 else 1


velocity_of = WanExperts.velocity_of
FAULTS: dict[str, tuple[Any, str, Any]] = {
    name: test_wan.FAULTS[name]
    for name in ("rounded time", "another mean of the latent", "half of the places for text")
} | {
    "the wrong expert": (WanExperts, "velocity_of", other_expert),
    "another boundary": (Experts, "expert_at", later),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at t = .8824 lies between the two boundaries."""
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=5, scales=SCALES, shift=5.0)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    policy = load(folder, cfg, cfg_2=cfg)
    assert set(backbone.plan_of(policy, VIDEO).experts) == {0, 1}
    assert backbone.largest_log_ratio(policy, VIDEO, encode(folder)[0], cpu_world) <= 1e-6


def trained(
    policy: WanExperts,
    conditions: list[Condition],
    world: World,
    window: range | None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, bool], list[tuple[int, list[float]]]]:
    """Which networks an update with AdamW and an average changes, and what each forward was asked.

    returns part -> whether any of its weights changed; by forward its expert and its rows' times
    """
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    sharding.shard(policy, world, torch.float32)
    shape = policy.latent_shape(VIDEO)
    grid = policy.time_grid(6, None, shape)
    plan = Plan(
        seed=3,
        iteration=0,
        group_size=GROUP,
        grid=grid,
        eta=0.4,
        shared_noise=True,
        latent_shape=shape,
        experts=experts_of(policy.network, grid),
        window=window,
    )
    drawn = backbone.draw(policy, plan, conditions, 3)
    asked: list[tuple[int, list[float]]] = []

    def seen(self: WanExperts, expert: int, x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        asked.append((expert, t.tolist()))
        return velocity_of(self, expert, x, t, *rest)

    monkeypatch.setattr(WanExperts, "velocity_of", seen)
    kept = torch.ones(len(drawn.slots), dtype=torch.bool)
    advantages = torch.linspace(-1, 1, len(kept))
    trainer = Trainer.create(
        policy, Optimizer(lr=1e-3, batch_size=4, ema_decay=0.5, weight_decay=0.1), None
    )
    experience = Experience(
        plan=plan,
        trajectories=drawn.trajectories,
        conditions=conditions,
        advantages=advantages,
        selected=kept,
    )
    update(trainer, Objective(), experience, world)
    changed_parts = {}
    for part in wan_a14b.NETWORKS:
        own = [name for name in before if name.startswith(f"{part}.")]
        now = {n: p.full_tensor() for n, p in policy.network.named_parameters() if n in own}  # type: ignore[attr-defined]
        average = {n: trainer.ema[n].full_tensor() for n in own}  # type: ignore[attr-defined]
        same = [torch.equal(before[n], now[n]) for n in own]
        assert [torch.equal(before[n], average[n]) for n in own] == same
        changed_parts[part] = not all(same)
    return changed_parts, asked


@pytest.mark.parametrize(
    ("window", "expected"),
    [(None, (True, True)), (range(2), (True, False)), (range(3, 5), (False, True))],
)
def test_the_noisy_steps_decide_which_network_is_trained(
    folder: Path,
    cpu_world: World,
    window: range | None,
    expected: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, the moving average too; no micro-batch mixes networks, though it mixes steps."""
    policy, conditions = load(folder), encode(folder)[0]
    found, asked = trained(policy, conditions, cpu_world, window, monkeypatch)
    assert tuple(found.values()) == expected
    for expert, times in asked:
        assert {0 if t >= files.BOUNDARY else 1 for t in times} == {expert}
    assert [expert for expert, _ in asked] == sorted(expert for expert, _ in asked)
    assert any(len(set(times)) > 1 for _, times in asked)


def test_a_checkpoint_has_both_networks_moments_whichever_was_trained(
    folder: Path, cpu_world: World, tmp_path: Path
) -> None:
    """So it can be loaded by a run whose optimizer has taken no step, or steps of the other."""
    policy = load(folder)
    sharding.shard(policy, cpu_world, torch.float32)
    trainer = Trainer.create(policy, Optimizer(lr=1e-3), None)
    x, t, about = noise_of(policy, VIDEO), torch.tensor([0.95]), stack(encode(folder)[0][:1])
    policy.velocity_of(0, x, t, about).square().mean().backward()
    trainer.step()
    settings = Checkpoint(every=1)
    saved = Checkpoints(tmp_path / "checkpoints", settings, cpu_world)
    assert saved.save_if_due(trainer, Progress(iteration=1), iterations=1) is None
    saved.end_saving(trainer, Progress(iteration=1))
    kept = {name: dict(trainer.optimizer.state[p]) for name, p in policy.network.named_parameters()}
    assert {of["step"].item() for of in kept.values()} == {0.0, 1.0}

    other = load(folder)
    sharding.shard(other, cpu_world, torch.float32)
    resumed = Trainer.create(other, Optimizer(lr=1e-3), None)
    assert Checkpoints(tmp_path / "checkpoints", settings, cpu_world).load(resumed).iteration == 1
    for name, parameter in other.network.named_parameters():
        for key, value in resumed.optimizer.state[parameter].items():
            assert torch.equal(plain(value), plain(kept[name][key])), (name, key)


def plain(tensor: Any) -> Tensor:
    """A tensor that may be a DTensor, whole."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_both_are_files_that_diffusers_loads_as_the_card_says(
    folder: Path, tmp_path: Path
) -> None:
    """And that `fastgrpo sample` reads again."""
    overrides = [f"model.path={folder}", "lora.rank=2", "lora.alpha=3.0"]
    recipe = config.load(runs.RECIPE, ["model.family=wan_a14b", *overrides])
    policy = policies.load(recipe.model, CPU, recipe.lora)
    trainable = {n: p for n, p in policy.network.named_parameters() if p.requires_grad}
    draws = torch.Generator().manual_seed(0)
    for parameter in trainable.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    state = {name: p.detach() for name, p in trainable.items()}
    dcp.save({"model": state}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    out = tmp_path / "out"
    export(Export(tmp_path / "run", out))
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', f'"{out}"').replace('"BASE"', f'"{folder}"'), names)
    again = find(Asked(str(out))).snapshot.load(CPU)
    assert isinstance(policy, WanExperts) and isinstance(again, WanExperts)
    condition = stack(encode(folder)[0][:1])
    x, t = noise_of(policy, VIDEO), torch.tensor([0.9])
    for expert, part in enumerate(wan_a14b.NETWORKS):
        with torch.no_grad():
            expected = policy.velocity_of(expert, x, t, condition)
            text = policy._padded(condition["text"])
            theirs = getattr(names["pipeline"], part)(x, t * 1000, text).sample
            read = again.velocity_of(expert, x, t, condition)
        for found in (theirs, read):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        plain_ = load(folder).velocity_of(expert, x, t, condition)
        assert (plain_ - expected).abs().max() > 0.1


def test_recomputing_changes_memory_alone(folder: Path) -> None:
    """In both networks."""
    assert_recomputing_changes_memory_alone(
        load(folder), load(folder, gradient_checkpointing=True), stack(encode(folder)[0][:1] * 2)
    )


def assert_recomputing_changes_memory_alone(
    plain: WanExperts, recomputing: WanExperts, two: Condition
) -> None:
    """By the gradients of two rows, one of each network's times."""
    x, t = noise_of(plain, VIDEO).expand(2, -1, -1, -1, -1), torch.tensor([0.95, 0.6])
    grads = []
    for policy in (plain, recomputing):
        policy.velocity(x, t, two).square().mean().backward()
        grads.append({name: p.grad for name, p in policy.network.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        again = grads[1][name]
        assert grad is not None and again is not None and torch.equal(grad, again), name


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 5.0), VIDEO, encode(folder)[0][:1])


def test_every_block_of_the_real_networks_is_wrapped() -> None:
    with torch.device("meta"):
        network = Experts(
            {part: WanTransformer3DModel.from_config(REAL_14B) for part in wan_a14b.NETWORKS}, 0.875
        )
    blocks = wan_a14b.blocks(network)
    assert len(blocks) == 80 and sum(p.numel() for p in network.parameters()) == 2 * 14_288_491_584
    alone = backbone.outside_blocks(network.transformer, wan.blocks(network.networks[0]))  # type: ignore[arg-type]
    assert backbone.outside_blocks(network, blocks) == {
        f"{part}.{name}".rstrip(".") for part in wan_a14b.NETWORKS for name in alone
    }


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    one = changed(folder, tmp_path / "one", "", transformer_2=[None, None])
    with pytest.raises(UserError, match=r"has no transformer_2, which .*use Wan 2.2 T2V-A14B"):
        policies.load(settings(one), CPU)
    whole = changed(folder, tmp_path / "whole", "", boundary_ratio=None)
    with pytest.raises(UserError, match=r"has no boundary_ratio, which Wan 2.2 A14B's has"):
        policies.load(settings(whole), CPU)
    with pytest.raises(
        UserError, match=r"has transformer_2, .*use Wan 2.1 .*model.family=wan_a14b for A14B"
    ):
        policies.load(test_wan.settings(folder), CPU)
    with pytest.raises(UserError, match=r"model.network=x: this family trains two networks"):
        policies.load(settings(folder, network="x"), CPU)
    wide = changed(folder, tmp_path / "wide", "transformer_2", in_channels=20)
    with pytest.raises(
        UserError, match=r"20 channels in and 8 out.*family=wan_a14b_i2v for I2V-A14B"
    ):
        policies.load(settings(wide), CPU)
    missing = tmp_path / "missing"
    changed(folder, missing, "", boundary_ratio=0.875)
    (missing / "transformer_2" / "config.json").unlink()
    with pytest.raises(UserError, match=r"transformer_2/config.json cannot be read"):
        policies.load(settings(missing), CPU)


def test_the_second_networks_guidance_is_the_firsts_unless_it_is_told(folder: Path) -> None:
    assert load(folder, 4.0).scales == (4.0, 4.0)
    assert load(folder, 4.0, cfg_2=3.0).scales == SCALES
    index = json.loads((folder / "model_index.json").read_text())
    network = load(folder).network
    assert isinstance(network, Experts) and network.boundary == index["boundary_ratio"] == 0.875
    assert issubclass(WanExperts, Wan)
