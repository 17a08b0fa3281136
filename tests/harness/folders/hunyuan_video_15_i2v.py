"""A tiny random HunyuanVideo-1.5 for image-to-video: the one from text, and SigLIP beside it."""

import json
from pathlib import Path

import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from tests.harness.folders import hunyuan_video_15

CHANNELS = hunyuan_video_15.CHANNELS
PLACES = 4  # of the image: 2 x 2 patches
VISION = {"hidden_size": 6, "intermediate_size": 12, "num_attention_heads": 2}
VISION |= {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}


def write(folder: Path) -> None:
    """The folder of hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v, in small."""
    parts = hunyuan_video_15.pipeline().components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vision = SiglipVisionModel(SiglipVisionConfig(**VISION))
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=vision,
        feature_extractor=SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"][1] = "SiglipImageProcessor"  # without torchvision another name
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
