"""The plan's FLOPs and bytes per decoded pixel against diffusers' decoders of the published sizes,
without contents.
"""

import math

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plan import decoders
from fastgrpo.core import config
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.plan.simulation.counters import counting_flops
from tests.fastgrpo.tools.plan.test_planner import T2V


@pytest.mark.parametrize("name", decoders.DECODERS)
def test_decoding_costs_what_the_published_decoder_does(name: str) -> None:
    flops, held = decoders.per_pixel(name)
    planned = decoders.planned(name)
    assert planned.decode_flops == pytest.approx(flops, rel=0.03)
    assert planned.decode_bytes == pytest.approx(held, rel=0.01)
    assert planned.graph_bytes == pytest.approx(decoders.graph_per_pixel(name), rel=0.01)


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(29, 320, 320), (17, 256, 256), (13, 256, 256), (13, 256, 320)],
)
def test_overlapping_tiles_are_counted_once_each(frames: int, height: int, width: int) -> None:
    """HunyuanVideo's clips as a run decodes them: of 29 frames of 320 x 320 in 3 x 2 x 2 tiles; of
    17 frames in two, though one tile has 17; of 13 x 256 x 256 in one; and 256 x 320 in 2 x 2,
    since one side is longer than a tile.
    """
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad(), counting_flops() as flops:
        vae = AutoencoderKLHunyuanVideo()
        vae.enable_tiling()
        vae.decode(torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8))
    sizes = [f"video.frames={frames}", f"video.height={height}", f"video.width={width}"]
    asked = config.load(T2V, [*sizes, "prompts.per_iteration=1"])
    found = planner.plan(asked, 8, Machine(gpu("h800"), Achieved()))
    (planned,) = (phase.flops for phase in found.phases if phase.name == "decode")
    assert planned == pytest.approx(math.ceil(12 / 8) * flops.get_total_flops(), rel=0.02)
