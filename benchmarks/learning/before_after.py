"""Held-out prompts before training and after it, from a run's own evaluation clips: a strip of
frames, or, for a .gif, the clips as they move.

    python -m benchmarks.learning.before_after runs/t2v_tiny docs/pictures/before_after.png
    python -m benchmarks.learning.before_after runs/t2v_tiny docs/pictures/before_after.gif
    python -m benchmarks.learning.before_after runs/t2v_tiny strip.png --prompts 0 4 --frames 6

In a strip left the base model, right the last evaluation; where clips move, above and below. A
prompt's two clips are of the same seed. By default a strip shows the first three prompts that the
run kept clips of, and moving clips the first six: none is chosen for its looks.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastgrpo.core.errors import UserError
from fastgrpo.data import video_reader

# pixels: a frame's longer side, between frames, around blocks, a line of text
SIDE, GAP, MARGIN, LINE = (
    88,
    2,
    16,
    22,
)
PAUSE_MS = 125  # between the pictures of an animation: the demo's 8 frames per second
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 36), (110, 110, 118)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Step:
    """One evaluation of a run: its prompts, and the clip of each prompt's first seed as far as
    clips were kept.
    """

    iteration: int
    prompts: list[str]
    clips: list[Path]


def read_steps(run: Path) -> tuple[Step, Step]:
    """The evaluation before training and the last one.

    Raises UserError where the run has not both.
    """
    folder = run / "evaluation"
    numbers = sorted(int(file.stem.removeprefix("step-")) for file in folder.glob("step-*.json"))
    if len(numbers) < 2 or numbers[0] != 0:
        raise UserError(
            f"run={run}: no evaluation before and after training there; give a finished run's "
            "folder."
        )
    return _read(folder, numbers[0]), _read(folder, numbers[-1])


def _read(folder: Path, iteration: int) -> Step:
    told = json.loads((folder / f"step-{iteration}.json").read_text(encoding="utf-8"))
    return Step(
        iteration, list(dict.fromkeys(told["prompts"])), [folder / name for name in told["clips"]]
    )


def shown(clip: Path, count: int) -> Frames:
    """Evenly spaced frames of a clip, with the longer side of SIDE pixels.

    returns uint8 [count, h, w, 3]
    """
    frames = video_reader.read(clip).pixels.numpy()
    scale = SIDE / max(frames.shape[1:3])
    size = round(frames.shape[2] * scale), round(frames.shape[1] * scale)
    chosen = [round(place) for place in np.linspace(0, len(frames) - 1, min(count, len(frames)))]
    small = [Image.fromarray(frames[place]).resize(size, Image.Resampling.BOX) for place in chosen]
    return np.stack([np.asarray(frame) for frame in small])


def check(numbers: Sequence[int], before: Step, after: Step) -> None:
    """Raise UserError for the number of a prompt whose clips were not kept."""
    kept = min(len(before.clips), len(after.clips))
    if missing := [number for number in numbers if not 0 <= number < kept]:
        raise UserError(
            f"--prompts={missing[0]}: clips of {kept} prompts were kept; use 0 to {kept - 1}."
        )


def strip(before: Step, after: Step, numbers: Sequence[int], count: int) -> Image.Image:
    """The picture: a line with the caption, and under it the frames of both clips side by side, for
    each prompt.
    """
    check(numbers, before, after)
    pairs = [
        (shown(before.clips[number], count), shown(after.clips[number], count))
        for number in numbers
    ]
    height, width = pairs[0][0].shape[1:3]
    block = len(pairs[0][0]) * (width + GAP) - GAP
    row = LINE + height + MARGIN
    picture = Image.new(
        "RGB", (2 * block + 3 * MARGIN, 2 * MARGIN + LINE + len(pairs) * row), PAPER
    )
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(15), ImageFont.load_default(13)
    titles = ("before training", f"after {after.iteration} iterations")
    for title, left in zip(titles, (MARGIN, 2 * MARGIN + block), strict=True):
        draw.text((left, MARGIN // 2), title, INK, large)
    for place, (number, pair) in enumerate(zip(numbers, pairs, strict=True)):
        top = MARGIN + LINE + place * row
        draw.text((MARGIN, top), before.prompts[number], FAINT, small)
        for frames, left in zip(pair, (MARGIN, 2 * MARGIN + block), strict=True):
            for index, frame in enumerate(frames):
                picture.paste(Image.fromarray(frame), (left + index * (width + GAP), top + LINE))
    return picture


def moving(before: Step, after: Step, numbers: Sequence[int]) -> list[Image.Image]:
    """The pictures of an animation, a clip's last one twice: a column for each prompt, before
    training above and after it below.
    """
    check(numbers, before, after)
    rows = [
        [shown(step.clips[number], count=1 << 20) for number in numbers] for step in (before, after)
    ]
    length, height, width = min(clip.shape[:3] for row in rows for clip in row)
    pictures = []
    for index in (*range(length), length - 1):
        size = MARGIN + len(numbers) * (width + GAP) + MARGIN, 2 * (LINE + height) + 2 * MARGIN
        picture = Image.new("RGB", size, PAPER)
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
        titles = ("before training", f"after {after.iteration} iterations")
        for place, (title, row) in enumerate(zip(titles, rows, strict=True)):
            top = MARGIN // 2 + place * (LINE + height + MARGIN // 2)
            draw.text((MARGIN, top), title, INK, font)
            for column, clip in enumerate(row):
                left = MARGIN + column * (width + GAP)
                picture.paste(Image.fromarray(clip[index]), (left, top + LINE))
        pictures.append(picture)
    return pictures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("picture", type=Path, help="the .png or .gif to write")
    parser.add_argument(
        "--prompts", type=int, nargs="+", metavar="N", help="which held-out prompts; the first ones"
    )
    parser.add_argument("--frames", type=int, default=5, help="of each clip (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        before, after = read_steps(arguments.run)
        animated = arguments.picture.suffix == ".gif"
        kept = min(6 if animated else 3, len(before.clips), len(after.clips))
        numbers = arguments.prompts or range(kept)
        if animated:
            picture, *others = moving(before, after, numbers)
        else:
            picture = strip(before, after, numbers, arguments.frames)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    if animated:
        picture.save(
            arguments.picture, save_all=True, append_images=others, duration=PAUSE_MS, loop=0
        )
    else:
        picture.save(arguments.picture)
    print(f"{arguments.picture}: {picture.width} x {picture.height} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
