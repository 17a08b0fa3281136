"""Wan 2.1 and 2.2 TI2V-5B against diffusers' own pipeline, which is the oracle: text features, times, ODE latents,
pixels, gradients.

The official pipeline's solver is of second order; it is given an Euler scheduler, or UniPC of first
order, to compare.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.models import wan
from fastgrpo.models.loading import policies
from fastgrpo.models.wan import Wan
from fastgrpo.parallel.precision import to_compute_precision
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import t5
from tests.harness.folders import wan as files

PROMPTS = ["a red circle", "two dogs\n in the snow &amp; ice"]
NEGATIVE = "blurred, static"
VIDEO = Video(frames=5, height=32, width=48)
EULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 5.0,
    "num_train_timesteps": 1000,
}
REAL: dict[
    str, Any
] = {  # transformer/config.json of Wan2.1-T2V-1.3B-Diffusers, and what differs in the 14 B one
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
REAL_TI2V_5B = REAL | {"ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24}
REAL_TI2V_5B |= {"out_channels": 48}
REAL_14B = REAL | {"ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}


class UniPCWithExactTimes(UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC, which tells the network its times rounded down to whole numbers, without the
    rounding.
    """

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        super().set_timesteps(steps, device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    files.write(path)
    return path


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan 2.2's 5 B model."""
    path = tmp_path_factory.mktemp("ti2v")
    files.write_ti2v(path)
    return path


@pytest.fixture(scope="module")
def euler(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the Euler scheduler in place of UniPC."""
    path = tmp_path_factory.mktemp("euler") / "folder"
    changed(folder, path, "", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(EULER))
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "wan", "path": str(path), "cfg": cfg, **more})


def load(path: Path, cfg: float = 1.0, **more: object) -> Wan:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, Wan)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path, scheduler: Any = None) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler or pipeline.scheduler
    return pipeline


def first_order(path: Path, steps: int) -> UniPCMultistepScheduler:
    """The folder's UniPC, of first order and without its corrector: Euler steps by other
    formulas.
    """
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    return UniPCWithExactTimes.from_config(
        config | {"solver_order": 1, "disable_corrector": list(range(steps))}
    )


def run(
    pipeline: WanPipeline,
    text: str,
    x: Tensor,
    steps: int,
    cfg: float,
    video: Video,
    output_type: str,
) -> Tensor:
    """Latents [1, C, F, H, W] or pixels [1, F, H, W, 3] in [0, 1] of diffusers' pipeline."""
    frames = pipeline(
        text,
        negative_prompt=NEGATIVE,
        height=video.height,
        width=video.width,
        num_frames=video.frames,
        latents=x,
        num_inference_steps=steps,
        guidance_scale=cfg,
        output_type=output_type,
        max_sequence_length=files.LONGEST,
    ).frames
    return torch.as_tensor(frames)


def noise_of(policy: Wan, video: Video = VIDEO) -> Tensor:
    generator = torch.Generator().manual_seed(video.width)
    return torch.randn(1, *policy.latent_shape(video), generator=generator)


def assert_equals_the_pipeline(
    path: Path,
    pipeline: WanPipeline,
    steps: int,
    cfg: float,
    video: Video = VIDEO,
    shift: float | None = None,
) -> None:
    """Times, ODE latents, from the texts on, and pixels."""
    policy = load(path)
    policy.cfg, (conditions, policy.negative) = cfg, encode(path)
    x = noise_of(policy, video)
    grid = policy.time_grid(steps, shift, policy.latent_shape(video))
    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(
            ours,
            run(pipeline, text=text, x=x, steps=steps, cfg=cfg, video=video, output_type="latent"),
            atol=1e-4,
            rtol=0,
        )
        assert (
            torch.equal(grid, pipeline.scheduler.sigmas)
            and bool((grid[:-1] > grid[1:]).all())
            and grid[-1] == 0
        )
        results.append(ours)
    assert not torch.allclose(results[0], results[1], atol=0.1)

    pixels = policy.decode(results[-1], {}).pixels
    assert (
        pixels.shape == (1, video.frames, video.height, video.width, 3)
        and pixels.dtype == torch.uint8
    )
    images = run(
        pipeline, text=PROMPTS[-1], x=x, steps=steps, cfg=cfg, video=video, output_type="np"
    )
    assert (pixels.float() - images * 255).abs().max() <= 0.51
    assert pixels.float().std() > 10


@pytest.mark.parametrize(("steps", "cfg", "frames"), [(5, 1.0, 5), (7, 5.0, 9), (4, 3.0, 1)])
def test_ode_equals_the_pipeline_with_euler(
    euler: Path, steps: int, cfg: float, frames: int
) -> None:
    assert_equals_the_pipeline(
        euler,
        pipeline=official(euler),
        steps=steps,
        cfg=cfg,
        video=clip(frames),
    )


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (7, 5.0)])
def test_ode_equals_the_pipeline_with_unipc_of_first_order(
    folder: Path, steps: int, cfg: float
) -> None:
    assert_equals_the_pipeline(folder, official(folder, first_order(folder, steps)), steps, cfg)


@pytest.mark.parametrize(("steps", "cfg", "frames"), [(4, 1.0, 5), (5, 5.0, 9)])
def test_ode_equals_wan_2_2s_pipeline_with_a_time_for_each_token(
    ti2v: Path, steps: int, cfg: float, frames: int
) -> None:
    pipeline, video = official(ti2v, first_order(ti2v, steps)), clip(frames)
    assert pipeline.config.expand_timesteps
    assert_equals_the_pipeline(ti2v, pipeline, steps=steps, cfg=cfg, video=video)
    assert load(ti2v).latent_shape(video) == (8, (frames - 1) // 4 + 1, 4, 6)


def clip(frames: int) -> Video:
    return VIDEO.model_copy(update={"frames": frames})


def strongly_guided(self: Wan, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    self.cfg += 0.1
    return velocity(self, x, t, condition)


def rounded(self: Wan, x: Tensor, t: Tensor, *rest: Any) -> Tensor:
    return predict(self, x, (1000 * t).floor() / 1000, *rest)


def of_another_mean(self: Wan, x: Tensor, condition: Condition) -> Any:
    return decode(self, x + 0.1, condition)


velocity, predict, decode = Wan.velocity, Wan._predict, Wan.decode
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "guidance": (Wan, "velocity", strongly_guided),
    "rounded time": (Wan, "_predict", rounded),
    "another mean of the latent": (Wan, "decode", of_another_mean),
    "half of the places for text": (wan, "text_tokens", lambda where: files.LONGEST // 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(ti2v: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(ti2v, official(ti2v, first_order(ti2v, 3)), steps=3, cfg=3.0)


def test_ode_tends_to_the_official_pipelines(folder: Path) -> None:
    """UniPC of second order, with its rounded times, as the folder has it: two solvers of one
    equation.
    """
    policy, pipeline = load(folder), official(folder)
    x, condition = noise_of(policy), stack(encode(folder)[0][:1])
    distances = []
    for steps in (8, 64):
        ours = sample_ode(
            policy, x, policy.time_grid(steps, None, policy.latent_shape(VIDEO)), condition
        )
        theirs = run(
            pipeline, text=PROMPTS[0], x=x, steps=steps, cfg=1.0, video=VIDEO, output_type="latent"
        )
        distances.append(((ours - theirs).norm() / theirs.norm()).item())
    assert distances[1] < 0.25 * distances[0] and distances[1] < 0.01


def test_the_recipes_shift_goes_before_the_folders(folder: Path, euler: Path) -> None:
    scheduler = first_order(folder, 4)
    scheduler.register_to_config(flow_shift=7.0)
    assert_equals_the_pipeline(folder, official(folder, scheduler), 4, 1.0, shift=7.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert_equals_the_pipeline(euler, official(euler, scheduler), 4, 1.0, shift=7.0)


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("scheduler", {"flow_shift": 5.0}),
        ("scheduler", {"num_train_timesteps": 500}),
        ("vae", {"latents_mean": [0.5] * files.CHANNELS}),
        ("vae", {"latents_std": [0.7] * files.CHANNELS}),
    ],
)
def test_the_folders_configs_are_followed(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object]
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    assert_equals_the_pipeline(edited, official(edited, first_order(edited, 3)), 3, 2.0)
    usual, policy = load(folder), load(edited)
    same_times = torch.equal(usual.time_grid(3, None, ()), policy.time_grid(3, None, ()))
    same_pixels = torch.equal(
        usual.decode(noise_of(usual), {}).pixels, policy.decode(noise_of(usual), {}).pixels
    )
    assert (same_times, same_pixels) == (part == "vae", part == "scheduler"), (
        "the change makes a difference"
    )


def test_text_features_equal_the_pipelines(folder: Path, tmp_path: Path) -> None:
    """Of cleaned texts, zeros to the end; 512 places where the tokenizer does not say fewer; long
    texts are cut.
    """
    endless = changed(folder, tmp_path / "endless", "tokenizer", model_max_length=10**30)
    texts = [*PROMPTS, "a long story, " * 50]
    for path, longest in ((folder, files.LONGEST), (endless, 512)):
        policy, pipeline = load(path), official(path)
        conditions, negative = encode(path, texts)
        with torch.no_grad():
            text, without = pipeline.encode_prompt(
                texts, [NEGATIVE] * 3, max_sequence_length=longest
            )
        ours = torch.stack([policy._padded(condition["text"]) for condition in conditions])
        assert ours.shape == (3, longest, t5.WIDTH) and conditions[-1]["text"].shape == (
            longest,
            t5.WIDTH,
        )
        torch.testing.assert_close(ours, text, atol=1e-6, rtol=0)
        torch.testing.assert_close(policy._padded(negative["text"]), without[0], atol=1e-6, rtol=0)
    assert (
        len(conditions[1]["text"])
        == len("two") + len("dogs") + len("inthesnow") + len("&ice") + 7 + 1
    )


def test_prediction_depends_on_all_that_it_is_given(folder: Path) -> None:
    (first, second), _ = encode(folder)
    policy, guided = load(folder), load(folder, 5.0)
    x, t = noise_of(policy), torch.tensor([0.5])
    with torch.no_grad():
        usual = policy.velocity(x, t, stack([first]))
        others = [
            policy.velocity(x + 0.1, t, stack([first])),
            policy.velocity(x, t / 2, stack([first])),
            policy.velocity(x, t, stack([second])),
            guided.velocity(x, t, stack([first])),
        ]
        guided.negative = {"text": second["text"]}
        other_negative = guided.velocity(x, t, stack([first]))
        one_by_one = [policy.velocity(x, t, stack([condition])) for condition in (second, first)]
    for other in others:
        assert (other - usual).abs().mean() > 0.02 * usual.abs().mean()
    assert (other_negative - others[-1]).abs().mean() > 0.02 * usual.abs().mean()
    expected = one_by_one[0] + 5.0 * (one_by_one[1] - one_by_one[0])
    torch.testing.assert_close(other_negative, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_gradient_equals_plain_autograd_of_the_objective(
    folder: Path, cpu_world: World, cfg: float
) -> None:
    pipeline = official(folder)
    text, without = pipeline.encode_prompt(PROMPTS[0], NEGATIVE, max_sequence_length=files.LONGEST)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        v: Tensor = pipeline.transformer(x, t * 1000, text.detach()).sample
        if cfg > 1:
            unconditional = pipeline.transformer(x, t * 1000, without.detach()).sample
            v = unconditional + cfg * (v - unconditional)
        return v

    backbone.assert_gradient_is_the_objectives(
        load(folder, cfg),
        video=VIDEO,
        condition=encode(folder)[0][0],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 5.0), load(folder, 5.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][:1])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 5.0), VIDEO, encode(folder)[0][:1])


def test_bfloat16_is_the_networks_alone(folder: Path) -> None:
    policy, condition = load(folder, 5.0, dtype="bfloat16"), stack(encode(folder)[0][:1])
    to_compute_precision(policy.network, torch.bfloat16)  # as FSDP does
    seen: dict[str, Tensor] = {}
    policy.network.register_forward_pre_hook(
        lambda module, args, given: seen.update(given), with_kwargs=True
    )
    x, t = noise_of(policy), torch.tensor([0.9873])
    with torch.no_grad():
        v, exact = policy.velocity(x, t, condition), load(folder, 5.0).velocity(x, t, condition)
    assert v.dtype == torch.float32 and (v - exact).norm() < 0.05 * exact.norm()
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.float32 and seen["timestep"].tolist() == pytest.approx(
        [987.3, 987.3]
    )
    assert policy.vae.dtype == torch.float32


def test_decoding_in_parts_and_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(folder)
    x = torch.cat([noise_of(policy), noise_of(policy).flip(-1)])
    whole = policy.decode(x, {}).pixels
    policy.decode_batch = 1
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1
    policy.vae.tile_sample_min_height = policy.vae.tile_sample_min_width = 24
    policy.vae.tile_sample_stride_height = policy.vae.tile_sample_stride_width = 16
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1, (
        "a small latent is decoded whole"
    )
    monkeypatch.setattr(wan, "TILED_ABOVE", 47)
    tiled = policy.decode(x, {}).pixels
    assert 0 < (tiled.float() - whole.float()).abs().mean() < 0.3 * whole.float().std()
    monkeypatch.setattr(wan, "TILED_ABOVE", 48)
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1, (
        "whatever was decoded before"
    )


@pytest.mark.parametrize(
    ("config", "count"),
    [(REAL, 1_418_996_800), (REAL_14B, 14_288_491_584), (REAL_TI2V_5B, 4_999_787_712)],
)
def test_the_full_size_network_is_wrapped_block_by_block(
    config: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(config)
    assert sum(p.numel() for p in network.parameters()) == count
    blocks = wan.blocks(network)
    assert len(blocks) == config["num_layers"]
    assert {type(block).__name__ for block in blocks} == set(network._repeated_blocks)
    assert sum(type(m).__name__ in network._repeated_blocks for m in network.modules()) == len(
        blocks
    )
    embedder = "condition_embedder"
    assert backbone.outside_blocks(network, blocks) == {
        "",
        "patch_embedding",
        "proj_out",
        f"{embedder}.time_proj",  # "" is the scale_shift_table
        *(f"{embedder}.{name}_embedder.linear_{n}" for name in ("text", "time") for n in (1, 2)),
    }


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        (
            "",
            {"_class_name": "WanVACEPipeline"},
            "not a WanPipeline; correct the path. There are the families",
        ),
        (
            "",
            {"_class_name": "WanImageToVideoPipeline"},
            "not a WanPipeline; set model.family=wan_i2v_14b, or correct the path",
        ),
        (
            "",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "has transformer_2, as Wan 2.2 A14B .* does; use Wan 2.1 .*model.family=wan_a14b for",
        ),
        ("", {"boundary_ratio": 0.875}, "has boundary_ratio, as Wan 2.2 A14B"),
        (
            "scheduler",
            {"_class_name": "DDIMScheduler"},
            "is a DDIMScheduler, not one of UniPCMultistepScheduler, Flow",
        ),
        (
            "scheduler",
            {"use_flow_sigmas": False},
            "has use_flow_sigmas=False; Wan wants True, set it there",
        ),
        (
            "scheduler",
            {"prediction_type": "epsilon"},
            "has prediction_type=epsilon; Wan wants flow_prediction",
        ),
        (
            "scheduler",
            {"final_sigmas_type": "sigma_min"},
            "has final_sigmas_type=sigma_min; Wan wants zero",
        ),
        (
            "scheduler",
            {"use_dynamic_shifting": True},
            "has use_dynamic_shifting=True; Wan wants False",
        ),
        (
            "transformer",
            {"in_channels": 20},
            "the network has 20 channels in and 8 out, the VAE 8; use Wan 2.1 T2V",
        ),
        (
            "transformer",
            {"image_dim": 1280, "added_kv_proj_dim": 32},
            "and sees images, the VAE 8; use Wan 2.1 T2V",
        ),
        ("transformer", {"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\], not \[1, n, n\]"),
        (
            "transformer",
            {"text_dim": 64},
            "text of width 64, the text encoder makes 32; the parts are of different",
        ),
        (
            "transformer",
            {"_class_name": "FluxTransformer2DModel"},
            "holds a FluxTransformer2DModel, not a WanTransformer",
        ),
        ("vae", {"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, not a AutoencoderKLWan"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    with pytest.raises(UserError, match=message) as caught:
        policies.load(settings(edited), CPU)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_recipe_are_one_clear_line(folder: Path) -> None:
    policy = load(folder)
    assert policy.latent_shape(VIDEO) == (8, 2, 8, 12)
    with pytest.raises(
        UserError, match=r"video.frames=6: must be a multiple of 4, plus 1; use 5 or 9"
    ):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 6}))
    with pytest.raises(UserError, match=r"video.width=36: not a multiple of 8 .*use 32 or 40"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 36}))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="prompts: '&nbsp;' has no tokens"),
    ):
        encoder([Prompt("a cat"), Prompt("&nbsp;")])
