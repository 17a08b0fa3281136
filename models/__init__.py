"""Backbones: one file per family, and the folder is the registry.

A family is a file models/NAME.py with `load(settings, device) -> Policy`. Adding one edits no other file.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fastgrpo.config import Model, Video
from fastgrpo.errors import UserError

Condition = Mapping[str, Tensor]  # what the network is conditioned on; one prompt's without, a batch's with a first dim


class Policy(Protocol):
    """A generator that can be sampled and trained. Everything outside it speaks t in [0, 1], float32 and uint8."""

    network: nn.Module
    """The trainable network."""
    blocks: Sequence[nn.Module]
    """Its repeated blocks, in the order in which they run: the units of sharding and of checkpointing."""
    shift: float
    """Shift of the time grid that the model folder's scheduler asks for."""

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        """(C, F, H, W) of one sample's latent. Raises UserError for a size that the networks cannot take."""

    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        """Text to conditions, one per prompt. Loads the text encoders and frees them before it returns."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction. x: [B, C, F, H, W] float32;  t: [B];  returns like x, float32."""

    def transition(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Mean and std of p(x_next | x), see fastgrpo.flow."""

    def clean_estimate(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the prediction implies: the deterministic last step."""

    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] to pixels, uint8 [B, F, H, W, 3]."""


def load(settings: Model, device: torch.device) -> Policy:
    """The policy of a recipe's [model] section, its network in float32 on `device`."""
    known = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    if settings.family not in known:
        raise UserError(
            f"model.family='{settings.family}': no file models/{settings.family}.py. Use one of {', '.join(known)}, "
            f"or add models/{settings.family}.py with a function load(settings, device) -> Policy."
        )
    policy: Policy = importlib.import_module(f"{__name__}.{settings.family}").load(settings, device)
    return policy


def stack(conditions: Sequence[Condition]) -> Condition:
    """Single prompts' conditions of equal shapes to one batch."""
    return {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}


def move(condition: Condition, device: torch.device) -> Condition:
    """The condition on another device."""
    return {name: tensor.to(device) for name, tensor in condition.items()}


def shape_key(condition: Condition) -> tuple[tuple[int, ...], ...]:
    """Conditions with the same key can share a batch without padding."""
    return tuple(tuple(condition[name].shape) for name in sorted(condition))
