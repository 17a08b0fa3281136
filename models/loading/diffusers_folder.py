"""Reading the diffusers folder layout, for every family: what is missing or damaged is one clear
line.

Constants that matter (channels, scaling factors, shifts, patch sizes) are read from the folder's
configs by the families; nothing of a checkpoint is assumed here but its layout.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded, part_of
from fastgrpo.models.loading.source import Folder, locate, refuse_file
from fastgrpo.models.loading.weight_files import (
    check_class,
    check_shards,
    read_variant,
    refuse_pointers,
)
from fastgrpo.models.loading.weight_files import read_json as read_json
from fastgrpo.models.placement.text_network import TextNetwork

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000  # by which the networks of flow models count t
E = TypeVar("E")


def pipeline_folder(settings: Model, parts: Sequence[str]) -> Folder:
    """The folder of model.path, whose `parts` (such as "vae", "tokenizer") are all there."""
    folder = locate(settings)
    config_of = {part: f"{part}_config.json" for part in ("guider", "scheduler", "tokenizer")}
    config_of |= dict.fromkeys(("image_processor", "feature_extractor"), "preprocessor_config.json")
    for file in (
        "model_index.json",
        *(
            f"{part}/{config_of.get(part) or config_of.get(part.split('_')[0], 'config.json')}"
            for part in parts
        ),
    ):
        if not (folder / file).is_file():
            raise UserError(
                f"model.path={settings.path}: {file} is missing; give a whole folder in the "
                "diffusers layout."
            )
    return folder


def check_pipeline(
    settings: Model,
    wanted: Sequence[str],
    fitting: Callable[[Mapping[str, Any]], str | None],
    families: Sequence[str],
) -> None:
    """Raise UserError where the model_index.json of model.path names none of the `wanted`
    pipelines, or a single file is named.

    fitting: gives the family of a model_index.json, to suggest it;  families: the names of all
    """
    refuse_file(settings, wanted[0])
    index = read_json(pipeline_folder(settings, ()) / "model_index.json")
    named = index.get("_class_name")
    if named in wanted:
        return
    suggested = fitting(index)
    family = f"set model.family={suggested}, or correct" if suggested else "correct"
    others = "" if suggested else f" There are the families {', '.join(families)}."
    raise UserError(
        f"model.path={settings.path}: model_index.json names a {named}, not a "
        f"{' or a '.join(wanted)}; {family} the path.{others}"
    )


def named_network(settings: Model) -> str:
    """The key and value that say where the trained network lies, for messages."""
    if settings.network is None:
        return f"model.path={settings.path}"
    return f"model.network={settings.network}"


def refuse_guidance(settings: Model, model: str) -> None:
    """Raise UserError for model.guidance with a model that has no place for it.  model: its name"""
    if settings.guidance is not None:
        raise UserError(
            f"model.guidance={settings.guidance}: {model} has no embedded guidance; set model.cfg "
            "instead."
        )


def network_folder(settings: Model, part: str) -> Folder:
    """The folder of the trained network: model.network, or the part of model.path."""
    if settings.network is None:
        return locate(settings) / part
    folder = locate(settings, "network")
    folder = folder if (folder / "config.json").is_file() else folder / part
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.network={settings.network}: has no config.json, and no {part}/config.json "
            "either; name the network's folder in the diffusers layout, or the one above it."
        )
    return folder


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's settings."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def check_flow_scheduler(config: Mapping[str, Any]) -> None:
    """Raise UserError for settings of a scheduler that is not FlowMatchEulerDiscreteScheduler, or
    of other times.
    """
    where = "model.path: scheduler/scheduler_config.json"
    if config.get("_class_name") != FLOW_SCHEDULER:
        raise UserError(
            f"{where} is a {config.get('_class_name')}, not a {FLOW_SCHEDULER}; correct "
            "model.family."
        )
    if config.get("num_train_timesteps", TRAIN_TIMESTEPS) != TRAIN_TIMESTEPS or config.get(
        "invert_sigmas"
    ):
        raise UserError(
            f"{where} must have num_train_timesteps={TRAIN_TIMESTEPS} and invert_sigmas=false; "
            "correct it."
        )


def constant_shift(folder: Path) -> float:
    """The shift of the folder's flow scheduler, whose times are shifted by it and by nothing else.

    Raises UserError where that is not so.
    """
    config, where = scheduler_config(folder), "model.path: scheduler/scheduler_config.json"
    check_flow_scheduler(config)
    for key in (
        "use_dynamic_shifting",
        *(f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")),
    ):
        if config.get(key):
            raise UserError(
                f"{where} has {key}=true, which this family's times have not; set it to false "
                "there."
            )
    if config.get("shift_terminal") is not None:
        raise UserError(
            f"{where} has a shift_terminal, which this family's times have not; set it to null "
            "there."
        )
    shift = config.get("shift")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not shift > 0:
        raise UserError(
            f"{where} has shift={shift}, not a number above 0; correct it or download that file "
            "again."
        )
    return float(shift)


def read(network: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen network, of a diffusers or transformers class, from its folder, in `dtype`, on the
    CPU.

    Raises UserError for another class's folder, a missing shard, a tensor that is missing or of
    another shape, or damaged weights.
    """
    check_class(network, folder)
    check_shards(folder)
    # transformers' own error for another shape names no tensor: what it leaves out is named below
    options: dict[str, Any] = {"variant": read_variant(folder)}
    options |= {"ignore_mismatched_sizes": True} if hasattr(network, "config_class") else {}
    try:
        model, found = network.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        problem = problem.split(". ")[0]  # what follows is advice to programmers
        raise UserError(
            f"model.path: {folder} cannot be read ({problem}); download that folder again."
        ) from None
    # transformers draws what is missing at random, on each rank anew, and says so in a warning
    # alone
    others = [key for key, *_ in found["mismatched_keys"]]
    for keys, problem in ((found["missing_keys"], "lacks {}"), (others, "has another shape of {}")):
        if keys:
            named = (
                f"{problem.format(min(keys))} (and {len(keys) - 1} more) of a {network.__name__}"
            )
            raise UserError(
                f"model.path: {folder} {named}; correct model_index.json or download that folder "
                "again."
            )
    return model


def check_text_class(kind: Any, folder: Path) -> None:
    """Raise UserError where the weights of the folder are of another architecture than the
    transformers class `kind`.

    The encoder of a whole model is no other one: T5EncoderModel reads T5ForConditionalGeneration,
    CLIPTextModel reads CLIPModel.
    """
    from transformers import CONFIG_MAPPING

    config = read_json(folder / "config.json")
    told, wanted = config.get("model_type"), getattr(kind, "config_class", None)
    if wanted is not None and told in (None, wanted.model_type):
        return
    parts = CONFIG_MAPPING[told].sub_configs.values() if told in CONFIG_MAPPING else ()
    if wanted is None or wanted not in parts:
        raise UserError(
            f"model.path: {folder} holds a {(config.get('architectures') or [told])[0]}, and "
            "model_index.json names a "
            f"{kind.__name__} for it; correct model_index.json or download that folder again."
        )


def text_model(
    folder: Path, tokenizer: str, encoder: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, TextNetwork]:
    """A tokenizer and its encoder, for `device`, of the classes that model_index.json names."""
    import transformers

    index = read_json(folder / "model_index.json")
    classes = []
    for part in (tokenizer, encoder):
        entry = index.get(part)
        found = (
            getattr(transformers, str(entry[1]), None)
            if isinstance(entry, list) and len(entry) == 2
            else None
        )
        if found is None:
            raise UserError(
                f"model.path: {folder}/model_index.json names no transformers class for '{part}' "
                f"({entry}); correct it "
                "or download that folder again."
            )
        classes.append(found)
    check_text_class(classes[1], folder / encoder)
    refuse_pointers(folder / tokenizer)
    model = read(classes[1], folder / encoder, dtype).requires_grad_(False).eval()
    try:
        reader = classes[0].from_pretrained(folder / tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"model.path: {folder / tokenizer} cannot be read ({problem}); download it again."
        ) from None
    return reader, TextNetwork(model, encoder, device)


@contextmanager
def freed(encoder: E) -> Iterator[E]:
    """`encoder`, which loses its networks when the context ends, whoever still holds it."""
    try:
        yield encoder
    finally:
        for name, part in list(vars(encoder).items()):
            if isinstance(part, TextNetwork):
                part.free()
            elif isinstance(part, nn.Module):
                delattr(encoder, name)
        gc.collect()
        if torch.cuda.is_initialized():  # once per run; a reward server may share the GPU
            torch.cuda.empty_cache()


def images_at_once(vae: Any, latents: Tensor) -> int:
    """How many images a decoder may take, so that no tensor has 2^31 elements.

    Some kernels count in 32 bits. The largest tensor is the last level's input, at full size.

    vae: an AutoencoderKL;  latents: [B, C, h, w]
    """
    widths = vae.config.block_out_channels
    pixels = latents.shape[-2] * latents.shape[-1] * 4 ** (len(widths) - 1)
    return max(1, (2**31 - 1) // (pixels * max(widths[:2])))


@contextmanager
def tf32_convolutions() -> Iterator[None]:
    """Let convolutions of float32 round to TF32 inside: for a decoder, which no ratio sees."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def latent_size(video: Video, space: int, time: int, patch: int) -> tuple[int, int, int]:
    """(F, H, W) of a latent. space, time: the VAE's factors;  patch: the network's

    Raises UserError, with the nearest sizes that work, for one that does not divide.
    """
    unit = space * patch
    for name, size in (("height", video.height), ("width", video.width)):
        if size % unit:
            nearest = [str(count * unit) for count in (size // unit, size // unit + 1) if count]
            raise UserError(
                f"video.{name}={size}: not a multiple of {unit} (VAE factor {space} x patch "
                f"{patch}); "
                f"use {' or '.join(nearest)}."
            )
    if (video.frames - 1) % time:
        below = (video.frames - 1) // time * time + 1
        raise UserError(
            f"video.frames={video.frames}: must be a multiple of {time}, plus 1; use {below} or "
            f"{below + time}."
        )
    return (video.frames - 1) // time + 1, video.height // space, video.width // space


def image_only(video: Video, name: str) -> None:
    """Raise UserError for a clip where the family draws images."""
    if video.frames != 1:
        raise UserError(f"video.frames={video.frames}: {name} draws images; use 1.")


@torch.no_grad()
def decode(
    frames: Callable[[Tensor, Condition], Tensor], x: Tensor, condition: Condition, at_once: int
) -> Decoded:
    """Latents [B, C, F, H, W] to pixels, so many at a time.  frames: as `Policy.frames`"""
    parts = [slice(start, start + at_once) for start in range(0, len(x), at_once)]
    return Decoded.joined([to_pixels(frames(x[own], part_of(condition, own))) for own in parts])


def to_pixels(frames: Tensor) -> Decoded:
    """A VAE's output, [B, 3, F, H, W] in [-1, 1], as pixels, uint8 [B, F, H, W, 3].

    Both extremes of a clip are NaN where one of its values is, and need no memory.
    """
    extremes = torch.stack([frames.amin(dim=(1, 2, 3, 4)), frames.amax(dim=(1, 2, 3, 4))])
    pixels = (frames.float().clamp(-1, 1) + 1) * 127.5
    pixels = rearrange(pixels.round().to(torch.uint8), "b c f h w -> b f h w c")
    return Decoded(pixels, torch.isfinite(extremes).all(0))
