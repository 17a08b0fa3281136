"""Measurements of synthetic clips whose answers are known in closed form, or whose order is."""

import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards import video_stats
from fastgrpo.rewards.common import optical_flow

FPS = 8.0


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth random picture with detail of two sizes, float32 [height, width] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for cell, weight in ((8, 0.65), (24, 0.35)):
        coarse = torch.rand(1, 1, height // cell, width // cell, generator=generator)
        layers.append(
            weight
            * F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0, 0]
        )
    return sum(layers, torch.zeros(())).clamp(0.1, 0.9)


def pan(dx: float, dy: float, count: int = 9, size: int = 96) -> Tensor:
    """A camera moving (dx, dy) pixels per frame over a texture, uint8 [count, size, size, 3]."""
    wide = texture(320, 320)[None, None]
    result = []
    for t in range(count):
        x, y = (torch.arange(size) + 110 + d * t for d in (dx, dy))
        grid = torch.stack(
            torch.meshgrid((x + 0.5) / 160 - 1, (y + 0.5) / 160 - 1, indexing="xy"), -1
        )
        result.append(F.grid_sample(wide, grid[None], align_corners=False)[0, 0])
    return grey(torch.stack(result))


def grey(y: Tensor) -> Tensor:
    """[F, H, W] in [0, 1] to uint8 [F, H, W, 3]."""
    return (
        (255 * y).round().clamp(0, 255).to(torch.uint8)[..., None].expand(*y.shape, 3).contiguous()
    )


def still(image: Tensor, count: int = 5) -> Tensor:
    return image[None].expand(count, *image.shape).contiguous()


def colour(red: int, green: int, blue: int, size: int = 32) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8).expand(1, size, size, 3).contiguous()


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


def score(clip: Tensor, fps: float = FPS, **settings: Any) -> dict[str, float]:
    """Every part of one clip, uint8 [F, H, W, 3]; all must be valid."""
    spec = RewardSpec.model_validate({"name": "video_stats", "weights": {}} | settings)
    scores = rewards.load(spec)(clip[None], ["no matter"], fps)
    assert scores.valid.all()
    assert all(
        value.dtype == torch.float32 and value.isfinite().all() for value in scores.values.values()
    )
    return {part: float(value) for part, value in scores.values.items()}


@pytest.mark.parametrize(
    ("dx", "dy"), [(1.0, 0.0), (0.0, 2.0), (3.0, -1.0), (0.5, 0.25), (6.0, 0.0)]
)
def test_flow_of_a_moving_camera(dx: float, dy: float) -> None:
    """What the camera passes moves against it, by as many pixels; what leaves the picture is not
    seen.
    """
    clip = video_stats.luma(pan(dx, dy, 3))
    found = optical_flow.flow(clip[:-1], clip[1:])
    error = (found + torch.tensor([dx, dy])[:, None, None]).norm(dim=1)
    assert error.median() < 0.03
    assert error.quantile(0.95) < 0.15


@pytest.mark.parametrize("fps", [8.0, 24.0])
def test_speed_is_in_frame_heights_per_second(fps: float) -> None:
    assert score(pan(3.0, 0.0), fps)["speed"] == pytest.approx(3 * fps / 96, rel=0.05)
    wide = F.interpolate(
        pan(3.0, 0.0).permute(0, 3, 1, 2).float(), (384, 384), mode="bilinear", align_corners=False
    )
    enlarged = wide.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    # whatever the resolution
    assert score(enlarged, fps)["speed"] == pytest.approx(3 * fps / 96, rel=0.05)


def test_speed_of_the_tiny_world_is_that_of_its_captions() -> None:
    for speed in shapes.SPEEDS:
        meaning = next(m for m in shapes.meanings()[0] if m.speed == speed)
        found = score(torch.from_numpy(shapes.draw(meaning)), float(shapes.FPS))
        assert found["speed"] == pytest.approx(
            shapes.SPEEDS[speed] * shapes.FPS / shapes.CANVAS, rel=0.15
        )
        assert found["smoothness"] > 0.9


def test_a_still_clip_does_not_move() -> None:
    found = score(still(pan(1, 0, 1)[0]))
    for part, value in {"speed": 0.0, "motion": 0.0, "flicker": 0.0, "smoothness": 1.0}.items():
        assert found[part] == pytest.approx(value, abs=1e-4)


def test_shuffled_frames_are_faster_and_not_smooth() -> None:
    clip = pan(2.0, 0.5, 12)
    shuffled = clip[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    before, after = score(clip), score(shuffled)
    assert before["smoothness"] > 0.98
    assert after["smoothness"] < 0.5
    assert after["speed"] > 2 * before["speed"]
    assert after["motion"] < 0.5 * before["motion"]
    # what no order of frames can change
    for part in (
        "sharpness",
        "clipped",
        "grid",
        "jpeg",
        "colourfulness",
    ):
        assert after[part] == pytest.approx(before[part], rel=1e-5, abs=1e-6)


def test_reversal_changes_no_measure_but_rounding() -> None:
    before, after = score(pan(2.0, 1.0)), score(pan(2.0, 1.0).flip(0))
    assert after["speed"] == pytest.approx(before["speed"], rel=0.02)
    assert after["smoothness"] == pytest.approx(before["smoothness"], abs=0.01)


@pytest.mark.parametrize(
    ("speed", "share"),
    [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (10.0, 0.1)],
)
def test_band(speed: float, share: float) -> None:
    assert video_stats.band(speed, 0.2, 1.0) == pytest.approx(share)


def test_motion_is_band_times_smoothness() -> None:
    found = score(pan(2.0, 0.0))
    # 0.17 heights per second: in the band
    assert found["motion"] == pytest.approx(found["smoothness"])
    slow = score(pan(2.0, 0.0), options={"slowest": 0.5})
    assert slow["motion"] == pytest.approx(slow["speed"] / 0.5 * slow["smoothness"])
    fast = score(pan(2.0, 0.0), options={"slowest": 0.01, "fastest": 0.1})
    assert fast["motion"] == pytest.approx(0.1 / fast["speed"] * fast["smoothness"])


def test_flicker() -> None:
    black, white = colour(0, 0, 0)[0], colour(255, 255, 255)[0]
    assert score(torch.stack([black, white, black, white, black]))["flicker"] == pytest.approx(1.0)
    fade = torch.stack([colour(v, v, v)[0] for v in range(0, 100, 10)])
    assert score(fade)["flicker"] == pytest.approx(0.0, abs=1e-6)
    # second differences 10, -20, 10
    pulse = torch.stack([colour(v, v, v)[0] for v in (100, 100, 110, 100, 100)])
    assert score(pulse)["flicker"] == pytest.approx((10 + 20 + 10) / 3 / 2 / 255, rel=1e-4)


def test_sharpness_of_a_ramp_and_under_blur() -> None:
    ramp = torch.arange(32) * 3 / 255
    # 3 levels per pixel
    assert score(grey(ramp.expand(1, 32, 32)))["sharpness"] == pytest.approx(9.0, rel=1e-4)
    tilted = (torch.arange(32) * 3 + torch.arange(32)[:, None] * 4) / 255
    assert score(grey(tilted[None]))["sharpness"] == pytest.approx(25.0, rel=1e-4)
    assert score(colour(90, 90, 90))["sharpness"] == 0.0
    sharp = pan(0, 0, 1)
    found = [score(sharp)["sharpness"]]
    for side in (3, 7, 15):
        blurred = optical_flow.local_mean(sharp.float().permute(0, 3, 1, 2), side).permute(
            0, 2, 3, 1
        )
        found.append(score(blurred.round().to(torch.uint8))["sharpness"])
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_colourfulness() -> None:
    assert score(colour(77, 77, 77))["colourfulness"] == pytest.approx(0.0, abs=1e-4)
    assert score(colour(255, 0, 0))["colourfulness"] == pytest.approx(
        0.3 * math.hypot(255, 127.5), rel=1e-5
    )
    # rg = +-255, yb = 127.5
    halves = torch.cat([colour(255, 0, 0)[:, :16], colour(0, 255, 0)[:, :16]], 1)
    assert score(halves)["colourfulness"] == pytest.approx(255 + 0.3 * 127.5, rel=1e-5)
    vivid = noise(1, 32, 32, 3)
    pale = (
        (vivid.float() * 0.5 + vivid.float().mean(-1, keepdim=True) * 0.5).round().to(torch.uint8)
    )
    assert score(pale)["colourfulness"] < score(vivid)["colourfulness"]


def test_clipped() -> None:
    assert score(colour(1, 128, 254))["clipped"] == 0.0
    assert score(colour(0, 128, 255))["clipped"] == pytest.approx(2 / 3)
    image = colour(100, 100, 100)
    image[:, :8] = 255
    assert score(image)["clipped"] == pytest.approx(0.25)


@pytest.mark.parametrize("period", [8, 16])
def test_a_pure_grid_repeats_itself_wholly_and_noise_does_not(period: int) -> None:
    tile = torch.rand(period, period, generator=torch.Generator().manual_seed(0))
    tiled = grey(tile.repeat(128 // period, 128 // period)[None])
    inner = score(tiled)["grid"]
    assert inner > 0.97  # all but the border, where a neighbourhood is cut
    random = grey(torch.rand(8, 128, 128, generator=torch.Generator().manual_seed(0)))
    assert score(random)["grid"] < 0.005
    assert score(colour(9, 9, 9, 64))["grid"] == 0.0


def test_a_faint_grid_shows_more_the_stronger_it_is() -> None:
    """Lines every 8 pixels, 1 to 8 grey levels high, over a moving picture with some noise."""
    clip = pan(2.0, 0.0, 5, 128).int() + noise(5, 128, 128, 3).int() % 7 - 3
    found = [score(clip.to(torch.uint8))["grid"]]
    for height in (1, 2, 4, 8):
        drawn = clip.clone()
        drawn[:, ::8] += height
        drawn[:, :, ::8] += height
        found.append(score(drawn.clamp(0, 255).to(torch.uint8))["grid"])
    assert found[0] < 0.01
    assert all(later > earlier + 0.01 for earlier, later in itertools.pairwise(found))
    other = clip.clone()
    other[:, ::11] += 8  # a rhythm that is not the network's
    assert score(other.clamp(0, 255).to(torch.uint8))["grid"] < 0.1 * found[-1]


def test_jpeg_is_pillows_size() -> None:
    image = noise(1, 48, 40, 3)
    file = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(file, format="JPEG", quality=60)
    assert score(image, options={"jpeg_quality": 60})["jpeg"] == pytest.approx(file.tell() / 1000)
    assert (
        score(colour(9, 9, 9))["jpeg"]
        < score(grey(texture(48, 48)[None]))["jpeg"]
        < score(image)["jpeg"]
    )


def test_an_image_and_a_pair_are_valid() -> None:
    clip = pan(2.0, 0.0, 2)
    image, pair = score(clip[:1]), score(clip)
    assert (image["motion"], image["speed"], image["smoothness"], image["flicker"]) == (
        0.0,
        0.0,
        1.0,
        0.0,
    )
    assert pair["speed"] > 0.1
    assert (pair["smoothness"], pair["flicker"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("height", "width"), [(3, 3), (8, 20), (32, 32), (33, 47), (36, 300), (480, 270)]
)
def test_any_size_is_finite(height: int, width: int) -> None:
    for clip in (noise(4, height, width, 3), torch.zeros(3, height, width, 3, dtype=torch.uint8)):
        score(clip)


def test_frames_choose_stills_but_not_motion() -> None:
    clip = torch.stack([colour(v, v, v)[0] for v in (0, 128, 128, 128)])
    assert score(clip, frames="first")["clipped"] == 1.0
    assert score(clip, frames="middle")["clipped"] == 0.0
    assert score(clip)["clipped"] == pytest.approx(0.25)
    assert score(clip, frames="middle")["flicker"] == score(clip)["flicker"] > 0.1


def test_batches_change_no_bit() -> None:
    clips = torch.stack([pan(dx, 0.0, 4) for dx in (0.0, 1.0, 4.0)])
    reward = rewards.load(rewards.plain("video_stats"))
    together = reward(clips, [""] * 3, FPS).values
    for n in range(3):
        alone = reward(clips[[n]], [""], FPS).values
        assert all(torch.equal(alone[part], together[part][[n]]) for part in reward.names)


def test_what_it_cannot_judge() -> None:
    reward = rewards.load(rewards.plain("video_stats"))
    for pixels, fps, said in (
        (noise(1, 2, 2, 64, 3), FPS, "at least 3 pixels"),
        (noise(1, 2, 64, 64, 3), 0.0, "fps=0"),
        (noise(1, 2, 64, 64, 4), FPS, "expected torch.uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            reward(pixels, [""], fps)
    for options, said in (
        ({"gridperiod": 8}, "did you mean 'grid_period'"),
        ({"grid_period": 1}, "rewards.options.grid_period=1"),
        ({"fastest": -1.0}, "rewards.options.fastest=-1.0"),
        ({"colour": 1}, "it has slowest, fastest, grid_period, jpeg_quality"),
    ):
        with pytest.raises(UserError, match=said):
            rewards.load(
                RewardSpec.model_validate(
                    {"name": "video_stats", "weights": {}, "options": options}
                )
            )
