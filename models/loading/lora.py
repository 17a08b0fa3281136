"""Low-rank adapters for any family's network, by peft; and what becomes of them.

Hu et al. 2021, arXiv 2106.09685.

A linear layer W gets alpha / rank * B A beside it. W is frozen; A and B alone are in the optimizer,
in the moving average and in checkpoints, under the names `LAYER.lora_A.default.weight` [rank, in]
and `LAYER.lora_B.default.weight` [out, rank], LAYER being the name of the layer in the network
without adapters. Such a mapping is a `state` below: the "model" or the "ema" part of a checkpoint.
Only `add_adapters` needs peft.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastgrpo.algorithm import noise
from fastgrpo.core.config import Lora
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replacing
from fastgrpo.core.policy import networks_of
from fastgrpo.models.loading.weight_files import cast
from fastgrpo.parallel.precision import to_compute_precision

ATTENTION = (  # the names that diffusers' networks give the projections of their attention
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
ADAPTER = "default"
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(
    network: nn.Module, settings: Lora, frozen_dtype: torch.dtype = torch.float32
) -> None:
    """Freeze a diffusers network and put float32 adapters beside its linear layers, in place;
    before it is sharded.

    They start as `initial` says; those of a network without weights get their values with these,
    from `streaming`.

    frozen_dtype: what to keep the frozen weights in; the compute precision loses nothing, as they
    are cast to it anyway
    Raises UserError where peft is missing or a target of the recipe is no linear layer.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            f"lora.rank={settings.rank}: needs peft; pip install 'fastgrpo[lora]'."
        ) from None
    for one in networks_of(network).values():
        layers = target_layers(one, settings)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=_alpha(settings),
            target_modules=layers,
            init_lora_weights=False,
        )
        to_compute_precision(one, frozen_dtype)
        one.add_adapter(config, ADAPTER)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):  # float32, whatever precision peft chose
            start = parameter.data.float() if parameter.is_meta else initial(name, parameter.shape)
            parameter.data = start.to(parameter.device)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((DOWN, UP))


def unadapted(name: str) -> str:
    """A frozen parameter's name in the network without adapters."""
    return name.replace(".base_layer.", ".")


def initial(name: str, shape: Sequence[int]) -> Tensor:
    """An adapter's parameter as training begins: the whole [out, in], float32 on the CPU.

    B starts at 0, so the network's output does not change; A is uniform within +- 1 / sqrt(in), as
    peft has it, but a function of the layer's name alone: every rank and every attempt of a run
    starts from the same adapters.
    """
    if name.endswith(UP):
        return torch.zeros(*shape)
    uniform = torch.rand(*shape, generator=noise.generator(("lora", name.removesuffix(DOWN))))
    return (2 * uniform - 1) / shape[1] ** 0.5


def target_layers(network: nn.Module, settings: Lora) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises UserError for a target that names none.
    """
    # what a family froze depends on nothing that is trained; a network may be frozen as a whole
    some = any(parameter.requires_grad for parameter in network.parameters())
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and (module.weight.requires_grad or not some)
    ]
    layers: dict[str, None] = {}
    for target in settings.targets or ATTENTION:
        named = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not named and settings.targets:
            raise UserError(
                f"lora.targets='{target}': no linear layer of the network has a name that ends so; "
                f"use some of {', '.join(_endings(linear))}."
            )
        layers.update(dict.fromkeys(named))
    if not layers:
        raise UserError(
            f"lora.targets: the network has no attention projections of a known name; "
            f"use some of {', '.join(_endings(linear))}."
        )
    return list(layers)


def _endings(names: list[str]) -> list[str]:
    """The last part of each name, with the numbers that follow it: "to_q", "to_out.0"."""
    return sorted({found[0] for name in names if (found := re.search(r"[^.]+(\.\d+)*$", name))})


def _alpha(settings: Lora) -> float:
    return float(settings.rank) if settings.alpha is None else settings.alpha


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """The adapters' outputs scaled to exactly 0 inside.

    (peft's own switch also changes what requires gradients.)
    """
    layers: list[Any] = [
        module for module in network.modules() if ADAPTER in getattr(module, "scaling", {})
    ]
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def save_adapters(
    state: Mapping[str, Tensor],
    file: Path,
    part: str,
    settings: Lora,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a .safetensors file that the family's diffusers pipeline loads by
    `load_lora_weights(file)`.

    The names are PART.LAYER.lora_A.weight and PART.LAYER.lora_B.weight. The scale alpha / rank is
    multiplied into B, so that every program that knows this layout, with or without a notion of
    alpha, applies the adapters as trained.

    state: plain tensors [rank, in] and [out, rank] on any device, see above;  part: the family's
    NETWORK, "transformer" or "unet"
    """
    adapters = {}
    for name, value in state.items():
        if name.endswith(DOWN):
            down = cast(name, value.float().cpu(), dtype).contiguous()
            adapters[f"{part}.{name.removesuffix(DOWN)}.lora_A.weight"] = down
        elif name.endswith(UP):
            scaled = value.float() * (_alpha(settings) / settings.rank)
            up = cast(name, scaled.cpu(), dtype).contiguous()
            adapters[f"{part}.{name.removesuffix(UP)}.lora_B.weight"] = up
    if not adapters:
        raise UserError(
            f"{file}: the checkpoint has no adapters (lora.rank was 0); export the whole network."
        )
    with replacing(file) as partial:
        partial.write_bytes(save(adapters, metadata={"format": "pt"}))  # with the umask's mode


def merged(name: str, base: Tensor, state: Mapping[str, Tensor], settings: Lora) -> Tensor:
    """A parameter with its layer's adapter folded in: W + alpha / rank * B A.

    base: W [out, in], of the network without adapters

    Computed in float32 and returned in the dtype of `base`: give base.float() to lose nothing to
    rounding. A parameter without an adapter is returned as it is. Needs this one tensor in memory,
    not the network.

    name: in the network without adapters, e.g. "mid_block.attentions.0.proj_in.weight";  state: see
    above
    """
    down = state.get(name.removesuffix(".weight") + DOWN)
    if down is None:
        return base
    up = state[name.removesuffix(".weight") + UP]
    change = up.to(base.device, torch.float32) @ down.to(base.device, torch.float32)
    return torch.add(base.float(), change, alpha=_alpha(settings) / settings.rank).to(base.dtype)
