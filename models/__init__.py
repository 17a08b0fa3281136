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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgrpo.core.config import Lora, Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Encoder, Policy
from fastgrpo.models.loading import streaming
from fastgrpo.models.loading.lora import add_adapters


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
        add_adapters(policy.network, lora, settings.torch_dtype)
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
