"""The fingerprint of conditions: names and values on which they depend.

Two caches are the same where all values are. Model files are represented by the SHA-256 of their
content, which is computed once and remembered with the file's size and time.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fastgrpo import models
from fastgrpo.core.config import Recipe
from fastgrpo.core.policy import Prompt, StoredImage
from fastgrpo.data import prompt_formats
from fastgrpo.models.loading import diffusers_folder, weight_files
from fastgrpo.run.file_hashes import hashes

TEXT_PARTS = ("tokenizer", "text_encoder")  # beginnings of the names in model_index.json
IMAGE_PARTS = ("vae", "image_encoder", "image_processor", "feature_extractor")
OTHER_FORMATS = {".msgpack", ".h5", ".onnx", ".ot", ".md"}  # never read
SAMPLE = 1 << 16  # bytes at either end of a reference image that stand for it


def fingerprint(recipe: Recipe, prompts: Sequence[Prompt], remembered: Path) -> dict[str, str]:
    """Everything that a recipe's conditions depend on, by the names that messages use.

    remembered: a JSON file with the hashes of model files, read and kept up to date
    """
    with_images = recipe.prompts.image_column is not None
    values = {"family": recipe.model.family, "dtype": recipe.model.dtype}
    beginnings = TEXT_PARTS + IMAGE_PARTS if with_images else TEXT_PARTS
    values |= _model_parts(recipe, beginnings, remembered)
    values["length limits"] = json.dumps(models.length_limits(recipe.model.family))
    if recipe.model.cfg > 1:
        values["negative prompt"] = recipe.model.negative_prompt or ""
    values["prompts"] = _digest([prompt.text for prompt in prompts])
    if with_images:
        video = recipe.video
        values["reference images"] = _digest([_sample(prompt.image) for prompt in prompts])
        values["video size"] = f"{video.frames} x {video.height} x {video.width}"
    return values


def _model_parts(recipe: Recipe, beginnings: tuple[str, ...], remembered: Path) -> dict[str, str]:
    """Part -> a hash over the names and contents of its files."""
    folder = diffusers_folder.pipeline_folder(recipe.model, ())
    index = diffusers_folder.read_json(folder / "model_index.json")
    parts = sorted(name for name in index if name.startswith(beginnings))
    files = {part: _files(folder / part) for part in parts if (folder / part).is_dir()}
    digests = hashes([file for own in files.values() for file in own], remembered)
    named = {part: [[file.name, digests[file]] for file in own] for part, own in files.items()}
    return {part: _digest(content) for part, content in named.items()}


def _files(part: Path) -> list[Path]:
    """The files of a part that a model class may read: of its weights those of the variant."""
    return [
        file
        for file in weight_files.plainly_named(part)
        if not file.name.startswith(".") and file.suffix not in OTHER_FORMATS
    ]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sample(image: Path | StoredImage | None) -> str | None:
    """A hash of a file's size and its two ends, since reading all files whole takes too long."""
    if image is None:
        return None
    if isinstance(image, StoredImage):
        content = prompt_formats.stored_bytes(image)
        return f"{len(content)}:{hashlib.sha256(content).hexdigest()}"
    digest = hashlib.sha256()
    with image.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in (0, max(0, size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return f"{size}:{digest.hexdigest()}"
