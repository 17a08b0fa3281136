"""Rules that judge clips of the tiny world: visual quality, motion quality and text alignment.

Every score is made of bell-shaped marks in physical units (pixels of the 32-pixel canvas, steps of
the 0..255 colour scale), so it changes a little when the pixels change a little, and a bad clip
still tells a worse one apart. Only a clip without any object gets exactly nothing.

  VQ  the object is crisp, one, of the right area and of a plain palette colour; the background is
      plain
  MQ  the object's centroid follows a smooth path at the asked speed, whatever its direction and
      colour
  TA  colour, shape and direction are those of the caption, whatever the speed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.common import options

Array = NDArray[np.float64]

LEAST_FRAMES = 3  # for a path
PARTS = ("VQ", "MQ", "TA")
FAINTEST = 110.0
"""Colour distance from the background below which an object is only partly there.

The palette's colours are 159 to 286 away.
"""
OBJECT_REACH = 11.0  # canvas pixels from its centroid that every shape stays within
PERIMETER = 3.3  # most edge, sum of 4a(1 - a), of a drawn shape per square root of its area
SPREAD = 0.2  # most second moment of a drawn shape (the triangle) per square of its area


@dataclass(frozen=True, kw_only=True)
class View:
    """Measurements of a clip, for the rules; lengths in pixels of the 32-pixel canvas."""

    rgb: Array  # [F, N, N, 3], 0..255
    distance: Array  # [F, N, N] colour distance from the background
    cover: Array  # [F, N, N] how much of a pixel the object covers, 0..1
    colour: Array  # [3] mean colour of the object's interior over the clip
    area: Array  # [F] square pixels
    centroid: Array  # [F, 2] (x, y)
    radius: Array  # [F, N, N] distance of each pixel's centre from the centroid
    presence: Array  # [F] 0..1, is there an object


def bell(error: Array, tolerance: float) -> Array:
    """1 / (1 + (error / tolerance)^2): 1 at no error, 1/2 at the tolerance, a long tail beyond."""
    return 1.0 / (1.0 + (error / tolerance) ** 2)


def smoothstep(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, a cubic without corners between."""
    s = np.clip((x - low) / (high - low), 0.0, 1.0)
    return s * s * (3.0 - 2.0 * s)


def look(pixels: NDArray[np.uint8]) -> View:
    """Find the object: whatever differs from the background.

    pixels: uint8 [F, N, N, 3]
    """
    rgb = pixels.astype(np.float64)
    size = rgb.shape[1]
    distance = np.sqrt(((rgb - np.array(shapes.BACKGROUND)) ** 2).sum(-1))
    weight = distance**4  # the interior, not the edge, says how strong the object's colour is
    strength = (weight * distance).sum() / (weight.sum() + 1e-9)
    share = np.minimum(distance / max(strength, FAINTEST), 1.0)
    # in proportion, so the centroid is exact; faint noise is no object
    cover = share * smoothstep(share, 0.08, 0.35)
    inside = share**8
    colour = (inside[..., None] * rgb).sum((0, 1, 2)) / (inside.sum() + 1e-30)

    pixel = (shapes.CANVAS / size) ** 2
    axis = (np.arange(size) + 0.5) * shapes.CANVAS / size
    total = cover.sum((1, 2))
    # A pinch of weight in the canvas' middle keeps the centroid defined, and smooth, as an object
    # fades away.
    pinch = 0.01 / pixel
    x = ((cover.sum(1) * axis).sum(1) + pinch * shapes.CANVAS / 2) / (total + pinch)
    y = ((cover.sum(2) * axis).sum(1) + pinch * shapes.CANVAS / 2) / (total + pinch)
    radius = np.sqrt(
        (axis[None, None, :] - x[:, None, None]) ** 2
        + (axis[None, :, None] - y[:, None, None]) ** 2
    )
    area = total * pixel
    presence = smoothstep(area, 0.0, 60.0)
    return View(
        rgb=rgb,
        distance=distance,
        cover=cover,
        colour=colour,
        area=area,
        centroid=np.stack([x, y], 1),
        radius=radius,
        presence=presence,
    )


def palette_distance(colour: Array) -> Array:
    """Distance of a colour, float64 [..., 3], from each colour of the palette: [..., 6]."""
    palette = np.array(list(shapes.COLOURS.values()), dtype=np.float64)
    return np.asarray(np.sqrt(((colour[..., None, :] - palette) ** 2).sum(-1)))


def visual_quality(view: View) -> float:
    """Visual quality, 0 to 1, mean over frames.

    Crisp edge, plain background, plain palette colour, one compact object of the right area.
    """
    pixel = (shapes.CANVAS / view.rgb.shape[1]) ** 2
    root_area = np.sqrt(view.area + 1.0)

    # An edge one pixel wide has a known amount of half-covered pixels; a blurred one has more.
    edge = (4.0 * view.cover * (1.0 - view.cover)).sum((1, 2)) * np.sqrt(pixel) / root_area
    crisp = bell(np.maximum(edge - PERIMETER, 0.0), 4.0)

    outside = smoothstep(view.radius, OBJECT_REACH - 1.5, OBJECT_REACH)
    dirt = np.sqrt((outside * view.distance**2).sum((1, 2)) / (outside.sum((1, 2)) + 1e-9))
    clean = bell(dirt, 18.0)

    nearest = int(palette_distance(view.colour).argmin())
    paint = np.array(list(shapes.COLOURS.values())[nearest])
    inside = view.cover**8
    off = np.sqrt(
        (inside * ((view.rgb - paint) ** 2).sum(-1)).sum((1, 2)) / (inside.sum((1, 2)) + 1e-30)
    )
    plain = bell(off, 55.0)

    usual = np.mean([shapes.area(s) for s in shapes.SHAPES])
    right_area = bell(np.log((view.area + 1.0) / (usual + 1.0)), 0.45)
    moment = (view.cover * view.radius**2).sum((1, 2)) * pixel / (view.area + 1.0)
    compact = bell(np.maximum(moment / (view.area + 1.0) - SPREAD, 0.0), 0.15)
    return float((view.presence * crisp * clean * plain * right_area * compact).mean())


def velocity(view: View) -> Array:
    """Least-squares slope of the path, canvas pixels per frame: float64 [2], (x, y)."""
    time = np.arange(len(view.centroid)) - (len(view.centroid) - 1) / 2
    return np.asarray((time[:, None] * view.centroid).sum(0) / (time**2).sum())


def motion_quality(view: View, speed: float) -> float:
    """Motion quality, 0 to 1: a smooth path at the asked speed, with the object in every frame.

    speed: canvas pixels per frame
    """
    second = np.diff(view.centroid, n=2, axis=0)
    smooth = bell(np.sqrt((second**2).sum(1).mean()), 1.2)
    actual = np.sqrt((velocity(view) ** 2).sum())
    # the same for twice and half: an error of 1/3
    right_speed = bell((actual - speed) / (actual + speed), 0.2)
    # harmonic mean: an empty frame in nine leaves 0.28
    there = 1.0 / (1.0 / (view.presence + 0.05)).mean() - 0.05
    return float(smooth * right_speed * there)


def colour_match(view: View, colour: str) -> float:
    """Match of the colour, 0 to 1.

    Half for being near the asked colour, half for being nearer to it than to the others.
    """
    away = palette_distance(view.colour)
    asked = list(shapes.COLOURS).index(colour)
    share = np.exp(-(away - away.min()) / 20.0)
    return float(0.5 * bell(away[asked], 70.0) + 0.5 * share[asked] / share.sum())


def shape_match(view: View, shape: str) -> float:
    """Match of the shape, 0 to 1.

    Half for the overlap with the asked shape, half for overlapping it more than the others.
    """
    size = view.rgb.shape[1]
    # Coverage from eight points of a pixel, no two in a row or column: an upright edge gets eight
    # levels, not three.
    column, row = np.arange(8), np.arange(8) * 3 % 8
    nudges = (np.stack([column, row], 1)[:, None] - 3.5) / 8 * shapes.CANVAS / size
    overlap = []
    for candidate in shapes.SHAPES:
        points = shapes.shape_mask(
            candidate, (view.centroid[None] - nudges).reshape(-1, 2), size, supersample=1
        )
        mask = points.reshape(len(nudges), *view.cover.shape).mean(0)
        overlap.append(np.minimum(mask, view.cover).sum() / np.maximum(mask, view.cover).sum())
    iou = np.array(overlap)
    asked = shapes.SHAPES.index(shape)
    share = np.exp((iou - iou.max()) / 0.03)
    return float(0.5 * bell(1.0 - iou[asked], 0.4) + 0.5 * share[asked] / share.sum())


def direction_match(view: View, direction: str) -> float:
    """Match of the direction, ((1 + cos) / 2)^2 of the angle, 0 for an object that does not move.

    1 along the asked direction, 1/4 across it, 0 against it.
    """
    along = velocity(view) * (len(view.centroid) - 1)
    moved = float(np.sqrt((along**2).sum()))
    cosine = float((along * np.array(shapes.DIRECTIONS[direction])).sum()) / (moved + 1e-9)
    # 0.8 px: what jitter alone may add up to
    return (0.5 + 0.5 * cosine) ** 2 * moved**2 / (moved**2 + 0.8**2)


def text_alignment(view: View, meaning: shapes.Meaning) -> float:
    """Square of the mean of the three matches, so that the last mistake counts most.

    0 for an empty clip.
    """
    matches = (
        colour_match(view, meaning.colour),
        shape_match(view, meaning.shape),
        direction_match(view, meaning.direction),
    )
    return float(view.presence.mean()) * (sum(matches) / len(matches)) ** 2


class TinyWorld(Reward):
    """The reward of the tiny world.

    A prompt that is no caption of this world makes its clip invalid.
    """

    names: tuple[str, ...] = PARTS
    # scores of the drawn golden clip
    golden_scores: Mapping[str, float] = {"VQ": 0.978119, "MQ": 0.999504, "TA": 0.992966}

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """VQ, MQ and TA of B clips, float32 [B] in [0, 1].

        pixels: uint8 [B, F, N, N, 3], F >= 3;  prompts: B captions
        fps: frames per second, above 0
        Each clip is judged alone, so batching changes no bit.
        Raises ValueError for pixels of another form or a count that does not fit the prompts.
        """
        check(pixels, prompts, fps)
        values = np.full((len(prompts), len(PARTS)), np.nan, dtype=np.float32)
        for i, prompt in enumerate(prompts):
            meaning = shapes.parse(prompt)
            if meaning is None:
                continue
            view = look(pixels[i].numpy())
            speed = shapes.SPEEDS[meaning.speed] * shapes.FPS / fps
            values[i] = (
                visual_quality(view),
                motion_quality(view, speed),
                text_alignment(view, meaning),
            )
        scores = torch.from_numpy(values)
        return Scores(
            {name: scores[:, n].clone() for n, name in enumerate(PARTS)}, ~scores.isnan().any(1)
        )

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes for one clip: its masks at eight points of every pixel, in float64."""
        return 240.0 * frames * height * width


def check(pixels: Tensor, prompts: Sequence[str], fps: float) -> None:
    """Raise ValueError where the arguments are not clips that these rules can judge.

    pixels: uint8 [B, F, N, N, 3], F >= 3;  prompts: B texts;  fps: above 0
    """
    form = f"{pixels.dtype} {list(pixels.shape)}"
    if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[-1] != 3:
        raise ValueError(
            f"pixels={form}: expected torch.uint8 [B, F, H, W, 3]; convert the clips first"
        )
    if pixels.shape[1] < LEAST_FRAMES or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(
            f"pixels={form}: tiny_world judges motion on a square canvas; give at least "
            f"{LEAST_FRAMES} frames of equal sides"
        )
    if len(prompts) != len(pixels):
        raise ValueError(
            f"prompts={len(prompts)}: there are {len(pixels)} clips; give one prompt for each"
        )
    if not fps > 0.0:
        raise ValueError(f"fps={fps}: must be above 0; say how fast the clips play")


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for options, of which this reward has none."""
    options.refuse(spec)


def load(spec: RewardSpec) -> TinyWorld:
    """The reward of the file's name."""
    check_spec(spec)
    return TinyWorld()
