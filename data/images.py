"""Reference images of image-to-video: read from a picture or a video, brought to the clips' size.

Resize and crop rule: the image is scaled, its aspect ratio kept, until it covers height x width;
what then sticks out is cut off, as much on one side as on the other. Nothing is squashed and no
border is added.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastgrpo.core.errors import UserError

# what Pillow raises, by format
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)


def read_image(file: Path, what: str = "reference image") -> Tensor:
    """A picture of any format that Pillow knows, or the first frame of a video, by its content.

    Turned as its EXIF tag says, transparent parts over white, 16-bit grey scaled to 8 bits. Raises
    UserError, which names the file, for one that is missing, damaged or neither.

    what: how messages call the file;  returns uint8 [H, W, 3], RGB
    """
    try:
        with Image.open(file) as picture:
            return _pixels(picture)
    except UnidentifiedImageError:
        return _first_frame(file, what)
    except DAMAGED as error:
        raise _unreadable(file, what, error) from None


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


def _first_frame(file: Path, what: str) -> Tensor:
    """The first frame of a video, uint8 [H, W, 3]; the rest of the file is not decoded."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # the error below says it in one line
    try:
        reader = decord.VideoReader(str(file), ctx=decord.cpu(0), num_threads=1)
        return torch.from_numpy(reader[0].asnumpy())
    except (RuntimeError, IndexError, decord.DECORDError):
        raise _unreadable(file, what, "neither a picture nor a video, or damaged") from None


def _unreadable(file: Path, what: str, problem: object) -> UserError:
    message = str(problem).strip()
    if isinstance(problem, OSError) and problem.strerror:
        message = problem.strerror
    first = (message.splitlines() or [type(problem).__name__])[0].rstrip(".")
    return UserError(f"{what} {file}: cannot be read ({first}); replace it.")
