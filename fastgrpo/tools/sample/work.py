"""What is to be sampled, and where to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.policy import Prompt
from fastgrpo.tools.sample.source import Source
from fastgrpo.training.conditions.cut_prompts import Seen


@dataclass(frozen=True)
class Clip:
    """One sample."""

    number: int
    prompt: Prompt
    seed: int
    stem: str  # of its files

    @property
    def caption(self) -> str:
        return f"seed {self.seed}: {self.prompt.text}"


@dataclass(frozen=True)
class Cut:
    """The texts that are longer than a text encoder sees; the main rank alone knows them."""

    prompts: Mapping[Prompt, Seen]
    negative: Seen

    def marks(self, prompt: Prompt) -> dict[str, Seen]:
        """What marks a prompt's entries in a file; empty where all of it is seen."""
        seen = self.prompts.get(prompt)
        return {"tokens_seen": seen} if seen else {}


UNCUT = Cut({}, {})


@dataclass(frozen=True)
class Work:
    """All that is to be sampled, the same on every rank."""

    source: Source
    clips: list[Clip]  # prompt by prompt, seed by seed
    batches: list[range]  # of clips; each of one prompt
    against_base: bool


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """All that is to be sampled, and the folder for it."""

    out: Path
    overwrite: bool

    @property
    def suffix(self) -> str:
        return ".png" if self.source.video.frames == 1 else ".mp4"
