"""A tiny random Wan 2.2 I2V-A14B: two networks that differ, each with a given clip beside x."""

import json
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.harness.folders import t5, wan

BOUNDARY = 0.9  # the published folder's


def transformer() -> WanTransformer3DModel:
    """The tiny Wan's, with more channels in."""
    config = dict(wan.transformer().config) | {"in_channels": 2 * wan.CHANNELS + 4}
    return WanTransformer3DModel.from_config(config)


def write(folder: Path) -> None:
    """Random weights, the same on every call; those that text and time go through are enlarged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pieces = t5.tokenizer(wan.LONGEST)
        networks = [transformer() for _ in range(2)]
        with torch.no_grad():
            for name, parameter in (n for one in networks for n in one.named_parameters()):
                if name.endswith(wan.SEEN):
                    parameter.mul_(4.0)
        pipeline = WanImageToVideoPipeline(
            tokenizer=pieces,
            text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), **t5.SIZES)),
            vae=wan.vae(),
            scheduler=UniPCMultistepScheduler.from_config(wan.SCHEDULER),
            transformer=networks[0],
            transformer_2=networks[1],
            boundary_ratio=BOUNDARY,
        )
        pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(wan.SCHEDULER, indent=2) + "\n"
    )
