"""HunyuanVideo against diffusers' own pipeline, which is the oracle: text features, ODE latents, pixels."""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from fastgrpo import models
from fastgrpo.config import Model, Video
from fastgrpo.errors import UserError
from fastgrpo.flow import time_grid
from fastgrpo.models import Policy
from fastgrpo.rollout import sample_ode

FOLDER = Path(__file__).parent.parent / "data" / "tiny_hunyuan_video"
PROMPTS = ["a red circle moves left slowly", "watch as one blue square glides upwards quickly"]
VIDEO = Video(frames=9, height=32, width=32)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return models.load(Model(family="hunyuan_video", path=str(FOLDER)), torch.device("cpu"))


@pytest.fixture(scope="module")
def pipeline() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.from_pretrained(FOLDER)


def template(pipeline: HunyuanVideoPipeline) -> dict[str, object]:
    text = DEFAULT_PROMPT_TEMPLATE["template"]
    return {"template": text, "crop_start": len(pipeline.tokenizer(text.split("{}")[0])["input_ids"])}


def test_text_features_equal_the_pipelines(policy: Policy, pipeline: HunyuanVideoPipeline) -> None:
    for prompt, condition in zip(PROMPTS, policy.encode(PROMPTS), strict=True):
        text, pooled, mask = pipeline.encode_prompt(prompt, prompt_template=template(pipeline))
        length = int(mask.sum())
        assert condition["text"].shape[0] == length == len(prompt.split()) + 1
        torch.testing.assert_close(condition["text"], text[0, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(condition["pooled"], pooled[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "frames"), [(12, 9), (5, 1)])
def test_ode_equals_the_pipeline(policy: Policy, pipeline: HunyuanVideoPipeline, steps: int, frames: int) -> None:
    video = VIDEO.model_copy(update={"frames": frames})
    shape = policy.latent_shape(video)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(steps))
    text, pooled, mask = pipeline.encode_prompt(PROMPTS[0], prompt_template=template(pipeline))
    common = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "prompt_attention_mask": mask,
        "guidance_scale": 6.0,
        "num_inference_steps": steps,
        "height": 32,
        "width": 32,
        "num_frames": frames,
        "latents": noise,
    }
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(**common, output_type="latent").frames
    condition = models.stack(policy.encode(PROMPTS[:1]))
    latents = sample_ode(policy, noise, time_grid(steps, policy.shift), condition)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert latents.std() > 0.1

    frames_out = torch.from_numpy(pipeline(**common, output_type="np").frames)  # [B, F, H, W, 3] in [0, 1]
    pixels = policy.decode(latents)
    assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == (1, frames, 32, 32, 3)
    assert (pixels.float() - frames_out * 255).abs().max() <= 0.51


def test_latent_shape_and_its_errors(policy: Policy) -> None:
    assert policy.latent_shape(VIDEO) == (8, 3, 8, 8)
    with pytest.raises(UserError, match=r"video.frames=8: must be a multiple of 4, plus 1; use 5 or 9"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 8}))
    with pytest.raises(UserError, match=r"video.height=30: not a multiple of 8"):
        policy.latent_shape(VIDEO.model_copy(update={"height": 30}))


@pytest.mark.parametrize(("family", "path", "message"), [
    ("hunyuan", str(FOLDER), "no file models/hunyuan.py. Use one of hunyuan_video"),
    ("hunyuan_video", "/nowhere/at/all", "no such folder"),
    ("hunyuan_video", str(FOLDER / "vae"), "model_index.json is missing"),
])  # fmt: skip
def test_a_wrong_model_is_one_clear_line(family: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.load(Model(family=family, path=path), torch.device("cpu"))
