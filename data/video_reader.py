"""Video files to pixels: the one reader, for scores, reference images, reports and trackers.

Frames come out as a player shows them: turned and mirrored as the display matrix says, with square
pixels, transparent parts over white. decord has random access and reads the plain files; PyAV reads
the files that decord reads wrongly or not at all. The file alone decides which, and where both can
read it their pixels are equal, so that a frame is the same for every use.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgrpo.core.files import is_lfs_pointer

# what decord's FFmpeg reads as PyAV's does, bit for bit: upright, square pixels, from time 0
PLAIN_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9")
PLAIN_FORMAT = "yuv420p"
# FFmpeg's own decoders of these skip the alpha channel
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
WIDEST_PIXEL = 8  # of a pixel's width to its height or the reverse: more is damage
UNREADABLE = "neither a picture nor a video, or damaged"

Frame = NDArray[np.uint8]  # [H, W, 3]


class VideoError(ValueError):
    """What is wrong with a video file, without the file's name."""


@dataclass(frozen=True)
class Footage:
    """Frames of a file."""

    pixels: Tensor  # uint8 [F, H, W, 3]
    fps: float  # frames per second; 0: the file says none
    decoder: str  # what read them: decord or PyAV


def read(path: Path | bytes, indices: Sequence[int] | None = None) -> Footage:
    """The frames of a video file, or of the content of one.

    indices: which frames, in ascending order (all when None)
    Raises OSError for a file that cannot be opened, VideoError for one that is no video, is
    damaged, ends early (where all frames are asked for) or has fewer frames than asked for.
    """
    wanted = None if indices is None else list(indices)
    if wanted is not None and (wanted != sorted(set(wanted)) or any(i < 0 for i in wanted)):
        raise ValueError(f"indices={wanted}: give frame numbers from 0 up, in ascending order")
    if isinstance(path, Path) and is_lfs_pointer(path):
        raise VideoError("a pointer of git-lfs and not the file, get it with git lfs pull")
    try:
        with _open(path) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise VideoError("it has no pictures")
            fps = float(stream.average_rate or 0)
            plain = _is_plain(container, stream)
        packets = _packets(path) if wanted is None else None
        frames = None
        if plain and isinstance(path, Path):
            frames = _by_decord(path, wanted, packets)
        decoder = "PyAV" if frames is None else "decord"
        if frames is None:
            frames = _by_pyav(path, wanted)
    except (av.error.InvalidDataError, av.error.EOFError, IndexError):
        raise VideoError(UNREADABLE) from None
    except av.FFmpegError as error:
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            raise
        raise VideoError(f"{error.strerror or error}") from None
    return Footage(torch.from_numpy(frames), fps, decoder)


def _open(path: Path | bytes) -> Any:
    """The container of a file, whose tags may be in any encoding. Raises av.FFmpegError."""
    source = io.BytesIO(path) if isinstance(path, bytes) else str(path)
    return av.open(source, metadata_errors="replace")


def _is_plain(container: Any, stream: VideoStream) -> bool:
    """Whether decord reads the file rightly. Decodes its first frame, which has the rotation."""
    frame = next(container.decode(stream), None)
    if frame is None:
        raise VideoError(UNREADABLE)
    return (
        stream.codec_context.name in PLAIN_CODECS
        and frame.format.name == PLAIN_FORMAT
        and _display_matrix(frame) == (1, 0, 0, 1)
        and _pixel_aspect(stream) == 1
        and not stream.start_time
        and stream.metadata.get("alpha_mode") != "1"
    )


def _packets(path: Path | bytes) -> int:
    """The number of compressed frames of a file.

    Raises VideoError where the last one ends before the time that the file declares.
    """
    with _open(path) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, VideoStream)
        declared, base = _declared_seconds(container, stream), stream.time_base or Fraction(1)
        spans = [
            (packet.pts, packet.pts + (packet.duration or 0))
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None
        ]
    if not spans:
        return 0
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    seconds, count = float((last - first) * base), len(spans)
    # MP4 counts frames that its edit list leaves out, too
    total = 0 if "mp4" in container.format.name else stream.frames
    if declared > seconds + 1.5 * max(seconds / count, 1e-3):
        total = max(total, round(declared * count / seconds) if seconds else count + 1)
    if total > count:
        raise VideoError(f"it ends early, {count} frames of about {total} are there")
    return count


def _declared_seconds(container: Any, stream: VideoStream) -> float:
    """How long the file says that its frames go on; 0: it says nothing of the frames alone."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")  # Matroska's, as 00:00:05.000000000
    try:
        hours, minutes, seconds = map(float, parts)
        return 3600 * hours + 60 * minutes + seconds
    except ValueError:
        alone = len(container.streams) == 1 and container.duration is not None
        return float(container.duration / av.time_base) if alone else 0.0


def _by_decord(path: Path, wanted: list[int] | None, packets: int | None) -> Frame | None:
    """Frames [F, H, W, 3] by decord; None where its result is not what the file holds."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if packets is not None and len(reader) != packets:
            return None
        numbers = list(range(len(reader))) if wanted is None else wanted
        if not numbers or numbers[-1] >= len(reader):
            return None  # PyAV says how many there are
        frames: Frame = reader.get_batch(numbers).asnumpy()
    except (RuntimeError, IndexError, decord.DECORDError):
        return None
    right = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[::3] == (len(numbers), 3)
    return frames if right else None


def _by_pyav(path: Path | bytes, wanted: list[int] | None) -> Frame:
    """Frames [F, H, W, 3] by PyAV; decoding stops after the last one that is wanted."""
    chosen: list[Frame] = []
    count = 0
    with _open(path) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, VideoStream)
        aspect = _pixel_aspect(stream)
        for frame in _decoded(container, stream):
            if wanted is None or count in wanted:
                chosen.append(_as_shown(frame, aspect))
            count += 1
            if wanted and count > wanted[-1]:
                break
    if not chosen or (wanted is not None and len(chosen) < len(wanted)):
        asked = wanted[-1] if wanted else 0
        raise VideoError(f"frame {asked} was asked for, but it has only {count} frames")
    if any(frame.shape != chosen[0].shape for frame in chosen):
        raise VideoError("its frames change their size")
    return np.stack(chosen)


def _decoded(container: Any, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """The frames in the order of showing, with their alpha channel where the file has one."""
    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or name not in ALPHA_DECODERS:
        yield from container.decode(stream)
        return
    decoder: Any = av.CodecContext.create(ALPHA_DECODERS[name], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _as_shown(frame: av.VideoFrame, aspect: Fraction) -> Frame:
    """A decoded frame as a player shows it.

    aspect: width of a pixel over its height;  returns uint8 [H, W, 3]
    """
    if any(component.is_alpha for component in frame.format.components):
        picture = Image.fromarray(frame.to_ndarray(format="rgba"))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    else:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if aspect != 1:  # the longer side of a pixel is filled up: nothing is thrown away
        width, height = picture.size
        wide, high = max(aspect, Fraction(1)), max(1 / aspect, Fraction(1))
        size = (round(width * wide), round(height * high))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return _turned(np.array(picture), _display_matrix(frame))


def _turned(frame: Frame, matrix: tuple[int, ...]) -> Frame:
    """A frame under x' = a x + c y, y' = b x + d y.

    frame: uint8 [H, W, 3];  matrix: (a, b, c, d) of -1, 0 and 1;  returns uint8 [H, W, 3] or
    [W, H, 3]
    """
    a, b, c, d = matrix
    if a == 0:
        frame, (a, d) = frame.transpose(1, 0, 2), (c, b)
    return np.ascontiguousarray(frame[:: d or 1, :: a or 1])


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the frame's display matrix, each -1, 0 or 1.

    Raises VideoError where it does more than turn by quarters and mirror.
    """
    side_data: Any = frame.side_data
    for data in side_data:
        if data.type == SideDataType.DISPLAYMATRIX:
            exact = np.frombuffer(bytes(data), dtype="<i4")[[0, 1, 3, 4]] / 65536
            a, b, c, d = (round(value) for value in exact)
            quarter = abs(a) == abs(d) != abs(b) == abs(c)
            if not quarter or abs(exact - (a, b, c, d)).max() > 0.01:
                raise VideoError("it is to be turned by other than quarters")
            return a, b, c, d
    return 1, 0, 0, 1


def _pixel_aspect(stream: VideoStream) -> Fraction:
    """Width of a pixel over its height; 1 where the file says none."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        raise VideoError(f"its pixels are {aspect.numerator}:{aspect.denominator} in shape")
    return Fraction(aspect)
