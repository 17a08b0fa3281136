"""Clips to MP4 that every browser plays, pictures, and sheets of frames.

Pixels are uint8 `[F, H, W, 3]`, RGB, as a torch tensor or a numpy array. The files are H.264,
yuv420p, BT.709 and tagged as such, so that players and `video_reader` agree on the colours. The bytes
depend on the pixels, the frame rate and the version of the encoder only: no date, no thread count.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from fastgrpo.data.lettering import lettering

Pixels = Tensor | NDArray[np.uint8]

# clips with a shorter side are enlarged: H.264 would smear their colours and players blur them
SMALLEST_SIDE = 192
# x264's quality: visually lossless for flat colours, a few hundred kB for 73 frames of 480x480
CRF = "16"
# one thread: the same bytes on every machine; no B-frames: the first frame is at time 0
X264 = {"crf": CRF, "preset": "medium", "bf": "0", "threads": "1"}


def mp4_bytes(pixels: Pixels, fps: float) -> bytes:
    """A clip as the bytes of an MP4 file; the same clip always gives the same bytes.

    pixels: uint8 [F, H, W, 3], F >= 1;  fps: frames per second, > 0
    A short side under 192 pixels is enlarged by a whole factor (nearest neighbour, 32 -> 192); odd
    sides then get one more row or column, because yuv420p needs even ones.
    ValueError: another shape, dtype or frame rate.
    """
    frames = _presentable(as_array(pixels, dimensions=4))
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps}: frames per second must be above 0 and at most 1000")
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        for array in frames:
            rgb = av.VideoFrame.from_ndarray(array, format="rgb24")
            container.mux(stream.encode(_to_yuv(rgb)))
        container.mux(stream.encode(None))
    return file.getvalue()


def write_mp4(path: Path, pixels: Pixels, fps: float) -> None:
    """Write `mp4_bytes(pixels, fps)` to a file, making its folder where there is none.

    pixels: uint8 [F, H, W, 3];  fps: frames per second
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mp4_bytes(pixels, fps))


def contact_sheet(
    clips: Tensor | NDArray[np.uint8], labels: Sequence[str] | None = None, smallest_side: int = 64
) -> Image.Image:
    """Clips as one picture: a row for each clip, a column for each frame, a label over each row.

    clips: uint8 [N, F, H, W, 3];  labels: N texts, shortened with an ellipsis where they do not fit
    smallest_side: frames with a shorter side are enlarged by a whole factor to at least this many
    pixels
    """
    array = as_array(clips, dimensions=5)
    if labels is not None and len(labels) != len(array):
        raise ValueError(
            f"labels={len(labels)} texts: there are {len(array)} clips; give one text for each"
        )
    array = _enlarge(array, smallest_side)
    count, frames, height, width = array.shape[:4]
    gap, head = 4, 0 if labels is None else 20
    size = (frames * (width + gap) + gap, count * (head + height + gap) + gap)
    sheet = Image.new("RGB", size, (246, 246, 244))
    pen, (font, texts) = ImageDraw.Draw(sheet), lettering(labels or (), 13)
    for n, clip in enumerate(array):
        top = gap + n * (head + height + gap)
        if labels is not None:
            text = texts[n]
            while pen.textlength(text, font=font) > size[0] - 2 * gap and len(text) > 1:
                text = text[:-2] + "…"
            pen.text((gap, top + head / 2), text, fill=(40, 40, 44), font=font, anchor="lm")
        for f, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame), (gap + f * (width + gap), top + head))
    return sheet


def write_png(path: Path, pixels: Pixels) -> None:
    """Write one image, uint8 [H, W, 3], as PNG, making its folder when there is none."""
    array = as_array(pixels, dimensions=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format="PNG")


def as_array(pixels: Pixels, dimensions: int) -> NDArray[np.uint8]:
    """The pixels as a numpy array [..., H, W, 3] on the CPU.

    ValueError: wrong shape, no pixels or not uint8.
    """
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    if array.dtype != np.uint8:
        raise ValueError(
            f"pixels of dtype {array.dtype}: must be uint8; scale to 0..255, round and cast first"
        )
    if array.ndim != dimensions or array.shape[-1] != 3 or array.size == 0:
        layout = ["N", "F", "H", "W", "3"][-dimensions:]
        raise ValueError(
            f"pixels of shape {list(array.shape)}: must be [{', '.join(layout)}] with at least one "
            "pixel"
        )
    return array


def _presentable(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] with sides of at least SMALLEST_SIDE and of an even number of pixels."""
    large = _enlarge(frames, SMALLEST_SIDE)
    height, width = large.shape[1:3]
    return np.pad(large, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _enlarge(frames: NDArray[np.uint8], smallest_side: int) -> NDArray[np.uint8]:
    """Frames [..., H, W, 3] with sides of at least `smallest_side`, by a whole factor."""
    factor = -(-smallest_side // min(frames.shape[-3:-1]))
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2) if factor > 1 else frames


def _to_yuv(rgb: av.VideoFrame) -> av.VideoFrame:
    return rgb.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
