"""Text encoders on the GPUs: how each is placed, what that takes, and how long prompts take."""

import math
from dataclasses import dataclass

from fastgrpo.core.units import GIB
from fastgrpo.models.sizes.family_plan import AuxiliaryModels
from fastgrpo.models.sizes.text_encoders import FREE_SHARE, WAYS, Published, Sizes, possible
from fastgrpo.tools.plan.costs.compute import Job

PROMPTS = 1000  # whose seconds a plan tells


@dataclass(frozen=True)
class Placed:
    """A text encoder as model.text_encoders has it on the GPUs."""

    text: Published
    sizes: Sizes  # in bytes
    way: str
    fits: bool
    ranks: int

    @property
    def memory(self) -> dict[str, float]:
        """Bytes at the peak, by kind."""
        at_work = self.sizes.at_work
        return {
            "text encoders": self.sizes.peak(self.way, self.ranks) - at_work,
            "activations": at_work,
        }

    @property
    def flops(self) -> float:
        """FLOPs of linear layers for PROMPTS prompts of the longest text, on the busiest rank."""
        layers = self.text.blocks * self.text.block
        return 2.0 * layers * self.batches * self.text.texts * self.text.longest

    @property
    def batches(self) -> int:
        """Batches of PROMPTS prompts that the busiest rank encodes."""
        own = math.ceil(PROMPTS / self.ranks)
        return math.ceil(own / self.text.texts) if self.text.texts else 0

    @property
    def moved(self) -> float:
        """Bytes of blocks that come to a GPU for PROMPTS prompts."""
        share = (self.ranks - 1) / self.ranks if self.way == "sharded" else 1.0
        return 0.0 if self.way == "whole" else self.sizes.blocks * share * self.batches


def placed(auxiliary: AuxiliaryModels, job: Job, room: float) -> list[Placed]:
    """Every text encoder as a run would place it.  room: bytes on each GPU beside what is there"""
    whole = Published(
        name="text encoders", outside=auxiliary.encoders, block=0, blocks=0, width=0, at_work=0
    )
    return [_placed(text.of(job.text), job, room) for text in auxiliary.texts or (whole,)]


def _placed(text: Published, job: Job, room: float) -> Placed:
    sizes, wanted = text.sizes(job.element), job.recipe.model.text_encoders
    if not text.blocks:
        wanted = "whole"
    ways = possible(wanted, job.gpus) or ("whole",)
    found = sizes.way(wanted, job.gpus, FREE_SHARE * room)
    way = found or min(ways, key=lambda one: sizes.peak(one, job.gpus))
    return Placed(text, sizes, way, found is not None, job.gpus)


def summary(found: list[Placed], seconds: float) -> str:
    """A line on the encoders.  seconds: of PROMPTS prompts"""
    parts = [
        f"{one.text.name} {WAYS[one.way]}, {one.sizes.peak(one.way, one.ranks) / GIB:,.1f} GiB"
        + ("" if one.way == "whole" else f" (whole {one.sizes.peak('whole', 1) / GIB:,.1f})")
        + ("" if one.fits else ", which does not fit")
        for one in found
    ]
    told = f"one after the other: {'; '.join(parts)}" if len(parts) > 1 else parts[0]
    return f"text encoders, {told}; {PROMPTS:,} prompts in {seconds:,.1f} s"
