"""Stable Diffusion 3.5 against diffusers' own pipeline, which is the oracle: text features, times,
ODE latents, pixels, gradients.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded, Prompt, stack
from fastgrpo.models import stable_diffusion_3
from fastgrpo.models.loading import policies
from fastgrpo.models.stable_diffusion_3 import StableDiffusion3
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import stable_diffusion_3 as files

PROMPTS = ["a red circle", "two dogs in the snow"]
NEGATIVE = "blurred"
VIDEO = Video(frames=1, height=32, width=24)
REAL: dict[str, Any] = {  # transformer/config.json of stable-diffusion-3.5-medium
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": [*range(13)],
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
REAL_LARGE = REAL | {"caption_projection_dim": 2432, "dual_attention_layers": []}
REAL_LARGE |= {"num_attention_heads": 38, "num_layers": 38, "pos_embed_max_size": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stable_diffusion_3")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    given = {"family": "stable_diffusion_3", "path": str(path), "cfg": cfg}
    return Model.model_validate(given | more)


def load(path: Path, cfg: float = 1.0, **more: object) -> StableDiffusion3:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, StableDiffusion3)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(path)
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
            height=VIDEO.height,
            width=VIDEO.width,
            latents=x.squeeze(2),
            num_inference_steps=steps,
            guidance_scale=cfg,
            output_type=output_type,
            max_sequence_length=files.LONGEST,
        ).images
        return torch.as_tensor(images)

    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(ours.squeeze(2), run(text, "latent"), atol=1e-4, rtol=0)
        results.append(ours)
    assert torch.equal(grid, pipeline.scheduler.sigmas)
    assert not torch.allclose(results[0], results[1], atol=0.1)
    pixels = policy.decode(results[-1], {}).pixels
    assert pixels.shape == (1, 1, VIDEO.height, VIDEO.width, 3)
    assert (pixels[:, 0].float() - run(PROMPTS[-1], "np") * 255).abs().max() <= 0.51


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (4, 4.5)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float) -> None:
    assert_equals_the_pipeline(folder, steps, cfg)


def test_times_fall_to_the_schedulers_smallest_before_the_last_step(folder: Path) -> None:
    policy = load(folder)
    shape = policy.latent_shape(VIDEO)
    expected = [1.0, 0.9004, 0.7511, 0.5030, 0.0089, 0.0]
    assert policy.time_grid(5, None, shape).tolist() == pytest.approx(expected, abs=1e-4)
    assert policy.time_grid(5, 1.0, shape).tolist() == pytest.approx(
        [1.0, 0.75025, 0.5005, 0.25075, 0.001, 0.0], abs=1e-4
    )


def strongly_guided(self: StableDiffusion3, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    self.cfg += 0.1
    return velocity(self, x, t, condition)


def rounded(self: StableDiffusion3, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return predict(self, x, (1000 * t).floor() / 1000, condition)


def evenly(self: StableDiffusion3, steps: int, shift: float | None, shape: object) -> Tensor:
    return transitions.time_grid(steps, 3.0)


def shifted(self: StableDiffusion3, x: Tensor, condition: Condition) -> Decoded:
    return decode(self, x + 0.1, condition)


velocity, predict = StableDiffusion3.velocity, StableDiffusion3._predict
decode = StableDiffusion3.decode
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "guidance": (StableDiffusion3, "velocity", strongly_guided),
    "rounded time": (StableDiffusion3, "_predict", rounded),
    "times of even steps": (StableDiffusion3, "time_grid", evenly),
    "another shift of the latent": (StableDiffusion3, "decode", shifted),
    "half of T5's places": (stable_diffusion_3, "MAX_TEXT_TOKENS", files.LONGEST // 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_text_features_equal_the_pipelines(folder: Path, tmp_path: Path) -> None:
    """All places of three encoders, padding included, and both CLIPs' pooled outputs; T5 has 256
    places where its tokenizer says more.
    """
    endless = changed(folder, tmp_path / "endless", "tokenizer_3", model_max_length=10**30)
    texts = [*PROMPTS, "a long story, " * 50]
    for path, longest in ((folder, files.LONGEST), (endless, 256)):
        conditions, negative = encode(path, texts)
        text, without, pooled, pooled_without = official(path).encode_prompt(
            texts, None, None, negative_prompt=NEGATIVE, max_sequence_length=longest
        )
        assert text.shape[1] == 77 + longest
        for name, ours, theirs in (("text", conditions, text), ("pooled", conditions, pooled)):
            got = torch.stack([condition[name] for condition in ours])
            torch.testing.assert_close(got, theirs.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(negative["text"], without[0].detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(
            negative["pooled"], pooled_without[0].detach(), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """By diffusers' own attention processor."""
    pipeline = official(folder)
    text, without, pooled, pooled_without = pipeline.encode_prompt(
        PROMPTS[0], None, None, negative_prompt=NEGATIVE, max_sequence_length=files.LONGEST
    )

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with_text, unconditional = (
            pipeline.transformer(
                x.squeeze(2), words.detach(), vector.detach(), t * 1000, return_dict=False
            )[0]
            for words, vector in ((text, pooled), (without, pooled_without))
        )
        v: Tensor = unconditional + 4.5 * (with_text - unconditional)
        return v.unsqueeze(2)

    backbone.assert_gradient_is_the_objectives(
        load(folder, 4.5),
        video=VIDEO,
        condition=encode(folder)[0][0],
        world=cpu_world,
        network=pipeline.transformer,
        predict=predict,
    )


def test_the_attention_backend_is_the_recipes(folder: Path) -> None:
    """diffusers' own processor would take torch's choice whatever is asked."""
    policy, t, about = load(folder), torch.tensor([0.6]), stack(encode(folder)[0][:1])
    x = backbone.noise_of(policy, VIDEO)
    with torch.no_grad():
        v = policy.velocity(x, t, about)
        other = load(folder, attention="_native_math")
        w = other.velocity(x, t, about)
    other.network.set_attention_backend("native")  # type: ignore[operator]  # diffusers' choice is the process's, too
    assert not torch.equal(v, w)  # the kernels round otherwise
    torch.testing.assert_close(v, w, rtol=0, atol=1e-4)


def test_checkpointing_changes_memory_alone(folder: Path) -> None:
    pair = load(folder, 4.5), load(folder, 4.5, gradient_checkpointing=True)
    backbone.assert_checkpointing_changes_memory_alone(
        *pair, backbone.noise_of(pair[0], VIDEO), stack(encode(folder)[0][:1])
    )


def test_nothing_waits_for_the_device(folder: Path) -> None:
    backbone.assert_nothing_waits_for_the_device(load(folder, 4.5), VIDEO, encode(folder)[0][:1])


def test_bfloat16_is_the_networks_alone(folder: Path) -> None:
    """Positions and times stay in float32."""
    policy, condition = load(folder, 4.5, dtype="bfloat16"), stack(encode(folder)[0][:1])
    for parameter in policy.network.parameters():  # as FSDP does, not the buffer of positions
        parameter.data = parameter.data.bfloat16()
    seen: dict[str, Tensor] = {}
    policy.network.register_forward_pre_hook(
        lambda module, args, given: seen.update(given), with_kwargs=True
    )
    x, t = backbone.noise_of(policy, VIDEO), torch.tensor([0.9873])
    with torch.no_grad():
        v, exact = policy.velocity(x, t, condition), load(folder, 4.5).velocity(x, t, condition)
    assert v.dtype == torch.float32 and (v - exact).norm() < 0.05 * exact.norm()
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].tolist() == pytest.approx([987.3, 987.3])
    assert policy.network.pos_embed.pos_embed.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(("config", "count"), [(REAL, 2_243_171_520), (REAL_LARGE, 8_056_627_520)])
def test_the_full_size_network_is_wrapped_block_by_block(
    config: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config)
    assert sum(p.numel() for p in network.parameters()) == count
    blocks = stable_diffusion_3.blocks(network)
    assert len(blocks) == config["num_layers"]
    outside = backbone.outside_blocks(network, blocks)
    assert outside == {
        "context_embedder",
        "norm_out.linear",
        "pos_embed.proj",
        "proj_out",
        *(
            f"time_text_embed.{name}_embedder.linear_{n}"
            for name in ("text", "timestep")
            for n in (1, 2)
        ),
    }


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        (
            "",
            {"_class_name": "FluxPipeline"},
            "not a StableDiffusion3Pipeline; set model.family=flux",
        ),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler, not one of FlowMatch"),
        (
            "scheduler",
            {"use_dynamic_shifting": True},
            "has use_dynamic_shifting=True; Stable Diffusion 3 wants False",
        ),
        ("transformer", {"in_channels": 33}, "the network has 33 channels in and 4 out, the VAE 4"),
        (
            "transformer",
            {"joint_attention_dim": 48},
            "takes text of widths 48 and 20, .* make 32 and",
        ),
        ("transformer", {"pooled_projection_dim": 24}, "of widths 32 and 24, .* make 32 and 20"),
        ("vae", {"shift_factor": None}, "has no shift_factor, which Stable Diffusion 3's has"),
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
    assert policy.latent_shape(VIDEO) == (4, 1, 16, 12)
    for changes, message in (
        ({"frames": 5}, "video.frames=5: Stable Diffusion 3 draws images; use 1"),
        ({"width": 30}, "video.width=30: not a multiple of 4 .*use 28 or 32"),
        ({"height": 68}, "video.height=68: above 64 pixels, for which the network has positions"),
    ):
        with pytest.raises(UserError, match=message):
            policy.latent_shape(VIDEO.model_copy(update=changes))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
