"""A tiny random FLUX.2 klein base in the real layout: Qwen3 of 28 layers by learnt word pieces, 1 + 2
blocks, a 2x VAE.

Twice, not eight times: so few pixels give as many latent values as float32 log-probabilities, their
means, need. The text encoder's layers are tiny but as many as the states that are read ask for.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.harness.folders import flux
from tests.harness.folders.hunyuan_video import llama_tokenizer

SCHEDULER = flux.SCHEDULER | {
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
CHANNELS = 4
WIDTH = 16  # of a state of the text
CHAT = (  # in the form of Qwen3's
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "{{ message.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def vae() -> AutoencoderKLFlux2:
    """With statistics of latents that are far from 0 and 1, and differ by channel."""
    network = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    )
    statistics = network.bn
    assert statistics.running_mean is not None and statistics.running_var is not None
    statistics.running_mean.normal_()
    statistics.running_var.uniform_(0.2, 2.0)
    return network


def text_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
            initializer_range=0.2,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = llama_tokenizer()
    words.chat_template = CHAT
    return words


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text and time do to the prediction is enlarged,
    to be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, network = tokenizer(), transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.startswith("time_guidance_embed"):
                    parameter.mul_(3.0)
                if "modulation" in name or name == "norm_out.linear.weight":
                    parameter.mul_(2.0)
                if name.endswith(("context_embedder.weight", "add_v_proj.weight")):
                    parameter.mul_(4.0)
                if name == "proj_out.weight":
                    parameter.mul_(0.4)
        pipeline = Flux2KleinPipeline(
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
