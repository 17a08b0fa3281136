"""What every family of models must offer: the protocols of a policy and of its text encoder, and
their conditions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastgrpo.core.config import Video
from fastgrpo.core.reward import PromptText


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a Parquet file."""

    file: Path
    column: str
    row: int  # from 0

    def __str__(self) -> str:
        return f"{self.file}: row {self.row + 1} of '{self.column}'"


@dataclass(frozen=True)
class Prompt:
    """What one group of samples is drawn for."""

    text: str
    image: Path | StoredImage | None = (
        # the reference image of image-to-video: a picture, or a video whose first frame is meant
        None
    )
    place: str = field(default="", compare=False)  # recipe key, file and row, for messages
    # column -> value of JSON's types, for the columns of prompts.reward_columns
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def for_rewards(self) -> PromptText:
        """The text as rewards are handed it, with its row."""
        return PromptText(self.text, self.row)


# what the network is conditioned on; one prompt's without, a batch's with a first dim
Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Decoded:
    """B clips as a decoder gave them."""

    pixels: Tensor  # uint8 [B, F, H, W, 3]
    finite: Tensor  # bool [B], on the same device
    """Whether the decoder's output was finite. Cast to uint8, NaN looks like a black clip."""

    @classmethod
    def joined(cls, parts: "Sequence[Decoded]") -> "Decoded":
        """The clips of consecutive batches as one."""
        pixels = torch.cat([part.pixels for part in parts])
        return cls(pixels, torch.cat([part.finite for part in parts]))


class Encoder(Protocol):
    """Prompts to conditions, with the family's own text encoders (and image encoder), loaded while
    it is open.
    """

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        """One condition per prompt, float32 on the CPU, without a batch dimension.

        A prompt's condition depends on that prompt alone. Raises UserError for a prompt without
        tokens or, where the network needs a reference image, without one.
        """

    def negative(self, text: str) -> Condition:
        """The condition of the unconditional branch of classifier-free guidance."""

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        """The encoders that see less than the whole text, by their parts of the folder.

        returns part -> (tokens that it sees, tokens of the text); empty where all see the text
        """


class Policy(Protocol):
    """A generator that can be sampled and trained.

    Everything outside it speaks t in [0, 1], float32 and uint8.
    """

    network: nn.Module
    """The trainable network."""
    vae: nn.Module
    """The decoder, frozen."""
    negative: Condition | None
    """The unconditional branch's condition, on the network's device; set before sampling where
    model.cfg > 1.
    """

    share_sequence: Callable[[Any, Any], None]
    """Function (network, layout) that lets the ranks of a group share each sequence; set on
    loading.

    The family file's, or one that refuses where it has none; layout: of parallel/sequence_parallel.
    """

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The network's repeated blocks, in the order in which they run: the units of sharding and
        recomputation.
        """

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        """(C, F, H, W) of one sample's latent.

        Raises UserError for a size that the networks cannot take.
        """

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of a sampler with `steps` steps for latents of `shape`, as the folder's scheduler
        has them.

        shift: in place of the scheduler's, where the family has one;  returns float32 [steps + 1],
        falling to 0
        """

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, guidance included.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x.
        """

    def transition(
        self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of p(x_next | x), see fastgrpo.algorithm.transitions.

        x, v: [B, C, F, H, W] float32;  t, t_next: scalars or [B]
        returns mean like x, and std, which broadcasts against it
        """

    def clean_estimate(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the prediction implies: the deterministic last step, from time t to 0.

        x, v: [B, C, F, H, W] float32;  t: a scalar or [B];  returns like x
        """

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1.

        With the frames' gradient in the latents; the VAE is frozen.
        condition: the batch's, of which image-to-video takes frames that are not drawn
        """

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] to pixels, each clip marked where they are not finite.

        condition: as in `frames`
        """


class Experts(nn.Module):
    """Two networks of one form as one: each answers for times of its own.

    Its parameters are named PART.NAME by the folder's parts. It has the config of both, which are
    equal, and hands on what a diffusers network is asked to switch.
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float) -> None:
        """networks: by the folder's parts, for times t >= boundary and below, 1 >= boundary >= 0"""
        super().__init__()
        self.parts = tuple(networks)
        self.boundary = boundary
        for part, network in networks.items():
            self.add_module(part, network)

    @property
    def networks(self) -> tuple[Any, ...]:
        """The networks, in the order in which a sampler comes to them."""
        return tuple(self.get_submodule(part) for part in self.parts)

    @property
    def config(self) -> Any:
        return self.networks[0].config

    @property
    def _keep_in_fp32_modules(self) -> Any:
        """diffusers' word for what stays in float32, see parallel/precision.py."""
        return getattr(self.networks[0], "_keep_in_fp32_modules", None)

    def expert_at(self, t: float) -> int:
        """The number of the network that answers at time t."""
        return 0 if t >= self.boundary else 1

    def forward(self, expert: int, inputs: Mapping[str, Any]) -> Any:
        """One network's answer.  inputs: its arguments by name"""
        return self.networks[expert](**inputs)


def networks_of(network: nn.Module) -> dict[str, Any]:
    """The networks that a policy trains, each by what its parameters' names begin with."""
    if isinstance(network, Experts):
        return {f"{part}.": network.get_submodule(part) for part in network.parts}
    return {"": network}


def experts_of(network: nn.Module, grid: Tensor) -> tuple[int, ...]:
    """The expert of each step, by the time that it begins at; empty where there is one network.

    grid: float32 [T + 1] on the CPU, so that routing waits for no device
    """
    if not isinstance(network, Experts):
        return ()
    assert grid.device.type == "cpu"
    return tuple(network.expert_at(t) for t in grid[:-1].tolist())


@runtime_checkable
class Routed(Protocol):
    """What a policy of `Experts` has beside the members of `Policy`."""

    def velocity_of(self, expert: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """`Policy.velocity` by one expert: all rows' times are its own.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """


class Predicts(Protocol):
    """The part of a `Policy` that evaluates its network."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Policy.velocity`.  x: [B, C, F, H, W] float32;  t: [B];  returns like x"""


def predict(policy: Predicts, x: Tensor, t: Tensor, condition: Condition, expert: int) -> Tensor:
    """The policy's prediction; expert: the one whose times the rows have, 0 where there is one.

    x: [B, C, F, H, W] float32;  t: [B];  returns like x
    """
    if isinstance(policy, Routed):
        return policy.velocity_of(expert, x, t, condition)
    return policy.velocity(x, t, condition)


def stack(conditions: Sequence[Condition]) -> Condition:
    """Single prompts' conditions of equal shapes to one batch."""
    return {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}


def move(condition: Condition, device: torch.device) -> Condition:
    """The condition on another device."""
    return {name: tensor.to(device) for name, tensor in condition.items()}


def part_of(condition: Condition, rows: slice) -> Condition:
    """Some rows of a batch's condition."""
    return {name: tensor[rows] for name, tensor in condition.items()}


def shape_key(condition: Condition) -> tuple[tuple[int, ...], ...]:
    """Conditions with the same key can share a batch without padding."""
    return tuple(tuple(condition[name].shape) for name in sorted(condition))
