"""A tiny random Stable Diffusion 3.5 in the layout of medium: two CLIPs and T5 by characters, two
blocks, the first with an image-only attention, a 2x VAE of FLUX's kind.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.harness.folders import flux, stable_diffusion, t5

SCHEDULER = {  # of 3.5 medium
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
LONGEST = 40  # tokens of T5
CLIPS = (8, 12)  # channels of the two, also of what they pool
CHANNELS = 4


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=t5.WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIPS),
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text and time do to the prediction is enlarged,
    to be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, pieces = stable_diffusion.tokenizer(), t5.tokenizer(LONGEST)
        network = transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.startswith(("time_text_embed", "context_embedder")) and name.endswith(
                    "weight"
                ):
                    parameter.mul_(3.0)
                if "norm" in name and name.endswith("linear.weight"):
                    parameter.mul_(2.0)
                if name == "proj_out.weight":
                    parameter.mul_(0.4)
        clips = []
        for width in CLIPS:
            config = stable_diffusion.clip_config(words, width, heads=2)
            config.projection_dim = width
            clips.append(CLIPTextModelWithProjection(config))
        pipeline = StableDiffusion3Pipeline(
            network,
            FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
            flux.vae(),
            clips[0],
            words,
            clips[1],
            words,
            T5EncoderModel(T5Config(vocab_size=len(pieces), **t5.SIZES)),
            pieces,
        )
        pipeline.save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n"
        )
