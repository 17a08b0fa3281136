"""Coloured shapes that move over a plain background, their captions, and how to draw both.

A clip is fixed by its `Meaning` (colour, shape, direction, speed) and a starting point. Captions
say a meaning in one of several wordings; `parse` finds the meaning in a caption again, whatever the
wording. Lengths are in pixels of a 32-pixel canvas and scale with the canvas.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CANVAS = 32  # the side that lengths refer to
RADIUS = 5.5  # of the circle that each shape is about as large as
BACKGROUND = (28, 28, 36)
COLOURS = {
    "red": (226, 54, 48),
    "green": (52, 180, 76),
    "blue": (58, 96, 232),
    "yellow": (244, 214, 58),
    "purple": (164, 72, 206),
    "cyan": (72, 208, 220),
}
SHAPES = ("circle", "square", "triangle")
# x right, y down
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slow": 0.8, "fast": 1.8}  # pixels per frame
FRAMES = 9
FPS = 8.0

WORDINGS = (
    "a {colour} {shape} moves {direction} {speed}",
    "the {colour} {shape} slides {speed} {direction}wards",
    "{speed} a {colour} {shape} drifts {direction}",
    "there is a {colour} {shape} moving {direction} {speed}",
    "watch as one {colour} {shape} glides {direction}wards {speed}",
    "we see the {colour} {shape} travel {speed} {direction}",
)
SPEED_WORDS = {"slow": ("slowly", "gently"), "fast": ("quickly", "rapidly")}


@dataclass(frozen=True)
class Meaning:
    """The content of a caption; each field is a key of the table of its name above."""

    colour: str
    shape: str
    direction: str
    speed: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame (x, y) on the 32-pixel canvas."""
        dx, dy = DIRECTIONS[self.direction]
        return dx * SPEEDS[self.speed], dy * SPEEDS[self.speed]


def meanings() -> tuple[list[Meaning], list[Meaning]]:
    """(training, held-out) meanings, 120 and 24, disjoint; every colour, shape, ... is in both."""
    training: list[Meaning] = []
    held_out: list[Meaning] = []
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                for v, speed in enumerate(SPEEDS):
                    # one colour of each (shape, direction, speed)
                    apart = (c + 2 * s + d + 3 * v) % len(COLOURS) == 0
                    (held_out if apart else training).append(
                        Meaning(colour, shape, direction, speed)
                    )
    return training, held_out


def caption(meaning: Meaning, wording: int) -> str:
    """The meaning in words; wordings 0..11 differ in order, verb and the word for the speed."""
    template = WORDINGS[wording % len(WORDINGS)]
    speed = SPEED_WORDS[meaning.speed][wording // len(WORDINGS) % 2]
    return template.format(
        colour=meaning.colour, shape=meaning.shape, direction=meaning.direction, speed=speed
    )


def captions(wanted: list[Meaning]) -> Iterator[str]:
    """Every wording of every meaning, wording by wording, so that any prefix is varied."""
    for wording in range(2 * len(WORDINGS)):
        for meaning in wanted:
            yield caption(meaning, wording)


def parse(text: str) -> Meaning | None:
    """The meaning of a caption in any wording.

    None where a colour, shape, direction or speed is missing or doubled.
    """
    words = text.lower().replace("wards", "").split()
    speed_of = {word: speed for speed, group in SPEED_WORDS.items() for word in group}
    colour = [w for w in words if w in COLOURS]
    shape = [w for w in words if w in SHAPES]
    direction = [w for w in words if w in DIRECTIONS]
    speed = [speed_of[w] for w in words if w in speed_of]
    if not all(len(found) == 1 for found in (colour, shape, direction, speed)):
        return None
    return Meaning(colour[0], shape[0], direction[0], speed[0])


def shape_mask(
    shape: str, centre: NDArray[np.float64], size: int, supersample: int = 4
) -> NDArray[np.float64]:
    """Coverage in [0, 1] of each pixel by the shape.

    centre: [F, 2] as (x, y) on the 32-pixel canvas;  returns [F, size, size]
    """
    fine = (np.arange(size * supersample) + 0.5) * CANVAS / (size * supersample)
    x = fine[None, None, :] - centre[:, 0, None, None]
    y = fine[None, :, None] - centre[:, 1, None, None]
    if shape == "circle":
        inside = x**2 + y**2 <= RADIUS**2
    elif shape == "square":
        inside = (abs(x) <= 0.9 * RADIUS) & (abs(y) <= 0.9 * RADIUS)
    else:  # an upright triangle whose centroid is the centre
        half = 1.25 * RADIUS
        inside = (y <= 0.7 * half) & (y - 2.0 * abs(x) >= -1.4 * half)
    if supersample == 1:
        return inside.astype(np.float64)
    coarse = inside.reshape(len(centre), size, supersample, size, supersample)
    return coarse.mean(axis=(2, 4), dtype=np.float64)


def path(
    meaning: Meaning, frames: int, start: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    """Centres [F, 2] (x, y) of a straight path.

    Without a start, the path whose middle is the canvas' middle.
    """
    velocity = np.array(meaning.velocity)
    if start is None:
        start = tuple(CANVAS / 2 - velocity * (frames - 1) / 2)
    return np.array(start) + velocity * np.arange(frames)[:, None]


def random_start(meaning: Meaning, frames: int, rng: np.random.Generator) -> tuple[float, float]:
    """A start from which the whole path stays on the canvas."""
    margin = 1.25 * RADIUS + 1.0
    travel = np.array(meaning.velocity) * (frames - 1)
    low = margin - np.minimum(travel, 0.0)
    high = CANVAS - margin - np.maximum(travel, 0.0)
    x, y = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    return float(x), float(y)


def draw(
    meaning: Meaning,
    frames: int = FRAMES,
    size: int = CANVAS,
    start: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """The clip of a meaning, anti-aliased.  returns uint8 [F, size, size, 3]"""
    mask = shape_mask(meaning.shape, path(meaning, frames, start), size)[..., None]
    pixels = mask * np.array(COLOURS[meaning.colour]) + (1.0 - mask) * np.array(BACKGROUND)
    return np.floor(pixels + 0.5).astype(np.uint8)


def area(shape: str) -> float:
    """Area of a shape in square pixels of the 32-pixel canvas."""
    half = 1.25 * RADIUS
    return {
        "circle": math.pi * RADIUS**2,
        "square": (1.8 * RADIUS) ** 2,
        "triangle": 0.5 * (2.1 * half) ** 2,
    }[shape]
