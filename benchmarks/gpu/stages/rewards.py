"""Stage (h): clips per second of reward networks of published size, with random weights.

VideoAlign is fastgrpo's own network around transformers' Qwen2-VL-2B; CLIP-H is transformers' CLIP
of ViT-H-14. Clips are those of launch/t2v_hunyuan.toml, 53 frames of 480 x 480; what is timed is
the network, not the resizing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import measure
from benchmarks.gpu.hunyuan import randomize
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1e6,
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
}
SMALL_QWEN = QWEN | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 151_936,
    "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 256},
}
TEXT_TOKENS = 350  # of VideoAlign's template and a prompt
SAMPLED, SIDE = 14, 448  # frames of the clip at two per second; their pixels' side
CLIP_FRAMES = 8  # frames of a clip that CLIP-H is given here
GROUPS = (1, 4, 8)


def run(setup: Setup, report: Report) -> None:
    """Measure both networks in bfloat16; calibrate the plan's share by VideoAlign."""
    with report.attempt("VideoAlign"):
        _videoalign(setup, report)
    measure.free(measure.device())
    with report.attempt("CLIP-H"):
        _clip(setup, report)


def _timed(
    setup: Setup, report: Report, name: str, work: Callable[[int], Callable[[], Any]]
) -> float:
    """Report clips per second for each number of clips at once.  returns the best"""
    best = 0.0
    for batch in GROUPS[:2] if measure.is_small(setup) else GROUPS:
        with report.attempt(f"{name}, {batch} clips at once"):
            task, where = work(batch), measure.device()
            speed = batch / measure.seconds(task, where)
            gib = measure.peak_gib(task, where)
            note = "" if math.isnan(gib) else f"peak {gib:.2f} GiB"
            report.row(f"{name}, {batch} clips at once", speed, "clips/s", note)
            best = max(best, speed)
        measure.free(measure.device())
    return best


def _videoalign(setup: Setup, report: Report) -> None:
    """VideoAlign's network; the share of the peak is by the plan's count of its FLOPs."""
    from fastgrpo.core.config import RewardSpec
    from fastgrpo.rewards.networks.qwen2_vl.body import config_of, empty_body
    from fastgrpo.rewards.networks.videoalign.network import Network
    from fastgrpo.rewards.videoalign import SIZE

    where, small = measure.device(), measure.is_small(setup)
    base: dict[str, Any] = {"model_type": "qwen2_vl", **(SMALL_QWEN if small else QWEN)}
    config = config_of(base, base["vocab_size"])
    body = empty_body(config)
    tables = {name: buffer.clone() for name, buffer in body.named_buffers() if not buffer.is_meta}
    _parameters(nn.Module.to(body, torch.bfloat16).to_empty(device=where), tables)
    network = Network(body, torch.zeros(1, base["hidden_size"])).to(where)
    count = sum(parameter.numel() for parameter in network.parameters())
    side, depth = (4, 2) if small else (SIDE // 14, SAMPLED // 2)
    note = f"{2 * depth} frames of {14 * side} x {14 * side}"
    report.row("VideoAlign", count / 1e6, "M parameters", note)

    def work(batch: int) -> Callable[[], Any]:
        return lambda: network(_videoalign_inputs(config, batch, (depth, side), where))

    best = _timed(setup, report, "VideoAlign", work)
    spec = RewardSpec(name="videoalign", weights={"VQ": 1.0})
    flops = 2.0 * SIZE.parameters * SIZE.tokens * SIZE.frames_scored(spec, 53, 8.0)
    if not small and best:
        share = best * flops / 1e12 / measure.peak_tflops(setup)
        report.row("VideoAlign, share by the plan's FLOPs", round(100 * share, 1), "% of peak")
        report.calibrate(reward=share)


def _parameters(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Random parameters, and the buffers [...] as they were."""
    randomize(module)
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def _videoalign_inputs(config: Any, batch: int, size: tuple[int, int], where: torch.device) -> Any:
    """A Batch: ids [B, L], patches [P, 1176], grids [B, 3], marks [B, 3].  size: (T, side)"""
    from fastgrpo.rewards.networks.qwen2_vl.body import Batch

    depth, side = size
    video = depth * side * side // 4
    ids = torch.ones(batch, video + TEXT_TOKENS, dtype=torch.long, device=where)
    ids[:, 20 : 20 + video] = config.video_token_id
    patches = torch.randn(batch * depth * side * side, 1176, device=where)
    grids = torch.tensor([[depth, side, side]] * batch, device=where)
    marks = torch.tensor([[video + 100, video + 200, video + 300]] * batch, device=where)
    return Batch(ids, patches, grids, marks)


def _clip(setup: Setup, report: Report) -> None:
    """CLIP of ViT-H-14: the frames' features; the text's cost little."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    where, small = measure.device(), measure.is_small(setup)
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024}
    if small:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2}
    network: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, hidden_act="gelu"))
    network = nn.Module.to(network, where, torch.bfloat16).eval()
    count = sum(parameter.numel() for parameter in network.parameters())
    report.row(
        "CLIP-H's vision tower", count / 1e6, "M parameters", f"{CLIP_FRAMES} frames of a clip"
    )

    def work(batch: int) -> Callable[[], Any]:
        make = {"device": where, "dtype": torch.bfloat16}
        pixels = torch.randn(batch * CLIP_FRAMES, 3, 224, 224, **make)  # type: ignore[call-overload]

        @torch.no_grad()
        def score() -> Any:
            return network(pixel_values=pixels).image_embeds

        return score

    _timed(setup, report, "CLIP-H", work)
