"""Z-Image against diffusers' own pipeline, which is the oracle: text features, times, ODE latents,
pixels, gradients.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from fastgrpo.core.config import Lora, Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded, Prompt, stack
from fastgrpo.models import z_image
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import target_layers
from fastgrpo.models.text_encoders import qwen_3
from fastgrpo.models.z_image import ZImage, ZImageTransformer2DModel
from fastgrpo.parallel.sequence_parallel import install
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import z_image as files
from tests.models.test_family_contract import group

PROMPTS = ["a red boat", "two dogs run over the sand behind the hills, and many birds fly over it"]
NEGATIVE = "blurry"
VIDEO = Video(frames=1, height=40, width=24)  # 5 x 3 tokens, and 17 that were learned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "z_image", "path": str(path), "cfg": cfg, **more})


def load(path: Path, cfg: float = 1.0, **more: object) -> ZImage:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, ZImage)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float) -> None:
    """Times, ODE latents, from the texts on, and pixels."""
    policy, pipeline = load(path), official(path)
    policy.cfg, (conditions, policy.negative) = cfg, encode(path)
    x = backbone.noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, None, policy.latent_shape(VIDEO))

    def run(text: str, output_type: str) -> Tensor:
        images = pipeline(
            text,
            negative_prompt=NEGATIVE,
            guidance_scale=cfg - 1,  # the pipeline's counts from the branch with the text
            height=VIDEO.height,
            width=VIDEO.width,
            latents=x[:, :, 0],
            num_inference_steps=steps,
            output_type=output_type,
        ).images
        return torch.as_tensor(images)

    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours[:, :, 0], run(text, "latent"), atol=1e-4, rtol=0)
        results.append(ours)
    torch.testing.assert_close(grid, pipeline.scheduler.sigmas, atol=1e-6, rtol=0)
    assert not torch.allclose(results[0], results[1], atol=0.1)
    pixels = policy.decode(results[-1], {}).pixels
    assert pixels.shape == (1, 1, VIDEO.height, VIDEO.width, 3)
    assert (pixels[:, 0].float() - run(PROMPTS[-1], "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (4, 4.0)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float) -> None:
    """One text has the unconditional branch's padded length, and one has another."""
    (short, long), negative = encode(folder)
    lengths = [z_image.padded(len(of["text"])) for of in (negative, short, long)]
    assert lengths[0] == lengths[1] == 32 and lengths[2] == 64
    assert_equals_the_pipeline(folder, steps, cfg)


Texts = Sequence[Tensor]


def of_the_other_sign(self: ZImage, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    return -predict(self, x, t, texts)


def time_from_data(self: ZImage, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    return predict(self, x, 1 - t, texts)


def rounded(self: ZImage, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    return predict(self, x, (1000 * t).floor() / 1000, texts)


def padded_with_zeros(self: ZImage, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    for token in (self.network.x_pad_token, self.network.cap_pad_token):
        nn.init.zeros_(token)  # type: ignore[arg-type]
    return predict(self, x, t, texts)


def of_one_length(self: ZImage, x: Tensor, t: Tensor, texts: Texts) -> Tensor:
    longest = max(text.shape[1] for text in texts)
    more = [(0, 0, 0, longest - text.shape[1]) for text in texts]
    given = [nn.functional.pad(text, by) for text, by in zip(texts, more, strict=True)]
    return predict(self, x, t, given)


def scale_of_the_pipeline(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    return guided(without, with_text, scale + 1)


def weakly_guided(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    return guided(without, with_text, scale - 0.1)


def shifted(self: ZImage, x: Tensor, condition: Condition) -> Decoded:
    return decode(self, x + 0.1, condition)


guided, predict, decode = z_image.guided, ZImage._predict, ZImage.decode
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "sign of the velocity": (ZImage, "_predict", of_the_other_sign),
    "time from data to noise": (ZImage, "_predict", time_from_data),
    "rounded time": (ZImage, "_predict", rounded),
    "zeros in place of learned tokens": (ZImage, "_predict", padded_with_zeros),
    "branches of one length": (ZImage, "_predict", of_one_length),
    "the pipeline's scale": (z_image, "guided", scale_of_the_pipeline),
    "guidance": (z_image, "guided", weakly_guided),
    "another multiple": (z_image, "MULTIPLE", 16),
    "another layer of Qwen3": (qwen_3, "SKIPPED_LAYERS", 0),
    "another mean of the latent": (ZImage, "decode", shifted),
    "fewer places for text": (z_image, "MAX_TEXT_TOKENS", 16),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_text_features_equal_the_pipelines(folder: Path) -> None:
    """The whole chat, each of its own length; long texts are cut after 512 tokens."""
    texts = [*PROMPTS, "a long story of a boat, " * 100]
    (conditions, negative), pipeline = encode(folder, texts), official(folder)
    with torch.no_grad():
        states, without = pipeline.encode_prompt([*texts], negative_prompt=[NEGATIVE] * 3)
    assert [len(condition["text"]) for condition in conditions] == [len(row) for row in states]
    assert len(states[2]) == 512
    for condition, row in zip([*conditions, negative], [*states, without[0]], strict=True):
        torch.testing.assert_close(condition["text"], row, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """Of diffusers' own network, which takes lists and masks; with branches of two lengths."""
    pipeline = official(folder)
    with torch.no_grad():
        text, without = pipeline.encode_prompt(PROMPTS[1], negative_prompt=NEGATIVE)

    def predict_alone(x: Tensor, t: Tensor) -> Tensor:
        time = (1 - t).expand(2)
        (with_text, unconditional), *_ = pipeline.transformer(
            [x[0], x[0]], time, [*text, *without], return_dict=False
        )
        return -(unconditional + 4.0 * (with_text - unconditional))[None]

    backbone.assert_gradient_is_the_objectives(
        load(folder, 4.0),
        video=VIDEO,
        condition=encode(folder)[0][1],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict_alone,
    )


def test_learned_tokens_have_a_gradient_also_where_none_is_used(folder: Path) -> None:
    """So that all ranks reduce the same weights, whatever the lengths of their texts."""
    policy = load(folder)
    x = torch.randn(1, 4, 1, 16, 8)  # 32 tokens
    text = torch.randn(1, 32, files.WIDTH)
    policy.velocity(x, torch.tensor([0.5]), {"text": text}).sum().backward()
    missing = [name for name, of in policy.network.named_parameters() if of.grad is None]
    assert not missing


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 4.0), load(folder, 4.0, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][1:])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 4.0), VIDEO, encode(folder)[0][1:])


def test_the_attention_backend_is_the_recipes(folder: Path) -> None:
    policy = load(folder, attention="_native_math")
    processors = {block.attention.processor._attention_backend for block in policy.blocks}  # type: ignore[union-attr]
    assert len(processors) == 1 and "math" in str(processors)
    policy.network.set_attention_backend("native")  # type: ignore[operator]  # diffusers' choice is the process's, too


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        network = ZImageTransformer2DModel.from_config(z_image.REAL)
    assert sum(p.numel() for p in network.parameters()) == 6_154_908_736
    blocks = z_image.blocks(network)
    assert len(blocks) == 34
    assert backbone.outside_blocks(network, blocks) == {
        "",  # the two learned tokens
        "all_final_layer.2-1.adaLN_modulation.1",
        "all_final_layer.2-1.linear",
        "all_x_embedder.2-1",
        "cap_embedder.0",
        "cap_embedder.1",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
    }
    assert len(target_layers(network, Lora(rank=4))) == 4 * 34
    with pytest.raises(UserError, match=r"distributed.sp=4: .* 30 heads; use one of 1, 2, 3, 5, 6"):
        install(network, group(4), z_image.share_sequence)


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("", {"_class_name": "ZImageOmniPipeline"}, "ZImageOmniPipeline, not a ZImagePipeline"),
        ("scheduler", {"use_dynamic_shifting": True}, "has use_dynamic_shifting=true, which this"),
        ("transformer", {"siglip_feat_dim": 1152}, "siglip_feat_dim=1152, as models that see imag"),
        ("transformer", {"all_patch_size": [2, 4]}, r"all_patch_size=\[2, 4\], and .* has \[2\]"),
        ("transformer", {"in_channels": 16}, "the network takes 16 channels, the VAE's latents"),
        ("transformer", {"cap_feat_dim": 48}, "takes text of width 48, .* makes 24; the parts"),
        ("vae", {"shift_factor": None}, "vae/config.json has no shift_factor, which Z-Image's"),
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
    assert policy.latent_shape(VIDEO) == (4, 1, 10, 6)
    with pytest.raises(UserError, match=r"video.frames=5: Z-Image draws images; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 5}))
    with pytest.raises(UserError, match=r"video.width=30: not a multiple of 8 .*use 24 or 32"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 30}))
    with pytest.raises(UserError, match=r"video.width=264: .* tables reach 256 pixels; use no mor"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 264}))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
