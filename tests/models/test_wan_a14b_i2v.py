"""Wan 2.2 A14B from an image against diffusers' own pipeline, which is the oracle: the given clip,
which network answers at which step, guidance of both, ODE latents, pixels.
"""

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
from fastgrpo.models import wan_a14b_i2v
from fastgrpo.models.loading import policies
from fastgrpo.models.wan_a14b import WanExperts
from fastgrpo.models.wan_a14b_i2v import ImageTextEncoder, WanExpertsFromImage
from fastgrpo.models.wan_i2v_14b import GivenClip, GivenClipEncoder
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU
from tests.harness.folders import wan as tiny_wan
from tests.harness.folders import wan_a14b as from_text
from tests.harness.folders import wan_a14b_i2v as files
from tests.models import test_wan
from tests.models.test_wan import NEGATIVE, REAL_14B, first_order, noise_of

VIDEO = Video(frames=5, height=32, width=48)
TEXT = "a red circle"
SCALES = (3.5, 2.5)  # of high noise, of low noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and two pictures in the clips' size."""
    path = tmp_path_factory.mktemp("wan_a14b_i2v")
    files.write(path)
    for number in range(2):
        pixels = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(number))
        small = Image.fromarray((255 * pixels).byte().numpy())
        small.resize((VIDEO.width, VIDEO.height), Image.Resampling.NEAREST).save(
            path / f"{number}.png"
        )
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
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at t = .8824 lies between the two boundaries."""
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=5, scales=SCALES, shift=5.0)


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_every_step_has_the_network_that_the_pipeline_chooses(folder: Path, shift: float) -> None:
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
    assert tuple(asked) == experts_of(policy.network, grid)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    policy = load(folder, cfg, cfg_2=cfg)
    assert set(backbone.plan_of(policy, VIDEO).experts) == {0, 1}
    assert backbone.largest_log_ratio(policy, VIDEO, encode(folder)[0], cpu_world) <= 1e-6


def test_the_full_size_networks_are_planned_as_they_are() -> None:
    published = dict(wan_a14b_i2v.PUBLISHED)[""]
    assert published["in_channels"] == 36
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(REAL_14B | {"in_channels": 36})
    count = sum(p.numel() for p in network.parameters())
    assert wan_a14b_i2v.plan(published).network.parameters == 2 * count


def test_a_folder_of_text_to_video_is_one_clear_line(tmp_path: Path) -> None:
    from_text.write(tmp_path)
    with pytest.raises(UserError, match=r"not a WanImageToVideoPipeline; set model.family") as told:
        policies.load(settings(tmp_path), CPU)
    assert "\n" not in str(told.value)
