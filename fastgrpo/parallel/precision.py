"""Which of a network's parameters stay in float32 whatever the compute precision.

Some diffusers classes say so (`_keep_in_fp32_modules`), and their pipelines loaded in bfloat16
compute with those in float32: of Wan the time embedder, the scale-shift tables and the norms. Here
they do in rollout and update alike, sharded or not, beneath adapters and in an export.
"""

import torch
from torch import nn


def stays_float32(network: nn.Module | type[nn.Module], name: str) -> bool:
    """Whether a parameter of this name stays in float32, as diffusers has it.

    network: or its class;  name: with or without adapters
    """
    words = getattr(network, "_keep_in_fp32_modules", None) or ()
    return not set(words).isdisjoint(name.split("."))


def to_compute_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters in place but those that stay in float32. Buffers, such as rotary
    tables, are left alone.
    """
    for name, parameter in network.named_parameters():
        if not stays_float32(network, name):
            parameter.data = parameter.data.to(dtype)
