"""Rules that judge clips of the tiny world: visual quality, motion quality and text alignment.

Every score is made of bell-shaped marks in physical units (pixels of the 32-pixel canvas, steps of
the 0..255 colour scale), so it changes a little when the pixels change a little, and a bad clip
still tells a worse one apart. Only a clip without any object gets exactly nothing. So they have a
gradient, too, which passes by what is chosen or counted: the nearest colour, the masks of shapes.

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
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.common import options

LEAST_FRAMES = 3  # for a path
PARTS = ("VQ", "MQ", "TA")
DIFFERENTIABLE = True
FAINTEST = 110.0
"""Colour distance from the background below which an object is only partly there.

The palette's colours are 159 to 286 away.
"""
OBJECT_REACH = 11.0  # canvas pixels from its centroid that every shape stays within
PERIMETER = 3.3  # most edge, sum of 4a(1 - a), of a drawn shape per square root of its area
SPREAD = 0.2  # most second moment of a drawn shape (the triangle) per square of its area
PALETTE = torch.tensor(list(shapes.COLOURS.values()), dtype=torch.float64)  # [6, 3]


@dataclass(frozen=True, kw_only=True)
class View:
    """Measurements of a clip, for the rules, float64; lengths in pixels of the 32-pixel canvas."""

    rgb: Tensor  # [F, N, N, 3], 0..255
    distance: Tensor  # [F, N, N] colour distance from the background
    cover: Tensor  # [F, N, N] how much of a pixel the object covers, 0..1
    colour: Tensor  # [3] mean colour of the object's interior over the clip
    area: Tensor  # [F] square pixels
    centroid: Tensor  # [F, 2] (x, y)
    radius: Tensor  # [F, N, N] distance of each pixel's centre from the centroid
    presence: Tensor  # [F] 0..1, is there an object


def bell(error: Tensor, tolerance: float) -> Tensor:
    """1 / (1 + (error / tolerance)^2): 1 at no error, 1/2 at the tolerance, a long tail beyond.

    error: [...];  returns like it
    """
    return 1.0 / (1.0 + (error / tolerance) ** 2)


def smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    """0 below low, 1 above high, a cubic without corners between.  x: [...];  returns like it"""
    s = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return s * s * (3.0 - 2.0 * s)


def root(squares: Tensor) -> Tensor:
    """The square root, with a finite slope at 0.  squares: [...];  returns like it"""
    return (squares + 1e-12).sqrt()


def eighth(x: Tensor) -> Tensor:
    """x to the eighth, by squares, which are quicker than a power.  x: [...];  returns like it"""
    return x.square().square().square()


def over_colours(values: Tensor) -> Tensor:
    """The sum over the last dimension; `sum` is slow for as few as three values.

    values: [..., 3];  returns [...]
    """
    red, green, blue = values.unbind(-1)
    return red + green + blue


def look(pixels: Tensor) -> View:
    """Find the object: whatever differs from the background.

    pixels: [F, N, N, 3], 0..255
    """
    rgb = pixels.double()
    size = rgb.shape[1]
    distance = root(over_colours((rgb - torch.tensor(shapes.BACKGROUND)) ** 2))
    # the interior, not the edge, says how strong the object's colour is
    weight = distance.square().square()
    strength = (weight * distance).sum() / (weight.sum() + 1e-9)
    share = (distance / strength.clamp(min=FAINTEST)).clamp(max=1.0)
    # in proportion, so the centroid is exact; faint noise is no object
    cover = share * smoothstep(share, 0.08, 0.35)
    inside = eighth(share)
    shades = torch.stack([(inside * shade).sum() for shade in rgb.unbind(-1)])
    colour = shades / (inside.sum() + 1e-30)

    pixel = (shapes.CANVAS / size) ** 2
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * shapes.CANVAS / size
    total = cover.sum((1, 2))
    # A pinch of weight in the canvas' middle keeps the centroid defined, and smooth, as an object
    # fades away.
    pinch = 0.01 / pixel
    x = ((cover.sum(1) * axis).sum(1) + pinch * shapes.CANVAS / 2) / (total + pinch)
    y = ((cover.sum(2) * axis).sum(1) + pinch * shapes.CANVAS / 2) / (total + pinch)
    radius = root(
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
        centroid=torch.stack([x, y], 1),
        radius=radius,
        presence=presence,
    )


def palette_distance(colour: Tensor) -> Tensor:
    """Distance of a colour, float64 [..., 3], from each colour of the palette: [..., 6]."""
    return root(((colour[..., None, :] - PALETTE) ** 2).sum(-1))


def visual_quality(view: View) -> Tensor:
    """Visual quality, 0 to 1, mean over frames.

    Crisp edge, plain background, plain palette colour, one compact object of the right area.
    returns a scalar
    """
    pixel = (shapes.CANVAS / view.rgb.shape[1]) ** 2
    root_area = (view.area + 1.0).sqrt()

    # An edge one pixel wide has a known amount of half-covered pixels; a blurred one has more.
    edge = (4.0 * view.cover * (1.0 - view.cover)).sum((1, 2)) * pixel**0.5 / root_area
    crisp = bell((edge - PERIMETER).clamp(min=0.0), 4.0)

    outside = smoothstep(view.radius, OBJECT_REACH - 1.5, OBJECT_REACH)
    dirt = root((outside * view.distance**2).sum((1, 2)) / (outside.sum((1, 2)) + 1e-9))
    clean = bell(dirt, 18.0)

    paint = PALETTE[palette_distance(view.colour).argmin()]
    inside = eighth(view.cover)
    off = root(
        (inside * over_colours((view.rgb - paint) ** 2)).sum((1, 2)) / (inside.sum((1, 2)) + 1e-30)
    )
    plain = bell(off, 55.0)

    usual = sum(shapes.area(s) for s in shapes.SHAPES) / len(shapes.SHAPES)
    right_area = bell(((view.area + 1.0) / (usual + 1.0)).log(), 0.45)
    moment = (view.cover * view.radius**2).sum((1, 2)) * pixel / (view.area + 1.0)
    compact = bell((moment / (view.area + 1.0) - SPREAD).clamp(min=0.0), 0.15)
    return (view.presence * crisp * clean * plain * right_area * compact).mean()


def velocity(view: View) -> Tensor:
    """Least-squares slope of the path, canvas pixels per frame: float64 [2], (x, y)."""
    time = torch.arange(len(view.centroid), dtype=torch.float64) - (len(view.centroid) - 1) / 2
    return (time[:, None] * view.centroid).sum(0) / (time**2).sum()


def motion_quality(view: View, speed: float) -> Tensor:
    """Motion quality, 0 to 1: a smooth path at the asked speed, with the object in every frame.

    speed: canvas pixels per frame;  returns a scalar
    """
    second = view.centroid.diff(n=2, dim=0)
    smooth = bell(root((second**2).sum(1).mean()), 1.2)
    actual = root((velocity(view) ** 2).sum())
    # the same for twice and half: an error of 1/3
    right_speed = bell((actual - speed) / (actual + speed), 0.2)
    # harmonic mean: an empty frame in nine leaves 0.28
    there = 1.0 / (1.0 / (view.presence + 0.05)).mean() - 0.05
    return smooth * right_speed * there


def colour_match(view: View, colour: str) -> Tensor:
    """Match of the colour, 0 to 1.

    Half for being near the asked colour, half for being nearer to it than to the others.
    returns a scalar
    """
    away = palette_distance(view.colour)
    asked = list(shapes.COLOURS).index(colour)
    share = (-away / 20.0).softmax(0)
    return 0.5 * bell(away[asked], 70.0) + 0.5 * share[asked]


def shape_match(view: View, shape: str) -> Tensor:
    """Match of the shape, 0 to 1.

    Half for the overlap with the asked shape, half for overlapping it more than the others.
    returns a scalar
    """
    size = view.rgb.shape[1]
    # Coverage from eight points of a pixel, no two in a row or column: an upright edge gets eight
    # levels, not three.
    column, row = np.arange(8), np.arange(8) * 3 % 8
    nudges = (np.stack([column, row], 1)[:, None] - 3.5) / 8 * shapes.CANVAS / size
    centres = (view.centroid.detach().numpy()[None] - nudges).reshape(-1, 2)
    overlap = []
    for candidate in shapes.SHAPES:
        points = torch.from_numpy(shapes.shape_mask(candidate, centres, size, supersample=1))
        mask = points.reshape(len(nudges), *view.cover.shape).mean(0)
        both, either = torch.minimum(mask, view.cover), torch.maximum(mask, view.cover)
        overlap.append(both.sum() / either.sum())
    iou = torch.stack(overlap)
    asked = shapes.SHAPES.index(shape)
    share = (iou / 0.03).softmax(0)
    return 0.5 * bell(1.0 - iou[asked], 0.4) + 0.5 * share[asked]


def direction_match(view: View, direction: str) -> Tensor:
    """Match of the direction, ((1 + cos) / 2)^2 of the angle, 0 for an object that does not move.

    1 along the asked direction, 1/4 across it, 0 against it.
    returns a scalar
    """
    along = velocity(view) * (len(view.centroid) - 1)
    moved = root((along**2).sum())
    cosine = (along * torch.tensor(shapes.DIRECTIONS[direction])).sum() / (moved + 1e-9)
    # 0.8 px: what jitter alone may add up to
    return (0.5 + 0.5 * cosine) ** 2 * moved**2 / (moved**2 + 0.8**2)


def text_alignment(view: View, meaning: shapes.Meaning) -> Tensor:
    """Square of the mean of the three matches, so that the last mistake counts most.

    0 for an empty clip.  returns a scalar
    """
    matches = (
        colour_match(view, meaning.colour),
        shape_match(view, meaning.shape),
        direction_match(view, meaning.direction),
    )
    return view.presence.mean() * torch.stack(matches).mean() ** 2


def judge(clip: Tensor, meaning: shapes.Meaning, fps: float) -> Tensor:
    """The three parts of one clip.  clip: [F, N, N, 3], 0..255;  returns float64 [3]"""
    view = look(clip)
    speed = shapes.SPEEDS[meaning.speed] * shapes.FPS / fps
    parts = visual_quality(view), motion_quality(view, speed), text_alignment(view, meaning)
    return torch.stack(parts)


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
        scores = self.differentiable(pixels, prompts, fps)
        return Scores(scores, torch.stack([*scores.values()]).isfinite().all(0))

    def differentiable(
        self, frames: Tensor, prompts: Sequence[str], fps: float
    ) -> dict[str, Tensor]:
        """The same of frames that need not be whole numbers, with their gradient.

        frames: [B, F, N, N, 3], 0..255;  returns float32 [B] by part, NaN for a prompt that is no
        caption of this world
        """
        frames, nothing = frames.cpu(), torch.full((len(PARTS),), float("nan"))
        rows = []
        for clip, prompt in zip(frames, prompts, strict=True):
            meaning = shapes.parse(prompt)
            rows.append(nothing if meaning is None else judge(clip, meaning, fps).float())
        scores = torch.stack(rows).unbind(1)
        return dict(zip(PARTS, scores, strict=True))

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
