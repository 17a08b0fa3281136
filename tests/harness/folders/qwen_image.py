"""A tiny random Qwen-Image in the real layout: Qwen2.5-VL by learnt word pieces, 2 blocks, Wan's VAE
of 4x in space.

Four times, not eight: so few pixels give as many latent values as float32 log-probabilities, their
means, need.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.harness.folders.hunyuan_video import llama_tokenizer

SCHEDULER = {  # of Qwen-Image
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.34.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
CHANNELS = 4
WIDTH = 32  # of the text


def transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1 * n - 0.3 for n in range(CHANNELS)],
        latents_std=[1 + 0.2 * n for n in range(CHANNELS)],
    )


def text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text and time do to the prediction is enlarged,
    to be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, network = llama_tokenizer(), transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.startswith("time_text_embed") and name.endswith("weight"):
                    parameter.mul_(3.0)
                if name.endswith(("_mod.1.weight", "norm_out.linear.weight")):
                    parameter.mul_(2.0)
                if name.endswith(("txt_in.weight", "add_v_proj.weight", "to_out.0.weight")):
                    parameter.mul_(4.0)
                if name == "proj_out.weight":
                    parameter.mul_(0.4)
        pipeline = QwenImagePipeline(
            FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
            vae(),
            text_encoder(len(words)),
            words,
            network,
        )
        pipeline.save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(SCHEDULER, indent=2) + "\n"
        )
