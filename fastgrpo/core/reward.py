"""What every reward offers, and the scores that it gives.

Torch is not imported here, so that the registry of rewards and the planner start without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastgrpo.core.config import RewardSpec


class PromptText(str):
    """A prompt as rewards are handed it: its text, and what its row says beside it.

    A text like any other for whoever asks for no more, so that a prompt and its row cannot part on
    their way through batches, groups and requests.
    """

    row: Mapping[str, Any]
    """Column -> value, of JSON's types, for the columns of prompts.reward_columns."""

    def __new__(cls, text: str, row: Mapping[str, Any] | None = None) -> PromptText:
        """Take a text and its row. None: nothing beside the text."""
        made = super().__new__(cls, text)
        made.row = row or {}
        return made


def row_of(prompt: str) -> Mapping[str, Any]:
    """What a prompt's row says beside its text; empty where nothing does."""
    return prompt.row if isinstance(prompt, PromptText) else {}


@dataclass(frozen=True)
class Scores:
    """What a reward says about B clips.

    A score that could not be made is NaN; no constant ever stands in for it. `valid` is False where
    a clip has none, and then every part counts as NaN.
    """

    values: dict[str, Tensor]  # part -> float32 [B]
    valid: Tensor  # bool [B]


@dataclass(frozen=True)
class Download:
    """Where files that a reward needs are published: an entry of `DOWNLOADS` at the top of the
    reward's file, by the key of its block, "path" or "options.NAME".
    """

    repository: str  # of a hub, or an address where no hub has them
    files: tuple[str, ...]  # names or patterns

    @property
    def by_hand(self) -> bool:
        """Whether no hub has them."""
        return "://" in self.repository


@dataclass(frozen=True)
class RewardSize:
    """What a plan takes a reward's network for: `SIZE` at the top of the reward's file, where it
    has a network.
    """

    parameters: float
    tokens: float  # that the network reads per scored frame
    frames_scored: Callable[[RewardSpec, int, float], int]
    """(spec, frames of a clip, its frames per second) -> frames that the network reads, as
    `Reward.frames_used`.
    """


class Reward(ABC):
    """A scorer of clips.

    A reward sets `names` and defines `__call__`; everything else has a default.
    """

    fingerprint: str = ""
    """Hash of the weights and of what else changes scores: replicas must agree in it.

    Empty: no weights.
    """

    reads_prompts: bool = True
    """False where prompts change no score; `fastgrpo score` then asks for none."""

    golden: tuple[Tensor, str, float] | None = None
    """The clip that a server scores at its start: uint8 [F, H, W, 3], prompt, frames per second.

    None: a drawn clip.
    """

    golden_scores: Mapping[str, float] | None = None
    """What the golden clip must score, by part, where that is written down; preflight compares."""

    examples: tuple[Tensor, Sequence[str]] | None = None
    """Six clips that differ in their scores, uint8 [6, 9, H, W, 3], and their prompts, with which
    `fastgrpo check-reward` tries the reward. None: clips of the tiny world."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The parts that the reward scores, for example ("VQ", "MQ", "TA")."""

    @abstractmethod
    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Score B clips.

        pixels: uint8 [B, F, H, W, 3], an image is F = 1;  prompts: B texts, whose rows `row_of`
        gives;  fps: frames per second
        returns float32 [B] for each part
        A clip's scores depend on that clip and its prompt alone, never on the batch around it.
        Raises ValueError for pixels of a size that the reward cannot judge.
        """

    def differentiable(
        self, frames: Tensor, prompts: Sequence[str], fps: float
    ) -> dict[str, Tensor]:
        """The scores of B clips with their gradient in the frames, where `DIFFERENTIABLE = True`
        stands at the top of the reward's file: objective.kind = "refl" trains on them.

        frames: float32 [B, F, H, W, 3], 0 to 255, not rounded;  fps: frames per second
        returns float32 [B] for each part, on the frames' device or the CPU; of whole numbers the
        scores of `__call__`
        """
        raise NotImplementedError

    def frames_used(self, frames: int, fps: float) -> list[int] | None:
        """Indices of the frames that change the scores of a clip of `frames` frames.

        None: all of them.

        fps: frames per second. Only these frames travel to a server, where the others of `pixels`
        are black.
        """
        return None

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes that judging one clip takes beside its pixels: here two float32 copies of them.

        frames: those that it looks at. A server judges only as many clips at a time as it has this
        memory for, and refuses a clip for which it has not.
        """
        return 24.0 * frames * height * width

    def modules(self) -> Sequence[nn.Module]:
        """The networks, whose weights leave a GPU that is shared between phases."""
        return ()


@runtime_checkable
class ImageEncoder(Protocol):
    """A reward whose network gives images vectors, as a CLIP: how alike clips are can be told."""

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors of images, uint8 [N, H, W, 3]: float32 [N, E], on the CPU."""


class RewardWrapper(Reward):
    """A reward around another one: everything that it does not change is the inner reward's."""

    names: tuple[str, ...] = ()  # set by __init__

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.names = reward.names
        self.fingerprint = reward.fingerprint
        self.reads_prompts = reward.reads_prompts
        self.golden = reward.golden
        self.golden_scores = reward.golden_scores

    def frames_used(self, frames: int, fps: float) -> list[int] | None:
        """Indices of the frames that the inner reward looks at. None: all of them."""
        return self.reward.frames_used(frames, fps)

    def differentiable(
        self, frames: Tensor, prompts: Sequence[str], fps: float
    ) -> dict[str, Tensor]:
        """The inner reward's scores.  frames: float32 [B, F, H, W, 3];  returns float32 [B] each"""
        return self.reward.differentiable(frames, prompts, fps)

    def memory(self, frames: int, height: int, width: int) -> float:
        """What the inner reward takes."""
        return self.reward.memory(frames, height, width)

    def modules(self) -> Sequence[nn.Module]:
        """The inner reward's networks."""
        return self.reward.modules()
