"""HunyuanVideo against diffusers' own pipeline, which is the oracle: text features, ODE latents,
pixels, gradients.
"""

import json
import re
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaForCausalLM,
    LlamaModel,
)

from fastgrpo.algorithm.transitions import gaussian_log_prob, sde_transition
from fastgrpo.core.config import Model, Objective, Optimizer, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, Prompt, stack
from fastgrpo.models.attention.trimmed import TrimmedAttention
from fastgrpo.models.hunyuan_video import blocks, both_texts
from fastgrpo.models.loading import diffusers_folder, policies, source
from fastgrpo.models.placement.text_network import TextNetwork
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import sample_ode
from fastgrpo.training.update import update
from tests import ROOT
from tests.harness import tiny
from tests.harness.backbone import changed, draw, first_ratio, plan_of

FOLDER = ROOT / "data" / "tiny_hunyuan_video"
PROMPTS = ["a red circle moves left slowly", "watch as one blue square glides upwards quickly"]
VIDEO = Video(frames=9, height=32, width=32)
SHORT = VIDEO.model_copy(update={"frames": 5})
NEGATIVES = {
    "shorter": "still",
    "longer": "a red circle moves down slowly and one blue square glides upwards",
}
CFG = 4.0
GROUP = 3
STEPS = 4


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policies.load(Model(family="hunyuan_video", path=str(FOLDER)), torch.device("cpu"))


def encode(texts: list[str], path: Path = FOLDER) -> list[Condition]:
    with policies.encoder(
        Model(family="hunyuan_video", path=str(path)), VIDEO, torch.device("cpu")
    ) as encoder:
        return encoder([Prompt(text) for text in texts])


@pytest.fixture(scope="module")
def pipeline() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.from_pretrained(FOLDER)


def template(pipeline: HunyuanVideoPipeline) -> dict[str, object]:
    text = DEFAULT_PROMPT_TEMPLATE["template"]
    return {
        "template": text,
        "crop_start": len(pipeline.tokenizer(text.split("{}")[0])["input_ids"]),
    }


def test_text_features_equal_the_pipelines(pipeline: HunyuanVideoPipeline) -> None:
    for prompt, condition in zip(PROMPTS, encode(PROMPTS), strict=True):
        text, pooled, mask = pipeline.encode_prompt(prompt, prompt_template=template(pipeline))
        length = int(mask.sum())
        assert condition["text"].shape[0] == length == len(prompt.split()) + 1
        torch.testing.assert_close(condition["text"], text[0, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(condition["pooled"], pooled[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "frames"), [(12, 9), (5, 1)])
def test_ode_equals_the_pipeline(
    policy: Policy, pipeline: HunyuanVideoPipeline, steps: int, frames: int
) -> None:
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
    condition = stack(encode(PROMPTS[:1]))
    latents = sample_ode(policy, noise, policy.time_grid(steps, None, shape), condition)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert latents.std() > 0.1

    # [B, F, H, W, 3] in [0, 1]
    frames_out = torch.from_numpy(pipeline(**common, output_type="np").frames)
    pixels = policy.decode(latents, {}).pixels
    assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == (1, frames, 32, 32, 3)
    assert (pixels.float() - frames_out * 255).abs().max() <= 0.51


@pytest.fixture(scope="module")
def negatives() -> dict[str, Condition]:
    """Conditions of unconditional branches whose texts are shorter and longer than PROMPTS[0]'s,
    and as long.
    """
    conditions = encode([*NEGATIVES.values(), PROMPTS[0].replace("left", "right")])
    return dict(zip([*NEGATIVES, "as long"], conditions, strict=True))


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return encode(PROMPTS)


def guided(negative: Condition | None, checkpointing: bool | int = False) -> Policy:
    """The policy with classifier-free guidance, where there is a negative condition."""
    settings = Model(
        family="hunyuan_video",
        path=str(FOLDER),
        cfg=1.0 if negative is None else CFG,
        gradient_checkpointing=checkpointing,
    )
    policy = policies.load(settings, torch.device("cpu"))
    policy.negative = negative
    return policy


@pytest.mark.parametrize(("name", "steps", "frames"), [("shorter", 4, 5), ("longer", 6, 1)])
def test_guided_ode_equals_the_pipeline(
    pipeline: HunyuanVideoPipeline,
    negatives: dict[str, Condition],
    conditions: list[Condition],
    name: str,
    steps: int,
    frames: int,
) -> None:
    """Prompts' texts are padded to the negative one's length or it to theirs; the pipeline runs
    branch by branch.
    """
    policy, video = guided(negatives[name]), VIDEO.model_copy(update={"frames": frames})
    shape = policy.latent_shape(video)
    pipeline.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(PROMPTS):
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(number))
        expected = pipeline(
            prompt,
            negative_prompt=NEGATIVES[name],
            true_cfg_scale=CFG,
            guidance_scale=6.0,
            latents=noise,
            height=32,
            width=32,
            num_frames=frames,
            num_inference_steps=steps,
            output_type="latent",
            prompt_template=template(pipeline),
        ).frames
        latents = sample_ode(
            policy, noise, policy.time_grid(steps, None, shape), stack([conditions[number]])
        )
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
        plain = sample_ode(
            guided(None), noise, policy.time_grid(steps, None, shape), stack([conditions[number]])
        )
        assert (plain - latents).abs().max() > 0.1


def test_only_texts_of_different_lengths_are_padded(
    negatives: dict[str, Condition], conditions: list[Condition]
) -> None:
    batch = stack(conditions[:1] * 2)["text"]
    for name, negative in negatives.items():
        text, told = both_texts(negative["text"], batch)
        lengths = (len(negative["text"]), batch.shape[1])
        assert text.shape[:2] == (4, max(lengths))
        assert torch.equal(text[1, : lengths[0]], negative["text"]) and torch.equal(
            text[3, : lengths[1]], batch[1]
        )
        assert told == (() if name == "as long" else lengths)


def test_no_block_attends_with_a_mask_and_each_branch_sees_its_own_text(
    negatives: dict[str, Condition], conditions: list[Condition], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask rules flash attention out, and with it most of what a long clip's attention could
    be.
    """
    module = sys.modules[HunyuanVideoTransformer3DModel.__module__]
    real, seen = vars(module)["dispatch_attention_fn"], []

    def noting(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        seen.append((len(query), key.shape[1], settings.get("attn_mask")))
        attended: Tensor = real(query, key, value, **settings)
        return attended

    monkeypatch.setattr(module, "dispatch_attention_fn", noting)
    condition = stack(conditions[:1] * 2)
    for name, negative in negatives.items():
        policy = guided(negative)
        shape = policy.latent_shape(SHORT)
        seen.clear()
        policy.velocity(torch.zeros(2, *shape), torch.tensor([0.9, 0.4]), condition)
        tokens = shape[1] * shape[2] * shape[3] // policy.network.config.patch_size**2  # type: ignore[union-attr, operator]
        texts = [len(negative["text"]), condition["text"].shape[1]]
        branches = [(2, tokens + length, None) for length in texts]
        expected = [(4, tokens + texts[0], None)] if name == "as long" else branches
        assert seen == expected * len(policy.blocks)


def gradients(policy: Policy, condition: Condition) -> dict[str, Tensor]:
    """Of a weighted sum of the prediction."""
    x = torch.randn(2, *policy.latent_shape(SHORT), generator=torch.Generator().manual_seed(1))
    v = policy.velocity(x, torch.tensor([0.9, 0.4]), condition)
    (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad for name, p in policy.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["shorter", "longer", "as long"])
@pytest.mark.parametrize("checkpointing", [True, 2])
def test_recomputed_blocks_give_equal_gradients_with_padding(
    negatives: dict[str, Condition],
    conditions: list[Condition],
    name: str,
    checkpointing: bool | int,
) -> None:
    condition = stack(conditions[:1] * 2)
    stored, recomputed = (
        gradients(guided(negatives[name], choice), condition) for choice in (False, checkpointing)
    )
    assert stored.keys() == recomputed.keys()
    for parameter, grad in stored.items():
        assert torch.equal(grad, recomputed[parameter]), parameter
    assert any(grad.abs().max() > 0 for grad in stored.values())


def test_guided_ratio_is_one_for_any_batch_size(
    negatives: dict[str, Condition], conditions: list[Condition], cpu_world: World
) -> None:
    policy = guided(negatives["longer"])
    sharding.shard(policy, cpu_world, torch.float32)
    plan = plan_of(policy, SHORT, steps=STEPS)
    for rollout_batch, update_batch in ((1, 3), (2, 1), (3, 2)):
        drawn = draw(policy, plan, conditions, rollout_batch)
        assert len(drawn.slots) == 2 * GROUP and len(plan.grid) == STEPS + 1
        ratio = first_ratio(policy, plan, drawn, conditions, size=update_batch, world=cpu_world)
        assert ratio <= 1e-6, (rollout_batch, update_batch)


def test_guided_gradient_equals_plain_autograd_of_the_objective(
    negatives: dict[str, Condition], conditions: list[Condition], cpu_world: World
) -> None:
    """On one sample: two forwards of diffusers' unmodified network, one per branch, in place of the
    padded batch.
    """
    policy, branches = (
        guided(negatives["shorter"], checkpointing=True),
        (negatives["shorter"], conditions[1]),
    )
    sharding.shard(policy, cpu_world, torch.float32)
    plan = plan_of(policy, SHORT, steps=STEPS)
    drawn = draw(policy, plan, conditions[1:], GROUP)
    trainer = tiny.Recorder.create(policy, Optimizer(lr=1e-4, batch_size=2), None)
    assert isinstance(trainer, tiny.Recorder)
    kept = torch.tensor([False, True, False])
    update(
        trainer,
        Objective(),
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions[1:],
            advantages=0.7 * kept,
            selected=kept,
        ),
        cpu_world,
    )

    network = HunyuanVideoTransformer3DModel.from_pretrained(FOLDER / "transformer")
    loss = torch.zeros(())
    for step in range(STEPS - 1):
        x, t = drawn.trajectories[1].states[step][None], plan.grid[step]
        without, with_text = (
            network(
                x,
                t[None] * 1000,
                branch["text"][None],
                torch.ones(1, len(branch["text"])),
                branch["pooled"][None],
                torch.tensor([6000.0]),
            ).sample
            for branch in branches
        )
        v = without + CFG * (with_text - without)
        moments = sde_transition(x, v=v, t=t, t_next=plan.grid[step + 1], eta=plan.eta)
        log_prob = gaussian_log_prob(drawn.trajectories[1].states[step + 1][None], *moments)[0]
        loss = loss - 0.7 * (log_prob - log_prob.detach()).exp() / (STEPS - 1)
    loss.backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert expected.keys() == trainer.gradients[0].keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (trainer.gradients[0][name] - grad).norm() <= 1e-5 * whole, name


def test_nothing_waits_for_the_device(
    negatives: dict[str, Condition], conditions: list[Condition]
) -> None:
    """A fake tensor has no values, so that reading one, which would wait for a GPU, is an error."""
    for negative in (None, negatives["longer"]):
        policy = guided(negative)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x, t = torch.empty(1, *policy.latent_shape(SHORT)), torch.empty(1)
            assert policy.velocity(x, t, stack(conditions[:1])).shape == x.shape


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel()  # the class's defaults are HunyuanVideo's config
    total = sum(p.numel() for p in network.parameters())
    assert total == 12_821_012_544
    wrapped = blocks(network)
    assert [type(block).__name__ for block in wrapped] == [
        *["HunyuanVideoTransformerBlock"] * 20,
        *["HunyuanVideoSingleTransformerBlock"] * 40,
    ]
    inside = {id(p) for block in wrapped for p in block.parameters()}
    outside = {name: p.numel() for name, p in network.named_parameters() if id(p) not in inside}
    assert {name.split(".")[0] for name in outside} == {
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "norm_out",
        "proj_out",
    }
    assert sum(outside.values()) < 0.03 * total


def test_every_attention_is_trimmed() -> None:
    """Blocks attend without a mask; the refiner of the text, which sees no video token, keeps
    diffusers' own.
    """
    network: Any = guided(None).network
    trimmed = {
        name for name, p in network.attn_processors.items() if isinstance(p, TrimmedAttention)
    }
    assert len(trimmed) == len(blocks(network)) == 6
    assert all(
        name.startswith("context_embedder") for name in network.attn_processors.keys() - trimmed
    )


def test_the_folders_constants_are_followed(tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(FOLDER, edited)
    for file, entry in (
        ("scheduler/scheduler_config.json", {"shift": 2.0}),
        ("vae/config.json", {"scaling_factor": 0.4}),
    ):
        (edited / file).write_text(json.dumps(json.loads((edited / file).read_text()) | entry))
    policy = policies.load(
        Model(family="hunyuan_video", path=str(edited), decode_batch=1), torch.device("cpu")
    )
    pipeline = HunyuanVideoPipeline.from_pretrained(edited)
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(policy.time_grid(4, None, ()), pipeline.scheduler.sigmas)

    x = torch.randn(2, *policy.latent_shape(SHORT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frames = pipeline.vae.decode(x / 0.4).sample
    expected = ((frames.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1)
    assert (
        policy.decode(x, {}).pixels.float() - expected
    ).abs().max() <= 0.51  # of one clip at a time: decode_batch is 1


def test_latent_shape_and_its_errors(policy: Policy) -> None:
    assert policy.latent_shape(VIDEO) == (8, 3, 8, 8)
    with pytest.raises(
        UserError, match=r"video.frames=8: must be a multiple of 4, plus 1; use 5 or 9"
    ):
        policy.latent_shape(VIDEO.model_copy(update={"frames": 8}))
    with pytest.raises(
        UserError, match=r"video.height=30: not a multiple of 8 .*; use 24 or 32\.$"
    ):
        policy.latent_shape(VIDEO.model_copy(update={"height": 30}))
    with pytest.raises(UserError, match=r"video.height=4: not a multiple of 8 .*; use 8\.$"):
        policy.latent_shape(VIDEO.model_copy(update={"height": 4}))


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("hunyuan", str(FOLDER), "Did you mean hunyuan_video. Use one of"),
        ("hunyuan_video", "/nowhere/at/all", "no such folder"),
        ("hunyuan_video", str(FOLDER / "vae"), "model_index.json is missing"),
    ],
)
def test_a_wrong_model_is_one_clear_line(family: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        policies.load(Model(family=family, path=path), torch.device("cpu"))


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        (
            "",
            {"_class_name": "WanPipeline"},
            "names a WanPipeline, not a HunyuanVideoPipeline; set model.family=wan, or ",
        ),
        (
            "",
            {"_class_name": "MochiPipeline"},
            "names a MochiPipeline, not .*; correct the path. There are the families flux, flux_2, hunyuan",
        ),
        ("scheduler", {"shift": None}, "has shift=None, not a number above 0; correct it"),
        (
            "scheduler",
            {"use_dynamic_shifting": True},
            "has use_dynamic_shifting=true, .*; set it to false there",
        ),
        (
            "scheduler",
            {"use_karras_sigmas": True},
            "has use_karras_sigmas=true, .*; set it to false there",
        ),
        ("scheduler", {"shift_terminal": 0.02}, "has a shift_terminal, .*; set it to null there"),
        (
            "scheduler",
            {"_class_name": "PNDMScheduler"},
            "is a PNDMScheduler, not a FlowMatchEulerDiscreteScheduler",
        ),
        ("scheduler", {"num_train_timesteps": 500}, "must have num_train_timesteps=1000"),
        ("scheduler", {"invert_sigmas": True}, "invert_sigmas=false"),
        (
            "transformer",
            {"patch_size_t": 2},
            "patch_size=2 and patch_size_t=2, not a whole number and 1; use",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line_before_its_weights_are_read(
    tmp_path: Path, part: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(FOLDER, tmp_path / "edited", part, **entries)
    for file in edited.glob("*/*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=message) as caught:
        policies.load(Model(family="hunyuan_video", path=str(edited)), torch.device("cpu"))
    assert "\n" not in str(caught.value)
    if part == "":
        with pytest.raises(UserError, match=message):
            encode(PROMPTS, edited)


def test_a_scheduler_without_shift_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert diffusers_folder.constant_shift(tmp_path) == config.pop("shift")
    file.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"scheduler_config.json has shift=None, not a number above 0"
    ):
        diffusers_folder.constant_shift(tmp_path)


def damaged(copy: Path, part: str, cut: bool) -> tuple[Path, str]:
    """A copy of the folder with the first tensor of a part left out, or one row shorter.

    returns it and the name
    """
    shutil.copytree(FOLDER, copy)
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensor = tensors.pop(name)
    save_file(
        tensors | ({name: tensor[1:].clone()} if cut else {}), file, metadata={"format": "pt"}
    )
    return copy, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_or_misshapen_tensor_is_one_line_and_never_random(
    tmp_path: Path, part: str, cut: bool
) -> None:
    edited, name = damaged(tmp_path / "edited", part, cut)
    with pytest.raises(UserError) as caught:
        if part.startswith("text"):
            encode(PROMPTS, edited)
        else:
            policies.load(Model(family="hunyuan_video", path=str(edited)), torch.device("cpu"))
    told = str(caught.value)
    assert (
        name.removeprefix("text_model.") in told
        and f"{edited / part} " in told
        and "\n" not in told
    )
    assert cut or re.search(
        r"lacks \S+ \(and 0 more\) of a \w+; correct model_index.json or download", told
    )


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        (
            "text_encoder",
            "MistralModel",
            "text_encoder holds a LlamaModel, and model_index.json names a MistralModel for",
        ),
        (
            "text_encoder",
            "LlamaConfig",
            "holds a LlamaModel, and model_index.json names a LlamaConfig",
        ),
        (
            "text_encoder_2",
            "CLIPVisionModel",
            "holds a CLIPTextModel, and model_index.json names a CLIPVisionModel",
        ),
        (
            "text_encoder_2",
            "CLIPTextModelWithProjection",
            r"lacks text_projection.weight \(and 0 more\) of a CLIPText",
        ),
        ("text_encoder", "NoSuchModel", "names no transformers class for 'text_encoder'"),
        ("text_encoder", None, "names no transformers class for 'text_encoder'"),
    ],
)
def test_another_class_in_model_index_is_one_line(
    tmp_path: Path, part: str, name: str | None, message: str
) -> None:
    edited = changed(FOLDER, tmp_path / "edited", "", **{part: ["transformers", name]})
    with pytest.raises(UserError, match=message) as caught:
        encode(PROMPTS, edited)
    assert "\n" not in str(caught.value)


def test_the_encoder_of_a_whole_model_is_read(tmp_path: Path) -> None:
    """As published: a LlamaModel or CLIPTextModel from the weights of LlamaForCausalLM or
    CLIPModel.
    """
    expected = encode(PROMPTS)
    edited = tmp_path / "edited"
    shutil.copytree(FOLDER, edited)
    llama, clip = LlamaModel.from_pretrained(FOLDER / "text_encoder"), FOLDER / "text_encoder_2"
    causal = LlamaForCausalLM(llama.config)
    causal.model = llama
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig.from_pretrained(clip).to_dict()
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"patch_size": 16}))
    whole.text_model = CLIPTextModel.from_pretrained(clip)
    for model, part in ((causal, "text_encoder"), (whole, "text_encoder_2")):
        shutil.rmtree(edited / part)
        model.save_pretrained(edited / part)
    for one, other in zip(encode(PROMPTS, edited), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_encoder_loses_its_networks_when_it_is_closed() -> None:
    with policies.encoder(
        Model(family="hunyuan_video", path=str(FOLDER)), VIDEO, torch.device("cpu")
    ) as encoder:
        held = [
            weakref.ref(part.network)
            for part in vars(encoder).values()
            if isinstance(part, TextNetwork)
        ]
    assert len(held) == 2 and not any(reference() for reference in held)


HUB = {  # files of repositories, and whether a family reads them
    "model_index.json": True,
    "README.md": True,
    "LICENSE.md": True,
    "transformer/config.json": True,
    "unet/config.json": True,
    "text_encoder/config.json": True,
    "text_encoder_2/config.json": True,
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": True,
    "text_encoder_2/model.safetensors": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    "tokenizer/merges.txt": True,
    "tokenizer_2/spiece.model": True,
    "scheduler/scheduler_config.json": True,
    "config.json": True,
    "diffusion_pytorch_model-00001-of-00006.safetensors": True,
    "pytorch_lora_weights.safetensors": True,
    "flux1-dev.safetensors": False,
    "ae.safetensors": False,
    "v1-5-pruned.ckpt": False,
    "dev_grid.jpg": False,
    "unet/diffusion_pytorch_model.fp16.safetensors": False,
    "unet/diffusion_flax_model.msgpack": False,
    "unet/diffusion_pytorch_model.non_ema.safetensors": False,
    "vae/diffusion_pytorch_model.bin": False,
    "text_encoder/model.fp16-00001-of-00002.safetensors": False,
    "text_encoder/model.onnx": False,
    "unet/openvino_model.xml": False,
}


def test_what_no_family_reads_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own filter on the names of published repositories; and what `fastgrpo fetch`
    chooses of them.
    """

    def snapshot(
        repository: str,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        assert (repository, revision) == ("owner/name", "v1.0")
        for name in filter_repo_objects(
            HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for variant in (None, "fp16"):
        settings = Model(
            family="hunyuan_video", path="owner/name", revision="v1.0", variant=variant
        )
        assert source.locate(settings) == tmp_path
        found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
        expected = {name for name, read in HUB.items() if read}
        if variant:
            expected |= FP16
        assert found == expected == set(source.chosen(list(HUB), variant))
        for file in found:
            (tmp_path / file).unlink()


FP16 = {
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
}
