"""What a plan makes a network of: parameters by name, matrices with the tokens they are applied to.

Importing diffusers takes five seconds: so a family writes the parameters of its class down by their
names, in its function plan(config). tests/test_family_contract.py compares them with the class
itself. Where tokens go is noted with each matrix: FLOPs and activations are proportional to that.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrpo.core.config import Model

Shape = tuple[int, ...]
VIDEO, TEXT, BOTH, SAMPLE, IMAGE = "video", "text", "both", "sample", "image"
"""What a matrix is applied to: drawn image or video tokens, text tokens, both as one sequence, one
vector per sample, or a reference image's states (`Network.image`).
"""
ATTENDING = ("to_q", "to_k", "to_v", "to_out.0")
ATTENDING_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTED = (*ATTENDING, *ATTENDING_TEXT)
"""The layers that get an adapter where lora.targets names none, as in models/loading/lora.py."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A linear or convolutional layer: inputs x outputs multiplications for each position."""

    name: str
    inputs: int  # of a convolution: times its kernel
    outputs: int
    where: str
    area: float = (
        1.0  # positions per token of `where`; a UNet's levels have 1, 1/4, 1/16 ... of the latent's
    )
    linear: bool = True  # nn.Linear, which may get an adapter

    @property
    def flops(self) -> float:
        """FLOPs per token of `where`."""
        return 2.0 * self.inputs * self.outputs * self.area


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(Q K) V: 4 x queries x keys x width FLOPs."""

    width: int  # heads x dimensions of each
    queries: str
    keys: str
    area: float = (
        1.0  # of the queries, as in Product; and of the keys where they are of the same kind
    )
    # with sequence parallelism, each rank computes its share of the heads or of the queries
    shared: bool = True


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered, reduced and recomputed together: a block, or what lies outside
    all blocks.
    """

    name: str
    weights: dict[str, Shape] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    # counted once: a search asks a thousand times
    _padded: dict[tuple[int, tuple[str, ...]], int] = field(default_factory=dict, repr=False)
    _adapted: dict[tuple[int, tuple[str, ...]], "Unit"] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights.values())

    def padded(self, shards: int, named: tuple[str, ...] = ()) -> int:
        """Elements when each parameter's first dimension is padded to divide over the shards, as
        FSDP2 does.

        named: of those parameters alone that have such a part in their names; empty: of all
        """
        if (shards, named) not in self._padded:
            self._padded[shards, named] = sum(
                shards * math.ceil(s[0] / shards) * math.prod(s[1:])
                for name, s in self.weights.items()
                if not named or has_part(name, named)
            )
        return self._padded[shards, named]

    def repeated(self, settings: "Model", number: int) -> float:
        """Share of the forward that the backward computes again where nothing of it is kept.

        number: this unit's
        """
        return float(settings.recomputes(number))

    def linear(
        self, name: str, inputs: int, outputs: int, where: str, bias: bool = True, area: float = 1.0
    ) -> None:
        """Add an nn.Linear.  where, area: as in Product"""
        self._weight(name, (outputs, inputs), bias)
        self.products.append(
            Product(name=self.full(name), inputs=inputs, outputs=outputs, where=where, area=area)
        )

    def conv(
        self, name: str, inputs: int, outputs: int, kernel: Sequence[int], area: float = 1.0
    ) -> None:
        """Add a convolution over the latent's places, with its bias."""
        self._weight(name, (outputs, inputs, *kernel), True)
        inputs *= math.prod(kernel)
        self.products.append(
            Product(
                name=self.full(name),
                inputs=inputs,
                outputs=outputs,
                where=VIDEO,
                area=area,
                linear=False,
            )
        )

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        """Add a normalisation's scale."""
        self._weight(name, (size,), bias)

    def embedder(self, name: str, inputs: int, width: int, where: str = SAMPLE) -> None:
        """Add two layers with an activation between: of times, guidance, pooled text or text."""
        self.linear(f"{name}.linear_1", inputs, width, where)
        self.linear(f"{name}.linear_2", width, width, where)

    def feed_forward(self, name: str, width: int, hidden: int, where: str) -> None:
        """Add diffusers' feed-forward layer with a plain activation."""
        self.linear(f"{name}.net.0.proj", width, hidden, where)
        self.linear(f"{name}.net.2", hidden, width, where)

    def _weight(self, name: str, shape: Shape, bias: bool) -> None:
        self.weights[f"{self.full(name)}.weight"] = shape
        if bias:
            self.weights[f"{self.full(name)}.bias"] = shape[:1]

    def full(self, name: str) -> str:
        """A name with the unit's in front."""
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What goes through a block on one rank, guidance's second branch included."""

    width: int  # channels of a token between blocks
    element: int  # bytes of a number in compute precision
    video: int  # tokens of this rank
    text: int  # tokens
    image: int = 0  # states of reference images
    shared: bool = False  # with sequence parallelism
    recomputed: bool = False  # in the backward


class Block(Unit, ABC):
    """One of a network's repeated blocks, which knows the bytes of its activations."""

    unreduced = Fraction(0)
    """Measured share of the block's unreduced gradients when its backward holds the most."""

    def inputs(self, batch: Batch) -> float:
        """Bytes of the tokens that go in."""
        return float(batch.element * batch.width * batch.video)

    @abstractmethod
    def forward(self, batch: Batch) -> float:
        """The most bytes at once without gradients."""

    @abstractmethod
    def stored(self, batch: Batch) -> float:
        """Bytes kept from the forward to the backward."""

    def moved(self, batch: Batch) -> float:
        """Bytes that a recomputation reads and writes which keeps what attention and linear layers
        gave.
        """
        return 0.0

    @abstractmethod
    def working(self, batch: Batch) -> float:
        """The most bytes at once in the backward, what is kept included."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Blocks in the order in which they run, and the rest."""

    blocks: tuple[Block, ...]
    rest: Unit
    width: int  # channels of a token between blocks (a UNet: of its first level)
    heads: int  # that ranks may share; 1 where they cannot
    rotary: int = 0  # channels of the rotary tables
    image: int = 0  # states of a reference image that the blocks attend to
    image_joins: bool = False  # whether they stand among the text's tokens in the blocks
    others: tuple["Network", ...] = ()
    """Networks of the same sizes for other times: one of them all runs at a time."""
    apart: tuple[
        Unit, ...
    ] = ()  # parts outside the blocks that are sharded on their own; they run before the blocks
    float32: tuple[str, ...] = ()
    """Parts of names of the weights that stay in float32 whatever the compute precision, as
    parallel/precision.py has them."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """Those that run in a forward."""
        return (*self.apart, *self.blocks, self.rest)

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """Those that are held: of the other networks, too."""
        return (*self.units, *(unit for other in self.others for unit in other.units))

    def set_apart(self, name: str) -> "Network":
        """The network with a module outside the blocks, such as "context_embedder", sharded on its
        own.
        """
        rest, part = Unit(""), Unit(name)
        for key, shape in self.rest.weights.items():
            (part if key.startswith(f"{name}.") else rest).weights[key] = shape
        for product in self.rest.products:
            (part if product.name.startswith(f"{name}.") else rest).products.append(product)
        part.attentions = self.rest.attentions
        return replace(self, rest=rest, apart=(*self.apart, part))

    @property
    def parameters(self) -> int:
        return sum(unit.parameters for unit in self.all_units)


def has_part(name: str, named: Sequence[str]) -> bool:
    """Whether one of several words is a part of a parameter's name, between its dots."""
    return not set(named).isdisjoint(name.split("."))


def adapters(unit: Unit, rank: int, targets: Sequence[str]) -> Unit:
    """The adapters of a unit's linear layers: A [rank, in] and B [out, rank] beside each that is a
    target.
    """
    key = (rank, tuple(targets))
    if key not in unit._adapted:
        unit._adapted[key] = _adapters(unit, rank, targets)
    return unit._adapted[key]


def _adapters(unit: Unit, rank: int, targets: Sequence[str]) -> Unit:
    found = Unit(unit.name)
    for product in unit.products:
        if product.linear and any(
            f".{product.name}".endswith(f".{target}") for target in targets or ADAPTED
        ):
            name = product.name.removeprefix(f"{unit.name}." if unit.name else "")
            found.linear(
                f"{name}.lora_A.default",
                product.inputs,
                rank,
                product.where,
                bias=False,
                area=product.area,
            )
            found.linear(
                f"{name}.lora_B.default",
                rank,
                product.outputs,
                product.where,
                bias=False,
                area=product.area,
            )
    return found
