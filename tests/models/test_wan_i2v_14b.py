"""Wan 2.1 I2V against diffusers' own pipeline, which is the oracle: the given clip, the image's
states, times, ODE latents, pixels, gradients.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.data import images
from fastgrpo.models import wan_i2v_14b
from fastgrpo.models.loading import policies
from fastgrpo.models.wan import Wan
from fastgrpo.models.wan_i2v_14b import ImageTextEncoder, WanFromImage
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import wan
from tests.harness.folders import wan_i2v_14b as files
from tests.models import test_wan
from tests.models.test_wan import NEGATIVE, REAL_14B, first_order, noise_of

VIDEO = Video(frames=9, height=32, width=48)
TEXT = "a red boat sails"
REAL = REAL_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
"""transformer/config.json of Wan2.1-I2V-14B-480P-Diffusers, as diffusers' convert script has it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and two pictures in the clips' size."""
    path = tmp_path_factory.mktemp("wan_i2v_14b")
    files.write(path)
    backbone.write_pictures(path, VIDEO)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "wan_i2v_14b", "path": str(path), "cfg": cfg, **more})


def encode(path: Path, video: Video = VIDEO) -> tuple[list[Condition], Condition]:
    """The conditions of the two pictures with one text, and the negative one."""
    with policies.encoder(settings(path), video, CPU) as encoder:
        prompts = [Prompt(TEXT, path / f"{number}.png") for number in range(2)]
        return encoder(prompts), encoder.negative(NEGATIVE)


def load(path: Path, cfg: float = 1.0, **more: object) -> WanFromImage:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, WanFromImage)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float, frames: int = 9) -> None:
    """Times, ODE latents, from image and text on, and pixels."""
    pipeline = WanImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = first_order(path, steps)
    video = VIDEO.model_copy(update={"frames": frames})
    policy, (conditions, negative) = load(path), encode(path, video)
    policy.cfg, policy.negative = cfg, negative
    x = noise_of(policy, video)
    grid = policy.time_grid(steps, None, policy.latent_shape(video))

    def official(number: int, output_type: str) -> Tensor:
        frames_ = pipeline(
            Image.open(path / f"{number}.png"),
            TEXT,
            negative_prompt=NEGATIVE,
            height=video.height,
            width=video.width,
            num_frames=video.frames,
            latents=x,
            num_inference_steps=steps,
            guidance_scale=cfg,
            output_type=output_type,
        ).frames
        return torch.as_tensor(frames_)

    results = []
    for number, condition in enumerate(conditions):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours, official(number, "latent"), atol=1e-4, rtol=0)
        assert torch.equal(grid, pipeline.scheduler.sigmas)
        results.append(ours)
    assert (results[0] - results[1]).abs().max() > 0.01, "the image is seen"
    pixels = policy.decode(results[-1], stack([conditions[-1]])).pixels
    assert pixels.shape == (1, video.frames, video.height, video.width, 3)
    assert (pixels.float() - official(1, "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "cfg", "frames"), [(4, 1.0, 5), (5, 5.0, 9)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float, frames: int) -> None:
    assert_equals_the_pipeline(folder, steps, cfg, frames)


def without_means(self: ImageTextEncoder, posterior: Any, pixels: Tensor) -> Tensor:
    """The given clip's latent, but for the channels' means."""
    std = torch.tensor(self.vae.config.latents_std).reshape(-1, 1, 1, 1)
    latent: Tensor = posterior.mode()[0] / std
    return latent


def last_states(self: ImageTextEncoder, picture: Tensor) -> Tensor:
    seen = self.processor(images=Image.fromarray(picture.numpy()), return_tensors="pt")
    states: Tensor = self.vision(seen.pixel_values, output_hidden_states=True).hidden_states[-1]
    return states[0]


def zeros_after(self: ImageTextEncoder, posterior: Any, pixels: Tensor) -> Tensor:
    """The given clip's latent as SkyReels-V1's: of the first frame alone."""
    whole: Tensor = latent(self, posterior, pixels).clone()
    whole[:, 1:] = 0
    return whole


def masked_everywhere(
    self: WanFromImage, x: Tensor, t: Tensor, condition: Condition, *rest: Any
) -> Tensor:
    given = condition["image"]
    mask = torch.ones(len(x), 4, *x.shape[2:])
    return Wan._guided(self, torch.cat([x, mask, given], 1), t, condition, *rest)


latent = ImageTextEncoder.latent
FAULTS: dict[str, tuple[Any, str, Any]] = {
    name: test_wan.FAULTS[name] for name in ("rounded time", "another mean of the latent")
} | {
    "half of the places for text": (WanFromImage, "form", replace(WanFromImage.form, places=256)),
    "another latent of the image": (ImageTextEncoder, "latent", without_means),
    "nothing behind the first frame": (ImageTextEncoder, "latent", zeros_after),
    "the image's last states": (ImageTextEncoder, "states", last_states),
    "another mask": (WanFromImage, "_guided", masked_everywhere),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_a_condition_is_the_pipelines(folder: Path) -> None:
    """The given clip's latent of every frame, all places of the image's states."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    (condition, _), _ = encode(folder)
    picture = Image.open(folder / "0.png")
    assert condition["image"].shape == (wan.CHANNELS, 3, 8, 12)
    assert condition["image_states"].shape == (files.PLACES, files.VISION["hidden_size"])
    states = pipeline.encode_image(picture)[0]
    torch.testing.assert_close(condition["image_states"], states, atol=1e-5, rtol=0)
    pixels = pipeline.video_processor.preprocess(picture, height=32, width=48)
    _, channels = pipeline.prepare_latents(
        pixels, 1, wan.CHANNELS, 32, 48, 9, torch.float32, CPU, torch.Generator()
    )
    torch.testing.assert_close(condition["image"], channels[0, 4:], atol=1e-5, rtol=0)
    assert condition["image"][:, 1:].abs().max() > 0.1


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """By the network called as the pipeline calls it."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    text, without = pipeline.encode_prompt(TEXT, NEGATIVE, max_sequence_length=512)
    (condition, _), _ = encode(folder)
    picture = Image.open(folder / "0.png")
    states = pipeline.encode_image(picture).detach()
    pixels = pipeline.video_processor.preprocess(picture, height=32, width=48)
    with torch.no_grad():
        _, given = pipeline.prepare_latents(
            pixels, 1, wan.CHANNELS, 32, 48, 9, torch.float32, CPU, torch.Generator()
        )

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with_text, unconditional = (
            pipeline.transformer(torch.cat([x, given], 1), t * 1000, words.detach(), states).sample
            for words in (text, without)
        )
        v: Tensor = unconditional + 5.0 * (with_text - unconditional)
        return v

    backbone.assert_gradient_is_the_objectives(
        load(folder, 5.0),
        video=VIDEO,
        condition=condition,
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 5.0), load(folder, 5.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, noise_of(pair[0], VIDEO), stack(encode(folder)[0][:1])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 5.0), VIDEO, encode(folder)[0][:1])


def test_every_block_of_the_real_network_is_wrapped() -> None:
    with torch.device("meta"):
        network: Any = WanTransformer3DModel.from_config(REAL)
    blocks = wan_i2v_14b.blocks(network)
    assert len(blocks) == 40 and sum(p.numel() for p in network.parameters()) == 16_394_878_784
    assert backbone.outside_blocks(network, blocks) == {
        "",  # the last scale and shift
        "patch_embedding",
        "proj_out",
        *(
            f"condition_embedder.{part}"
            for part in (
                "time_embedder.linear_1",
                "time_embedder.linear_2",
                "time_proj",
                "text_embedder.linear_1",
                "text_embedder.linear_2",
                "image_embedder.norm1",
                "image_embedder.ff.net.0.proj",
                "image_embedder.ff.net.2",
                "image_embedder.norm2",
            )
        ),
    }


def test_a_condition_takes_what_the_page_of_families_says() -> None:
    """Bytes of 81 frames of 480 x 832, beside the text."""
    planned = wan_i2v_14b.plan(wan_i2v_14b.PUBLISHED[0][1])
    shapes = planned.condition(512, (16, 21, 60, 104))
    assert set(shapes) == {"text", "image", "image_states"}
    kept = sum(math.prod(shapes[name]) for name in ("image", "image_states"))
    assert f"{4 * kept / 1e6:.1f} MB" == "9.7 MB"


def test_a_picture_of_another_shape_is_cut_and_not_stretched(folder: Path, tmp_path: Path) -> None:
    """For the given clip; the image encoder sees it whole, as the pipeline's does."""
    picture = tmp_path / "wide.png"
    Image.open(folder / "0.png").resize((192, 64)).save(picture)
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        (condition,) = encoder([Prompt(TEXT, picture)])
        assert isinstance(encoder, ImageTextEncoder)
        cut = images.cover(images.read_image(picture), VIDEO.height, VIDEO.width)
        assert torch.equal(condition["image"], encoder.image(cut))
    expected = WanImageToVideoPipeline.from_pretrained(folder).encode_image(Image.open(picture))[0]
    torch.testing.assert_close(condition["image_states"], expected, atol=1e-5, rtol=0)


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="no reference image, which wan_i2v_14b needs; set prompts"),
    ):
        encoder([Prompt(TEXT)])
    two = changed(folder, tmp_path / "two", "", boundary_ratio=0.9)
    with pytest.raises(
        UserError, match=r"has boundary_ratio, .*use Wan 2.1 I2V.*wan_a14b_i2v for I2V-A14B"
    ):
        policies.load(settings(two), CPU)
    entries: list[dict[str, Any]] = [{"in_channels": 8}, {"image_dim": None}]
    for number, entry in enumerate(entries):
        other = changed(folder, tmp_path / f"o{number}", "transformer", **entry)
        with pytest.raises(UserError, match=r"channels in and 8 out.*use Wan 2.1 I2V 14B"):
            policies.load(settings(other), CPU)
    both = changed(folder, tmp_path / "both", "transformer", pos_embed_seq_len=514)
    with pytest.raises(UserError, match=r"pos_embed_seq_len, .*last frame; use Wan 2.1 I2V 14B"):
        policies.load(settings(both), CPU)
    text = test_wan.settings(folder)
    with pytest.raises(UserError, match=r"names a WanImageToVideoPipeline, .*family=wan_i2v_14b"):
        policies.load(text, CPU)
    bare = tmp_path / "bare"
    changed(folder, bare, "", boundary_ratio=None)
    (bare / "image_processor" / "preprocessor_config.json").unlink()
    with (
        pytest.raises(UserError, match=r"image_processor/preprocessor_config.json is missing"),
        policies.encoder(settings(bare), VIDEO, CPU),
    ):
        pytest.fail("opened")
