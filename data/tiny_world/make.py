"""Make the tiny world: a small HunyuanVideo in the diffusers layout, trained on `shapes`.

    python -m fastgrpo.data.tiny_world OUT_FOLDER [--vae-steps N] [--clips N] [--steps N] [--seed N]
        [--only tokenizers,vae,...] [--keep 600,1200]

writes OUT_FOLDER/{transformer,vae,text_encoder,text_encoder_2,tokenizer,tokenizer_2,scheduler,
model_index.json}, and beside it tiny_world_train.txt and tiny_world_heldout.txt, one caption a
line. Only training meanings are ever shown to the networks. The folder is made of the classes of
the full model, so `HunyuanVideoPipeline.from_pretrained` loads it.

Stages, in this order (`--only` picks some; a later stage reads what an earlier one left):
    prompts      the two caption files
    tokenizers   one token a caption word; the prompt template takes 95 tokens, as in the full model
    vae          clip [3, 9, 32, 32] <-> latent [8, 3, 8, 8]; scaling_factor makes the std 1
    transformer  flow matching, x_t = (1 - t) x_0 + t e, target v = e - x_0 (Lipman et al. 2022),
                 jointly with both text encoders; the weights written are a moving average
The learning rate of the transformer stage does not depend on --steps: `--steps 600` gives what
`--steps 2500` has after 600 steps. Same seed, machine and thread count: same bytes. With the
defaults, on two cores of their own: 13 minutes for the VAE, one for the latents, three for the
transformer.
"""

import argparse
import copy
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from fastgrpo.core.errors import UserError
from fastgrpo.data.tiny_world import shapes
from fastgrpo.data.tiny_world.text import clip_tokenizer, encode, encode_pooled, llama_tokenizer
from fastgrpo.data.tiny_world.vae import CHANNELS, latents_of, new_vae, train_vae

STAGES = ("prompts", "tokenizers", "vae", "transformer")
# the embedded guidance scale that the transformer always saw; the network is given 1000 times it
GUIDANCE = 6.0
SHIFT = 3.0  # of the scheduler's times, in training and in sampling
BATCH = 32
RATE = 1.5e-3
EMA = 0.99


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages to run and their sizes."""

    stages: tuple[str, ...] = STAGES
    vae_steps: int = 3000
    clips: int = 4800
    """Latents that the transformer stage draws its batches from."""
    steps: int = 600
    """Optimizer steps of the transformer stage. The default stops early: the colour is right then
    and the direction mostly, path and shape are not, so that a reward has something to teach."""
    keep: tuple[int, ...] = ()
    """Steps after which a copy is written too."""
    seed: int = 0


@dataclass(frozen=True)
class Networks:
    """The networks that the transformer stage trains."""

    transformer: HunyuanVideoTransformer3DModel
    text_encoder: LlamaModel
    text_encoder_2: CLIPTextModel

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in (self.transformer, self.text_encoder, self.text_encoder_2):
            yield from module.parameters()


# ---------------------------------------------------------------- prompts
def prompts(seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) captions, in a varied order.

    Every wording of the 120 training meanings, one wording of each of the 24 held-out meanings.
    """
    rng = np.random.default_rng([seed, 0])
    training, held_out = (
        [wanted[i] for i in rng.permutation(len(wanted))] for wanted in shapes.meanings()
    )
    wordings = 2 * len(shapes.WORDINGS)
    return (
        [shapes.caption(m, i + turn) for turn in range(wordings) for i, m in enumerate(training)],
        [shapes.caption(m, i) for i, m in enumerate(held_out)],
    )


def write_prompts(folder: Path, seed: int) -> None:
    """Write tiny_world_train.txt and tiny_world_heldout.txt into the folder."""
    for name, lines in zip(("train", "heldout"), prompts(seed), strict=True):
        (folder / f"tiny_world_{name}.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )


# ---------------------------------------------------------------- transformer
def new_networks(tokenizer: PreTrainedTokenizerFast, tokenizer_2: CLIPTokenizer) -> Networks:
    """Untrained transformer (1.5 M parameters) and text encoders (0.2 M) for the tokenizers."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=4.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=64,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 8, 8),
    )
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        # the usual 0.02 suits thousands of channels: here words would start out all alike
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer_2),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer_2.bos_token_id,
        eos_token_id=tokenizer_2.eos_token_id,
        pad_token_id=tokenizer_2.pad_token_id,
    )
    return Networks(transformer, LlamaModel(llama), CLIPTextModel(clip))


def flow_loss(
    transformer: nn.Module, x_0: Tensor, text: Tensor, pooled: Tensor, noise: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity, at times distributed as the sampler's.

    x_0: float32 [B, C, F, H, W];  text: [B, L, D], all of one length;  pooled: [B, D']
    returns a float32 scalar
    """
    batch = len(x_0)
    # stratified: less noise in the loss
    u = (torch.rand(batch, generator=noise) + torch.arange(batch)) / batch
    t = SHIFT * u / (1.0 + (SHIFT - 1.0) * u)
    e = torch.randn(x_0.shape, generator=noise)
    t_ = t.view(-1, 1, 1, 1, 1)
    v = transformer(
        hidden_states=(1.0 - t_) * x_0 + t_ * e,
        timestep=t * 1000.0,
        encoder_hidden_states=text,
        encoder_attention_mask=torch.ones(text.shape[:2]),
        pooled_projections=pooled,
        guidance=torch.full((batch,), GUIDANCE * 1000.0),
        return_dict=False,
    )[0]
    return nn.functional.mse_loss(v, e - x_0)


class Batches:
    """Endless (latents, captions) batches whose captions have the same number of tokens.

    latents: float32 [N, C, F, H, W];  which: N indices of meanings
    """

    def __init__(
        self, latents: Tensor, which: Sequence[int], tokenizer: PreTrainedTokenizerFast, seed: int
    ) -> None:
        self.latents, self.which = latents, which
        self.rng = np.random.default_rng([seed, 3])
        self.training, _ = shapes.meanings()
        said = [shapes.caption(self.training[0], w) for w in range(2 * len(shapes.WORDINGS))]
        lengths = [len(ids) for ids in tokenizer(said).input_ids]
        self.classes = [
            [w for w, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Latents float32 [B, C, F, H, W] and B captions, again and again."""
        while True:
            wordings = self.classes[self.rng.integers(len(self.classes))]
            rows = self.rng.integers(len(self.latents), size=BATCH)
            chosen = self.rng.choice(wordings, size=BATCH)
            said = [
                shapes.caption(self.training[self.which[r]], int(w))
                for r, w in zip(rows, chosen, strict=True)
            ]
            yield self.latents[rows], said


def learning_rate(step: int) -> float:
    """Rate of step 1, 2, ...: warm-up to 100, constant to 400, then as 1 / sqrt(step)."""
    return RATE * min(step / 100, 1.0, math.sqrt(400 / step))


def train_transformer(pipeline: HunyuanVideoPipeline, folder: Path, plan: Plan) -> None:
    """Train the networks of the pipeline and write the pipeline with their moving averages.

    To `folder` after the last step, and to `folder`-N after each step N of `plan.keep`.
    """
    tokenizer, tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
    begun = time.monotonic()
    latents, which = latents_of(pipeline.vae, plan.clips, np.random.default_rng([plan.seed, 2]))
    print(f"{plan.clips} latents, {time.monotonic() - begun:.0f} s", flush=True)
    average = Networks(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    trained = copy.deepcopy(average)
    parameters: list[Tensor] = list(trained.parameters())
    averages: list[Tensor] = list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4)
    noise = torch.Generator().manual_seed(plan.seed)
    batches = iter(Batches(latents, which, tokenizer, plan.seed))
    running = 0.0
    for step in range(1, plan.steps + 1):
        x_0, captions = next(batches)
        text = encode(tokenizer, trained.text_encoder, captions)
        pooled = encode_pooled(tokenizer_2, trained.text_encoder_2, captions)
        loss = flow_loss(trained.transformer, x_0, text=text, pooled=pooled, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        weight = 1.0 - min(EMA, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, weight)
        running += loss.item()
        if step % 50 == 0:
            spent = time.monotonic() - begun
            print(
                f"step {step} of {plan.steps}: loss {running / 50:.4f}, {spent:.0f} s", flush=True
            )
            running = 0.0
        if step in plan.keep:
            pipeline.save_pretrained(folder.with_name(f"{folder.name}-{step}"))
    pipeline.save_pretrained(folder)


# ---------------------------------------------------------------- the command
def make(folder: Path, plan: Plan) -> None:
    """Run the stages of the plan, in their order, into the folder.

    raises UserError where a stage needs what is not there yet
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "prompts" in plan.stages:
        write_prompts(folder.parent, plan.seed)
    if "tokenizers" in plan.stages:
        llama_tokenizer().save_pretrained(folder / "tokenizer")
        clip_tokenizer().save_pretrained(folder / "tokenizer_2")
    if "vae" in plan.stages:
        with seeded(plan.seed):
            vae = new_vae()
        train_vae(vae, plan.vae_steps, plan.seed)
        vae.save_pretrained(folder / "vae")
    if "transformer" in plan.stages:
        for part in ("tokenizer", "tokenizer_2", "vae"):
            if not (folder / part).is_dir():
                raise UserError(
                    f"OUT_FOLDER={folder}: no {part}/ in it; run the stages tokenizers "
                    "and vae first"
                )
        with seeded(plan.seed):
            pipeline = untrained_pipeline(folder)
        train_transformer(pipeline, folder, plan)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside: networks take their initial weights from there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def untrained_pipeline(folder: Path) -> HunyuanVideoPipeline:
    """The tokenizers and the VAE of the folder, with new text encoders and a new transformer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    networks = new_networks(tokenizer, tokenizer_2)
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    vae.register_to_config(_name_or_path="")  # else the saved config names this machine's folder
    return HunyuanVideoPipeline(
        text_encoder=networks.text_encoder,
        tokenizer=tokenizer,
        transformer=networks.transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=networks.text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 2 for a user's mistake."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        "python -m fastgrpo.data.tiny_world", description="Make the tiny HunyuanVideo."
    )
    add = parser.add_argument
    add("folder", metavar="OUT_FOLDER", type=Path)
    for name, default, meaning in (
        ("--vae-steps", usual.vae_steps, "of 8 clips "),
        ("--clips", usual.clips, "to train with "),
        ("--steps", usual.steps, "of 32 latents "),
        ("--seed", usual.seed, ""),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{meaning}(default {default})")
    stages = ",".join(STAGES)
    add("--only", default=stages, metavar="STAGE,...", help=f"some of {stages}")
    text = "also write OUT_FOLDER-N as it is after transformer step N"
    add("--keep", default="", metavar="N,...", help=text)
    try:
        options = parser.parse_args(arguments)
        make(options.folder, plan_of(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the arguments describe.

    raises UserError for a value out of range
    """
    stages = tuple(options.only.split(","))
    for stage in stages:
        if stage not in STAGES:
            raise UserError(
                f"--only={options.only}: no stage '{stage}'; use some of {','.join(STAGES)}"
            )
    for name, least in (("vae_steps", 1), ("clips", 1), ("steps", 1), ("seed", 0)):
        if getattr(options, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}={getattr(options, name)}: too small; use {least} or more")
    if not re.fullmatch(r"(\d+(,\d+)*)?", options.keep):
        raise UserError(f"--keep={options.keep}: not a list of steps; write it as 600,1200")
    keep = tuple(int(step) for step in options.keep.split(",") if step)
    return Plan(
        stages=stages,
        vae_steps=options.vae_steps,
        clips=options.clips,
        steps=options.steps,
        keep=keep,
        seed=options.seed,
    )
