"""Stable Diffusion against diffusers' own pipeline and DDIM scheduler, which are the oracles."""

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from fastgrpo.algorithm.transitions import gaussian_log_prob
from fastgrpo.core.config import Model, Objective, Optimizer, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.models.loading import policies
from fastgrpo.models.stable_diffusion import Schedule, StableDiffusion, blocks
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import sample_ode
from fastgrpo.training.update import update
from tests import GOLDENS
from tests.harness import tiny
from tests.harness.backbone import CONFIGS, draw, first_ratio, plan_of
from tests.harness.folders import stable_diffusion as files

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two dogs in the snow"]
NEGATIVE = "blurred"
VIDEO = Video(frames=1, height=32, width=32)
STEPS = 5
GROUP = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stable_diffusion")
    files.write(path)
    return path


def changed(folder: Path, copy: Path, part: str, **entries: object) -> Path:
    """A copy of the folder with entries of one part's config changed; None takes one out."""
    shutil.copytree(folder, copy)
    file = copy / part / CONFIGS.get(part, "config.json")
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


def settings(path: Path, cfg: float = 1.0) -> Model:
    return Model(family="stable_diffusion", path=str(path), cfg=cfg)


def load(path: Path, cfg: float = 1.0, negative: Condition | None = None) -> StableDiffusion:
    policy = policies.load(settings(path, cfg), CPU)
    assert isinstance(policy, StableDiffusion)
    policy.negative = negative
    return policy


@dataclass
class Texts:
    conditions: list[Condition]
    negative: Condition


@pytest.fixture(scope="module")
def texts(folder: Path) -> Texts:
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        return Texts(encoder([Prompt(text) for text in PROMPTS]), encoder.negative(NEGATIVE))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return official(folder)


def official(path: Path) -> StableDiffusionPipeline:
    """The folder's pipeline with DDIM."""
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = ddim(path)
    return pipeline


def ddim(path: Path) -> DDIMScheduler:
    """Straight from the folder: a pipeline would set steps_offset to 1 whatever the folder says."""
    return DDIMScheduler.from_config(
        json.loads((path / "scheduler/scheduler_config.json").read_text())
    )


def noise_of(policy: StableDiffusion, video: Video = VIDEO) -> Tensor:
    generator = torch.Generator().manual_seed(video.width)
    return torch.randn(len(PROMPTS), *policy.latent_shape(video), generator=generator)


def assert_equals(
    policy: StableDiffusion,
    pipeline: StableDiffusionPipeline,
    texts: Texts,
    steps: int,
    video: Video = VIDEO,
) -> None:
    """ODE latents, for the pipeline from the texts on, and pixels."""
    policy.negative = texts.negative
    x = noise_of(policy, video)
    grid = policy.time_grid(steps, None, policy.latent_shape(video))
    assert bool((grid[:-1] > grid[1:]).all()) and grid[-1] == 0
    ours = sample_ode(policy, x, grid, stack(texts.conditions))

    expected = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        height=video.height,
        width=video.width,
        latents=x[:, :, 0],
        num_inference_steps=steps,
        guidance_scale=policy.cfg,
        eta=0.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours[:, :, 0], expected, atol=1e-4, rtol=0)
    assert not torch.allclose(ours[0], ours[1], atol=0.1)

    pixels = policy.decode(ours, {}).pixels
    assert pixels.shape == (2, 1, video.height, video.width, 3) and pixels.dtype == torch.uint8
    decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample.detach()
    images = pipeline.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(pixels[:, 0].numpy().astype(int) - (images * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize(("steps", "cfg", "width"), [(12, 1.0, 48), (5, 5.0, 48), (7, 7.5, 32)])
def test_ode_equals_the_pipeline(
    folder: Path,
    pipeline: StableDiffusionPipeline,
    texts: Texts,
    steps: int,
    cfg: float,
    width: int,
) -> None:
    assert_equals(
        load(folder, cfg),
        pipeline=pipeline,
        texts=texts,
        steps=steps,
        video=VIDEO.model_copy(update={"width": width}),
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"prediction_type": "v_prediction"},
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"timestep_spacing": "trailing"},
        {"beta_end": 0.02, "beta_schedule": "linear"},
        {"num_train_timesteps": 500, "_class_name": "DDPMScheduler"},
    ],
)
def test_the_schedulers_config_is_followed(
    folder: Path,
    pipeline: StableDiffusionPipeline,
    texts: Texts,
    tmp_path: Path,
    entries: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edited = load(changed(folder, tmp_path / "edited", "scheduler", **entries), 5.0)
    monkeypatch.setattr(pipeline, "scheduler", ddim(tmp_path / "edited"))
    assert_equals(edited, pipeline, texts, 5)
    with pytest.raises(AssertionError):
        monkeypatch.setattr(edited, "schedule", Schedule(files.SCHEDULER, CPU))
        assert_equals(edited, pipeline, texts, 5)


def test_the_vaes_scaling_factor_is_followed(folder: Path, texts: Texts, tmp_path: Path) -> None:
    edited = changed(folder, tmp_path / "edited", "vae", scaling_factor=0.5)
    assert_equals(load(edited), official(edited), texts, 3)
    x = noise_of(load(folder))
    assert not torch.equal(load(folder).decode(x, {}).pixels, load(edited).decode(x, {}).pixels)


def test_decoding_in_parts_changes_nothing(folder: Path) -> None:
    policy = load(folder)
    x = noise_of(policy)
    whole = policy.decode(x, {}).pixels
    policy.decode_batch = 1
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1


def test_text_features_equal_the_pipelines(pipeline: StableDiffusionPipeline, texts: Texts) -> None:
    text, without = pipeline.encode_prompt(PROMPTS, CPU, 1, True, [NEGATIVE] * 2)
    torch.testing.assert_close(stack(texts.conditions)["text"], text, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts.negative["text"], without[0], atol=1e-6, rtol=0)
    assert text.shape == (2, 77, files.WIDTH)


def test_transitions_equal_the_golden_ones(folder: Path) -> None:
    with safe_open(GOLDENS / "ddim_sde.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    policy = load(folder)
    policy.schedule = Schedule(json.loads(metadata["scheduler"]) | {"clip_sample": False}, CPU)
    for case in json.loads(metadata["cases"]):
        x, eps, x_next = (
            tensors[f"{case['step']}.{key}"][:, :, None] for key in ("x", "eps", "x_next")
        )
        t = torch.tensor(case["timestep"] / 1000)
        # its end is timestep 0
        t_next = torch.tensor(max(case["timestep"] - 1000 // case["num_steps"], 0.25) / 1000)
        for shape in ((), (len(x),)):
            mean, std = policy.transition(
                x, v=eps, t=t.expand(shape), t_next=t_next.expand(shape), eta=case["eta"]
            )
            log_prob = gaussian_log_prob(x_next, mean, std)
            torch.testing.assert_close(
                log_prob, tensors[f"{case['step']}.log_prob"], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("count", [1000, 777])
def test_times_find_their_timesteps_again(count: int) -> None:
    """Every timestep, after its division in float32; the end is no timestep."""
    entries = {"num_train_timesteps": count, "set_alpha_to_one": True, "steps_offset": 0}
    schedule = Schedule(files.SCHEDULER | entries, CPU)
    grid = schedule.grid(count)
    assert torch.equal(schedule.timestep(grid[:-1]), torch.arange(count).flip(0).float())
    assert torch.equal(schedule.alpha(grid[:-1]), schedule.scheduler.alphas_cumprod.flip(0))
    assert schedule.alpha(grid[-1]) == 1 > schedule.alpha(grid[-2])


@pytest.mark.parametrize("steps", [2, 50, 500])
def test_the_noise_never_exceeds_its_share(folder: Path, steps: int) -> None:
    """1 - alpha_next - std^2 in float64, of which the transition takes the root: positive up to eta
    = 1, then not.
    """
    policy = load(folder)
    alphas = policy.schedule.alpha(policy.time_grid(steps, None, ())).double()
    for alpha, alpha_next in pairwise(alphas[:-1]):
        share = (1 - alpha_next) * (1 - alpha / alpha_next) / (1 - alpha)
        assert 1 - alpha_next - share > 0
    x = torch.zeros(1, 4, 1, 2, 2)
    with pytest.raises(UserError, match=r"rollout.eta=1.2: .*use at most 1"):
        policy.transition(x, v=x, t=torch.tensor(0.5), t_next=torch.tensor(0.3), eta=1.2)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_on_every_step_for_any_batch_size(
    folder: Path, texts: Texts, cpu_world: World, cfg: float
) -> None:
    policy, conditions = load(folder, cfg, texts.negative), texts.conditions
    sharding.shard(policy, cpu_world, torch.float32)
    plan = plan_of(policy, VIDEO, group_size=GROUP, steps=STEPS, eta=1.0)
    for rollout_batch, update_batches in ((1, (2, 3)), (2, (1, 2)), (3, (1, 3))):
        drawn = draw(policy, plan, conditions, rollout_batch)
        for update_batch in update_batches:
            assert (
                first_ratio(
                    policy,
                    plan=plan,
                    drawn=drawn,
                    conditions=conditions,
                    size=update_batch,
                    world=cpu_world,
                )
                <= 1e-6
            )

    # the reference scores what it drew and keeps it rounded: its ratio leaves the clip range of
    # 1e-4
    for trajectory in drawn.trajectories.values():
        trajectory.states = {step: x.bfloat16().float() for step, x in trajectory.states.items()}
    assert (
        first_ratio(policy, plan=plan, drawn=drawn, conditions=conditions, size=2, world=cpu_world)
        > 1e-4
    )


def test_log_probs_are_those_of_the_stored_samples(folder: Path, texts: Texts) -> None:
    """By another route, in float64 from diffusers' step; the last trained step, of the least noise,
    included.
    """
    policy, conditions = load(folder, 5.0, texts.negative), texts.conditions
    plan = plan_of(policy, VIDEO, group_size=GROUP, steps=STEPS, eta=1.0)
    drawn = draw(policy, plan, conditions, 4)
    scheduler = ddim(folder)
    scheduler.set_timesteps(STEPS)
    for slot in range(len(drawn.slots)):
        for step, timestep in enumerate(scheduler.timesteps[:-1]):
            states = drawn.trajectories[slot].states
            x, x_next = states[step][None], states[step + 1][None].double()
            with torch.no_grad():
                eps = policy.velocity(x, plan.grid[step][None], stack([conditions[slot // GROUP]]))
            mean = scheduler.step(
                eps.double(), timestep, x.double(), 1.0, variance_noise=0 * eps.double()
            ).prev_sample
            std = scheduler._get_variance(timestep, timestep - 1000 // STEPS) ** 0.5
            expected = torch.distributions.Normal(mean, std.double()).log_prob(x_next).mean()
            assert drawn.trajectories[slot].log_probs[step].item() == pytest.approx(
                expected.item(), abs=3e-5
            )


def test_cfg_gradient_equals_plain_autograd_of_the_objective(
    folder: Path, pipeline: StableDiffusionPipeline, texts: Texts, cpu_world: World
) -> None:
    policy, conditions, negative = (
        load(folder, 5.0, texts.negative),
        texts.conditions,
        texts.negative,
    )
    sharding.shard(policy, cpu_world, torch.float32)
    plan = plan_of(policy, VIDEO, group_size=GROUP, steps=STEPS, eta=1.0)
    drawn = draw(policy, plan, conditions[:1], 2)
    trainer = tiny.Recorder.create(policy, Optimizer(lr=1e-4, batch_size=3), None)
    assert isinstance(trainer, tiny.Recorder)
    kept, advantages = torch.tensor([True, False]), torch.tensor([0.7, 0.0])
    update(
        trainer,
        Objective(),
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions[:1],
            advantages=advantages,
            selected=kept,
        ),
        cpu_world,
    )

    pipeline.scheduler.set_timesteps(STEPS)
    loss = torch.zeros(())
    for step, timestep in enumerate(pipeline.scheduler.timesteps[:-1]):
        x, x_next = (
            drawn.trajectories[0].states[step][None, :, 0],
            drawn.trajectories[0].states[step + 1][None, :, 0],
        )
        without, with_text = (
            pipeline.unet(x, timestep, condition["text"][None]).sample
            for condition in (negative, conditions[0])
        )
        eps = without + 5.0 * (with_text - without)
        mean = pipeline.scheduler.step(
            eps, timestep, x, 1.0, variance_noise=torch.zeros_like(x)
        ).prev_sample
        std = pipeline.scheduler._get_variance(timestep, timestep - 1000 // STEPS) ** 0.5
        log_prob = torch.distributions.Normal(mean, std).log_prob(x_next).mean()
        loss = loss - 0.7 * (log_prob - log_prob.detach()).exp() / (STEPS - 1)
    loss.backward()
    expected = {name: p.grad for name, p in pipeline.unet.named_parameters() if p.grad is not None}
    assert expected.keys() == trainer.gradients[0].keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (trainer.gradients[0][name] - grad).norm() <= 1e-5 * whole, name


def test_prediction_depends_on_all_that_it_is_given(folder: Path, texts: Texts) -> None:
    policy, guided = load(folder), load(folder, 5.0, texts.negative)
    first, second = (stack([condition]) for condition in texts.conditions)
    x, t = noise_of(policy)[:1], torch.tensor([0.5])
    with torch.no_grad():
        usual = policy.velocity(x, t, first)
        for other in (
            policy.velocity(x + 0.1, t, first),
            policy.velocity(x, t / 2, first),
            policy.velocity(x, t, second),
            guided.velocity(x, t, first),
        ):
            assert (other - usual).abs().mean() > 0.02 * usual.abs().mean()


def test_bfloat16_is_near_and_gives_float32(folder: Path, texts: Texts, cpu_world: World) -> None:
    exact = load(folder)
    policy = policies.load(settings(folder).model_copy(update={"dtype": "bfloat16"}), CPU)
    sharding.shard(policy, cpu_world, torch.bfloat16)
    x, t = noise_of(exact), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        expected, v = (p.velocity(x, t, stack(texts.conditions)) for p in (exact, policy))
    assert v.dtype == torch.float32 and 0 < (v - expected).norm() < 0.03 * expected.norm()
    assert (policy.decode(x, {}).pixels.int() - exact.decode(x, {}).pixels.int()).abs().max() <= 8


def test_nothing_waits_for_the_device(folder: Path, texts: Texts) -> None:
    """A fake tensor has no values, so that reading one, which would wait for a GPU, is an error."""
    policy = load(folder, 5.0, texts.negative)
    plan = plan_of(policy, VIDEO, group_size=GROUP, steps=STEPS, eta=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, times = torch.empty(2, *plan.latent_shape), torch.empty(len(plan.grid))
        v = policy.velocity(x, times[0].expand(2), stack(texts.conditions))
        for t, t_next in ((times[0], times[1]), (times[:2], times[1:3])):
            assert policy.transition(x, v=v, t=t, t_next=t_next, eta=1.0)[0].shape == x.shape
            assert policy.clean_estimate(x, v, t).shape == x.shape


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        # v1.4's config
        network = UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, sample_size=64
        )
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
    wrapped = blocks(network)
    assert [type(block).__name__ for block in wrapped] == [
        *["CrossAttnDownBlock2D"] * 3,
        "DownBlock2D",
        "UNetMidBlock2DCrossAttn",
        "UpBlock2D",
        *["CrossAttnUpBlock2D"] * 3,
    ]
    inside = {id(p) for block in wrapped for p in block.parameters()}
    outside = {
        name.rpartition(".")[0] for name, p in network.named_parameters() if id(p) not in inside
    }
    assert outside == {
        "conv_in",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "conv_norm_out",
        "conv_out",
    }
    assert sum(p.numel() for p in network.parameters() if id(p) not in inside) < 0.003 * 859_520_964


def test_every_block_is_sharded(folder: Path, cpu_world: World) -> None:
    policy = load(folder)
    sharding.shard(policy, cpu_world, torch.float32)
    assert all(isinstance(module, FSDPModule) for module in (*policy.blocks, policy.network))
    assert len(policy.blocks) == 5


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        (
            "",
            {"_class_name": "StableDiffusionXLPipeline"},
            "not a StableDiffusionPipeline; correct the path. There are the families",
        ),
        (
            "",
            {"_class_name": "FluxPipeline"},
            "names a FluxPipeline, not a StableDiffusionPipeline; set model.family=flux",
        ),
        ("scheduler", {"clip_sample": True}, "has clip_sample=true, .*set it to false"),
        ("scheduler", {"thresholding": True}, "has thresholding=true, .*set it to false"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr=true"),
        (
            "scheduler",
            {"prediction_type": "sample"},
            "prediction_type=sample; this family knows epsilon and v_prediction",
        ),
        (
            "scheduler",
            {"beta_schedule": None, "_class_name": "FlowMatchEulerDiscreteScheduler"},
            "is a FlowMatchEulerDiscreteScheduler, .*model.family",
        ),
        ("unet", {"time_cond_proj_dim": 32}, "unet/config.json has time_cond_proj_dim=32; "),
        ("unet", {"in_channels": 9}, "has in_channels=9, for inpainting"),
        (
            "unet",
            {"_class_name": "FluxTransformer2DModel"},
            "holds a FluxTransformer2DModel, not a UNet2DConditionModel",
        ),
        (
            "text_encoder",
            {"hidden_size": 64},
            "width 32, .*text encoder 64; the parts are of different models",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    if part == "unet" and "_class_name" not in entries:  # the weights must still fit their config
        config = UNet2DConditionModel.load_config(edited / "unet")
        UNet2DConditionModel.from_config(config).save_pretrained(edited / "unet")
    with pytest.raises(UserError, match=message) as caught:
        load(edited)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        ("leading", 501, "=501: the schedule has timesteps for at most 500; use fewer"),
        ("trailing", 33, "=33: trailing timesteps need a divisor of 1000; use 25 or 40"),
        ("trailing", 1001, "at most 1000"),
        ("linspace", 10, "set timestep_spacing to leading"),
    ],
)
def test_numbers_of_steps_that_ddim_cannot_take(spacing: str, steps: int, message: str) -> None:
    schedule = Schedule(files.SCHEDULER | {"timestep_spacing": spacing}, CPU)
    with pytest.raises(UserError, match=message):
        schedule.grid(steps)


def test_mistakes_of_the_recipe_are_one_clear_line(folder: Path) -> None:
    policy = load(folder)
    shape = policy.latent_shape(VIDEO)
    with pytest.raises(UserError, match=r"rollout.shift=3.0: .*no shift; leave it out"):
        policy.time_grid(10, 3.0, shape)
    with pytest.raises(UserError, match=r"video.frames=5: Stable Diffusion draws images; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 5}))
    with pytest.raises(UserError, match=r"video.height=33: not a multiple of 2 .*use 32 or 34"):
        policy.latent_shape(VIDEO.model_copy(update={"height": 33}))
    with pytest.raises(UserError, match=r"model.guidance=3.5: .*set model.cfg instead"):
        policies.load(settings(folder).model_copy(update={"guidance": 3.5}), CPU)
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="prompts: ' ' has no tokens"),
    ):
        encoder([Prompt("a cat"), Prompt(" ")])
