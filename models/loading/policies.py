"""A recipe's policy and its text encoders, whatever its family.

The one file of this folder that asks the registry. The class that model_index.json names is
compared here with the family's PIPELINES, so that the families' files need not know of each other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastgrpo import models
from fastgrpo.core.config import Lora, Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Encoder, Policy, networks_of
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.loading.lora import add_adapters
from fastgrpo.models.text_encoders.passes import passes_of
from fastgrpo.parallel.precision import to_compute_precision
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

ATTENTION = ("scaled_dot_product", "flash_attn")
"""Also kernels that torch does not bring, which register an operator of that name."""
KEPT = {"attention": ATTENTION, "products": (*ATTENTION, "aten.mm", "aten.addmm")}
"""By model.keep, the operators whose results a recomputed block keeps: the dearest to compute."""


def outline(settings: Model, device: torch.device, lora: Lora | None = None) -> Policy:
    """The policy of a recipe's [model] section, with its adapters; the network has no weights yet.

    Shard the policy, then `streaming.fill` its network; nothing before needs the weights. The other
    parts are on `device`.
    """
    policy = _family(settings).load(settings, device)
    configure(policy, settings)
    if lora is not None and lora.rank:
        add_adapters(policy.network, lora, settings.torch_dtype)
    return policy


def load(
    settings: Model,
    device: torch.device,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """The policy of `outline` with the whole network on `device`, read straight into `dtype`, but
    for what the network keeps in float32.

    What adapters stand beside is in compute precision.
    """
    policy = outline(settings, device, lora)
    to_compute_precision(policy.network, dtype)  # on the meta device: nothing is moved
    streaming.fill(policy.network, device)
    return policy


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[Encoder]:
    """The text encoders of a recipe's [model] section; freed when the context ends.

    Each of its networks is in host memory until it is first called, or placed by who asks for it.
    """
    with _family(settings).encoder(settings, video, device) as encode:
        for one in passes_of(encode):
            for network in one.networks:
                network.wanted = settings.text_encoders
        yield encode


def _family(settings: Model) -> models.Family:
    """The recipe's family. Raises UserError where model.path is another pipeline's folder."""
    family = models.family(settings.family)
    diffusers_folder.check_pipeline(settings, family.PIPELINES, models.fitting, models.known())
    return family


def configure(policy: Policy, settings: Model) -> None:
    """Set recomputation, the attention kernel and how sequences are shared."""
    networks = networks_of(policy.network).values()
    policy.share_sequence = share_sequence(settings.family)
    if settings.gradient_checkpointing:
        left_out = {id(b) for n, b in enumerate(policy.blocks) if not settings.recomputes(n)}

        recompute = recomputing(settings.keep)

        def run(module: nn.Module, *inputs: object) -> object:
            if id(module) in left_out:
                return module(*inputs)
            return recompute(module, *inputs)

        for network in networks:
            network.enable_gradient_checkpointing(run)
    if settings.attention is not None:
        try:
            for network in networks:
                _choose_attention(network, settings.attention)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(
                f"model.attention={settings.attention}: {str(error).splitlines()[0]}; leave it out "
                "for torch's own."
            ) from None


def _choose_attention(network: Any, backend: str) -> None:
    """Raise ValueError for a network that cannot choose."""
    network.set_attention_backend(backend)
    processors = [getattr(module, "processor", None) for module in network.modules()]
    if not any(getattr(processor, "_attention_backend", None) for processor in processors):
        raise ValueError(f"a {type(network).__name__} has no choice of kernels")


def recomputing(keep: str) -> Callable[..., Any]:
    """Call a block so that its backward computes it again, but for what is kept.

    keep: as model.keep;  returns (block, *inputs) -> the block's outputs
    """
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # no block draws
    if keep == "nothing":
        return recompute
    chosen = partial(_kept_of_a_block, KEPT[keep])
    return partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, chosen))


def _kept_of_a_block(
    kept: tuple[str, ...],
    context: SelectiveCheckpointContext,
    operator: Any,
    *args: Any,
    **kwargs: Any,
) -> CheckpointPolicy:
    """Keep the results of some operators; compute the rest again.  kept: parts of their names"""
    name = str(operator)
    found = any(part in name for part in kept)
    return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE


def share_sequence(family: str) -> ShareSequence:
    """The family's function of this name; where its file has none, one that raises UserError."""
    if family in models.with_function("share_sequence"):
        shares: ShareSequence = vars(models.family(family))["share_sequence"]
        return shares

    def refuse(network: nn.Module, layout: Layout) -> None:
        raise UserError(
            f"distributed.sp={layout.sp.size}: a {type(network).__name__} has no sequence "
            "parallelism; use 1. Those "
            f"with it: {', '.join(models.with_function('share_sequence'))}."
        )

    return refuse
