"""Reading the diffusers folder layout, for every family: what is missing or damaged is one clear line.

Constants that matter (channels, scaling factors, shifts, patch sizes) are read from the folder's configs by the
families; nothing of a checkpoint is assumed here but its layout.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.config import Model, Video
from fastgrpo.errors import UserError

INDEXES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")


def locate(path: str, key: str = "model.path") -> Path:
    """A local folder, or the local copy of a hub repository."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key}={path}: no such folder; give a folder in the diffusers layout or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{key}={path}: neither a folder nor on the hub ({problem}); correct the path.") from None


def pipeline_folder(settings: Model, parts: Sequence[str]) -> Path:
    """The folder of model.path, whose `parts` (such as "vae", "tokenizer") are all there."""
    folder = locate(settings.path)
    config_of = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    for file in ("model_index.json", *(f"{part}/{config_of.get(part.split('_')[0], 'config.json')}" for part in parts)):
        if not (folder / file).is_file():
            raise UserError(
                f"model.path={settings.path}: {file} is missing; give a whole folder in the diffusers layout."
            )
    return folder


def network_folder(settings: Model, part: str) -> Path:
    """The folder of the trained network: model.network, or the part of model.path."""
    if settings.network is None:
        return locate(settings.path) / part
    folder = locate(settings.network, "model.network")
    folder = folder if (folder / "config.json").is_file() else folder / part
    if not (folder / "config.json").is_file():
        raise UserError(f"model.network={settings.network}: has no config.json, and no {part}/config.json either.")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """A config file of the folder. Raises UserError where it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {file} cannot be read ({error}); download that folder again.") from None
    if not isinstance(content, dict):
        raise UserError(f"model.path: {file} is not a JSON object; download that folder again.")
    return content


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's settings."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def read(network: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of a diffusers or transformers class from its folder, in `dtype`, on the CPU.

    Raises UserError for another class's folder, a missing shard or damaged weights.
    """
    named = read_json(folder / "config.json").get("_class_name", network.__name__)
    if named != network.__name__:
        raise UserError(
            f"model.path: {folder} holds a {named}, not a {network.__name__}; correct model.family or the path."
        )
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    raise UserError(
                        f"model.path: {folder / shard} is missing, a part of the weights; download it again."
                    )
    try:
        return network.from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model.path: {folder} cannot be read ({problem}); download that folder again.") from None


def text_model(folder: Path, tokenizer: str, encoder: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A tokenizer and its encoder on `device`, of the classes that model_index.json names for these two parts."""
    import transformers

    index = read_json(folder / "model_index.json")
    classes = []
    for part in (tokenizer, encoder):
        entry = index.get(part)
        found = getattr(transformers, entry[1], None) if isinstance(entry, list) and len(entry) == 2 else None
        if found is None:
            raise UserError(
                f"model.path: {folder}/model_index.json names no transformers class for '{part}' ({entry})."
            )
        classes.append(found)
    model = read(classes[1], folder / encoder, dtype)
    try:
        return classes[0].from_pretrained(folder / tokenizer), model.requires_grad_(False).to(device).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"model.path: {folder / tokenizer} cannot be read ({problem}); download it again.") from None


def latent_size(video: Video, space: int, time: int, patch: int) -> tuple[int, int, int]:
    """(F, H, W) of a latent. space, time: the VAE's factors;  patch: the network's

    Raises UserError, with the nearest sizes that work, for one that does not divide.
    """
    unit = space * patch
    for name, size in (("height", video.height), ("width", video.width)):
        if size % unit:
            raise UserError(
                f"video.{name}={size}: not a multiple of {unit} (VAE factor {space} x patch {patch}); "
                f"use {max(size // unit, 1) * unit} or {(size // unit + 1) * unit}."
            )
    if (video.frames - 1) % time:
        below = (video.frames - 1) // time * time + 1
        raise UserError(
            f"video.frames={video.frames}: must be a multiple of {time}, plus 1; use {below} or {below + time}."
        )
    return (video.frames - 1) // time + 1, video.height // space, video.width // space


def image_only(video: Video, name: str) -> None:
    """Raise UserError for a clip where the family draws images."""
    if video.frames != 1:
        raise UserError(f"video.frames={video.frames}: {name} draws images; use 1.")


def to_pixels(frames: Tensor) -> Tensor:
    """A VAE's output, [B, 3, F, H, W] in [-1, 1], as pixels, uint8 [B, F, H, W, 3]."""
    pixels = (frames.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(pixels.round().to(torch.uint8), "b c f h w -> b f h w c")
