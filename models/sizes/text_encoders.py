"""Text encoders on a GPU: how much of it each way of placing one takes, and the published ones.

A way is a value of model.text_encoders. Parameters and bytes at work are what
benchmarks/plan/text_encoders.py finds by running transformers' classes without contents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastgrpo.core.errors import UserError

WAYS = {
    "whole": "whole on each GPU",
    "sharded": "sharded over the ranks",
    "streamed": "block by block from host memory",
}
"""In the order in which model.text_encoders = "auto" tries them: the quickest first."""
FREE_SHARE = 0.95  # of the free memory: the allocator cannot give the rest
AT_ONCE = 2  # blocks on the GPU where they come one by one: the one at work, and the next


@dataclass(frozen=True)
class Sizes:
    """What a text encoder takes, in bytes (`Published`: in parameters, but for `at_work`)."""

    outside: float  # of the blocks: embeddings, norms
    blocks: float  # all blocks
    largest: float  # block
    at_work: float  # activations of the largest batch of texts

    @property
    def weights(self) -> float:
        return self.outside + self.blocks

    def peak(self, way: str, ranks: int) -> float:
        """Bytes on each GPU while texts are encoded.  way: of WAYS"""
        if way == "whole":
            return self.weights + self.at_work
        moving = self.outside + min(AT_ONCE * self.largest, self.blocks) + self.at_work
        return moving + (self.blocks / ranks if way == "sharded" else 0.0)

    def way(self, wanted: str, ranks: int, room: float) -> str | None:
        """The first way that fits into `room` bytes; None: none does.

        wanted: "auto", or the one way that is to be tried
        """
        fitting = (way for way in WAYS if self.peak(way, ranks) <= room)
        return next((way for way in fitting if way in possible(wanted, ranks)), None)


def possible(wanted: str, ranks: int) -> tuple[str, ...]:
    """The ways that model.text_encoders = `wanted` has on so many ranks."""
    ways = WAYS if wanted == "auto" else (wanted,)
    return tuple(way for way in ways if way != "sharded" or ranks > 1)


def check(wanted: str, ranks: int) -> None:
    """Raise UserError where model.text_encoders = `wanted` needs more ranks."""
    if wanted == "sharded" and ranks == 1:
        raise UserError(
            "model.text_encoders=sharded: there is one rank, which has no other to share with; "
            "start several, or use streamed."
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published text encoder, in parameters, and the batch that a family gives it."""

    name: str  # the part of the folder
    outside: float
    block: float
    blocks: int
    width: int
    at_work: float  # bytes per token and channel, in bfloat16
    states: bool = False  # whether every layer's state is kept, 2 bytes more each
    texts: int = 0  # in a batch
    longest: int = 0  # tokens of a text, with what is around it
    around: int | None = None
    """Tokens beside the text's own; None: all texts are padded to `longest`."""

    @property
    def parameters(self) -> float:
        return self.outside + self.blocks * self.block

    def read_as(
        self,
        part: str,
        *,
        texts: int,
        longest: int,
        around: int | None = None,
        states: bool = False,
    ) -> "Published":
        """The encoder of a part of the folder, which takes so many texts of `longest` tokens."""
        return replace(self, name=part, texts=texts, longest=longest, around=around, states=states)

    def of(self, text: int) -> "Published":
        """The encoder where the longest text has so many tokens."""
        if self.around is None:
            return self
        return replace(self, longest=min(self.longest, self.around + text))

    def scaled(self, factor: float) -> "Published":
        """An encoder with `factor` times the parameters and the width's square."""
        return replace(
            self,
            outside=self.outside * factor,
            block=self.block * factor,
            width=int(self.width * factor**0.5),
        )

    @property
    def _kept(self) -> float:
        """Bytes per token and channel, in bfloat16."""
        return self.at_work + (2 * (self.blocks + 1) if self.states else 0)

    def sizes(self, element: int) -> Sizes:
        """In bytes.  element: of a number in compute precision"""
        return Sizes(
            outside=element * self.outside,
            blocks=element * self.blocks * self.block,
            largest=element * self.block,
            at_work=element * self.width * self.texts * self.longest * self._kept / 2,
        )


AT_WORK: Mapping[str, float] = {
    "clip": 33.0,
    "llama": 24.0,
    "qwen": 41.0,
    "qwen3": 25.1,
    "t5": 29.0,
    "umt5": 46.0,
}
"""Bytes per token and channel at work, in bfloat16, by a kind of encoder; a state of each layer that
is kept comes on top."""
CLIP_L = Published(
    name="", outside=38.6e6, block=7.09e6, blocks=12, width=768, at_work=AT_WORK["clip"]
)
CLIP_G = Published(
    name="", outside=65.0e6, block=19.68e6, blocks=32, width=1280, at_work=AT_WORK["clip"]
)
T5_XXL = Published(
    name="", outside=131.6e6, block=192.95e6, blocks=24, width=4096, at_work=AT_WORK["t5"]
)
BYT5_SMALL = Published(
    name="", outside=2.224e6, block=18.09e6, blocks=12, width=1472, at_work=AT_WORK["t5"]
)
UMT5_XXL = Published(
    name="", outside=1050.2e6, block=192.95e6, blocks=24, width=4096, at_work=AT_WORK["umt5"]
)
LLAMA_3_8B = Published(
    name="", outside=525.6e6, block=218.1e6, blocks=32, width=4096, at_work=AT_WORK["llama"]
)
QWEN_2_5_VL_7B = Published(
    name="", outside=545.0e6, block=233.06e6, blocks=28, width=3584, at_work=AT_WORK["qwen"]
)
"""Its language model, which alone reads texts."""
QWEN_3_4B = Published(
    name="", outside=389.0e6, block=100.93e6, blocks=36, width=2560, at_work=AT_WORK["qwen3"]
)
QWEN_3_8B = Published(
    name="", outside=622.3e6, block=192.95e6, blocks=36, width=4096, at_work=AT_WORK["qwen3"]
)
"""Both without the layer of logits."""
