"""What a plan makes a network of: parameters by their names, matrices with the tokens that they are applied to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Shape = tuple[int, ...]
VIDEO, TEXT, BOTH, SAMPLE = "video", "text", "both", "sample"
"""What a matrix is applied to: image or video tokens, text tokens, both as one sequence, or one vector per sample."""
ADAPTED = (  # the layers that get an adapter where lora.targets names none: those of fastgrpo.models.loading.lora
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A linear or convolutional layer: inputs x outputs multiplications for each position."""

    name: str
    inputs: int  # of a convolution: times its kernel
    outputs: int
    where: str
    area: float = 1.0  # positions per token of `where`; a UNet's levels have 1, 1/4, 1/16 ... of the latent's
    linear: bool = True  # nn.Linear, which may get an adapter

    @property
    def flops(self) -> float:
        return 2.0 * self.inputs * self.outputs * self.area


@dataclass(frozen=True)
class Attention:
    """softmax(Q K) V: 4 x queries x keys x width FLOPs."""

    width: int  # heads x dimensions of each
    queries: str
    keys: str
    area: float = 1.0  # of the queries, as in Product; and of the keys where they are of the same kind
    shared: bool = True  # with sequence parallelism, each rank computes its share of the heads or of the queries


@dataclass
class Unit:
    """Parameters that are gathered, reduced and recomputed together: a block, or what lies outside all blocks."""

    name: str
    kind: str
    weights: dict[str, Shape] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    saved: float = 0.0  # a UNet's level: bytes per latent place kept for the backward in bfloat16, see plan_unet.Levels
    _padded: dict[int, int] = field(default_factory=dict, repr=False)  # counted once: a search asks a thousand times

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights.values())

    def padded(self, shards: int) -> int:
        """Elements when each parameter's first dimension is padded to divide over the shards, as FSDP2 does."""
        if shards not in self._padded:
            shapes = self.weights.values()
            self._padded[shards] = sum(shards * math.ceil(s[0] / shards) * math.prod(s[1:]) for s in shapes)
        return self._padded[shards]

    def linear(self, name: str, inputs: int, outputs: int, where: str, bias: bool = True, area: float = 1.0) -> None:
        self._weight(name, (outputs, inputs), bias)
        self.products.append(Product(self._full(name), inputs, outputs, where, area))

    def conv(self, name: str, inputs: int, outputs: int, kernel: Sequence[int], where: str, area: float = 1.0) -> None:
        self._weight(name, (outputs, inputs, *kernel), True)
        self.products.append(Product(self._full(name), inputs * math.prod(kernel), outputs, where, area, linear=False))

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self._weight(name, (size,), bias)

    def _weight(self, name: str, shape: Shape, bias: bool) -> None:
        self.weights[f"{self._full(name)}.weight"] = shape
        if bias:
            self.weights[f"{self._full(name)}.bias"] = shape[:1]

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class Network:
    """Blocks in the order in which they run, and the rest."""

    blocks: tuple[Unit, ...]
    rest: Unit
    width: int  # channels of a token between blocks (a UNet: of its first level)
    heads: int
    apart: tuple[Unit, ...] = ()  # parts outside the blocks that are sharded on their own; they run before the blocks

    @property
    def units(self) -> tuple[Unit, ...]:
        return (*self.apart, *self.blocks, self.rest)

    def set_apart(self, name: str) -> "Network":
        """The network with a module outside the blocks, such as "context_embedder", sharded on its own."""
        rest, part = (Unit(of, kind) for of, kind in (("", "rest"), (name, "apart")))
        for key, shape in self.rest.weights.items():
            (part if key.startswith(f"{name}.") else rest).weights[key] = shape
        for product in self.rest.products:
            (part if product.name.startswith(f"{name}.") else rest).products.append(product)
        part.attentions = self.rest.attentions
        return replace(self, rest=rest, apart=(*self.apart, part))

    @property
    def parameters(self) -> int:
        return sum(unit.parameters for unit in self.units)


def adapters(unit: Unit, rank: int, targets: Sequence[str]) -> Unit:
    """The adapters of a unit's linear layers: A [rank, in] and B [out, rank] beside each that is a target."""
    found = Unit(unit.name, unit.kind)
    for product in unit.products:
        if product.linear and any(f".{product.name}".endswith(f".{target}") for target in targets or ADAPTED):
            name = product.name.removeprefix(f"{unit.name}." if unit.name else "")
            found.linear(f"{name}.lora_A.default", product.inputs, rank, product.where, False, product.area)
            found.linear(f"{name}.lora_B.default", rank, product.outputs, product.where, False, product.area)
    return found


def time_embedder(unit: Unit, name: str, inputs: int, width: int, where: str = SAMPLE) -> None:
    """Two layers with an activation between: of times, guidance, pooled text, and Wan's text tokens."""
    unit.linear(f"{name}.linear_1", inputs, width, where)
    unit.linear(f"{name}.linear_2", width, width, where)
