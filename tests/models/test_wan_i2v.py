"""Wan 2.2 TI2V-5B from an image against diffusers' own pipeline, which is the oracle; and that the
image's frame takes no part in what is drawn and trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.data import images
from fastgrpo.models import wan
from fastgrpo.models.loading import policies
from fastgrpo.models.wan import Wan
from fastgrpo.models.wan_i2v import ImageTextEncoder, WanImageToVideo
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import wan as files
from tests.models import test_wan
from tests.models.test_wan import NEGATIVE, first_order, noise_of

VIDEO = Video(frames=9, height=32, width=48)
TEXT = "a red boat sails"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and two pictures in the clips' size."""
    path = tmp_path_factory.mktemp("wan_i2v")
    files.write_ti2v(path)
    backbone.write_pictures(path, VIDEO)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "wan_i2v", "path": str(path), "cfg": cfg, **more})


def encode(path: Path) -> tuple[list[Condition], Condition]:
    """The conditions of the two pictures with one text, and the negative one."""
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        prompts = [Prompt(TEXT, path / f"{number}.png") for number in range(2)]
        return encoder(prompts), encoder.negative(NEGATIVE)


def load(path: Path, cfg: float = 1.0, **more: object) -> WanImageToVideo:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, WanImageToVideo)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float, frames: int = 9) -> None:
    """Times, ODE latents, from image and text on, and pixels."""
    pipeline = WanImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = first_order(path, steps)
    policy, (conditions, negative) = load(path), encode(path)
    policy.cfg, policy.negative = cfg, negative
    video = VIDEO.model_copy(update={"frames": frames})
    x = noise_of(policy, video)
    assert x.shape == (1, files.CHANNELS, (frames - 1) // 4, 4, 6)
    grid = policy.time_grid(steps, None, policy.latent_shape(video))
    unseen = torch.full_like(x[:, :, :1], 7.0)  # of the first frame, which the pipeline replaces

    def official(number: int, output_type: str) -> Tensor:
        frames_ = pipeline(
            Image.open(path / f"{number}.png"),
            TEXT,
            negative_prompt=NEGATIVE,
            height=video.height,
            width=video.width,
            num_frames=video.frames,
            latents=torch.cat([unseen, x], 2),
            num_inference_steps=steps,
            guidance_scale=cfg,
            output_type=output_type,
            max_sequence_length=files.LONGEST,
        ).frames
        return torch.as_tensor(frames_)

    results = []
    for number, condition in enumerate(conditions):
        ours = sample_ode(policy, x, grid, stack([condition]))
        whole = torch.cat([condition["image"][None], ours], 2)
        torch.testing.assert_close(whole, official(number, "latent"), atol=1e-4, rtol=0)
        results.append(ours)
    assert (results[0] - results[1]).abs().max() > 0.01, "the image is seen"
    pixels = policy.decode(results[-1], stack([conditions[-1]])).pixels
    assert pixels.shape == (1, video.frames, video.height, video.width, 3)
    assert (pixels.float() - official(1, "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "cfg", "frames"), [(4, 1.0, 5), (5, 5.0, 9)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float, frames: int) -> None:
    assert_equals_the_pipeline(folder, steps, cfg, frames)


def one_time(self: Wan, x: Tensor, t: Tensor) -> Tensor:
    """The first frame's tokens at the others' time."""
    return t[:, None].expand(-1, x[0, 0].numel() // 4)


def without_means(self: ImageTextEncoder, posterior: Any, pixels: Tensor) -> Tensor:
    """The image's latent, but for the channels' means."""
    std = torch.tensor(self.vae.config.latents_std).reshape(-1, 1, 1, 1)
    latent: Tensor = posterior.mode()[0] / std
    return latent


FAULTS = test_wan.FAULTS | {
    "the first frame's time": (WanImageToVideo, "_times", one_time),
    "another latent of the image": (ImageTextEncoder, "latent", without_means),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_the_images_frame_is_neither_drawn_nor_trained(folder: Path, cpu_world: World) -> None:
    """No state holds it, whatever the noise; the first frame of every clip is the image."""
    policy, (conditions, _) = load(folder), encode(folder)
    plan = backbone.plan_of(policy, VIDEO)
    assert plan.latent_shape == (files.CHANNELS, 2, 4, 6)
    drawn = backbone.draw(policy, plan, conditions, 3)
    assert drawn.final.shape[1:] == plan.latent_shape
    about = stack([conditions[slot // plan.group_size] for slot in drawn.slots])
    pixels = policy.decode(drawn.final, about).pixels
    for number in range(2):
        own = pixels[number * plan.group_size : (number + 1) * plan.group_size, 0]
        assert torch.equal(own, own[:1].expand_as(own)), "of a group"
    assert not torch.equal(pixels[0, 0], pixels[-1, 0])
    assert (pixels[0, 1:].float() - pixels[1, 1:].float()).abs().max() > 1


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """By the network called as the pipeline calls it, on the frames behind the image's."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    text, without = pipeline.encode_prompt(TEXT, NEGATIVE, max_sequence_length=files.LONGEST)
    (condition, _), _ = encode(folder)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        whole = torch.cat([condition["image"][None], x], 2)
        mask = torch.ones(whole.shape[2:])
        mask[0] = 0
        times = (mask[:, ::2, ::2] * t * 1000).flatten()[None]
        with_text, unconditional = (
            pipeline.transformer(whole, times, words.detach()).sample for words in (text, without)
        )
        v: Tensor = unconditional + 5.0 * (with_text - unconditional)
        return v[:, :, 1:]

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


def test_a_picture_of_another_shape_is_cut_and_not_stretched(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "wide.png"
    Image.open(folder / "0.png").resize((192, 64)).save(picture)
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        (condition,) = encoder([Prompt(TEXT, picture)])
        assert isinstance(encoder, ImageTextEncoder)
        cut = images.cover(images.read_image(picture), VIDEO.height, VIDEO.width)
        assert torch.equal(condition["image"], encoder.image(cut))


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"video.frames=1: the first frame is .*use 5 or more"):
        load(folder).latent_shape(VIDEO.model_copy(update={"frames": 1}))
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="no reference image, which wan_i2v needs; set prompts"),
    ):
        encoder([Prompt(TEXT)])
    plain = changed(folder, tmp_path / "plain", "", expand_timesteps=False)
    with pytest.raises(
        UserError, match=r"has no expand_timesteps: .*use Wan 2.2 TI2V-5B.*wan_a14b_i2v"
    ):
        policies.load(settings(plain), CPU)
    wide = Video(frames=9, height=32, width=40)
    with (
        pytest.raises(UserError, match=r"video.width=40: not a multiple of 16"),
        policies.encoder(settings(folder), wide, CPU),
    ):
        pytest.fail("opened")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["expand_timesteps"] and wan.PIPELINES[0] == index["_class_name"]
