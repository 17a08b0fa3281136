"""A tiny random Stable Diffusion in the layout of v1.4: CLIP by characters, a UNet of two levels, a
2x VAE.

Twice, not eight times: so few pixels give as many latent values as float32 log-probabilities, their
means, need.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = {  # v1.4's scheduler_config.json; PNDMScheduler itself would not write clip_sample
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
WIDTH = 32  # of the text


def tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )


def clip_config(words: CLIPTokenizer, width: int, heads: int = 4) -> CLIPTextConfig:
    """A small text encoder for the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text and time do to the prediction is enlarged,
    to be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = tokenizer()
        text = clip_config(words, WIDTH)
        network = unet()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(
                    ("attn2.to_v.weight", "attn2.to_out.0.weight", "time_emb_proj.weight")
                ):
                    parameter.mul_(4.0)
                if name == "conv_out.weight":
                    parameter.mul_(0.25)
        pipeline = StableDiffusionPipeline(
            vae(),
            CLIPTextModel(text),
            words,
            network,
            PNDMScheduler.from_config(SCHEDULER),
            None,
            None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n"
        )
