"""A tiny random Wan 2.2 A14B: Wan 2.1 with two networks that differ, text-to-video."""

import json
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from transformers import UMT5Config, UMT5EncoderModel

from tests.harness.folders import t5, wan

BOUNDARY = 0.875  # the published folder's


def write(folder: Path) -> None:
    """Random weights, the same on every call; those that text and time go through are enlarged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pieces = t5.tokenizer(wan.LONGEST)
        networks = [wan.transformer() for _ in range(2)]
        with torch.no_grad():
            for name, parameter in (n for one in networks for n in one.named_parameters()):
                if name.endswith(wan.SEEN):
                    parameter.mul_(4.0)
        pipeline = WanPipeline(
            pieces,
            UMT5EncoderModel(UMT5Config(vocab_size=len(pieces), **t5.SIZES)),
            wan.vae(),
            UniPCMultistepScheduler.from_config(wan.SCHEDULER),
            *networks,
            boundary_ratio=BOUNDARY,
        )
        pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(wan.SCHEDULER, indent=2) + "\n"
    )
