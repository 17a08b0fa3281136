"""FLUX against diffusers' own pipeline, which is the oracle: text features, times, ODE latents,
pixels, gradients.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.models import flux
from fastgrpo.models.flux import Flux
from fastgrpo.models.loading import diffusers_folder, policies
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import flux as files
from tests.harness.folders import t5

PROMPTS = ["a red circle", "two dogs in the snow"]
VIDEO = Video(frames=1, height=32, width=48)
SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
REAL = {  # transformer/config.json of FLUX.1-dev
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    files.write(path)
    return path


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schnell")
    files.write(path / "whole", guidance_embeds=False)
    return changed(path / "whole", path / "edited", "scheduler", **SCHNELL)


def settings(path: Path, guidance: float | None = None, **more: object) -> Model:
    return Model.model_validate({"family": "flux", "path": str(path), "guidance": guidance, **more})


def load(path: Path, guidance: float | None = None, **more: object) -> Flux:
    policy = policies.load(settings(path, guidance, **more), CPU)
    assert isinstance(policy, Flux)
    return policy


def encode(path: Path) -> list[Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in PROMPTS])


def official(path: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(policy: Flux, video: Video = VIDEO) -> Tensor:
    generator = torch.Generator().manual_seed(video.width)
    return torch.randn(len(PROMPTS), *policy.latent_shape(video), generator=generator)


def assert_equals_the_pipeline(
    path: Path, steps: int, guidance: float | None, video: Video = VIDEO
) -> None:
    """Times, ODE latents, from the texts on, and pixels."""
    policy, pipeline = load(path, guidance), official(path)
    x = noise_of(policy, video)
    grid = policy.time_grid(steps, None, policy.latent_shape(video))
    ours = sample_ode(policy, x, grid, stack(encode(path)))

    count, channels, _, height, width = x.shape
    packed = pipeline._pack_latents(x[:, :, 0], count, channels, height, width)
    options = {
        "height": video.height,
        "width": video.width,
        "latents": packed,
        "num_inference_steps": steps,
        "guidance_scale": 3.5 if guidance is None else guidance,
        "max_sequence_length": files.LONGEST,
    }
    tokens = pipeline(PROMPTS, output_type="latent", **options).images
    torch.testing.assert_close(grid, pipeline.scheduler.sigmas, atol=1e-7, rtol=0)
    latents = pipeline._unpack_latents(tokens, video.height, video.width, pipeline.vae_scale_factor)
    torch.testing.assert_close(ours[:, :, 0], latents, atol=1e-4, rtol=0)
    assert not torch.allclose(ours[0], ours[1], atol=0.1)

    pixels = policy.decode(ours, {}).pixels
    assert pixels.shape == (2, 1, video.height, video.width, 3) and pixels.dtype == torch.uint8
    images = torch.from_numpy(pipeline(PROMPTS, output_type="np", **options).images)
    assert (pixels[:, 0].float() - images * 255).abs().max() <= 0.51
    assert pixels.float().std() > 10


@pytest.mark.parametrize(("steps", "guidance", "width"), [(5, None, 48), (12, 1.5, 64)])
def test_ode_equals_the_pipeline(
    folder: Path, steps: int, guidance: float | None, width: int
) -> None:
    assert_equals_the_pipeline(folder, steps, guidance, VIDEO.model_copy(update={"width": width}))


def test_schnells_ode_equals_the_pipeline(schnell: Path) -> None:
    assert_equals_the_pipeline(schnell, 4, None)


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("scheduler", {"use_dynamic_shifting": False}),
        ("scheduler", {"use_dynamic_shifting": False, "shift": 1.7}),
        ("scheduler", {"base_shift": 1.0, "base_image_seq_len": 64}),
        ("scheduler", {"max_shift": 3.0, "max_image_seq_len": 512}),
        ("scheduler", {"time_shift_type": "linear"}),
        ("scheduler", {"shift_terminal": 0.1}),
        ("vae", {"scaling_factor": 0.9}),
        ("vae", {"shift_factor": 0.6}),
    ],
)
def test_the_folders_configs_are_followed(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object]
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    assert_equals_the_pipeline(edited, 3, None)
    usual, policy = load(folder), load(edited)
    shape = policy.latent_shape(VIDEO)
    same_times = torch.equal(usual.time_grid(3, None, shape), policy.time_grid(3, None, shape))
    x = noise_of(policy)
    same_pixels = torch.equal(usual.decode(x, {}).pixels, policy.decode(x, {}).pixels)
    assert (same_times, same_pixels) == (part == "vae", part == "scheduler"), (
        "the change makes a difference"
    )


def test_times_are_those_of_the_closed_form(folder: Path) -> None:
    """The shift is exp(mu), mu linear in the number of tokens: 0.5 at 256, 1.15 at 4096; the
    recipe's goes before.
    """
    policy = load(folder)
    for height, width, mu in ((32, 32, 0.5), (128, 128, 1.15)):
        expected = transitions.time_grid(7, math.exp(mu))
        torch.testing.assert_close(
            policy.time_grid(7, None, (4, 1, height, width)), expected, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            policy.time_grid(7, 3.0, (4, 1, height, width)), transitions.time_grid(7, 3.0)
        )


def test_text_features_equal_the_pipelines(folder: Path, tmp_path: Path) -> None:
    """At the pipeline's own length, too, where the tokenizer does not say a smaller one."""
    endless = changed(folder, tmp_path / "endless", "tokenizer_2", model_max_length=10**30)
    for path, longest in ((folder, files.LONGEST), (endless, 512)):
        conditions = stack(encode(path))
        with torch.no_grad():
            text, pooled, _ = official(path).encode_prompt(
                PROMPTS, None, max_sequence_length=longest
            )
        assert conditions["text"].shape == (2, longest, t5.WIDTH)
        torch.testing.assert_close(conditions["text"], text, atol=1e-6, rtol=0)
        torch.testing.assert_close(conditions["pooled"], pooled, atol=1e-6, rtol=0)


def test_prediction_depends_on_all_that_it_is_given(folder: Path) -> None:
    policy, (first, second) = load(folder), encode(folder)
    x, t = noise_of(policy)[:1], torch.tensor([0.5])
    with torch.no_grad():
        usual = policy.velocity(x, t, stack([first]))
        others = [
            policy.velocity(x + 0.1, t, stack([first])),
            policy.velocity(x, t / 2, stack([first])),
            policy.velocity(x, t, stack([{**first, "text": second["text"]}])),
            policy.velocity(x, t, stack([{**first, "pooled": second["pooled"]}])),
            load(folder, 2.0).velocity(x, t, stack([first])),
        ]
    for other in others:
        assert (other - usual).abs().mean() > 0.02 * usual.abs().mean()


def test_bfloat16_is_the_networks_alone(folder: Path) -> None:
    """Positions, too, stay float32: a wide image's would not survive bfloat16.

    Times are rounded within the network.
    """
    exact, policy = load(folder, 2.0), load(folder, 2.0, dtype="bfloat16")
    policy.network.to(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    policy.network.register_forward_pre_hook(
        lambda module, args, given: seen.update(given), with_kwargs=True
    )
    x, conditions = (
        torch.randn(2, 4, 1, 2, 1200, generator=torch.Generator().manual_seed(1)),
        stack(encode(folder)),
    )

    def at(policy: Flux, *times: float) -> Tensor:
        with torch.no_grad():
            return policy.velocity(x, torch.tensor(times), conditions)

    # times and guidance that bfloat16 has, 1000-fold, too
    v, expected = (
        at(policy, 0.5, 0.125),
        at(exact, 0.5, 0.125),
    )
    assert v.dtype == torch.float32 and (v - expected).norm() < 0.03 * expected.norm()
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].tolist() == [0.5, 0.125] and seen["guidance"].tolist() == [2.0, 2.0]
    assert (
        seen["img_ids"][:, 2].tolist() == list(range(600))
        and seen["img_ids"][:, :2].abs().max() == 0
    )
    assert torch.equal(at(policy, 0.9873, 0.5), at(policy, 0.98828125, 0.5))


def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World) -> None:
    assert backbone.largest_log_ratio(load(folder), VIDEO, encode(folder), cpu_world) <= 1e-6


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    pipeline = official(folder)
    text, pooled, text_ids = pipeline.encode_prompt(
        PROMPTS[:1], None, max_sequence_length=files.LONGEST
    )
    _, _, _, height, width = noise_of(load(folder)).shape
    image_ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, torch.float32)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        tokens = pipeline._pack_latents(x[:, :, 0], 1, x.shape[1], height, width)
        v = pipeline.transformer(
            tokens,
            timestep=t,
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled.detach(),
            encoder_hidden_states=text.detach(),
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        whole: Tensor = pipeline._unpack_latents(
            v, VIDEO.height, VIDEO.width, pipeline.vae_scale_factor
        )[:, :, None]
        return whole

    backbone.assert_gradient_is_the_objectives(
        load(folder),
        video=VIDEO,
        condition=encode(folder)[0],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder), load(folder, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder))
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder), VIDEO, encode(folder))


def test_no_decode_has_more_elements_than_kernels_can_count() -> None:
    """The published decoder has 256 channels of 1024 x 1024 places: 2^28, so at most 7 images."""
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512, 512)))
    assert diffusers_folder.images_at_once(vae, torch.empty(24, 16, 128, 128)) == 7
    assert diffusers_folder.images_at_once(vae, torch.empty(24, 16, 64, 64)) == 31
    assert diffusers_folder.images_at_once(vae, torch.empty(1, 16, 1024, 1024)) == 1


def test_decoding_in_parts_and_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(folder)
    x = noise_of(policy)
    whole = policy.decode(x, {}).pixels
    policy.decode_batch = 1
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1
    policy.vae.tile_latent_min_size, policy.vae.tile_sample_min_size = 12, 24  # type: ignore[assignment]
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1, (
        "a small latent is decoded whole"
    )
    monkeypatch.setattr(flux, "TILED_ABOVE", 16)
    tiled = policy.decode(x, {}).pixels
    assert 0 < (tiled.float() - whole.float()).abs().mean() < 0.2 * whole.float().std()
    monkeypatch.setattr(flux, "TILED_ABOVE", 24)
    assert (whole.int() - policy.decode(x, {}).pixels.int()).abs().max() <= 1, (
        "whatever was decoded before"
    )


@pytest.mark.parametrize(
    ("guidance_embeds", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)]
)
def test_the_full_size_network_is_wrapped_block_by_block(guidance_embeds: bool, count: int) -> None:
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(REAL | {"guidance_embeds": guidance_embeds})
    assert sum(p.numel() for p in network.parameters()) == count
    blocks = flux.blocks(network)
    assert len(blocks) == 19 + 38
    assert {type(block).__name__ for block in blocks} == set(network._repeated_blocks)
    assert sum(type(m).__name__ in network._repeated_blocks for m in network.modules()) == len(
        blocks
    )
    embedders = [
        "timestep_embedder",
        "text_embedder",
        *(["guidance_embedder"] if guidance_embeds else []),
    ]
    assert backbone.outside_blocks(network, blocks) == {
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
        *(f"time_text_embed.{name}.linear_{n}" for name in embedders for n in (1, 2)),
    }


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        (
            "",
            {"_class_name": "HunyuanVideoPipeline"},
            "not a FluxPipeline; set model.family=hunyuan_video, or correct the",
        ),
        (
            "scheduler",
            {"_class_name": "DDIMScheduler"},
            "is a DDIMScheduler, not a FlowMatchEulerDiscreteScheduler",
        ),
        ("scheduler", {"num_train_timesteps": 500}, "must have num_train_timesteps=1000"),
        ("scheduler", {"invert_sigmas": True}, "invert_sigmas=false"),
        (
            "transformer",
            {"in_channels": 96},
            "96 channels in and 96 out, and the VAE's 4 make 16; use a text-to-image",
        ),
        ("transformer", {"out_channels": 8}, "16 channels in and 8 out"),
        (
            "transformer",
            {"joint_attention_dim": 64},
            "text of widths 64 and 24, the text encoders make 32 and 24",
        ),
        (
            "transformer",
            {"_class_name": "WanTransformer3DModel"},
            "holds a WanTransformer3DModel, not a FluxTransformer2D",
        ),
        (
            "vae",
            {"_class_name": "AutoencoderKLWan"},
            "holds a AutoencoderKLWan, not a AutoencoderKL",
        ),
        ("vae", {"shift_factor": None}, "no shift_factor, which FLUX's has; correct model.family"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    with pytest.raises(UserError, match=message) as caught:
        load(edited)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_recipe_are_one_clear_line(
    folder: Path, schnell: Path, tmp_path: Path
) -> None:
    policy = load(folder)
    with pytest.raises(UserError, match=r"video.frames=5: FLUX draws images; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 5}))
    with pytest.raises(UserError, match=r"video.height=34: not a multiple of 4 .*use 32 or 36"):
        policy.latent_shape(VIDEO.model_copy(update={"height": 34}))
    with pytest.raises(UserError, match=r"model.cfg=4.0: .*leave it out and set model.guidance"):
        load(folder, cfg=4.0)
    with pytest.raises(
        UserError, match=r"model.guidance=3.5: .*schnell.* has no guidance; leave it out"
    ):
        load(schnell, 3.5)
    other = tmp_path / "other"
    AutoencoderKL().save_pretrained(other)
    with pytest.raises(UserError, match=r"model.network=.*: the network has 3 channels"):
        load(folder, network=str(other))
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="prompts: ' ' has no tokens"),
    ):
        encoder([Prompt("a cat"), Prompt(" ")])
