"""Wan 2.2 A14B from an image against diffusers' own pipeline, which is the oracle: the given clip,
which network answers at which step, guidance of both, ODE latents, pixels.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Experts, Prompt, experts_of, stack
from fastgrpo.models import wan, wan_a14b_i2v
from fastgrpo.models.loading import policies
from fastgrpo.models.wan import Wan
from fastgrpo.models.wan_a14b import WanExperts
from fastgrpo.models.wan_a14b_i2v import ImageTextEncoder, WanExpertsFromImage
from fastgrpo.models.wan_i2v_14b import GivenClip, GivenClipEncoder
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import wan as tiny_wan
from tests.harness.folders import wan_a14b as from_text
from tests.harness.folders import wan_a14b_i2v as files
from tests.harness.folders import wan_i2v_14b as of_images
from tests.models import test_wan, test_wan_a14b
from tests.models.test_wan import NEGATIVE, REAL_14B, first_order, noise_of

VIDEO = Video(frames=5, height=32, width=48)
TEXT = "a red circle"
SCALES = (3.5, 2.5)  # of high noise, of low noise
REAL_COUNT = 14_288_901_184
"""Parameters of a published network: that from text, and 20 more channels in patches of 2 x 2."""


def real_network() -> WanTransformer3DModel:
    network: WanTransformer3DModel = WanTransformer3DModel.from_config(
        REAL_14B | {"in_channels": 36}
    )
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and two pictures in the clips' size."""
    path = tmp_path_factory.mktemp("wan_a14b_i2v")
    files.write(path)
    backbone.write_pictures(path, VIDEO)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "wan_a14b_i2v", "path": str(path), "cfg": cfg, **more})


def encode(path: Path) -> tuple[list[Condition], Condition]:
    """The conditions of the two pictures with one text, and the negative one."""
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        prompts = [Prompt(TEXT, path / f"{number}.png") for number in range(2)]
        return encoder(prompts), encoder.negative(NEGATIVE)


def load(path: Path, cfg: float = 1.0, **more: object) -> WanExpertsFromImage:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, WanExpertsFromImage)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def pipeline_of(path: Path, steps: int, shift: float) -> WanImageToVideoPipeline:
    """diffusers' pipeline with Euler steps of a shift, at times that are not rounded."""
    pipeline = WanImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = first_order(path, steps)
    pipeline.scheduler.register_to_config(flow_shift=shift)
    return pipeline


def assert_equals_the_pipeline(
    path: Path, steps: int, scales: tuple[float, float | None], shift: float = 5.0
) -> None:
    """ODE latents from image and text on, with both scales of guidance, and pixels."""
    pipeline, (conditions, negative) = pipeline_of(path, steps, shift), encode(path)
    policy = load(path, scales[0], cfg_2=scales[1])
    policy.negative = negative
    x = noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, shift, policy.latent_shape(VIDEO))
    assert set(experts_of(policy.network, grid)) == {0, 1}

    def theirs(number: int, output_type: str) -> Tensor:
        return torch.as_tensor(
            pipeline(
                Image.open(path / f"{number}.png"),
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

    results = []
    for number, condition in enumerate(conditions):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours, theirs(number, "latent"), atol=1e-4, rtol=0)
        results.append(ours)
    assert (results[0] - results[1]).abs().max() > 0.01, "the image is seen"
    pixels = policy.decode(results[-1], stack(conditions[-1:])).pixels
    assert (pixels.float() - theirs(1, "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "scales"), [(5, SCALES), (4, (1.0, None))])
def test_ode_equals_the_pipeline(
    folder: Path, steps: int, scales: tuple[float, float | None]
) -> None:
    assert_equals_the_pipeline(folder, steps, scales)


def other_expert(self: WanExperts, expert: int, *rest: Any) -> Tensor:
    return velocity_of(self, 1 - expert, *rest)


def earlier(self: Experts, t: float) -> int:
    """The boundary of text-to-video."""
    return 0 if t >= from_text.BOUNDARY else 1


def everywhere(self: GivenClip, x: Tensor, t: Tensor, condition: Condition, *rest: Any) -> Tensor:
    image = condition["image"][:, :, :1].expand_as(condition["image"])
    return guided(self, x, t, {**condition, "image": image}, *rest)


def masked_everywhere(
    self: GivenClip, x: Tensor, t: Tensor, condition: Condition, *rest: Any
) -> Tensor:
    mask = torch.ones(len(x), 4, *x.shape[2:])
    return Wan._guided(self, torch.cat([x, mask, condition["image"]], 1), t, condition, *rest)


def first_alone(self: GivenClipEncoder, frame: Tensor) -> Tensor:
    """Frames that repeat the first, in place of grey ones."""
    return frame.expand(-1, -1, self.frames, -1, -1)


velocity_of, guided = WanExperts.velocity_of, GivenClip._guided
FAULTS: dict[str, tuple[Any, str, Any]] = {
    name: test_wan.FAULTS[name] for name in ("rounded time", "another mean of the latent")
} | {
    "the wrong expert": (WanExperts, "velocity_of", other_expert),
    "another boundary": (Experts, "expert_at", earlier),
    "the image's latent in every frame": (GivenClip, "_guided", everywhere),
    "no grey frames": (ImageTextEncoder, "clip", first_alone),
    "another mask": (GivenClip, "_guided", masked_everywhere),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at t = .8824 lies between the two boundaries."""
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=5, scales=SCALES, shift=5.0)


@pytest.mark.parametrize(("shift", "count"), [(3.0, 6), (5.0, 8), (12.0, 12)])
def test_every_step_has_the_network_that_the_pipeline_chooses(
    folder: Path, shift: float, count: int
) -> None:
    policy, steps = load(folder), 20
    grid = policy.time_grid(steps, shift, policy.latent_shape(VIDEO))
    pipeline, asked = pipeline_of(folder, steps, shift), []
    for number, part in enumerate(wan_a14b_i2v.NETWORKS):
        getattr(pipeline, part).register_forward_pre_hook(
            lambda *_, number=number: asked.append(number)
        )
    pipeline(
        Image.open(folder / "0.png"),
        TEXT,
        height=32,
        width=48,
        num_frames=1,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        max_sequence_length=tiny_wan.LONGEST,
    )
    ours = experts_of(policy.network, grid)
    assert tuple(asked) == ours == (0,) * count + (1,) * (steps - count)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    policy = load(folder, cfg, cfg_2=cfg)
    assert set(backbone.plan_of(policy, VIDEO).experts) == {0, 1}
    assert backbone.largest_log_ratio(policy, VIDEO, encode(folder)[0], cpu_world) <= 1e-6


def test_the_full_size_networks_are_planned_as_they_are() -> None:
    published = dict(wan_a14b_i2v.PUBLISHED)[""]
    assert published["in_channels"] == 36
    with torch.device("meta"):
        assert sum(p.numel() for p in real_network().parameters()) == REAL_COUNT
    planned = wan_a14b_i2v.plan(published)
    assert planned.network.parameters == 2 * REAL_COUNT
    shapes = planned.condition(512, (16, 21, 60, 104))  # 81 frames of 480 x 832
    assert shapes["image"] == (16, 21, 60, 104) and set(shapes) == {"text", "image"}
    assert f"{4 * math.prod(shapes['image']) / 1e6:.1f} MB" == "8.4 MB"  # docs/families.md


def test_a_condition_is_the_pipelines(folder: Path) -> None:
    """The mask and the given clip's latent of every frame."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    (condition, _), _ = encode(folder)
    pixels = pipeline.video_processor.preprocess(Image.open(folder / "0.png"), height=32, width=48)
    _, channels = pipeline.prepare_latents(
        pixels, 1, tiny_wan.CHANNELS, 32, 48, 5, torch.float32, CPU, torch.Generator()
    )
    assert set(condition) == {"text", "image"}
    torch.testing.assert_close(condition["image"], channels[0, 4:], atol=1e-5, rtol=0)
    assert condition["image"][:, 1:].abs().max() > 0.1


@pytest.mark.parametrize(
    ("window", "expected"), [(range(2), (True, False)), (range(3, 5), (False, True))]
)
def test_a_window_of_one_networks_steps_leaves_the_other(
    folder: Path,
    cpu_world: World,
    window: range,
    expected: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit."""
    policy, conditions = load(folder), encode(folder)[0]
    found, _ = test_wan_a14b.trained(policy, conditions, cpu_world, window, monkeypatch)
    assert tuple(found.values()) == expected


def test_recomputing_changes_memory_alone(folder: Path) -> None:
    """In both networks."""
    test_wan_a14b.assert_recomputing_changes_memory_alone(
        load(folder), load(folder, gradient_checkpointing=True), stack(encode(folder)[0])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 5.0), VIDEO, encode(folder)[0][:1])


def test_every_block_of_the_real_networks_is_wrapped() -> None:
    with torch.device("meta"):
        network = Experts({part: real_network() for part in wan_a14b_i2v.NETWORKS}, files.BOUNDARY)
    blocks = wan_a14b_i2v.blocks(network)
    assert len(blocks) == 80 and sum(p.numel() for p in network.parameters()) == 2 * REAL_COUNT
    alone = backbone.outside_blocks(network.networks[0], wan.blocks(network.networks[0]))
    assert backbone.outside_blocks(network, blocks) == {
        f"{part}.{name}".rstrip(".") for part in wan_a14b_i2v.NETWORKS for name in alone
    }


def test_the_wrong_folder_or_family_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    """Whichever of Wan's families a folder is for, the message names it."""
    text, older = tmp_path / "text", tmp_path / "older"
    from_text.write(text)
    of_images.write(older)
    wide = changed(folder, tmp_path / "wide", "transformer_2", in_channels=24)
    seeing = changed(folder, tmp_path / "seeing", "transformer", image_dim=8, added_kv_proj_dim=8)
    last = changed(folder, tmp_path / "last", "transformer", pos_embed_seq_len=514)
    for family, path, message in (
        ("wan_a14b_i2v", text, "not a WanImageToVideoPipeline; set model.family=wan_a14b, or"),
        ("wan_a14b_i2v", older, "has no transformer_2, .*model.family=wan_i2v_14b for Wan 2.1 I2V"),
        ("wan_a14b", folder, "not a WanPipeline; set model.family=wan_a14b_i2v, or"),
        ("wan_a14b", older, "not a WanPipeline; set model.family=wan_i2v_14b, or"),
        ("wan", folder, "not a WanPipeline; set model.family=wan_a14b_i2v, or"),
        (
            "wan_i2v_14b",
            folder,
            "has transformer_2, .*use Wan 2.1.* model.family=wan_a14b_i2v for I2V-A14B",
        ),
        ("wan_i2v_14b", text, "not a WanImageToVideoPipeline; set model.family=wan_a14b, or"),
        ("wan_a14b_i2v", wide, "24 channels in and 8 out, .*use Wan 2.2 I2V-A14B"),
        ("wan_a14b_i2v", seeing, "and sees images, .*use Wan 2.2 I2V-A14B"),
        ("wan_a14b_i2v", last, "pos_embed_seq_len, .*last frame; use Wan 2.2 I2V-A14B"),
    ):
        with pytest.raises(UserError, match=message) as told:
            policies.load(Model(family=family, path=str(path)), CPU)
        assert "\n" not in str(told.value)
    with (
        policies.encoder(settings(folder), VIDEO, CPU) as encoder,
        pytest.raises(UserError, match="no reference image, which wan_a14b_i2v needs; set prompts"),
    ):
        encoder([Prompt(TEXT)])
