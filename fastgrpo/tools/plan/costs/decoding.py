"""What a decode covers, and what it keeps where the reward's gradient goes back through it."""

import math

from fastgrpo.core.config import Recipe, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB
from fastgrpo.models.sizes.family_plan import AuxiliaryModels
from fastgrpo.tools.plan.gpus import GPUS
from fastgrpo.training import methods


def covered(vae: AuxiliaryModels, video: Video) -> int:
    """Pixels that tiles cover in decoding a clip, overlaps counted twice."""
    size = (video.frames, video.height, video.width)
    if vae.tile is None:
        return math.prod(size)
    cut = _cut(vae, video)
    axes = zip(size, vae.tile, vae.stride, (cut[0], cut[1], cut[1]), strict=True)
    return math.prod(_tiled(length, t, s) if tiled else length for length, t, s, tiled in axes)


def in_tiles(vae: AuxiliaryModels, video: Video) -> bool:
    """Whether a clip is decoded in several tiles."""
    return any(_cut(vae, video))


def _cut(vae: AuxiliaryModels, video: Video) -> tuple[bool, bool]:
    """Whether tiles cut a clip in time, and in space: in both of its directions where one side is
    longer than a tile.
    """
    if vae.tile is None:
        return False, False
    frames, height, width = vae.tile
    return video.frames > (vae.uncut_frames or frames), video.height > height or video.width > width


def _tiled(length: int, tile: int, stride: int) -> int:
    """Places that tiles of an axis cover, overlaps counted twice: one begins at each stride."""
    return sum(min(tile, length - start) for start in range(0, length, stride))


def untiled(vae: AuxiliaryModels, recipe: Recipe) -> float:
    """Bytes of decoding one clip in one piece, beyond weights and latent."""
    video, element = recipe.video, vae.vae_bytes or (4 if recipe.model.dtype == "float32" else 2)
    return (
        video.frames
        * video.height
        * video.width
        * (vae.decode_bytes * element / 2 + 3 * (2 * element + 4 + 1))
    )


def graph(vae: AuxiliaryModels, recipe: Recipe) -> float:
    """Bytes that decoding one clip keeps for its backward: of all tiles, since none is done before
    the judge has seen the clip. 0 where the family does not say.
    """
    element = 4 if recipe.model.dtype == "float32" else 2
    return covered(vae, recipe.video) * vae.graph_bytes * element / 2


def check_graph(recipe: Recipe, vae: AuxiliaryModels) -> None:
    """Raise UserError where the method keeps a clip's decoding, and no GPU has room for it."""
    if not methods.traits(recipe).differentiates:
        return
    kept, most = graph(vae, recipe) / GIB, max(card.memory_gib for card in GPUS)
    if kept > most:
        video = recipe.video
        raise UserError(
            f"objective.kind={recipe.objective.kind}: goes back through the decoding of whole clips, "
            f"which keeps {kept:,.0f} GiB for one of {video.frames} x {video.height} x "
            f"{video.width}, where GPUs have {most:.0f} GiB at most; use smaller or shorter clips, "
            "or objective.kind=grpo."
        )
