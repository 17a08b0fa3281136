"""What the process that forks the jobs imports: all that any job imports, and no thread."""

import tests.harness.preload  # noqa: F401, I001  # quiets the libraries first

import matplotlib
import os

matplotlib.use("Agg")

import av  # noqa: F401
import peft  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint.state_dict  # noqa: F401
import transformers
from diffusers import (  # noqa: F401
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

import fastgrpo.models.flux
import fastgrpo.models.flux_2
import fastgrpo.models.hunyuan_video_15
import fastgrpo.models.hunyuan_video_15_i2v
import fastgrpo.models.qwen_image
import fastgrpo.models.skyreels_i2v
import fastgrpo.models.stable_diffusion
import fastgrpo.models.stable_diffusion_3
import fastgrpo.models.wan
import fastgrpo.models.wan_a14b
import fastgrpo.models.wan_a14b_i2v
import fastgrpo.models.wan_i2v
import fastgrpo.models.wan_i2v_14b
import fastgrpo.models.z_image
import fastgrpo.rewards.video_stats
import fastgrpo.tools.evaluate.evaluate
import fastgrpo.tools.export.export
import fastgrpo.tools.preflight.run
import fastgrpo.tools.report.report
import fastgrpo.tools.sample.sample  # noqa: F401

for _name in (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "LlamaModel",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLTextModel",
    "Qwen3ForCausalLM",
    "Qwen3Model",
    "SiglipVisionModel",
    "T5EncoderModel",
    "UMT5EncoderModel",
):
    getattr(transformers, _name)  # imported when first asked for
assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread only"
