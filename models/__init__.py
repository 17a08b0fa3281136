"""Backbones: one file per family, and the folder is the registry.

A family is a file models/NAME.py with

  NETWORK: str                                     the folder part that is trained: "transformer" or "unet"
  blocks(network) -> list[nn.Module]               its repeated blocks
  load(settings, device) -> Policy                 its network from streaming.outline, without weights yet
  encoder(settings, video, device)                 a context manager that gives an Encoder
  PIPELINES: tuple[str, ...]                       the diffusers pipelines whose folders it reads
  MAX_..._TOKENS: int                              its limits of text lengths: the cache of conditions notes them

and, where its other parts lie in another pipeline's folder, PIPELINE: the diffusers class that an export names. Adding
one edits no other file. `folder` reads the diffusers layout, `streaming` the network's weights, `lora` adds adapters to
any family's network.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrpo.config import Lora, Model, Video
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import UserError
from fastgrpo.models import streaming
from fastgrpo.models.lora import add_adapters

Condition = Mapping[str, Tensor]  # what the network is conditioned on; one prompt's without, a batch's with a first dim


class Encoder(Protocol):
    """Prompts to conditions, with the family's own text encoders (and image encoder), loaded while it is open."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        """One condition per prompt, float32 on the CPU, without a batch dimension.

        A prompt's condition depends on that prompt alone. Raises UserError for a prompt without tokens or, where the
        network needs a reference image, without one.
        """

    def negative(self, text: str) -> Condition:
        """The condition of the unconditional branch of classifier-free guidance."""


class Policy(Protocol):
    """A generator that can be sampled and trained. Everything outside it speaks t in [0, 1], float32 and uint8."""

    network: nn.Module
    """The trainable network."""
    vae: nn.Module
    """The decoder, frozen."""
    negative: Condition | None
    """The unconditional branch's condition, on the network's device; set before sampling where model.cfg > 1."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The network's repeated blocks, in the order in which they run: the units of sharding and recomputation."""

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        """(C, F, H, W) of one sample's latent. Raises UserError for a size that the networks cannot take."""

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of a sampler with `steps` steps for latents of `shape`, as the folder's scheduler has them.

        shift: in place of the scheduler's, where the family has one;  returns float32 [steps + 1], falling to 0
        """

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, guidance included. x: [B, C, F, H, W] float32;  t: [B];  returns like x."""

    def transition(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Mean and std of p(x_next | x), see fastgrpo.flow."""

    def clean_estimate(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the prediction implies: the deterministic last step, from time t to 0."""

    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] to pixels, uint8 [B, F, H, W, 3]."""


class Family(Protocol):
    """What a file models/NAME.py has at its top level."""

    NETWORK: str

    def blocks(self, network: nn.Module) -> list[nn.Module]: ...

    def load(self, settings: Model, device: torch.device) -> Policy:
        """The policy, its network from `streaming.outline`: without weights, which `outline` and `load` below know."""

    def encoder(self, settings: Model, video: Video, device: torch.device) -> AbstractContextManager[Encoder]: ...


def known() -> list[str]:
    """Names of the families: the files here that define `load`."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [f.stem for f in files if re.search(r"^def load\(settings", f.read_text(encoding="utf-8"), re.MULTILINE)]


def family(name: str) -> Family:
    """The file models/NAME.py. Raises UserError where there is none."""
    if name not in known():
        raise UserError(
            f"model.family='{name}': no file models/{name}.py. Use one of {', '.join(known())}, "
            f"or add models/{name}.py with a function load(settings, device) -> Policy."
        )
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))


def outline(settings: Model, device: torch.device, lora: Lora | None = None) -> Policy:
    """The policy of a recipe's [model] section, with adapters where it asks, and a network that has no weights yet.

    Shard it, then `streaming.fill` its network; nothing before needs the weights. Its other parts are on `device`.
    """
    policy = family(settings.family).load(settings, device)
    _configure(policy, settings)
    if lora is not None and lora.rank:
        add_adapters(policy.network, lora, getattr(torch, settings.dtype))
    return policy


def load(settings: Model, device: torch.device, lora: Lora | None = None) -> Policy:
    """`outline`, with the whole network in float32 on `device`; what adapters stand beside is in compute precision."""
    policy = outline(settings, device, lora)
    streaming.fill(policy.network, device)
    return policy


def _configure(policy: Policy, settings: Model) -> None:
    """Recomputation and attention kernel: the same for every family."""
    network: Any = policy.network
    if settings.gradient_checkpointing:
        left_out = {id(b) for n, b in enumerate(policy.blocks) if n % int(settings.gradient_checkpointing)}

        def run(module: nn.Module, *inputs: object) -> object:
            if id(module) in left_out:
                return module(*inputs)
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)  # no block draws

        network.enable_gradient_checkpointing(run)
    if settings.attention is not None:
        try:
            network.set_attention_backend(settings.attention)
            if not any(getattr(p, "_attention_backend", None) for p in network.attn_processors.values()):
                raise ValueError(f"a {type(network).__name__} has no choice of kernels")
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(
                f"model.attention={settings.attention}: {str(error).splitlines()[0]}; leave it out for torch's own."
            ) from None


def encoder(settings: Model, video: Video, device: torch.device) -> AbstractContextManager[Encoder]:
    """The text encoders of a recipe's [model] section; freed when the context ends."""
    return family(settings.family).encoder(settings, video, device)


def stack(conditions: Sequence[Condition]) -> Condition:
    """Single prompts' conditions of equal shapes to one batch."""
    return {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}


def move(condition: Condition, device: torch.device) -> Condition:
    """The condition on another device."""
    return {name: tensor.to(device) for name, tensor in condition.items()}


def shape_key(condition: Condition) -> tuple[tuple[int, ...], ...]:
    """Conditions with the same key can share a batch without padding."""
    return tuple(tuple(condition[name].shape) for name in sorted(condition))
