"""Captions on pictures in any script: a font of this machine that has their letters, or escapes.

Pillow's own font has Latin letters without accents; a letter that a font lacks is drawn as a box.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont
from PIL.ImageFont import ImageFont as BitmapFont

# tried in this order, by the names under which systems install them
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "LiberationSans-Regular.ttf",
)
NO_LETTER = "\U0010ffff"  # no font has it: what is drawn for it is the box

Font = FreeTypeFont | BitmapFont


def lettering(texts: Sequence[str], size: int) -> tuple[Font, list[str]]:
    """(a font, the texts as it can draw them).

    The first font that has the most of the letters; letters that it lacks become escapes such as
    \\u7ea2, and invisible ones go.
    """
    shown = ["".join(letter for letter in text if not _invisible(letter)) for text in texts]
    letters = frozenset("".join(shown))
    fonts = [ImageFont.load_default(size)]
    if not all(_has(fonts[0], letter) for letter in letters):
        fonts += _installed(size)
    font = min(fonts, key=lambda font: sum(not _has(font, letter) for letter in letters))
    escapes = {letter: letter if _has(font, letter) else _escaped(letter) for letter in letters}
    return font, ["".join(escapes[letter] for letter in text) for text in shown]


def _installed(size: int) -> list[Font]:
    fonts: list[Font] = []
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return fonts


def _invisible(letter: str) -> bool:
    return letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf")


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter and no box."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask(NO_LETTER))


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()
