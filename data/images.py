"""Reference images of image-to-video: read from a picture or a video, brought to the clips' size.

Resize and crop rule: the image is scaled, its aspect ratio kept, until it covers height x width;
what then sticks out is cut off, as much on one side as on the other. Nothing is squashed and no
border is added.
"""

import io
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import is_lfs_pointer
from fastgrpo.core.policy import StoredImage
from fastgrpo.data import prompt_formats, video_reader
from fastgrpo.data.video_reader import VideoError

# formats whose further frames are an animation; those of TIFF and MPO are other pictures
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# what Pillow raises, by format
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)


def read_image(file: Path | StoredImage, what: str = "reference image") -> Tensor:
    """A picture of any format that Pillow knows, or the first frame of a video, by its content.

    Turned as its EXIF tag says, transparent parts over white, 16-bit grey scaled to 8 bits. Raises
    UserError, which names the file, for one that is missing, damaged or neither.

    what: how messages call the file;  returns uint8 [H, W, 3], RGB
    """
    try:
        with Image.open(_source(file)) as picture:
            return _pixels(picture)
    except UnidentifiedImageError:
        return _first_frame(file, what)
    except DAMAGED as error:
        raise _unreadable(file, what, error) from None


def read_frames(file: Path, what: str) -> tuple[Tensor, float | None]:
    """Every frame of an animated picture, or the one of another, and its frames per second.

    Frames are as `read_image` has them. One that is shown n times as long as the shortest comes n
    times. Raises UserError, which names the file, where it is no picture or damaged.

    what: how messages call the file;  returns uint8 [F, H, W, 3], and None for a still picture; 0
    where an animation says no times
    """
    frames, times = [], []
    try:
        with Image.open(_source(file)) as picture:
            if picture.format not in ANIMATED or getattr(picture, "n_frames", 1) == 1:
                return _pixels(picture)[None], None
            for frame in ImageSequence.Iterator(picture):
                frames.append(_pixels(frame))
                times.append(float(frame.info.get("duration", 0)))  # milliseconds
    except UnidentifiedImageError:
        raise _unreadable(file, what, "no picture, or damaged") from None
    except DAMAGED as error:
        raise _unreadable(file, what, error) from None
    if min(times) <= 0:
        return torch.stack(frames), 0.0
    repeats = torch.tensor([round(time / min(times)) for time in times])
    return torch.stack(frames).repeat_interleave(repeats, 0), 1000 / min(times)


def cover(image: Tensor, height: int, width: int) -> Tensor:
    """The image in another size, by the module's rule, with Lanczos' filter.

    An image of this size is returned unchanged.

    image: uint8 [H, W, 3];  height, width: pixels;  returns uint8 [height, width, 3]
    """
    rows, columns = image.shape[:2]
    scale = max(height / rows, width / columns)
    # in pixels of the image, 0 on one axis
    left, top = (columns - width / scale) / 2, (rows - height / scale) / 2
    middle = (max(left, 0.0), max(top, 0.0), min(columns - left, columns), min(rows - top, rows))
    scaled = Image.fromarray(image.numpy()).resize(
        (width, height), Image.Resampling.LANCZOS, box=middle
    )
    return torch.from_numpy(np.array(scaled))


def _pixels(picture: Image.Image) -> Tensor:
    """The pixels of a picture.  returns uint8 [H, W, 3]

    Raises one of DAMAGED where the file ends early or its values do not fit 8 bits.
    """
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I;16"):
        grey: NDArray[np.uint8] = np.round(np.asarray(turned) / 257.0).astype(np.uint8)
        turned = Image.fromarray(grey)
    elif turned.mode in ("I", "F"):
        raise ValueError("its 32-bit values have no known range")
    if turned.has_transparency_data:
        turned = Image.alpha_composite(
            Image.new("RGBA", turned.size, "white"), turned.convert("RGBA")
        )
    return torch.from_numpy(np.array(turned.convert("RGB")))


def _source(file: Path | StoredImage) -> Path | IO[bytes]:
    """What Pillow opens. Raises OSError, or ValueError for what holds no picture."""
    if isinstance(file, StoredImage):
        return io.BytesIO(prompt_formats.stored_bytes(file))
    if is_lfs_pointer(file):
        raise ValueError("a pointer of git-lfs and not the file; get it with git lfs pull")
    return file


def _first_frame(file: Path | StoredImage, what: str) -> Tensor:
    """The first frame of a video, uint8 [H, W, 3]; the rest of the file is not decoded."""
    try:
        source = prompt_formats.stored_bytes(file) if isinstance(file, StoredImage) else file
        return video_reader.read(source, [0]).pixels[0]
    except (OSError, VideoError) as error:
        raise _unreadable(file, what, error) from None


def _unreadable(file: Path | StoredImage, what: str, problem: object) -> UserError:
    message = str(problem).strip()
    if isinstance(problem, OSError) and problem.strerror:
        message = problem.strerror
    first = (message.splitlines() or [type(problem).__name__])[0].rstrip(".")
    return UserError(f"{what} {file}: cannot be read ({first}); replace it.")
