"""A tiny random Wan 2.1 I2V: Wan 2.1 with an image encoder and a network that sees images."""

import json
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.harness.folders import t5, wan

SEEN = ("attn2.to_v.weight", "attn2.add_v_proj.weight", "time_proj.weight")
"""Weights that are enlarged, so that text, time and the image's states make a difference. Not the
output's: gradients of the 512 places of text would be large beside all others, and round so.
"""
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
VISION |= {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
PLACES = 17  # of the image: 4 x 4 patches and the class's


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * wan.CHANNELS + 4,
        out_channels=wan.CHANNELS,
        text_dim=t5.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=VISION["hidden_size"],
        added_kv_proj_dim=32,
    )


def write(folder: Path) -> None:
    """Random weights, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pieces, network = t5.tokenizer(wan.LONGEST), transformer()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(SEEN):
                    parameter.mul_(4.0)
        pipeline = WanImageToVideoPipeline(
            tokenizer=pieces,
            text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), **t5.SIZES)),
            vae=wan.vae(),
            scheduler=UniPCMultistepScheduler.from_config(wan.SCHEDULER),
            image_processor=CLIPImageProcessor(
                size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
            ),
            image_encoder=CLIPVisionModel(CLIPVisionConfig(**VISION)),
            transformer=network,
        )
        pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(wan.SCHEDULER, indent=2) + "\n"
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["image_processor"][1] = "CLIPImageProcessor"  # without torchvision it has another name
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
