"""How many frames of a clip VideoAlign looks at: for its pixels, its least clip and the planner.

The rule is that of the VideoAlign repository's vision_process.py. Nothing here imports torch.
"""

LEAST_FRAMES = 2
"""Frames that a clip must have: a single one shows no motion, and the reference raises at it."""

FEWEST, MOST = 4, 768
"""Bounds of the frames that are sampled.

A clip of fewer than FEWEST gives an even number of what it has.
"""

PUBLISHED_FPS = 2.0
"""Frames sampled per second of a clip by the published checkpoint's model_config.json."""


def sampled(frames: int, fps: float, wanted_fps: float) -> int:
    """Number of frames that are sampled of a clip, about wanted_fps per second.

    frames: of the clip;  fps: frames per second of the clip
    returns an even number, and 0 for a clip of fewer than LEAST_FRAMES.
    """
    most = min(MOST, frames) // 2 * 2
    count = min(max(frames / fps * wanted_fps, FEWEST), most)
    return min(round(count / 2) * 2, frames)  # round: halves to even, as in the reference
