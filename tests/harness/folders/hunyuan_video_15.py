"""A tiny random HunyuanVideo-1.5 in the real layout: Qwen2.5-VL's text by learnt word pieces, ByT5, a
4x VAE.

Four times, not sixteen: so few pixels give as many latent values as float32 log-probabilities,
their means, need.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from tests.harness.folders.hunyuan_video import llama_tokenizer

CHANNELS = 4
WIDTH = 32  # of Qwen
GLYPHS = 24  # of ByT5
CHAT = (  # of Qwen's, in small; it ends the system's message and the user's head by a line break
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|eot_id|>\n{% endfor %}<|start_header_id|>assistant\n"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Room for a chat of 1000 tokens behind the system's message."""
    words = llama_tokenizer()
    words.model_max_length = 4096
    words.chat_template = CHAT
    return words


def text_encoder(vocabulary: int) -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            initializer_range=0.2,
            rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        )
    )


def byt5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=GLYPHS, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    )


def vae() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def network() -> HunyuanVideo15Transformer3DModel:
    """What time and texts do to the prediction is enlarged, to be seen."""
    built = HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=GLYPHS,
        image_embed_dim=6,
        rope_axes_dim=(4, 6, 6),
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith("time_embed") and name.endswith("weight"):
                parameter.mul_(3.0)
            if name.endswith(("proj_in.weight", "linear_3.weight", "add_v_proj.weight")):
                parameter.mul_(4.0)
    return built


def pipeline() -> HunyuanVideo15Pipeline:
    """Random weights, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, letters = tokenizer(), ByT5Tokenizer()
        return HunyuanVideo15Pipeline(
            text_encoder(len(words)),
            words,
            network(),
            vae(),
            FlowMatchEulerDiscreteScheduler(shift=5.0),
            byt5(len(letters)),
            letters,
            ClassifierFreeGuidance(guidance_scale=6.0),
        )


def write(folder: Path) -> None:
    """The folder of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v, in small."""
    pipeline().save_pretrained(folder)
