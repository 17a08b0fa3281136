"""A tiny random FLUX in the layout of FLUX.1-dev: CLIP and T5 by characters, 1 + 1 blocks, a 2x
VAE.

Twice, not eight times: so few pixels give as many latent values as float32 log-probabilities, their
means, need.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.harness.folders import stable_diffusion, t5

SCHEDULER = {  # of FLUX.1-dev
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
LONGEST = 40  # tokens of T5
POOLED = 24


def transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=t5.WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def write(folder: Path, guidance_embeds: bool = True) -> None:
    """Random weights, the same on every call; what text, time and guidance do to the prediction is
    enlarged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, pieces = stable_diffusion.tokenizer(), t5.tokenizer(LONGEST)
        clip = stable_diffusion.clip_config(words, POOLED)
        network = transformer(guidance_embeds)
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
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
            vae(),
            CLIPTextModel(clip),
            words,
            T5EncoderModel(T5Config(vocab_size=len(pieces), **t5.SIZES)),
            pieces,
            network,
        )
        pipeline.save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n"
        )
