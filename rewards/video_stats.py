"""Measurements of a clip without any weights: rewards by rule, and monitors of reward hacking.

  motion        band(speed) x smoothness: moving, not too fast, and steadily. A still clip is
                perfectly smooth, so smoothness alone would reward it; the product does not
  speed         mean over the frame pairs of the mean of the fastest 5 % of the pixels, in frame
                heights per second (as VBench's dynamic degree, Huang et al. 2024)
  smoothness    1 - sum |v'(x + v) - v| / sum (|v'(x + v)| + |v|), v and v' one pair's and the next
                one's flow: 1 for steady motion, towards 0 where neighbouring flows disagree
  flicker       mean of |m'' - 2 m' + m| / 2 over a frame's mean luma m and the next two: 0 for a
                steady fade, 1 for black and white in turn
  sharpness     Tenengrad (Krotkov 1987): mean of Gx^2 + Gy^2, Sobel's filters over 8, in (grey
                levels per pixel)^2. It likes noise and grids too: watch it beside `grid`
  colourfulness Hasler and Suesstrunk 2003: sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2),
                rg = R - G, yb = (R + G) / 2 - B, in colour levels; 0 for grey
  clipped       share of the channel values that are 0 or 255
  grid          share of the fine detail (luma less its 3 x 3 mean) that is the same in every tile
                of `grid_period` pixels: the pattern of reward hacking, at the network's patch size
                times the VAE's stride. By Parseval it is the energy on the lattice of frequencies
                k / period over that of all, less what chance gives
  jpeg          size of a frame as a JPEG, 1000 bytes (DDPO, Black et al. 2023, rewards - size /
                500); another build of Pillow's JPEG library gives other sizes

Luma is 0.299 R + 0.587 G + 0.114 B. The four temporal parts see every frame, the others those of
the spec (all of them, if it says nothing) and are means over them. One frame does not move: speed,
motion and flicker are 0 and smoothness is 1; two frames have a speed but, again, smoothness 1 and
flicker 0. So an image is always valid.
"""

import io
from collections.abc import Sequence
from typing import Annotated

import torch
from einops import rearrange
from PIL import Image
from pydantic import Field
from torch import Tensor

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.common import clips, frames, optical_flow, options, weight_files

PARTS = (
    "motion",
    "speed",
    "smoothness",
    "flicker",
    "sharpness",
    "colourfulness",
    "clipped",
    "grid",
    "jpeg",
)
WORSE_WHEN_HIGHER = ("flicker", "clipped", "grid")  # where they are monitors
SEEN = 160  # longest side at which motion is measured, pixels
FASTEST = 0.05  # share of the pixels that says how fast a clip is
UNMOVED = 1e-3  # pixels of that size per frame: less than that is no motion to be jerky

Positive = Annotated[float, Field(gt=0)]


class Options(Section):
    """`rewards.options` of video_stats.

    The band is a convention, not a measurement; set it for your clips.
    """

    slowest: Positive = 0.05
    """Frame heights per second; below it the band falls in proportion to the speed."""
    fastest: Positive = 1.0
    """Frame heights per second; above it the band falls as its inverse."""
    grid_period: Annotated[int, Field(ge=2)] = 16
    """Patch size times the VAE's stride, pixels: 2 x 8 in HunyuanVideo, FLUX and Wan."""
    jpeg_quality: Annotated[int, Field(ge=1, le=95)] = 95
    """Quality of the JPEG, as Pillow counts."""


class VideoStats(Reward):
    """Measurements of clips, each alone, so batching changes no bit; prompts are not read."""

    names: tuple[str, ...] = PARTS
    reads_prompts = False

    def __init__(self, settings: Options, rule: frames.Rule) -> None:
        self.settings = settings
        self.rule = rule
        self.fingerprint = weight_files.fingerprint([], settings.model_dump() | {"frames": rule})

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Measurements of B clips, float32 [B] for each part, all of them finite.

        pixels: uint8 [B, F, H, W, 3], sides of at least 3 pixels;  prompts: B texts, not read
        fps: frames per second, above 0
        Raises ValueError for other arguments.
        """
        clips.check(pixels, prompts)
        if min(pixels.shape[2:4]) < 3:
            raise ValueError(
                f"pixels={list(pixels.shape)}: a slope takes sides of at least 3 pixels; give "
                "larger clips"
            )
        if not fps > 0.0:
            raise ValueError(f"fps={fps}: must be above 0; say how fast the clips play")
        table = torch.tensor([self._measure(clip.cpu(), fps) for clip in pixels])
        values = {part: table[:, n].clone() for n, part in enumerate(PARTS)}
        return Scores(values, torch.isfinite(table).all(1))

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes for one clip: its optical flow, there and back, in float32."""
        return 64.0 * frames * height * width

    def _measure(self, clip: Tensor, fps: float) -> tuple[float, ...]:
        """The parts of one clip, uint8 [F, H, W, 3], in their order."""
        y = luma(clip)
        stills = frames.choose(self.rule, len(clip))
        v = optical_flow.between(y, SEEN) if len(clip) > 1 else torch.zeros(0, 2, 1, 1)
        quick, steady = speed(v, fps), smoothness(v)
        return (
            band(quick, self.settings.slowest, self.settings.fastest) * steady,
            quick,
            steady,
            flicker(y),
            sharpness(y[stills]),
            colourfulness(clip[stills]),
            clipped(clip[stills]),
            grid(y[stills], self.settings.grid_period),
            jpeg_size(clip[stills], self.settings.jpeg_quality),
        )


def luma(clip: Tensor) -> Tensor:
    """Luma by ITU-R BT.601 of a clip, uint8 [F, H, W, 3]: float32 [F, H, W] in [0, 1]."""
    return clip.float() @ (torch.tensor([0.299, 0.587, 0.114]) / 255)


def band(speed: float, slowest: float, fastest: float) -> float:
    """1 from slowest to fastest, speed / slowest below, fastest / speed above."""
    return min(speed / slowest, 1.0, fastest / max(speed, 1e-9))


def speed(v: Tensor, fps: float) -> float:
    """Frame heights per second of the fastest pixels that stay in view.

    v: float32 [F - 1, 2, H, W], pixels per frame
    """
    if not len(v):
        return 0.0
    length = (v.square().sum(1, keepdim=True).sqrt() * optical_flow.inside(v)).flatten(1)
    top = length.topk(max(round(FASTEST * length.shape[1]), 1), dim=1).values
    return float(top.mean()) * fps / v.shape[-2]


def smoothness(v: Tensor) -> float:
    """Likeness of each pixel's next motion to its last, 0 to 1, and 1 where no motion follows.

    v: float32 [F - 1, 2, H, W], pixels per frame
    """
    if len(v) < 2:
        return 1.0
    now, after = v[:-1], optical_flow.warp(v[1:], v[:-1])
    change, later, first = (u.square().sum(1).sqrt().mean() for u in (after - now, after, now))
    return 1.0 - float(change / (later + first + UNMOVED))


def flicker(y: Tensor) -> float:
    """Second differences of the frames' mean luma, 0 to 1.

    y: float32 [F, H, W], luma in [0, 1]
    """
    if len(y) < 3:
        return 0.0
    return float(y.mean((1, 2)).diff(n=2).abs().mean()) / 2


def sharpness(y: Tensor) -> float:
    """Tenengrad, (grey levels per pixel)^2.

    y: float32 [N, H, W], luma in [0, 1]
    """
    # Sobel's filters are separable, which is much less work
    columns = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    rows = y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]
    x_slope, y_slope = columns[..., 2:] - columns[..., :-2], rows[:, 2:] - rows[:, :-2]
    return float((x_slope.square() + y_slope.square()).mean()) * (255 / 8) ** 2


def colourfulness(stills: Tensor) -> float:
    """Hasler and Suesstrunk's M3, mean of the frames.

    stills: uint8 [N, H, W, 3]
    """
    red, green, blue = rearrange(stills.float(), "n h w c -> c n (h w)")
    opponent = torch.stack([red - green, (red + green) / 2 - blue])
    spread = opponent.var(-1, correction=0).sum(0).sqrt()
    return float((spread + 0.3 * opponent.mean(-1).square().sum(0).sqrt()).mean())


def clipped(stills: Tensor) -> float:
    """Share of the values that are 0 or 255.  stills: uint8 [N, H, W, 3]"""
    return float(((stills == 0) | (stills == 255)).float().mean())


def grid(y: Tensor, period: int) -> float:
    """Share of the fine detail that repeats every `period` pixels, 0 to 1.  y: [N, H, W]

    0 in a flat picture, and in one of fewer than two tiles, where nothing can be seen to repeat
    itself.

    With r the detail, r_k its K tiles of period x period pixels and m their mean: s = mean m^2 /
    mean r^2 is the energy on the lattice over all of it, 1/K for noise; so (s - 1/K) / (1 - 1/K),
    at least 0.
    """
    rows, columns = (side // period for side in y.shape[1:])
    if rows * columns < 2:
        return 0.0
    mean = optical_flow.local_mean(y[:, None], 3)[:, 0]
    detail = (y - mean)[:, : rows * period, : columns * period]
    detail = detail - detail.mean((1, 2), keepdim=True)
    tiles = rearrange(detail, "n (a p) (b q) -> n (a b) p q", p=period, q=period)
    energy = detail.square().mean((1, 2))
    # a 40th of a grey level is flat
    share = tiles.mean(1).square().mean((1, 2)) / energy.clamp_min(1e-10)
    chance = 1 / tiles.shape[1]
    return float(((share - chance) / (1 - chance)).mean().clamp(0, 1))


def jpeg_size(stills: Tensor, quality: int) -> float:
    """Mean size as a JPEG, 1000 bytes.  stills: uint8 [N, H, W, 3]"""
    total = 0
    for still in stills:
        file = io.BytesIO()
        Image.fromarray(still.numpy()).save(file, format="JPEG", quality=quality)
        total += file.tell()
    return total / 1000 / len(stills)


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings with which `load` would fail."""
    load(spec)


def load(spec: RewardSpec) -> VideoStats:
    """The reward of the file's name."""
    return VideoStats(options.parse(spec, Options), frames.rule_of(spec, "all"))
