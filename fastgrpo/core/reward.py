"""What every reward must offer, and the scores that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What a reward says about B clips.

    A score that could not be made is NaN in every part and False in `valid`; no constant ever stands in for it.
    """

    values: dict[str, Tensor]  # part -> float32 [B]
    valid: Tensor  # bool [B]


class Reward(Protocol):
    """A scorer of clips.

    It may have, besides:
      fingerprint: str             of its weights and of what else changes its scores; replicas must agree in it
      looks_at(frames, fps)        indices of the frames that it looks at in a clip of that many: only these travel to
                                   the server, where the others of its `pixels` are black
      golden: (clip, prompt, fps)  what a server scores at its start, uint8 [F, H, W, 3]; none = a drawn clip
      golden_scores: {part: score} what that clip must score, where it is written down; preflight compares
      reads_prompts                false where prompts change nothing; `fastgrpo score` then asks for none
      to(device)                   moves its weights, so that a GPU that it shares has their memory between phases
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that it scores, for example ("VQ", "MQ", "TA")."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """pixels: uint8 [B, F, H, W, 3] (an image is F = 1);  prompts: B texts;  fps: frames per second.

        A clip's scores depend on that clip and its prompt alone, never on the batch around it.
        Raises ValueError for pixels of a size that it cannot judge.
        """
