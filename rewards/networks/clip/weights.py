"""CLIP checkpoints to transformers' CLIPModel.

A checkpoint has open_clip's layout, as HPS-v2.1 and DFN5B, or transformers' own.
open_clip holds q, k and v of an attention as one matrix and its projections transposed; its names
are mapped below. What tensors cannot say (heads, which gelu) is read from the config beside the
weights; nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import weight_files

OPEN_CLIP_CONFIG = "open_clip_config.json"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
}
"""open_clip's ViT-H-14, with the plain gelu; HPS-v2.1 is published without a config."""

MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
VISION_KEYS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}

PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
LAYER_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")


@dataclass(frozen=True)
class Loaded:
    """A CLIP and what its checkpoint says about its use."""

    model: Any  # CLIPModel, frozen, on the CPU
    open_clip: bool  # the layout, and with it the rules for text and crops
    logit_scale: float  # the learned temperature, exponentiated
    # what the config says about the pixels; keys of open_clip's preprocess_cfg
    preprocess: dict[str, Any]


def read(
    file: Path, known: Mapping[str, Any] | None, image_size: int | None, dtype: torch.dtype
) -> Loaded:
    """Read a checkpoint strictly: every tensor of the network, no other, each of the right shape.

    known: model_cfg in open_clip's terms for a checkpoint that is published without one
    image_size: side of the input where it is not the config's;  dtype: of the weights
    Raises UserError naming the file.
    """
    state = weight_files.read(file)
    open_clip = "visual.conv1.weight" in state
    if open_clip:
        config, preprocess = _open_clip_config(file, known, image_size)
        state = to_transformers(state)
    elif "vision_model.embeddings.patch_embedding.weight" in state:
        config, preprocess = _transformers_config(file, image_size)
        state = {
            name: tensor
            for name, tensor in state.items()
            if not name.endswith("embeddings.position_ids")
        }
    else:
        raise UserError(
            f"rewards.path={file}: neither open_clip's nor transformers' CLIP (its first tensor is "
            f"'{next(iter(state))}'); give a checkpoint of a CLIP with a vision transformer."
        )
    with torch.device("meta"):
        model = CLIPModel(config)
    _check(state, model.state_dict(), file)
    logit_scale = state["logit_scale"].float().exp().item()
    layout = torch.contiguous_format  # also of what is a transposed view, or lies in the file
    owned = {
        name: tensor.to(dtype, copy=True, memory_format=layout) for name, tensor in state.items()
    }
    model.load_state_dict(owned, assign=True)
    # position ids are in no checkpoint
    for part in (model.text_model.embeddings, model.vision_model.embeddings):
        part.position_ids = torch.arange(part.position_ids.shape[1])[None]
    return Loaded(model.requires_grad_(False).eval(), open_clip, logit_scale, preprocess)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip, tensors of any shape [...] by name, as transformers has it.

    A name that is not known stays, for the strict check to refuse.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if name in PLAIN:
            result[PLAIN[name]] = tensor
        elif stem in LAYER_NORMS:
            result[f"{LAYER_NORMS[stem]}.{kind}"] = tensor
        elif name in TRANSPOSED:
            result[TRANSPOSED[name]] = tensor.T
        elif name == "logit_scale":
            result[name] = tensor.reshape(())
        elif match := BLOCK.fullmatch(name):
            result |= _block(match, tensor)
        else:
            result[name] = tensor
    return result


def _block(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a block as transformers has it; q, k, v, [3 E, ...], become three."""
    tower, layer, part, kind = match.groups()
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
    part = part.rstrip(".")
    if part == "attn.in_proj_":
        return {
            f"{prefix}.self_attn.{n}_proj.{kind}": third
            for n, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {f"{prefix}.{IN_BLOCK.get(part, part)}.{kind}": tensor}


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    """Raise UserError for the first tensor that is missing, unknown or of another shape [...].

    The message also says how many there are.
    """
    missing = [f"'{name}' is missing" for name in wanted if name not in state]
    unknown = [f"'{name}' is not part of the network" for name in state if name not in wanted]
    shapes = [
        f"'{name}' is {list(state[name].shape)} where the config means {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = missing + unknown + shapes
    if problems:
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise UserError(
            f"rewards.path={file}: {problems[0]}{more}; download it again, or put the config that "
            f"it was published with ({OPEN_CLIP_CONFIG} or {CONFIG}) beside it."
        )


def _open_clip_config(
    file: Path, known: Mapping[str, Any] | None, image_size: int | None
) -> tuple[CLIPConfig, dict[str, Any]]:
    """The network's config and the preprocessing, from open_clip_config.json beside the weights.

    known: model_cfg where there is no such file
    """
    described: dict[str, Any] = {"model_cfg": known}
    where = f"rewards.path={file}"
    if (file.parent / OPEN_CLIP_CONFIG).is_file():
        described = weight_files.read_json(file.parent / OPEN_CLIP_CONFIG)
        where = f"{file.parent / OPEN_CLIP_CONFIG}"
    elif known is None:
        raise UserError(
            f"{where}: {OPEN_CLIP_CONFIG} is missing beside it, which says heads and gelu; "
            "download that file too."
        )
    preprocess = dict(described.get("preprocess_cfg") or {})
    try:
        model = described["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        if known is not None and model.get("quick_gelu", False) != known.get("quick_gelu", False):
            raise UserError(
                f"{where}: its gelu is not that of {file.name}; keep each checkpoint in its own "
                "folder."
            )
        other = (set(model) - MODEL_KEYS) | (set(vision) - VISION_KEYS) | (set(text) - TEXT_KEYS)
        if other:
            raise UserError(
                f"{where}: '{min(other)}' is not supported; use a plain CLIP with a vision "
                "transformer."
            )
        size = image_size or preprocess.get("size") or vision["image_size"]
        size = size[0] if isinstance(size, list | tuple) else size
        return _config(model, vision, text, int(size)), preprocess | {"size": int(size)}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: not a model_cfg of open_clip ({error!r}); download it again."
        ) from None


def _config(model: Any, vision: Any, text: Any, size: int) -> CLIPConfig:
    """A CLIPConfig of open_clip's model_cfg.  size: side of the input, pixels"""
    shared = {"hidden_act": "quick_gelu" if model.get("quick_gelu", False) else "gelu"}
    shared["projection_dim"] = model["embed_dim"]
    return CLIPConfig(
        projection_dim=model["embed_dim"],
        vision_config=shared
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": size,
            "patch_size": vision["patch_size"],
        },
        text_config=shared
        | {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text["vocab_size"],
            "eos_token_id": text["vocab_size"] - 1,
        },
    )


def _transformers_config(file: Path, image_size: int | None) -> tuple[CLIPConfig, dict[str, Any]]:
    """The network's config and the preprocessing, from transformers' files beside the weights."""
    if not (file.parent / CONFIG).is_file():
        raise UserError(
            f"rewards.path={file}: {CONFIG} is missing beside it; download that file too."
        )
    try:
        config = CLIPConfig.from_dict(weight_files.read_json(file.parent / CONFIG))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file.parent / CONFIG}: not a config of a CLIP ({error}); download it again."
        ) from None
    config.vision_config.image_size = image_size or config.vision_config.image_size
    preprocess: dict[str, Any] = {"size": config.vision_config.image_size}
    if (file.parent / PREPROCESSOR).is_file():
        said = weight_files.read_json(file.parent / PREPROCESSOR)
        names = {"mean": "image_mean", "std": "image_std"}
        preprocess |= {ours: said[theirs] for ours, theirs in names.items() if theirs in said}
        off = [
            key for key in ("do_resize", "do_center_crop", "do_normalize") if said.get(key) is False
        ]
        if off:
            raise UserError(
                f"{file.parent / PREPROCESSOR}: {off[0]} is false; only CLIP's usual steps are "
                "supported."
            )
    return config, preprocess
