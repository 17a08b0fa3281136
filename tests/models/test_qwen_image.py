"""Qwen-Image against diffusers' own pipeline, which is the oracle: text features, times, ODE
latents, pixels, gradients.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded, Prompt, stack
from fastgrpo.models import qwen_image
from fastgrpo.models.flux import pack, unpack
from fastgrpo.models.loading import policies
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.models.text_encoders import qwen
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import qwen_image as files

PROMPTS = ["a red boat", "two dogs run over the sand behind the hills"]
NEGATIVE = " "
VIDEO = Video(frames=1, height=32, width=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_image")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "qwen_image", "path": str(path), "cfg": cfg, **more})


def load(path: Path, cfg: float = 1.0, **more: object) -> QwenImage:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, QwenImage)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path) -> QwenImagePipeline:
    """diffusers' pipeline, whose constant of the template is told the tiny tokenizer's length."""
    pipeline = QwenImagePipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.prompt_template_encode == qwen.TEMPLATE
    before = qwen.TEMPLATE.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(before)["input_ids"])
    return pipeline


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float) -> None:
    """Times, ODE latents, from the texts on, and pixels."""
    policy, pipeline = load(path), official(path)
    # the pipeline reckons with a VAE of its own factor
    assert pipeline.vae_scale_factor == 4
    policy.cfg, (conditions, policy.negative) = cfg, encode(path)
    x = backbone.noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, None, policy.latent_shape(VIDEO))

    def run(text: str, output_type: str) -> Tensor:
        images = pipeline(
            text,
            negative_prompt=NEGATIVE,
            true_cfg_scale=cfg,
            height=VIDEO.height,
            width=VIDEO.width,
            latents=pack(x),
            num_inference_steps=steps,
            output_type=output_type,
        ).images
        return torch.as_tensor(images)

    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(pack(ours), run(text, "latent"), atol=1e-4, rtol=0)
        results.append(ours)
    assert torch.equal(grid, pipeline.scheduler.sigmas)
    assert not torch.allclose(results[0], results[1], atol=0.1)
    pixels = policy.decode(results[-1], {}).pixels
    assert pixels.shape == (1, 1, VIDEO.height, VIDEO.width, 3)
    assert (pixels[:, 0].float() - run(PROMPTS[-1], "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (4, 4.0)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float) -> None:
    assert_equals_the_pipeline(folder, steps, cfg)


def test_times_end_at_the_schedulers_terminal(folder: Path) -> None:
    policy = load(folder)
    grid = policy.time_grid(5, None, policy.latent_shape(VIDEO))
    assert grid[0] == 1 and grid[-1] == 0 and grid[-2].item() == pytest.approx(0.02, abs=1e-6)


def strongly_guided(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    return guided(without, with_text, scale + 0.1)


def of_any_length(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    return without + scale * (with_text - without)


def rounded(self: QwenImage, x: Tensor, t: Tensor, text: Tensor, lengths: Any) -> Tensor:
    return predict(self, x, (1000 * t).floor() / 1000, text, lengths)


def padded(self: QwenImage, x: Tensor, t: Tensor, text: Tensor, lengths: Any) -> Tensor:
    return predict(self, x, t, text, ())


def shifted(self: QwenImage, x: Tensor, condition: Condition) -> Decoded:
    return decode(self, x + 0.1, condition)


guided, predict, decode = qwen_image.guided, QwenImage._predict, QwenImage.decode
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "guidance": (qwen_image, "guided", strongly_guided),
    "guidance that lengthens": (qwen_image, "guided", of_any_length),
    "rounded time": (QwenImage, "_predict", rounded),
    "padding that is attended": (QwenImage, "_predict", padded),
    "another mean of the latent": (QwenImage, "decode", shifted),
    "fewer places for text": (qwen_image, "MAX_TEXT_TOKENS", 8),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_text_features_equal_the_pipelines(folder: Path) -> None:
    """Without the template's beginning, each of its own length; long texts are cut after 512."""
    texts = [*PROMPTS, "a long story of a boat, " * 100]
    (conditions, negative), pipeline = encode(folder, texts), official(folder)
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(texts, max_sequence_length=512)
        without, _ = pipeline.encode_prompt(NEGATIVE, max_sequence_length=512)
    lengths = mask.sum(1).tolist()
    assert [len(condition["text"]) for condition in conditions] == lengths and lengths[2] == 512
    for condition, row, length in zip(conditions, states, lengths, strict=True):
        torch.testing.assert_close(condition["text"], row[:length], atol=1e-4, rtol=0)
    torch.testing.assert_close(negative["text"], without[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """Through both lengths of guidance's rescaling."""
    pipeline = official(folder)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(PROMPTS[1])
        without, _ = pipeline.encode_prompt(NEGATIVE)

    def predict_alone(x: Tensor, t: Tensor) -> Tensor:
        shape = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]]
        with_text, unconditional = (
            pipeline.transformer(
                hidden_states=pack(x),
                encoder_hidden_states=words,
                timestep=t,
                img_shapes=shape,
                return_dict=False,
            )[0]
            for words in (text, without)
        )
        both = unconditional + 4.0 * (with_text - unconditional)
        v = both * (
            torch.norm(with_text, dim=-1, keepdim=True) / torch.norm(both, dim=-1, keepdim=True)
        )
        return unpack(v, x.shape[-2] // 2, x.shape[-1] // 2)

    backbone.assert_gradient_is_the_objectives(
        load(folder, 4.0),
        video=VIDEO,
        condition=encode(folder)[0][1],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict_alone,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 4.0), load(folder, 4.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][:1])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 4.0), VIDEO, encode(folder)[0][:1])


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        network = QwenImageTransformer2DModel.from_config(qwen_image.REAL)
    assert sum(p.numel() for p in network.parameters()) == 20_430_401_088
    blocks = qwen_image.blocks(network)
    assert len(blocks) == 60
    assert backbone.outside_blocks(network, blocks) == {
        "img_in",
        "norm_out.linear",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "txt_in",
        "txt_norm",
    }


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("", {"_class_name": "FluxPipeline"}, "not a QwenImagePipeline; set model.family=flux"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler, not a FlowMatch"),
        ("transformer", {"zero_cond_t": True}, "config has zero_cond_t=true, as models of editing"),
        ("transformer", {"in_channels": 64}, "the network has 64 channels in and 4 out, and the"),
        (
            "transformer",
            {"joint_attention_dim": 48},
            "takes text of width 48, .* makes 32; the parts",
        ),
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
    assert policy.latent_shape(VIDEO) == (4, 1, 8, 6)
    with pytest.raises(UserError, match=r"video.frames=5: Qwen-Image draws images; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 5}))
    with pytest.raises(UserError, match=r"video.width=30: not a multiple of 8 .*use 24 or 32"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 30}))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
