"""Files of clips and pictures on a command line: their pixels and prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.checkpoint import identity
from fastgrpo.core.config import Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import load_json
from fastgrpo.data import images, prompt_files, video_reader
from fastgrpo.data.prompts import text_of
from fastgrpo.data.video_reader import VideoError
from fastgrpo.tools.sample.sample_files import MANIFEST, SHEET

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif")

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Clip:
    """A file's pixels."""

    pixels: Tensor  # uint8 [F, H, W, 3]; of a still picture F = 1
    fps: float
    decoder: str  # what read the file: decord, PyAV or Pillow


def expand(names: Sequence[Path]) -> list[Path]:
    """The files, with a folder's clips in its place: those of its manifest, else all by name."""
    files = []
    for name in names:
        inside = _inside(name) if name.is_dir() else [name]
        if not inside:
            raise UserError(f"FILES={name}: the folder has no clips or pictures; name the files.")
        files += inside
    return files


def _inside(folder: Path) -> list[Path]:
    """A folder's clips: those of its manifest, else all by name."""
    sampled = []
    for entry in _samples(folder):
        sampled += [folder / str(entry[key]) for key in ("base", "file") if key in entry]
    files = [file for file in folder.iterdir() if file.suffix.lower() in VIDEOS + PICTURES]
    return sampled or sorted(file for file in files if file.name != SHEET)


def read(file: Path, fps: float | None, size: Size | None) -> Clip:
    """A file's pixels in the size in which the clip was made; if unknown, in the file's.

    fps: frames per second; None: the file's, for a still picture the recipes' default
    size: the clip's own; None: by the manifest or recipe beside the file
    Raises UserError for a file that is missing, damaged, of an unknown kind, without a frame rate,
    or of frames that do not have that size.
    """
    kind = file.suffix.lower()
    if kind in PICTURES:
        pixels, own = images.read_frames(file, "picture")
        rate = float(Video.model_fields["fps"].default) if own is None else own
        decoder = "Pillow"
    elif kind in VIDEOS:
        footage = _video(file)
        pixels, rate, decoder = footage.pixels, footage.fps, footage.decoder
    else:
        raise UserError(f"{file}: of an unknown kind; give one of {', '.join(VIDEOS + PICTURES)}.")
    if not (fps or rate > 0):
        raise UserError(f"{file}: says no frame rate; give --fps.")
    size = size or _made_in(file)
    return Clip(shrink(pixels, size, file) if size else pixels, fps or rate, decoder)


def _video(file: Path) -> video_reader.Footage:
    """A video's frames, uint8 [F, H, W, 3]. Raises UserError for an unreadable file."""
    try:
        return video_reader.read(file)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); correct the name or the file.",
        ) from None
    except VideoError as error:
        raise UserError(f"{file}: {error}; write it again.") from None


def shrink(pixels: Tensor, size: Size, file: Path) -> Tensor:
    """Undo `video.write_mp4`'s enlargement of small clips by a whole factor: means of squares.

    pixels: uint8 [F, H, W, 3];  returns uint8 [F, *size, 3], unchanged for pixels of that size
    Raises UserError, which names the file, where the sides are not `size` times a whole factor
    (made even).
    """
    rows, columns = pixels.shape[1:3]
    factor = max(rows // size[0], 1)
    height, width = (side * factor for side in size)
    if not (0 <= rows - height <= 1 and 0 <= columns - width <= 1):
        raise UserError(
            f"{file}: has frames of {rows}x{columns}, no whole multiple of "
            f"{size[0]}x{size[1]}; correct --size."
        )
    squares = pixels[:, :height, :width].unflatten(1, (size[0], factor))  # [F, h, factor, W, 3]
    squares = squares.unflatten(3, (size[1], factor))
    return squares.float().mean((2, 4)).round().to(torch.uint8)


def _made_in(file: Path) -> Size | None:
    """The size in the manifest of `fastgrpo sample`, or in the recipe of a run's evaluation."""
    if any(file.name in (entry.get("file"), entry.get("base")) for entry in _samples(file.parent)):
        settings = _read(file.parent / MANIFEST).get("settings")
        if not isinstance(settings, dict):
            return None
        height, width = settings.get("height"), settings.get("width")
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None
    run = _folder(file).parents[1] if _evaluated(file) is not None else None
    if run is None or not (run / identity.RECIPE).is_file():
        return None
    clip = identity.recipe_of(run).video
    return clip.height, clip.width


def captions(files: Sequence[Path], text: str | None, listed: str | None) -> list[str | None]:
    """Each file's prompt; None where it is unknown.

    text: for every file;  listed: a file of prompts, one for each file, in their order
    Without both: from the text file of the same name beside it, the manifest of `fastgrpo sample`,
    or a run's evaluation.
    Raises UserError where the numbers differ, or a file beside a clip cannot be read.
    """
    if text is not None and listed is not None:
        raise UserError("--prompts: give --prompt or --prompts, not both.")
    if text is not None:
        return [text] * len(files)
    if listed is not None:
        return list(_listed(listed, len(files)))
    return [_beside(file) for file in files]


def _listed(path: str, count: int) -> list[str]:
    """Every row's text, with repetitions: row n belongs to file n."""
    column = "prompt"
    texts = []
    for row in prompt_files.rows(path, "--prompts", {"prompts.column": column}):
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            texts.append(text_of(row, column)[0])
        except ValueError as error:
            raise UserError(f"--prompts={path}: {row.place} {error}; correct it.") from None
    if len(texts) != count:
        raise UserError(
            f"--prompts={path}: has {len(texts)} prompts for {count} files; "
            "give one for each, in order."
        )
    return texts


def _beside(file: Path) -> str | None:
    """A clip's prompt by the files beside it; None where it is unknown."""
    sidecar = file.with_suffix(".txt")
    if sidecar.is_file():
        try:
            return " ".join(sidecar.read_text(encoding="utf-8-sig").split()) or None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{sidecar}: cannot be read ({error}); write the prompt into it as UTF-8.",
            ) from None
    for entry in _samples(file.parent):
        if file.name in (entry.get("file"), entry.get("base")):
            return str(entry["prompt"]) if "prompt" in entry else None
    return _evaluated(file)


def _evaluated(file: Path) -> str | None:
    """The prompt of a clip of a run's evaluation: evaluation/step-N/NNN.mp4, prompt number NNN."""
    folder = _folder(file)
    if not (folder.name.startswith("step-") and file.stem.isdecimal()):
        return None
    content = _read(folder.with_name(folder.name + ".json"))
    if f"{folder.name}/{file.name}" not in content.get("clips", []):
        return None
    prompts = list(dict.fromkeys(content.get("prompts", [])))
    return str(prompts[int(file.stem)]) if int(file.stem) < len(prompts) else None


def _folder(file: Path) -> Path:
    """The folder of a file by its full name, which is known wherever the command is typed."""
    return file.parent.resolve()


def composed(file: Path) -> bool:
    """Whether `fastgrpo sample` made the file of several clips, so that it must not be scored."""
    others = [entry for entry in _samples(file.parent) if file.name != entry.get("file")]
    return any(file.name in (entry.get("beside"), SHEET) for entry in others)


def not_finite(file: Path) -> bool:
    """Whether `fastgrpo sample` marked the file's clip as not finite: its pixels mean nothing."""
    marks = {"file": "finite", "base": "base_finite"}
    return any(
        file.name == entry.get(key) and entry.get(mark) is False
        for entry in _samples(file.parent)
        for key, mark in marks.items()
    )


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The samples in the manifest of `fastgrpo sample`; empty for a folder without a manifest."""
    samples = _read(folder / MANIFEST).get("samples")
    if not isinstance(samples, list):
        return []
    return [entry for entry in samples if isinstance(entry, dict)]


def _read(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty without the file. Raises UserError for a damaged file."""
    if not file.is_file():
        return {}
    try:
        return load_json(file)
    except TypeError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); write it again, or give --prompt or --prompts."
        ) from None
