"""`python -m fastgrpo.data.tiny_world.reference_images FOLDER`: prompts with reference images.

Writes prompts_i2v.jsonl, rows of `{"prompt": ..., "image": ...}`, and beside it reference_images/,
a picture of each shape in each colour, whose motion the prompt tells. builtin:prompts_i2v is what
it writes. Recipes of image-to-video begin with it: it is varied enough to see a run through, not
to train a model for others' pictures.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from fastgrpo.data.tiny_world import shapes

FILE, PICTURES = "prompts_i2v.jsonl", "reference_images"
SIDE = 256  # pixels of a picture, which a run scales to its clips


def write(folder: Path) -> None:
    """Write the prompt file and its pictures; the same bytes on every call."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    rows = []
    training, held_out = shapes.meanings()
    for number, meaning in enumerate([*training, *held_out]):
        name = f"{PICTURES}/{meaning.colour}_{meaning.shape}.png"
        middle = (shapes.CANVAS / 2, shapes.CANVAS / 2)
        pixels = shapes.draw(meaning, frames=1, size=SIDE, start=middle)[0]
        Image.fromarray(pixels).save(folder / name, optimize=True)
        rows.append({"prompt": shapes.caption(meaning, number), "image": name})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / FILE).write_text(lines, encoding="utf-8")


def main() -> int:
    """Write into the folder that the command names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
