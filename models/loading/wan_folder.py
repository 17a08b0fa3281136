"""What a folder of Wan's must hold for each family that reads one: compared before the weights,
which are large, are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from fastgrpo.core.config import Model
from fastgrpo.core.errors import UserError
from fastgrpo.models.loading import diffusers_folder, streaming


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a family's network takes beside the noisy latent and the text."""

    models: str  # that have this form, for messages
    conditioned: bool = False
    """After the noisy latent's channels a mask's, which says what frames are given, and a given
    clip's latent."""
    images: bool = False  # states of an image encoder, which each block attends to
    experts: bool = False  # two networks, with a time at which one follows the other
    places: int | None = None  # the text's places; None: as many as the folder's tokenizer takes


def check_pipeline(index: Mapping[str, Any], settings: Model, form: Form) -> None:
    """Raise UserError for a folder of two networks, as Wan 2.2's A14B is, where one is read, and the
    reverse.
    """
    two = any(index.get("transformer_2") or ())
    for key, told in (("transformer_2", two), ("boundary_ratio", index.get("boundary_ratio"))):
        if told and not form.experts:
            raise UserError(
                f"model.path={settings.path}: model_index.json has {key}, as Wan 2.2 A14B with its "
                f"two networks does; use {form.models}."
            )
        if form.experts and not told:
            raise UserError(
                f"model.path={settings.path}: model_index.json has no {key}, which Wan 2.2 A14B's "
                f"has; use {form.models}."
            )


def check_network(
    config: Mapping[str, Any], where: Path, vae: Any, settings: Model, form: Form
) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    taken, given, patch = (config.get(key) for key in ("in_channels", "out_channels", "patch_size"))
    images = config.get("image_dim") is not None and config.get("added_kv_proj_dim") is not None
    wanted = vae.z_dim
    if form.conditioned:
        wanted += vae.scale_factor_temporal + vae.z_dim
    if images != form.images or taken != wanted or given != vae.z_dim:
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} "
            f"out{' and sees images' if images else ''}, the "
            f"VAE {vae.z_dim}; use {form.models}."
        )
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(
            f"{named}: the network has pos_embed_seq_len, as those do that are given a first and a "
            f"last frame; use {form.models}."
        )
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise UserError(
            f"{named}: the network's patch_size is {patch}, not [1, n, n]; use {form.models}."
        )
    made = diffusers_folder.read_json(where / "text_encoder" / "config.json").get("d_model")
    if config.get("text_dim") != made:
        raise UserError(
            f"{named}: the network takes text of width {config.get('text_dim')}, the text encoder "
            f"makes {made}; the "
            "parts are of different models."
        )


def outline(
    folder: Path, where: Path, vae: Any, settings: Model, device: torch.device, form: Form
) -> nn.Module:
    """The network of a folder, without weights.

    where: the folder of the other parts;  vae: its VAE's config
    """
    config = diffusers_folder.read_json(folder / "config.json")
    check_network(config, where, vae, settings, form)
    network: nn.Module = streaming.outline(WanTransformer3DModel, folder, device)
    return network
