"""FLUX.2 klein against diffusers' own pipeline, which is the oracle: text features, times, ODE
latents, pixels, gradients.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrpo.core import config
from fastgrpo.core.config import Lora, Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.models import flux, flux_2
from fastgrpo.models.flux import pack, unpack
from fastgrpo.models.flux_2 import Flux2, Schedule
from fastgrpo.models.loading import lora, policies
from fastgrpo.models.text_encoders import qwen_3
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout import sample_ode
from tests import ROOT
from tests.harness import backbone
from tests.harness.backbone import CPU, changed
from tests.harness.folders import flux_2 as files
from tests.harness.workers.lora import stir

PROMPTS = ["a red boat", "two dogs run over the sand behind the hills"]
NEGATIVE = ""
VIDEO = Video(frames=1, height=24, width=20)
TARGETS = config.load(ROOT / "launch" / "t2i_flux2_lora.toml").lora.targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux_2")
    files.write(path)
    return path


def settings(path: Path, cfg: float = 1.0, **more: object) -> Model:
    return Model.model_validate({"family": "flux_2", "path": str(path), "cfg": cfg, **more})


def load(path: Path, cfg: float = 1.0, **more: object) -> Flux2:
    policy = policies.load(settings(path, cfg, **more), CPU)
    assert isinstance(policy, Flux2)
    if cfg > 1:
        policy.negative = encode(path)[1]
    return policy


def encode(path: Path, prompts: list[str] = PROMPTS) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), VIDEO, CPU) as encoder:
        return encoder([Prompt(text) for text in prompts]), encoder.negative(NEGATIVE)


def official(path: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def patches(x: Tensor) -> Tensor:
    """Latents [1, C, 1, H, W] as the pipeline's, [1, 4 C, H / 2, W / 2]."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    return pack(x).transpose(1, 2).unflatten(2, (height, width))


def assert_equals_the_pipeline(path: Path, steps: int, cfg: float) -> None:
    """Times, ODE latents, from the texts on, and pixels."""
    policy, pipeline = load(path), official(path)
    policy.cfg, (conditions, policy.negative) = cfg, encode(path)
    x = backbone.noise_of(policy, VIDEO)
    grid = policy.time_grid(steps, None, policy.latent_shape(VIDEO))
    ends: list[Tensor] = []

    def keep(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(tensors["latents"])
        return {}

    results = []
    for text, condition in zip(PROMPTS, conditions, strict=True):
        images = pipeline(
            prompt=text,
            guidance_scale=cfg,
            height=VIDEO.height,
            width=VIDEO.width,
            latents=patches(x),
            num_inference_steps=steps,
            output_type="np",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        ours = sample_ode(policy, x, grid, stack([condition]))
        torch.testing.assert_close(pack(ours), ends[-1], atol=1e-4, rtol=0)
        pixels = policy.decode(ours, {}).pixels
        assert pixels.shape == (1, 1, VIDEO.height, VIDEO.width, 3)
        assert (pixels[:, 0].float() - torch.as_tensor(images) * 255).abs().max() <= 0.51
        results.append(ours)
    assert torch.equal(grid, pipeline.scheduler.sigmas)
    assert not torch.allclose(results[0], results[1], atol=0.1)


@pytest.mark.parametrize(("steps", "cfg"), [(5, 1.0), (4, 4.0)])
def test_ode_equals_the_pipeline(folder: Path, steps: int, cfg: float) -> None:
    assert_equals_the_pipeline(folder, steps, cfg)


@pytest.mark.parametrize(
    ("steps", "side", "shift"), [(10, 1024, 9.6), (50, 1024, 7.6), (10, 1088, 3.45)]
)
def test_times_are_shifted_by_tokens_and_steps(steps: int, side: int, shift: float) -> None:
    """Of an image of `side` x `side` pixels; above 4,300 tokens steps do not count."""
    tokens = (side // 16) ** 2
    grid = Schedule(files.SCHEDULER).grid(steps, None, tokens)
    assert grid[0] == 1 and grid[-1] == 0 and len(grid) == steps + 1
    plain = 1 - 1 / steps
    found = grid[1].item() * (1 - plain) / (plain * (1 - grid[1].item()))
    assert found == pytest.approx(shift, rel=0.01)
    fixed = Schedule(files.SCHEDULER).grid(4, 3.0, tokens)
    torch.testing.assert_close(fixed, 3 * (u := torch.linspace(1, 0, 5)) / (1 + 2 * u))


def strongly_guided(self: Flux2, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    self.cfg += 0.1
    v = velocity(self, x, t, condition)
    self.cfg -= 0.1
    return v


def rounded(self: Flux2, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return predict(self, x, (1000 * t).floor() / 1000, text)


def trimmed(self: Flux2, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return predict(self, x, t, text[:, :100])  # more than either text has


def of_a_scaling_factor(vae: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(()), torch.tensor(1 / 0.3611)


def of_the_latent_alone(vae: Any) -> tuple[Tensor, Tensor]:
    """A patch's four places with the statistics of the first."""
    mean, std = (x.unflatten(0, (-1, 4)) for x in statistics(vae))
    return mean[:, :1].expand(-1, 4).flatten(), std[:, :1].expand(-1, 4).flatten()


velocity, predict, statistics = Flux2.velocity, Flux2._predict, flux_2.latent_statistics
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "guidance": (Flux2, "velocity", strongly_guided),
    "rounded time": (Flux2, "_predict", rounded),
    "times of FLUX.1": (Schedule, "mu", flux.Schedule.mu),
    "a scaling factor": (flux_2, "latent_statistics", of_a_scaling_factor),
    "one place's statistics": (flux_2, "latent_statistics", of_the_latent_alone),
    "trimmed padding": (Flux2, "_predict", trimmed),
    "other hidden layers": (qwen_3, "LAYERS", (10, 18, 27)),
    "hidden layers in another order": (qwen_3, "LAYERS", (27, 18, 9)),
    "fewer places for text": (flux_2, "MAX_TEXT_TOKENS", 256),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_equals_the_pipeline(folder, steps=3, cfg=3.0)


def test_text_features_equal_the_pipelines(folder: Path) -> None:
    """Three states side by side at all 512 places, of long texts, which are cut, too."""
    texts = [*PROMPTS, "a long story of a boat, " * 100]
    (conditions, negative), pipeline = encode(folder, texts), official(folder)
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(texts)
        without, _ = pipeline.encode_prompt(NEGATIVE)
    for condition, row in zip(conditions, states, strict=True):
        assert condition["text"].shape == (512, 3 * files.WIDTH)
        torch.testing.assert_close(condition["text"], row, atol=1e-4, rtol=0)
    torch.testing.assert_close(negative["text"], without[0], atol=1e-4, rtol=0)


def test_layers_that_no_state_needs_are_not_run(folder: Path) -> None:
    """36 in the real encoder, of which the states ask for 27; the one after shows the 27th bare."""
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        assert isinstance(encoder, qwen_3.PaddedEncoder)
        assert len(encoder.qwen.network.layers) == 28 and not hasattr(
            encoder.qwen.network, "lm_head"
        )


def test_statistics_stay_in_float32(folder: Path) -> None:
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    policy = load(folder, dtype="bfloat16")
    assert next(policy.vae.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(policy.latent_mean, stored["bn.running_mean"], atol=0, rtol=0)
    expected = (stored["bn.running_var"] + 1e-4).sqrt()
    torch.testing.assert_close(policy.latent_std, expected, atol=0, rtol=0)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ratio_is_one_for_any_batch_size(folder: Path, cpu_world: World, cfg: float) -> None:
    assert (
        backbone.largest_log_ratio(load(folder, cfg), VIDEO, encode(folder)[0], cpu_world) <= 1e-6
    )


def test_gradient_equals_plain_autograd_of_the_objective(folder: Path, cpu_world: World) -> None:
    """Through both branches of guidance."""
    pipeline = official(folder)
    with torch.no_grad():
        text, text_ids = pipeline.encode_prompt(PROMPTS[1])
        without, _ = pipeline.encode_prompt(NEGATIVE)

    def predict_alone(x: Tensor, t: Tensor) -> Tensor:
        with_text, unconditional = (
            pipeline.transformer(
                hidden_states=pack(x),
                encoder_hidden_states=words,
                timestep=t,
                img_ids=pipeline._prepare_latent_ids(patches(x)),
                txt_ids=text_ids,
                return_dict=False,
            )[0]
            for words in (text, without)
        )
        v = unconditional + 4.0 * (with_text - unconditional)
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


@pytest.mark.parametrize(
    ("sizes", "parameters", "blocks", "attention"),
    [
        (flux_2.KLEIN_4B, 3_875_544_576, 25, 0.097),
        (flux_2.KLEIN_9B, 9_078_581_248, 32, 0.118),
    ],
)
def test_the_full_size_network_is_wrapped_block_by_block(
    sizes: dict[str, Any], parameters: int, blocks: int, attention: float
) -> None:
    """Adapters beside the attention's projections reach the dual-stream blocks alone."""
    with torch.device("meta"):
        network = Flux2Transformer2DModel.from_config(sizes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    own = flux_2.blocks(network)
    assert len(own) == blocks
    assert backbone.outside_blocks(network, own) == {
        "context_embedder",
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "norm_out.linear",
        "proj_out",
        "single_stream_modulation.linear",
        "time_guidance_embed.timestep_embedder.linear_1",
        "time_guidance_embed.timestep_embedder.linear_2",
        "x_embedder",
    }
    linear = {name: m.weight.numel() for name, m in network.named_modules() if type(m) is nn.Linear}

    def share(targets: tuple[str, ...]) -> float:
        layers = lora.target_layers(network, Lora(rank=2, targets=targets))
        return sum(linear[name] for name in layers) / sum(linear.values())

    assert share(()) == pytest.approx(attention, abs=1e-3)
    every = sum(size for name, size in linear.items() if "transformer_blocks" in name)
    assert share(TARGETS) == every / sum(linear.values())
    assert math.isclose(share(TARGETS), 0.95, abs_tol=0.02)


def test_diffusers_loads_adapters_of_the_fused_layers(folder: Path, tmp_path: Path) -> None:
    own = Lora(rank=2, alpha=3.0, targets=TARGETS)
    policy = policies.load(settings(folder), CPU, own)
    assert isinstance(policy, Flux2)
    stir(policy.network)
    x, about = backbone.noise_of(policy, VIDEO), stack(encode(folder)[0][:1])
    state = {name: p for name, p in policy.network.named_parameters() if lora.is_adapter(name)}
    assert len(state) == 2 * (12 + 2 * 2)  # one dual-stream block, two single-stream ones
    lora.save_adapters(state, tmp_path / "adapters.safetensors", flux_2.NETWORK, own)
    pipeline, plain = official(folder), load(folder)
    before = plain.velocity(x, torch.tensor([0.5]), about)
    pipeline.load_lora_weights(tmp_path, weight_name="adapters.safetensors")
    plain.network = pipeline.transformer
    with torch.no_grad():
        loaded, expected = (p.velocity(x, torch.tensor([0.5]), about) for p in (plain, policy))
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)
    assert (loaded - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("", {"_class_name": "FluxPipeline"}, "not a Flux2KleinPipeline; set model.family=flux"),
        ("", {"is_distilled": True}, "cfg=4.0: model_index.json has is_distilled=true, and a dist"),
        ("", {"_class_name": "Flux2Pipeline"}, "names a Flux2Pipeline, not a Flux2KleinPipeline"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler, not a FlowMatch"),
        ("transformer", {"guidance_embeds": True}, "has guidance_embeds=true, as FLUX.2-dev has"),
        ("transformer", {"in_channels": 64}, "the network has 64 channels in and 64 out, and the"),
        (
            "transformer",
            {"joint_attention_dim": 96},
            "takes text of width 96, .* makes 48; the parts",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", part, **entries)
    with pytest.raises(UserError, match=message) as caught:
        policies.load(settings(edited, 4.0), CPU)
    assert "\n" not in str(caught.value)


def test_a_distilled_folder_draws_without_guidance(folder: Path, tmp_path: Path) -> None:
    edited = changed(folder, tmp_path / "edited", "", is_distilled=True)
    assert_equals_the_pipeline(edited, steps=4, cfg=1.0)


def test_mistakes_of_the_recipe_are_one_clear_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(folder)
    assert policy.latent_shape(VIDEO) == (4, 1, 12, 10)
    with pytest.raises(UserError, match=r"video.frames=5: FLUX.2 klein draws images; use 1"):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 5}))
    with pytest.raises(UserError, match=r"video.width=30: not a multiple of 4 .*use 28 or 32"):
        policy.latent_shape(VIDEO.model_copy(update={"width": 30}))
    with pytest.raises(UserError, match=r"model.guidance=6.0: .*set model.cfg instead"):
        policies.load(settings(folder, guidance=6.0), CPU)
    monkeypatch.setattr(qwen_3, "LAYERS", (9, 18, 29))
    with pytest.raises(UserError, match=r"has 28 layers, and the states after 29 are wanted"):
        encode(folder)
    edited = changed(folder, tmp_path / "edited", "")
    (edited / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"tokenizer has no chat template; download it again"):
        encode(edited)
