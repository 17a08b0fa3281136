"""Pictures of samples: the contact sheet, and two clips next to each other.

Pixels are uint8; small frames are enlarged by a whole factor, large ones shrunk for the sheet.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from fastgrpo.core.config import Video
from fastgrpo.data import video as video_file
from fastgrpo.data.lettering import lettering

FRAMES = 6  # of a clip on the sheet, evenly spaced
THUMBNAIL = 192  # the longer side of a frame on the sheet, in pixels, is at most this
SMALL = 96  # and at least this, by a whole factor
CELLS = 96  # samples on the sheet
WIDTH = 1600  # pixels of the sheet, about
GAP, LINE = 8, 16
PAPER, INK = (246, 246, 244), (40, 40, 44)


def thumbnail_shape(size: Video) -> tuple[int, int, int, int]:
    """Shape [f, h, w, 3] of a clip's thumbnails."""
    scale = min(1.0, THUMBNAIL / max(size.height, size.width))
    return (
        len(_shown(size.frames)),
        max(1, round(size.height * scale)),
        max(1, round(size.width * scale)),
        3,
    )


def thumbnails(pixels: Tensor, size: Video) -> Tensor:
    """Some frames of a clip, shrunk for the sheet.

    pixels: uint8 [F, H, W, 3];  returns uint8 [f, h, w, 3]
    """
    shape = thumbnail_shape(size)
    frames = pixels[_shown(len(pixels))].cpu().numpy()
    small = [
        Image.fromarray(frame).resize((shape[2], shape[1]), Image.Resampling.BOX)
        for frame in frames
    ]
    return torch.stack(
        [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in small]
    ).view(shape)


def _shown(frames: int) -> list[int]:
    count = min(FRAMES, frames)
    return [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]


def write_sheet(path: Path, strips: Tensor, captions: Sequence[str], title: str) -> None:
    """All samples on one picture, a caption over each.

    strips: uint8 [N, R, f, h, w, 3], the R rows of a sample under each other;  captions: N;
    title: one line
    The first CELLS samples only; the title then says so.
    """
    total = len(strips)
    strips, captions = _enlarge(strips[:CELLS], SMALL), captions[:CELLS]
    if total > len(strips):
        title += f"; the first {len(strips)} of {total}"
    framed = (
        strips.new_tensor(PAPER)
        .expand(*strips.shape[:3], strips.shape[3] + 2, strips.shape[4] + 2, 3)
        .clone()
    )
    framed[..., :-2, :-2, :] = strips
    cells = rearrange(framed, "n r f h w c -> n (r h) (f w) c")
    height, width = cells.shape[1:3]
    font, (title, *letters) = lettering([title, *captions], 13)
    texts = [_shortened(caption, width, 3) for caption in letters]
    head = LINE * (1 + max(text.count("\n") for text in texts))
    columns = max(1, min(len(cells), WIDTH // (width + GAP)))
    rows = -(-len(cells) // columns)
    pitch = height + head + GAP
    sheet_width = max(columns * (width + GAP) + GAP, 480)
    sheet = Image.new("RGB", (sheet_width, rows * pitch + LINE + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), _shortened(title, sheet_width, 1), fill=INK, font=font)
    for n, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        left, top = GAP + n % columns * (width + GAP), LINE + 2 * GAP + n // columns * pitch
        pen.multiline_text((left, top), text, fill=INK, font=font, spacing=2)
        sheet.paste(Image.fromarray(cell.numpy()), (left, top + head))
    sheet.save(path)


def side_by_side(left: Tensor, right: Tensor, labels: tuple[str, str]) -> Tensor:
    """Two clips of one size next to each other, a label over each.

    left, right: uint8 [F, H, W, 3];
    returns uint8 [F, LINE + GAP + H', 2 W' + GAP, 3], enlarged where they are small
    """
    pair = _enlarge(torch.stack([left, right]).cpu(), video_file.SMALLEST_SIDE)
    frames, height, width = pair.shape[1:4]
    head = LINE + GAP
    page = Image.new("RGB", (2 * width + GAP, head + height), PAPER)
    pen, (font, shown) = ImageDraw.Draw(page), lettering(labels, 13)
    for number, label in enumerate(shown):
        pen.text(
            (number * (width + GAP) + GAP, GAP // 2),
            _shortened(label, width - GAP, 1),
            fill=INK,
            font=font,
        )
    canvas = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(
        head + height, 2 * width + GAP, 3
    )
    result = canvas.expand(frames, -1, -1, -1).clone()
    result[:, head:, :width] = pair[0]
    result[:, head:, width + GAP :] = pair[1]
    return result


def _shortened(text: str, width: int, lines: int) -> str:
    """Text in at most `lines` lines of `width` pixels, at seven pixels a character."""
    return "\n".join(textwrap.wrap(text, max(width // 7, 8), max_lines=lines, placeholder=" …"))


def _enlarge(pixels: Tensor, smallest: int) -> Tensor:
    """Pixels [..., H, W, 3] with sides of at least `smallest`, by a whole factor."""
    factor = -(-smallest // min(pixels.shape[-3:-1]))
    return (
        pixels.repeat_interleave(factor, -3).repeat_interleave(factor, -2) if factor > 1 else pixels
    )
