"""A tiny random Wan 2.1 in the layout of the 1.3 B model: UMT5 by characters, 2 blocks, a VAE of 4x
in time and space; and a Wan 2.2 in that of TI2V-5B, whose VAE sees patches and has 8x in space.

Four times, not eight, and eight, not sixteen: so few pixels give as many latent values as float32
log-probabilities, their means, need.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.harness.folders import t5

SCHEDULER = {  # of Wan2.1-T2V-1.3B-Diffusers
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
LONGEST = 40  # tokens of UMT5
CHANNELS = 8
SEEN = ("attn2.to_v.weight", "attn2.to_out.0.weight", "time_proj.weight")
"""Weights that are enlarged, so that text and time make a difference."""
SEEN_2_2 = (*SEEN, "attn1.to_v.weight", "attn1.to_out.0.weight")
"""The same, so that the reference image's frame does."""


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=t5.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )


def vae(**more: Any) -> AutoencoderKLWan:
    sizes = {
        "base_dim": 8,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.1 * n - 0.3 for n in range(CHANNELS)],
        "latents_std": [1 + 0.2 * n for n in range(CHANNELS)],
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 4,
    }
    return AutoencoderKLWan(**sizes | more)


def vae_2_2() -> AutoencoderKLWan:
    return vae(
        decoder_base_dim=12,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text and time do to the prediction is enlarged,
    to be seen.
    """
    save(folder, vae, SCHEDULER, SEEN)


def write_ti2v(folder: Path) -> None:
    """The same for Wan 2.2 TI2V-5B, whose one folder serves text-to-video and image-to-video."""
    scheduler = SCHEDULER | {"flow_shift": 5.0}
    save(folder, vae_2_2, scheduler, SEEN_2_2, expand_timesteps=True)


def save(
    folder: Path,
    decoder: Any,
    scheduler: dict[str, Any],
    enlarged: tuple[str, ...],
    **index: bool,
) -> None:
    """A WanPipeline's folder.  enlarged: endings of names of weights;  index: of model_index.json"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pieces = t5.tokenizer(LONGEST)
        network = transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(enlarged):
                    parameter.mul_(4.0)
        pipeline = WanPipeline(
            pieces,
            UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), **t5.SIZES)),
            decoder(),
            UniPCMultistepScheduler.from_config(scheduler),
            network,
            **index,
        )
        pipeline.save_pretrained(folder)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(scheduler, indent=2) + "\n"
        )
