"""A tiny random Z-Image in the real layout: Qwen3 by learnt word pieces, 1 + 1 + 2 blocks, FLUX's VAE
of 4x in space.

Four times, not eight: so few pixels give as many latent values as float32 log-probabilities, their
means, need.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.harness.folders.hunyuan_video import llama_tokenizer

CHANNELS = 4
WIDTH = 24  # of the text
CHAT = (  # in the form of Qwen3's, whose answer has its thoughts unless they are switched off
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|eot_id|>\n{% endfor %}<|start_header_id|>assistant\n"
    "{% if enable_thinking is false %}no thoughts\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = llama_tokenizer()
    words.chat_template = CHAT
    return words


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 32, 32],
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def text_encoder(vocabulary: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            initializer_range=0.2,
        )
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call; what text, time and padding do to the prediction is
    enlarged, to be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, network = tokenizer(), transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("_pad_token"):
                    parameter.normal_(std=2.0)  # they start at 0
                if name.startswith("t_embedder") and name.endswith("weight"):
                    parameter.mul_(3.0)
                if name.endswith(("cap_embedder.1.weight", "to_v.weight")):
                    parameter.mul_(2.0)
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=vae(),
            text_encoder=text_encoder(len(words)),
            tokenizer=words,
            transformer=network,
        ).save_pretrained(folder)
