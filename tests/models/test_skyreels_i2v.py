"""SkyReels-V1 against diffusers' own pipeline, which is the oracle: latents with guidance and an
image, and pixels.

The pipeline samples the image's latent with the generator it is given before it uses it for
anything else. Ours is a function of the image: its generator, handed to the pipeline together with
the noise, makes both draw the same sample.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.algorithm import noise
from fastgrpo.algorithm.transitions import gaussian_log_prob, sde_transition
from fastgrpo.core.config import Model, Objective, Optimizer, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt, stack
from fastgrpo.data import images, video
from fastgrpo.models import skyreels_i2v
from fastgrpo.models.loading import policies
from fastgrpo.models.skyreels_i2v import SkyReels, blocks, posterior_key
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import sample_ode
from fastgrpo.training.update import update
from tests.harness import tiny
from tests.harness.backbone import changed, draw, first_ratio, plan_of
from tests.harness.folders import hunyuan_video as base_files
from tests.harness.folders import skyreels_i2v as files

CPU = torch.device("cpu")
VIDEO = Video(frames=5, height=32, width=32)
# of different lengths
TEXTS = (
    "a boat leaves the shore",
    "the red sun goes down behind two hills",
    "two dogs run",
)
NEGATIVE = "blurred, still"
CFG = 6.0
GROUP = 3
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("skyreels")
    files.write(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """With two pictures and a video as reference images, none in the clips' size."""
    path = tmp_path_factory.mktemp("images")
    pixels = torch.randint(0, 256, (3, 6, 9, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    for number, size in enumerate([(64, 64), (90, 50)]):
        Image.fromarray(pixels[number].numpy()).resize(size, Image.Resampling.BICUBIC).save(
            path / f"{number}.png"
        )
    large = pixels[2].repeat_interleave(8, 0).repeat_interleave(8, 1)
    video.write_mp4(path / "2.mp4", large.expand(3, -1, -1, -1), 8)
    return [
        Prompt(text, path / name)
        for text, name in zip(TEXTS, ("0.png", "1.png", "2.mp4"), strict=True)
    ]


@pytest.fixture(scope="module")
def encoded(folder: Path, prompts: list[Prompt]) -> tuple[list[Condition], Condition]:
    return encode(folder, prompts)


@pytest.fixture(scope="module")
def conditions(encoded: tuple[list[Condition], Condition]) -> list[Condition]:
    return encoded[0]


@pytest.fixture(scope="module")
def negative(encoded: tuple[list[Condition], Condition]) -> Condition:
    return encoded[1]


def settings(path: Path, cfg: float = CFG) -> Model:
    return Model(family="skyreels_i2v", path=str(path), cfg=cfg)


def encode(
    path: Path, prompts: list[Prompt], size: Video = VIDEO
) -> tuple[list[Condition], Condition]:
    with policies.encoder(settings(path), size, CPU) as encoder:
        return encoder(prompts), encoder.negative(NEGATIVE)


def load(path: Path, negative: Condition | None = None, cfg: float = CFG) -> SkyReels:
    """With guidance where there is a negative condition."""
    policy = policies.load(settings(path, 1.0 if negative is None else cfg), CPU)
    assert isinstance(policy, SkyReels)
    policy.negative = negative
    return policy


def official(path: Path) -> HunyuanSkyreelsImageToVideoPipeline:
    pipeline = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> HunyuanSkyreelsImageToVideoPipeline:
    return official(folder)


def reference(prompt: Prompt, size: Video = VIDEO) -> Tensor:
    """The prompt's image in the clips' size, uint8 [H, W, 3]."""
    assert prompt.image is not None
    return images.cover(images.read_image(prompt.image), size.height, size.width)


def noise_of(policy: SkyReels, size: Video, seed: int = 1) -> Tensor:
    return torch.randn(1, *policy.latent_shape(size), generator=torch.Generator().manual_seed(seed))


def ours(policy: SkyReels, size: Video, steps: int, condition: Condition) -> Tensor:
    shape = policy.latent_shape(size)
    return sample_ode(
        policy, noise_of(policy, size), policy.time_grid(steps, None, shape), stack([condition])
    )


def theirs(
    pipeline: Any, x: Tensor, size: Video, steps: int, prompt: Prompt, output: str, **others: Any
) -> Tensor:
    """The official pipeline's clip from the prompt's text and image and the noise x."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    crop = len(pipeline.tokenizer(template.split("{}")[0])["input_ids"])
    pixels = reference(prompt, size)
    frames = pipeline(
        image=Image.fromarray(pixels.numpy()),
        prompt=prompt.text,
        latents=x,
        generator=noise.generator(posterior_key(pixels)),
        num_inference_steps=steps,
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        output_type=output,
        prompt_template={"template": template, "crop_start": crop},
        **others,
    ).frames
    return torch.as_tensor(frames)


@pytest.mark.parametrize(
    ("number", "steps", "frames", "width", "cfg", "guidance"),
    [
        (0, 5, 5, 32, CFG, None),
        (1, 9, 9, 48, 3.0, 2.5),  # the prompt is longer than the negative one
    ],
)
def test_ode_equals_the_pipeline(
    folder: Path,
    prompts: list[Prompt],
    pipeline: Any,
    number: int,
    steps: int,
    frames: int,
    width: int,
    cfg: float,
    guidance: float | None,
) -> None:
    size = VIDEO.model_copy(update={"frames": frames, "width": width})
    conditions, negative = encode(folder, prompts, size)
    policy = load(folder, negative, cfg)
    policy.guidance = policy.guidance if guidance is None else guidance
    x = noise_of(policy, size)
    latents = ours(policy, size, steps, conditions[number])
    asked = {
        "true_cfg_scale": cfg,
        "guidance_scale": guidance or 1.0,
        "negative_prompt": NEGATIVE if cfg > 1 else None,
    }
    expected = theirs(pipeline, x, size, steps, prompts[number], "latent", **asked)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert latents.std() > 0.1

    pixels = policy.decode(latents, {}).pixels
    assert pixels.shape == (1, frames, 32, width, 3) and pixels.dtype == torch.uint8
    decoded = theirs(pipeline, x, size, steps, prompts[number], "np", **asked)
    assert (pixels.float() - decoded * 255).abs().max() <= 0.51


def test_the_usual_guidance_is_the_pipelines(
    folder: Path, prompts: list[Prompt], pipeline: Any, conditions: list[Condition]
) -> None:
    """Embedded 1.0, which the pipeline takes when it is not told; the recipe's is followed."""
    policy = load(folder)
    expected = theirs(
        pipeline, x=noise_of(policy, VIDEO), size=VIDEO, steps=2, prompt=prompts[0], output="latent"
    )
    torch.testing.assert_close(ours(policy, VIDEO, 2, conditions[0]), expected, atol=1e-4, rtol=0)
    other = policies.load(settings(folder, 1.0).model_copy(update={"guidance": 6.0}), CPU)
    assert isinstance(other, SkyReels)
    assert (ours(other, VIDEO, 2, conditions[0]) - expected).abs().mean() > 1e-2


def test_prediction_depends_on_all_that_it_is_given(
    folder: Path, conditions: list[Condition], negative: Condition
) -> None:
    policy, t = load(folder, negative), torch.tensor([0.6])
    x = noise_of(policy, VIDEO)
    condition = dict(stack(conditions[:1]))
    with torch.no_grad():
        usual = policy.velocity(x, t, condition)
        others = {
            "x": policy.velocity(x + 0.1, t, condition),
            "t": policy.velocity(x, t / 2, condition),
            "text": policy.velocity(x, t, condition | {"text": stack(conditions[1:2])["text"]}),
            "pooled": policy.velocity(
                x, t, condition | {"pooled": stack(conditions[1:2])["pooled"]}
            ),
            "image": policy.velocity(x, t, condition | {"image": stack(conditions[1:2])["image"]}),
            "guidance scale": load(folder, negative, 3.0).velocity(x, t, condition),
        }
        policy.negative = {"text": condition["text"][0], "pooled": condition["pooled"][0]}
        others["negative prompt"] = policy.velocity(x, t, condition)
    for name, other in others.items():
        assert (other - usual).abs().mean() > 0.02 * usual.abs().mean(), name


def test_the_image_is_in_the_first_frame_of_the_last_channels(
    folder: Path, conditions: list[Condition], negative: Condition
) -> None:
    """What reaches the network, both branches of which see the same image."""
    policy, seen = load(folder, negative), []

    def record(module: object, arguments: tuple[()], named: dict[str, Tensor]) -> None:
        seen.append(named["hidden_states"])

    policy.network.register_forward_pre_hook(record, with_kwargs=True)
    x = noise_of(policy, VIDEO)
    policy.velocity(x, torch.tensor([0.5]), stack(conditions[:1]))
    (sent,) = seen  # one forward for both branches
    assert sent.shape == (2, 32, 2, 8, 8)
    for branch in sent:
        assert torch.equal(branch[:16], x[0])
        assert torch.equal(branch[16:, :1], conditions[0]["image"]) and not branch[16:, 1:].any()


def test_the_images_latent_is_a_reproducible_sample(
    folder: Path, prompts: list[Prompt], conditions: list[Condition]
) -> None:
    # whatever its place, its batch and its text
    again = encode(folder, [prompts[2], prompts[0]])[0]
    for condition, usual in zip(again, (conditions[2], conditions[0]), strict=True):
        assert torch.equal(condition["image"], usual["image"])
    other_text = encode(folder, [Prompt("a cat", prompts[0].image)])[0][0]
    assert torch.equal(other_text["image"], conditions[0]["image"])

    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
    samples = []
    for prompt, condition in zip(prompts, conditions, strict=True):
        pixels = reference(prompt).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        assert condition["image"].shape == (16, 1, 8, 8)
        samples.append((condition["image"] / 0.476986 - posterior.mean[0]) / posterior.std[0])
    draws = torch.stack(samples)  # standard normal, and another one for each image
    assert abs(draws.mean().item()) < 0.1 and abs(draws.std().item() - 1) < 0.1
    assert abs(torch.corrcoef(draws.flatten(1)) - torch.eye(3)).max() < 0.2


def test_the_folders_constants_are_followed(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    scaled = changed(folder, tmp_path / "scaled", "vae", scaling_factor=0.9)
    shifted = changed(scaled, tmp_path / "shifted", "scheduler", shift=2.0)
    policy = load(shifted)
    condition, x = encode(shifted, prompts[:1])[0][0], noise_of(policy, VIDEO)
    expected, other = (
        theirs(official(path), x=x, size=VIDEO, steps=4, prompt=prompts[0], output="latent")
        for path in (shifted, scaled)
    )
    torch.testing.assert_close(ours(policy, VIDEO, 4, condition), expected, atol=1e-4, rtol=0)
    assert (expected - other).abs().max() > 1e-2
    original = encode(folder, prompts[:1])[0][0]
    torch.testing.assert_close(condition["image"], original["image"] * 0.9 / 0.476986)


def test_the_network_may_lie_apart(
    folder: Path, tmp_path: Path, conditions: list[Condition]
) -> None:
    """As published: HunyuanVideo's folder, and SkyReels' network alone."""
    base_files.write(tmp_path / "hunyuan")
    shutil.copytree(folder / "transformer", tmp_path / "skyreels")
    recipe = settings(tmp_path / "hunyuan", 1.0).model_copy(
        update={"network": str(tmp_path / "skyreels")}
    )
    apart = policies.load(recipe, CPU)
    x, t = noise_of(load(folder), VIDEO), torch.tensor([0.5])
    expected = load(folder).velocity(x, t, stack(conditions[:1]))
    assert torch.equal(apart.velocity(x, t, stack(conditions[:1])), expected)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_ratio_is_one_for_any_batch_size(
    folder: Path, conditions: list[Condition], negative: Condition, cpu_world: World, cfg: float
) -> None:
    policy = load(folder, negative if cfg > 1 else None)
    sharding.shard(policy, cpu_world, torch.float32)
    plan, two = plan_of(policy, VIDEO, steps=STEPS), conditions[:2]
    for rollout_batch, update_batch in ((1, 3), (2, 1), (3, 2)):
        drawn = draw(policy, plan, two, rollout_batch)
        assert len(drawn.slots) == 2 * GROUP and len(plan.grid) == STEPS + 1
        ratio = first_ratio(policy, plan, drawn, two, size=update_batch, world=cpu_world)
        assert ratio <= 1e-6, (rollout_batch, update_batch)


def test_cfg_gradient_equals_plain_autograd_of_the_objective(
    folder: Path, conditions: list[Condition], negative: Condition, cpu_world: World
) -> None:
    """On one sample: two forwards of diffusers' unmodified network, one per branch, in place of the
    padded batch.
    """
    policy = load(folder, negative)
    sharding.shard(policy, cpu_world, torch.float32)
    plan, condition = plan_of(policy, VIDEO, steps=STEPS), conditions[1]
    drawn = draw(policy, plan, [condition], GROUP)
    trainer = tiny.Recorder.create(policy, Optimizer(lr=1e-4, batch_size=2), None)
    assert isinstance(trainer, tiny.Recorder)
    kept = torch.tensor([False, True, False])
    update(
        trainer,
        Objective(),
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=[condition],
            advantages=0.7 * kept,
            selected=kept,
        ),
        cpu_world,
    )

    network = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer")
    first = torch.cat([condition["image"], torch.zeros(16, 1, 8, 8)], 1)[None]
    loss = torch.zeros(())
    for step in range(STEPS - 1):
        x, t = drawn.trajectories[1].states[step][None], plan.grid[step]
        without, with_text = (
            network(
                torch.cat([x, first], 1),
                t[None] * 1000,
                branch["text"][None],
                torch.ones(1, len(branch["text"])),
                branch["pooled"][None],
                torch.tensor([1000.0]),
            ).sample
            for branch in (negative, condition)
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
    folder: Path, conditions: list[Condition], negative: Condition
) -> None:
    """A fake tensor has no values, so that reading one, which would wait for a GPU, is an error."""
    policy = load(folder, negative)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, t = torch.empty(1, *policy.latent_shape(VIDEO)), torch.empty(1)
        assert policy.velocity(x, t, stack(conditions[:1])).shape == x.shape


def test_the_full_size_network_is_wrapped_block_by_block() -> None:
    with torch.device("meta"):
        # SkyReels-V1's config
        network = HunyuanVideoTransformer3DModel(in_channels=32, out_channels=16)
    total = sum(p.numel() for p in network.parameters())
    assert total == 12_821_209_152
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
    assert sum(outside.values()) == 360_910_912 < 0.03 * total


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (
            "hunyuan_video",
            {},
            r"a network of image-to-video \(32 channels in, 16 out\); set model.family=skyreels_i2v",
        ),
        (
            "skyreels_i2v",
            {"in_channels": 16},
            r"a network of text-to-video \(16 channels .*model.family=hunyuan_video",
        ),
        (
            "skyreels_i2v",
            {"in_channels": 33, "image_condition_type": "latent_concat"},
            r"\(latent_concat\), which no fam",
        ),
        (
            "hunyuan_video",
            {"in_channels": 16, "image_condition_type": "token_replace"},
            r"\(token_replace\), which no fam",
        ),
        (
            "skyreels_i2v",
            {"in_channels": 33},
            "has in_channels=33 and out_channels=16; correct the path",
        ),
        (
            "skyreels_i2v",
            {"in_channels": 8, "out_channels": 4},
            "makes 4 channels and the VAE takes 16",
        ),
        (
            "skyreels_i2v",
            {"patch_size": None},
            "has patch_size=None and patch_size_t=1, not a whole number and 1",
        ),
        (
            "skyreels_i2v",
            {"guidance_embeds": False},
            r"model.guidance=2.0: .*no embedded guidance; set model.cfg instead",
        ),
        (
            "skyreels_i2v",
            {"_class_name": "UNet2DConditionModel"},
            "holds a UNet2DConditionModel, not a Hunyuan",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_one_line_before_its_weights_are_read(
    folder: Path, tmp_path: Path, family: str, entries: dict[str, object], message: str
) -> None:
    edited = changed(folder, tmp_path / "edited", "transformer", **entries)
    (edited / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    if family == "hunyuan_video":  # another network put into its folder
        edited = changed(edited, tmp_path / "named", "", _class_name="HunyuanVideoPipeline")
    recipe = settings(edited).model_copy(update={"family": family, "guidance": 2.0})
    with pytest.raises(UserError, match=message) as caught:
        policies.load(recipe, CPU)
    assert "\n" not in str(caught.value)
    if family == "skyreels_i2v" and "_class_name" not in entries:
        with pytest.raises(UserError, match=message), policies.encoder(recipe, VIDEO, CPU):
            pass


def test_another_pipelines_folder_is_one_line_that_names_its_family(
    folder: Path, tmp_path: Path
) -> None:
    wan = changed(folder, tmp_path / "wan", "", _class_name="WanPipeline")
    own = r"a HunyuanSkyreelsImageToVideoPipeline or a HunyuanVideoPipeline"
    for path, family, message in (
        (
            wan,
            "skyreels_i2v",
            f"names a WanPipeline, not {own}; set model.family=wan, or correct the path",
        ),
        (
            folder,
            "hunyuan_video",
            r"ToVideoPipeline, not a HunyuanVideoPipeline; set model.family=skyreels_i2v, or",
        ),
    ):
        recipe = settings(path).model_copy(update={"family": family})
        with pytest.raises(UserError, match=message):
            policies.load(recipe, CPU)
        with pytest.raises(UserError, match=message), policies.encoder(recipe, VIDEO, CPU):
            pass


def test_prompts_without_a_usable_image_are_one_line(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    with policies.encoder(settings(folder), VIDEO, CPU) as encoder:
        with pytest.raises(
            UserError, match=r"'a cat' has no reference image, .*; set prompts.image_column"
        ):
            encoder([prompts[0], Prompt("a cat")])
        with pytest.raises(
            UserError, match=r"reference image .*/none.png: cannot be read \(No such file"
        ):
            encoder([Prompt("a cat", tmp_path / "none.png")])
    for key, value, problem in (
        ("height", 30, "not a multiple of 8"),
        ("frames", 8, "must be a multiple of 4"),
    ):
        opened = policies.encoder(settings(folder), VIDEO.model_copy(update={key: value}), CPU)
        with pytest.raises(UserError, match=f"video.{key}={value}: {problem}"), opened:
            pass


def test_the_cache_knows_the_familys_length_limits() -> None:
    assert (skyreels_i2v.MAX_TEXT_TOKENS, skyreels_i2v.MAX_CLIP_TOKENS) == (256, 77)
