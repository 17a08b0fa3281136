"""A tiny random HunyuanVideo in the real layout: Llama by learnt word pieces, CLIP by characters, a
4x VAE.

The tokenizer begins every text with a token of its own, as Llama 3's does, so the template's length
has to count it. Four times, not eight: so few pixels give as many latent values as float32
log-probabilities, their means, need.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from tests.harness.folders.stable_diffusion import clip_config
from tests.harness.folders.stable_diffusion import tokenizer as clip_tokenizer

CHANNELS = 16  # of the latents, as in the real one
WIDTH = 32  # of Llama
POOLED = 32  # of CLIP
SPECIAL = {
    "bos_token": "<|begin_of_text|>",
    "pad_token": "<|pad|>",
    "eos_token": "<|eot_id|>",
    "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"],
}
LEARNT_FROM = "a boat leaves the shore slowly while the red sun goes down behind the hills and two dogs run over sand"


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs over 300 pieces; line breaks stand alone, so what follows the template never
    changes its tokens.
    """
    words = Tokenizer(models.BPE())
    breaks = pre_tokenizers.Split(Regex("\n+"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [breaks, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    names = [
        "<|pad|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"], LEARNT_FROM], trainer)
    begin = "<|begin_of_text|>"
    words.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, words.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=1024, padding_side="right", **SPECIAL
    )


def llama(vocabulary: int) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            pad_token_id=0,
        )
    )


def clip(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip_config(words, POOLED, heads=2))


def vae() -> AutoencoderKLHunyuanVideo:
    """4 times smaller in space and in time.

    What an image does to its latent is enlarged: the posterior's std is 1.
    """
    built = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=0.476986,
    )
    with torch.no_grad():
        built.quant_conv.weight[:CHANNELS].mul_(4.0)
    return built


def network(in_channels: int = CHANNELS) -> HunyuanVideoTransformer3DModel:
    """What time, pooled text and text do to the prediction is enlarged, to be seen."""
    built = HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 4, 4),
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith(("time_text_embed", "context_embedder.proj_in")) and name.endswith(
                "weight"
            ):
                parameter.mul_(2.0)
    return built


def pipeline() -> HunyuanVideoPipeline:
    """Random weights, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, letters = llama_tokenizer(), clip_tokenizer()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
        return HunyuanVideoPipeline(
            llama(len(words)), words, network(), vae(), scheduler, clip(letters), letters
        )


def write(folder: Path) -> None:
    """The folder of hunyuanvideo-community/HunyuanVideo, in small."""
    pipeline().save_pretrained(folder)
