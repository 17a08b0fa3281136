"""HunyuanVideo-1.5 against diffusers' own pipeline, which is the oracle: text features, times, ODE
latents, pixels, gradients.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, HunyuanVideo15Pipeline
from torch import Tensor

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded, Prompt, stack
from fastgrpo.models import hunyuan_video_15
from fastgrpo.models.hunyuan_video_15 import HunyuanVideo15, HunyuanVideo15Transformer3DModel
from fastgrpo.models.loading import guider, policies
from fastgrpo.models.text_encoders import qwen_and_byt5
from fastgrpo.models.text_encoders.qwen_and_byt5 import TextEncoder
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import hunyuan_video_15 as files

PROMPTS = ["a red boat", 'two dogs run past a sign "Go" and another “stop here”']
NEGATIVE = "a boat behind the hills"
VIDEO = Video(frames=5, height=32, width=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hunyuan_video_15")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate(
        {"family": "hunyuan_video_15", "path": str(path), "cfg": cfg, **more}
    )


def load(path: Path, cfg: float = 1.0, **more: object) -> HunyuanVideo15:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, HunyuanVideo15)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path, cfg: float = 1.0, rescale: float = 0.0) -> HunyuanVideo15Pipeline:
    """diffusers' pipeline, whose constant of the chat is told the tiny tokenizer's length.

    What it pads texts and the absent image to is masked; shorter is quicker.
    """
    pipeline = HunyuanVideo15Pipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.system_message == qwen_and_byt5.SYSTEM
    head = f"<|start_header_id|>system\n{qwen_and_byt5.SYSTEM}<|eot_id|>\n<|start_header_id|>user\n"
    tokens = pipeline.tokenizer(head, add_special_tokens=False)["input_ids"]
    pipeline.prompt_template_encode_start_idx = len(tokens)
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 60, 50
    pipeline.vision_num_semantic_tokens = 5
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=cfg, guidance_rescale=rescale)
    return pipeline


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float, rescale: float = 0.0) -> None:
    """Times, ODE latents, from the texts on, and pixels; without quoted text and with it."""
    policy, pipeline = load(path), official(path, cfg, rescale)
    policy.cfg, policy.rescale, (conditions, policy.negative) = cfg, rescale, encode(path)
    x = backbone.noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, None, policy.latent_shape(VIDEO))

    def run(text: str, output_type: str) -> Tensor:
        frames = pipeline(
            text,
            negative_prompt=NEGATIVE,
            height=VIDEO.height,
            width=VIDEO.width,
            num_frames=VIDEO.frames,
            latents=x,
            num_inference_steps=steps,
            output_type=output_type,
        ).frames
        return torch.as_tensor(frames)

    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours, run(text, "latent"), atol=1e-4, rtol=0)
        pixels = policy.decode(ours, {}).pixels
        assert pixels.shape == (1, VIDEO.frames, VIDEO.height, VIDEO.width, 3)
        assert (pixels.float() - run(text, "np") * 255).abs().max() <= 0.51
        results.append(ours)
    torch.testing.assert_close(grid, pipeline.scheduler.sigmas, atol=1e-6, rtol=0)
    assert not torch.allclose(results[0], results[1], atol=0.1)


@pytest.mark.parametrize(("steps", "cfg", "rescale"), [(5, 1.0, 0.0), (4, 6.0, 0.0), (3, 3.0, 0.7)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float, rescale: float) -> None:
    assert_equals_the_pipeline(folder, steps, cfg, rescale)


def strongly_guided(without: Tensor, with_text: Tensor, scale: float, rescale: float) -> Tensor:
    return guided(without, with_text, scale + 0.1, rescale)


def rounded(self: HunyuanVideo15, x: Tensor, t: Tensor, texts: Any) -> Tensor:
    return predict(self, x, (1000 * t).round() / 1000, texts)


def padded(self: HunyuanVideo15, x: Tensor, t: Tensor, texts: Any) -> Tensor:
    longest = max(len(part["text"][0]) for part in texts)
    rows = [(0, 0, 0, longest + 3 - len(part["text"][0])) for part in texts]
    longer = [torch.nn.functional.pad(p["text"], row) for p, row in zip(texts, rows, strict=True)]
    return predict(self, x, t, [{**p, "text": text} for p, text in zip(texts, longer, strict=True)])


def without_glyphs(self: TextEncoder, text: str) -> Tensor:
    return glyphs(self, "")


def one_token_less(self: TextEncoder) -> int:
    return before(self) - 1


def shifted(self: HunyuanVideo15, x: Tensor, condition: Condition) -> Decoded:
    return decode(self, x + 0.1, condition)


guided, predict, decode = guider.guided, HunyuanVideo15._predict, HunyuanVideo15.decode
glyphs, before = TextEncoder._glyphs_of, TextEncoder._tokens_before
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "guidance": (guider, "guided", strongly_guided),
    "rounded time": (HunyuanVideo15, "_predict", rounded),
    "padding that is attended": (HunyuanVideo15, "_predict", padded),
    "glyphs left out": (TextEncoder, "_glyphs_of", without_glyphs),
    "another crop of the chat": (TextEncoder, "_tokens_before", one_token_less),
    "another scale of the latent": (HunyuanVideo15, "decode", shifted),
    "another layer of Qwen": (qwen_and_byt5, "SKIPPED_LAYERS", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_text_features_equal_the_pipelines(folder: Path) -> None:
    """Without the system's message, each of its own length; long texts are cut after 1000 and
    256.
    """
    texts = [*PROMPTS, "", "a long story of a boat, " * 200, f'the sign "{"a boat " * 60}"']
    (conditions, negative), pipeline = encode(folder, texts), official(folder)
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 1000, 256
    with torch.no_grad():
        states, mask, quoted, quoted_mask = pipeline.encode_prompt(texts, batch_size=len(texts))
        without = pipeline.encode_prompt(NEGATIVE)[0]
    lengths, of_quotes = mask.sum(1).int().tolist(), quoted_mask.sum(1).int().tolist()
    assert [len(condition["text"]) for condition in conditions] == lengths and lengths[3] == 1000
    assert [len(condition["glyphs"]) for condition in conditions] == of_quotes
    assert of_quotes[0] == 0 and of_quotes[4] == 256
    for row, condition in enumerate(conditions):
        own, glyphs = states[row, : lengths[row]], quoted[row, : of_quotes[row]]
        torch.testing.assert_close(condition["text"], own, atol=1e-4, rtol=0)
        torch.testing.assert_close(condition["glyphs"], glyphs, atol=1e-4, rtol=0)
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        cut = encoder.cut(texts[4])
    assert cut == {"text_encoder_2": (256, len(f'Text "{"a boat " * 60}". ') + 1)}
    own = negative["text"]
    torch.testing.assert_close(own, without[0, : len(own)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """Of diffusers' network with its masks, both branches, a prompt with quoted text."""
    pipeline = official(folder)
    with torch.no_grad():
        texts = [pipeline.encode_prompt(text) for text in (PROMPTS[1], NEGATIVE)]
    pipeline.transformer.image_embedder.requires_grad_(False)

    def predict_alone(x: Tensor, t: Tensor) -> Tensor:
        given = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], 1)
        with_text, without = (
            pipeline.transformer(
                hidden_states=given,
                timestep=1000 * t,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                encoder_hidden_states_2=quoted,
                encoder_attention_mask_2=quoted_mask,
                image_embeds=torch.zeros(1, 5, 6),
                return_dict=False,
            )[0]
            for states, mask, quoted, quoted_mask in texts
        )
        return without + 6.0 * (with_text - without)

    backbone.assert_gradient_is_the_objectives(
        load(folder, 6.0),
        video=VIDEO,
        condition=encode(folder)[0][1],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict_alone,
    )


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 6.0), load(folder, 6.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][1:])
    )


@pytest.mark.parametrize("place", [0, 1])
def test_nothing_waits_for_the_device(folder: Path, place: int) -> None:
    condition = encode(folder)[0][place : place + 1]
    backbone.assert_nothing_waits_for_the_device(load(folder, 6.0), VIDEO, condition)


def test_times_stay_float32_with_weights_in_bfloat16(folder: Path) -> None:
    """The pipeline's own time, 987.3, would be 988 there."""
    policy, seen = load(folder, dtype="bfloat16"), []
    policy.network.time_embed.time_proj.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, inputs: seen.append(inputs[0])
    )
    policy.network.to(torch.bfloat16)
    x = backbone.noise_of(policy, VIDEO)
    assert policy.velocity(x, torch.tensor([0.9873]), stack(encode(folder)[0][:1])).shape == x.shape
    torch.testing.assert_close(seen[0], torch.tensor([987.3]))


def test_a_large_clip_is_decoded_in_tiles(folder: Path) -> None:
    """The same pixels as from diffusers' decoder with tiles, and others than from one without."""
    policy, vae = load(folder), official(folder).vae
    x = torch.randn(1, files.CHANNELS, 1, 8, 68, generator=torch.Generator().manual_seed(0))
    latent, frames = x / vae.config.scaling_factor, policy.frames(x, {})
    with torch.no_grad():
        whole = vae.decode(latent).sample
        vae.enable_tiling()
        assert torch.equal(frames, vae.decode(latent).sample)
    assert not torch.equal(frames, whole)


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        network = HunyuanVideo15Transformer3DModel.from_config(hunyuan_video_15.REAL)
    assert sum(p.numel() for p in network.parameters()) == 8_326_608_160
    blocks = hunyuan_video_15.blocks(network)
    assert len(blocks) == 54
    outside = {name.split(".")[0] for name in backbone.outside_blocks(network, blocks)}
    assert outside == {
        "cond_type_embed",
        "context_embedder",
        "context_embedder_2",
        "image_embedder",
        "norm_out",
        "proj_out",
        "time_embed",
        "x_embedder",
    }


MEANFLOW = r"config has use_meanflow=true, as models of super-resolution have"


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("", {"_class_name": "FluxPipeline"}, "not a HunyuanVideo15Pipeline; set model.fam"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler, not a FlowMatch"),
        ("transformer", {"use_meanflow": True}, MEANFLOW),
        ("transformer", {"in_channels": 4}, "has 4 channels in and 4 out in patches of 1, and"),
        ("transformer", {"patch_size": 2}, "9 channels in and 4 out in patches of 2, and the"),
        ("transformer", {"text_embed_2_dim": 48}, "of widths 32 and 48, .* make 32 and 24; the"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    with pytest.raises(UserError, match=message) as caught:
        policies.load(settings(edited), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "SkipLayerGuidance"}, "is a SkipLayerGuidance, not a ClassifierFree"),
        ({"stop": 0.5}, "has start=0.0 and stop=0.5: guidance of a part of the steps"),
        ({"guidance_scale": 1.0}, "model.cfg=6.0: .* guides with nothing, as a distilled"),
        ({"enabled": False}, "model.cfg=6.0: .* guides with nothing, as a distilled"),
        ({"guidance_scale": 0.0, "use_original_formulation": True}, "guides with nothing"),
    ],
)
def test_another_guider_is_refused(
    tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    file = tmp_path / guider.FILE
    file.parent.mkdir()
    config = ClassifierFreeGuidance(guidance_scale=6.0).config
    file.write_text(json.dumps({"_class_name": guider.KIND, **config, **entries}))
    with pytest.raises(UserError, match=message) as caught:
        guider.read_rescale(tmp_path, 6.0)
    assert "\n" not in str(caught.value)
    if "guides with nothing" in message or "distilled" in message:
        assert guider.read_rescale(tmp_path, 1.0) == 0.0


def test_mistakes_of_the_recipe_are_one_clear_line(folder: Path) -> None:
    policy = load(folder)
    assert policy.latent_shape(VIDEO) == (4, 2, 8, 6)
    with pytest.raises(UserError, match=r"video.frames=4: must be a multiple of 4, plus 1; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 4}))
    with pytest.raises(UserError, match=r"video.width=30: not a multiple of 4 .*use 28 or 32"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 30}))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
