"""HunyuanVideo-1.5 from an image against diffusers' own pipeline, which is the oracle: the image's
latent and states, times, ODE latents, pixels, gradients.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15ImageToVideoPipeline
from PIL import Image
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.data import images
from fastgrpo.models import hunyuan_video_15_i2v
from fastgrpo.models.hunyuan_video_15_i2v import HunyuanVideo15FromImage, ImageTextEncoder
from fastgrpo.models.loading import policies
from fastgrpo.models.text_encoders import qwen_and_byt5
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import hunyuan_video_15_i2v as files

VIDEO = Video(frames=5, height=32, width=24)
TEXTS = ("a red boat", 'two dogs run past a sign "Go"')
NEGATIVE = "a boat behind the hills"
BUCKET = 27.7  # of 48 places of 4 x 4 pixels, among them 8 x 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and two pictures in the clips' size."""
    path = tmp_path_factory.mktemp("hunyuan_video_15_i2v")
    files.write(path)
    backbone.write_pictures(path, VIDEO)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate(
        {"family": "hunyuan_video_15_i2v", "path": str(path), "cfg": cfg, **more}
    )


def encode(path: Path) -> tuple[list[Condition], Condition]:
    """The conditions of the two pictures, each with a text, and the negative one."""
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        prompts = [Prompt(text, path / f"{number}.png") for number, text in enumerate(TEXTS)]
        return encoder(prompts), encoder.negative(NEGATIVE)


def load(path: Path, cfg: float = 1.0, **more: object) -> HunyuanVideo15FromImage:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, HunyuanVideo15FromImage)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def official(path: Path, cfg: float = 1.0) -> HunyuanVideo15ImageToVideoPipeline:
    """diffusers' pipeline, told the tiny tokenizer's length and the clips' size."""
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    head = f"<|start_header_id|>system\n{qwen_and_byt5.SYSTEM}<|eot_id|>\n<|start_header_id|>user\n"
    tokens = pipeline.tokenizer(head, add_special_tokens=False)["input_ids"]
    pipeline.prompt_template_encode_start_idx = len(tokens)
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 60, 50
    pipeline.target_size = BUCKET
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=cfg)
    return pipeline


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float) -> None:
    """Times, ODE latents, from image and text on, and pixels."""
    policy, pipeline = load(path), official(path, cfg)
    policy.cfg, (conditions, policy.negative) = cfg, encode(path)
    x = backbone.noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, None, policy.latent_shape(VIDEO))

    def run(number: int, output_type: str) -> Tensor:
        frames = pipeline(
            Image.open(path / f"{number}.png"),
            TEXTS[number],
            negative_prompt=NEGATIVE,
            num_frames=VIDEO.frames,
            latents=x,
            num_inference_steps=steps,
            output_type=output_type,
        ).frames
        return torch.as_tensor(frames)

    for number, condition in enumerate(conditions):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours, run(number, "latent"), atol=1e-4, rtol=0)
        pixels = policy.decode(ours, stack([condition])).pixels
        assert pixels.shape == (1, VIDEO.frames, VIDEO.height, VIDEO.width, 3)
        assert (pixels.float() - run(number, "np") * 255).abs().max() <= 0.51
    torch.testing.assert_close(grid, pipeline.scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (4, 6.0)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float) -> None:
    assert_equals_the_pipeline(folder, steps, cfg)


def test_the_image_is_seen_by_both_of_its_ways(folder: Path) -> None:
    policy, (conditions, _) = load(folder), encode(folder)
    x, t = backbone.noise_of(policy, VIDEO), torch.tensor([0.8])
    one, other = (stack([condition]) for condition in conditions)
    usual = policy.velocity(x, t, one)
    for name in ("image", "image_states"):
        assert (policy.velocity(x, t, {**one, name: other[name]}) - usual).abs().max() > 1e-3, name
    assert one["image_states"].shape == (1, files.PLACES, 6)
    assert one["image"].shape == (1, files.CHANNELS, 1, 8, 6)


given, states, latent = (
    HunyuanVideo15FromImage._given,
    ImageTextEncoder.states,
    ImageTextEncoder.latent,
)


def without_mask(self: HunyuanVideo15FromImage, x: Tensor, texts: Any) -> Tensor:
    whole = given(self, x, texts).clone()
    whole[:, -1] = 0
    return whole


def in_every_frame(self: HunyuanVideo15FromImage, x: Tensor, texts: Any) -> Tensor:
    whole = given(self, x, texts).clone()
    whole[:, x.shape[1] :] = whole[:, x.shape[1] :, :1]
    return whole


def unscaled(self: ImageTextEncoder, posterior: Any, pixels: Tensor) -> Tensor:
    return latent(self, posterior, pixels) / self.vae.config.scaling_factor


def mirrored(self: ImageTextEncoder, pixels: Tensor) -> Tensor:
    return states(self, pixels.flip(1))


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "no mask": (HunyuanVideo15FromImage, "_given", without_mask),
    "the image in every frame": (HunyuanVideo15FromImage, "_given", in_every_frame),
    "another scale of the image's latent": (ImageTextEncoder, "latent", unscaled),
    "states of another image": (ImageTextEncoder, "states", mirrored),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """Of diffusers' network with its masks, both branches, a prompt with quoted text."""
    pipeline, condition = official(folder), encode(folder)[0][1]
    with torch.no_grad():
        texts = [pipeline.encode_prompt(text, CPU) for text in (TEXTS[1], NEGATIVE)]

    def predict_alone(x: Tensor, t: Tensor) -> Tensor:
        first = torch.zeros_like(x)
        first[:, :, 0] = condition["image"][:, 0]
        mask = torch.zeros_like(x[:, :1])
        mask[:, :, 0] = 1
        with_text, without = (
            pipeline.transformer(
                hidden_states=torch.cat([x, first, mask], 1),
                timestep=1000 * t,
                encoder_hidden_states=own,
                encoder_attention_mask=valid,
                encoder_hidden_states_2=quoted,
                encoder_attention_mask_2=quoted_valid,
                image_embeds=condition["image_states"][None],
                return_dict=False,
            )[0]
            for own, valid, quoted, quoted_valid in texts
        )
        return without + 6.0 * (with_text - without)

    backbone.assert_gradient_is_the_objectives(
        load(folder, 6.0),
        video=VIDEO,
        condition=condition,
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict_alone,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 6.0), load(folder, 6.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][1:])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    condition = encode(folder)[0][:1]
    backbone.assert_nothing_waits_for_the_device(load(folder, 6.0), VIDEO, condition)


def test_an_image_of_another_shape_is_cut_to_the_clips(folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.effect_noise((96, 40), 80).convert("RGB").save(wide)
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        (condition,) = encoder([Prompt(TEXTS[0], wide)])
        cut = images.cover(images.read_image(wide), VIDEO.height, VIDEO.width)
        Image.fromarray(cut.numpy()).save(tmp_path / "cut.png")
        (same,) = encoder([Prompt(TEXTS[0], tmp_path / "cut.png")])
    for name in ("image", "image_states"):
        assert torch.equal(condition[name], same[name])


def test_every_weight_is_trained_but_the_last_blocks_text(folder: Path) -> None:
    frozen = {n for n, p in load(folder).network.named_parameters() if not p.requires_grad}
    assert not any("image_embedder" in name for name in frozen)
    assert all(name.startswith("transformer_blocks.1.") for name in frozen)


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match=r"has no reference image, which hunyuan_video_15_i2v"),
    ):
        encoder([Prompt(TEXTS[0])])
    edited = changed(folder, tmp_path / "edited", "", _class_name="FluxPipeline")
    with pytest.raises(UserError, match=r"not a HunyuanVideo15ImageToVideoPipeline; set model.f"):
        policies.load(settings(edited), CPU)


def test_the_plan_counts_the_networks_weights() -> None:
    planned = hunyuan_video_15_i2v.plan(dict(hunyuan_video_15_i2v.PUBLISHED)[""])
    assert planned.network.image == 729 and planned.image_width == 1152
