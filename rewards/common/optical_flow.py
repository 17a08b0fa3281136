"""How far every pixel moves from frame to frame, in plain torch.

Least squares of Lucas and Kanade 1981, from coarse to fine; the pyramid and the warped iterations
as in Bouguet 2000, at every pixel, and the answer smoothed after every round, without which an
edge's unseen motion along itself grows. Exact enough to tell still from moving and steady from
jerky; what is smaller than the windows moves with its surroundings.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

WINDOW = 7  # pixels whose motion is taken as one
ROUNDS = 3  # warped iterations per level
SMOOTH = 9  # pixels over which each round's answer is averaged
SMALLEST = 12  # a level with a shorter side holds too little to match
# (luma per pixel)^2: where the picture is flatter than that, the coarser level's answer stays
STIFFNESS = 1e-4


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Displacement u with second(x + u(x)) = first(x).

    first, second: luma in [0, 1], float32 [N, H, W].  returns float32 [N, 2, H, W], pixels, (x, y)
    """
    levels = [(first[:, None], second[:, None])]
    while min(levels[-1][0].shape[-2:]) >= 2 * SMALLEST:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    u = torch.zeros(len(first), 2, *levels[-1][0].shape[-2:])
    for a, b in reversed(levels):
        size = a.shape[-2:]
        grow = torch.tensor([size[1] / u.shape[-1], size[0] / u.shape[-2]]).reshape(1, 2, 1, 1)
        u = F.interpolate(u, size, mode="bilinear", align_corners=False) * grow
        u = _refine(a, b, u)
    return u


def _refine(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """The displacement of one level, from the coarser level's.

    a, b: float32 [N, 1, H, W], luma;  u: float32 [N, 2, H, W], pixels.  returns the same as u
    Solve (sum of g g^T + stiffness) du = sum of g (a - b(x + u)) over each window, smooth, repeat.
    What leaves the picture is not compared; there the neighbours' answer spreads.
    """
    gradient = _gradient(a)
    xx, yy, xy = (
        local_mean(gradient[:, i : i + 1] * gradient[:, j : j + 1], WINDOW)
        for i, j in ((0, 0), (1, 1), (0, 1))
    )
    xx, yy = xx + STIFFNESS, yy + STIFFNESS
    for _ in range(ROUNDS):
        difference = (a - warp(b, u)) * inside(u)
        px, py = local_mean(gradient * difference, WINDOW).split(1, dim=1)
        step = torch.cat([yy * px - xy * py, xx * py - xy * px], 1) / (xx * yy - xy**2)
        # beyond a pixel the linear model no longer holds
        u = local_mean(u + step.clamp(-1, 1), SMOOTH)
    return u


def warp(picture: Tensor, u: Tensor) -> Tensor:
    """picture(x + u(x)), bilinear, its border continued outside: float32 [N, C, H, W].

    picture: float32 [N, C, H, W];  u: float32 [N, 2, H, W], pixels
    """
    height, width = picture.shape[-2:]
    x = (torch.arange(width) + u[:, 0] + 0.5) * 2 / width - 1
    y = (torch.arange(height)[:, None] + u[:, 1] + 0.5) * 2 / height - 1
    grid = torch.stack([x, y], -1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inside(u: Tensor) -> Tensor:
    """Whether x + u(x) lies in the picture: bool [N, 1, H, W].

    u: float32 [N, 2, H, W], pixels
    """
    height, width = u.shape[-2:]
    x, y = torch.arange(width) + u[:, :1], torch.arange(height)[:, None] + u[:, 1:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _gradient(a: Tensor) -> Tensor:
    """Central differences of a picture, float32 [N, 1, H, W]: [N, 2, H, W], (x, y), per pixel."""
    wide = F.pad(a, (1, 1, 1, 1), mode="replicate")
    x = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    y = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return torch.cat([x, y], 1)


def local_mean(values: Tensor, side: int) -> Tensor:
    """Mean over the square of an odd `side` around each pixel, as much of it as there is.

    values: float32 [N, C, H, W].  returns the same
    """
    across = F.avg_pool2d(
        values, (1, side), stride=1, padding=(0, side // 2), count_include_pad=False
    )
    return F.avg_pool2d(
        across, (side, 1), stride=1, padding=(side // 2, 0), count_include_pad=False
    )


def between(luma: Tensor, longest: int) -> Tensor:
    """Flow between neighbouring frames, seen at a longest side of at most `longest` pixels.

    luma: float32 [F, H, W] in [0, 1], F >= 2.
    returns float32 [F - 1, 2, h, w], in pixels of that size
    """
    scale = longest / max(luma.shape[-2:])
    if scale < 1:
        size = tuple(max(round(side * scale), 1) for side in luma.shape[-2:])
        luma = rearrange(F.interpolate(luma[:, None], size, mode="area"), "f 1 h w -> f h w")
    return flow(luma[:-1], luma[1:])
