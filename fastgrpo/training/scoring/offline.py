"""Samples of a file of preferred pairs in place of drawn ones: offline DPO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.core.config import Recipe, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Policy
from fastgrpo.data import images, preferred_pairs, video_reader
from fastgrpo.data.preferred_pairs import PreferredPair
from fastgrpo.data.video_reader import VideoError
from fastgrpo.models.loading.encode_pixels import encode_pixels
from fastgrpo.training.rollout import Drawn, Plan, Trajectory, stored


@dataclass(frozen=True)
class OfflinePairs:
    """The pairs of a recipe's file, by prompt; of several one is taken in an iteration, by a key."""

    pairs: Mapping[str, Sequence[PreferredPair]]
    video: Video

    @classmethod
    def of(cls, recipe: Recipe, texts: Sequence[str]) -> "OfflinePairs | None":
        """The pairs for the training prompts. None: the recipe names no file.

        Raises UserError for a prompt without a pair.
        """
        path = recipe.objective.dpo_pairs
        if path is None:
            return None
        pairs = preferred_pairs.read(path)
        missing = next((text for text in texts if text not in pairs), None)
        if missing is not None:
            raise UserError(
                f"objective.dpo_pairs={path}: has no pair for the training prompt '{missing}'; "
                "name the same file in prompts.train, or add one."
            )
        return cls(pairs, recipe.video)

    def draw(self, policy: Policy, plan: Plan, texts: Sequence[str], slots: list[int]) -> Drawn:
        """The latents of the slots' files: of each prompt the chosen one, then the rejected one.

        texts: one per prompt of the iteration
        """
        clips = torch.stack([self._clip(plan, texts, *divmod(slot, 2)) for slot in slots])
        final = encode_pixels(policy, clips).to(plan.grid.device)
        rows = zip(slots, final, strict=True)
        kept = {slot: Trajectory({plan.steps: stored(x_0, plan)}) for slot, x_0 in rows}
        return Drawn(slots, final, kept)

    def advantages(self, total: int) -> Tensor:
        """1 for the preferred samples, -1 for the others.  returns float32 [total]"""
        return 1.0 - 2.0 * (torch.arange(total) % 2)

    def _clip(self, plan: Plan, texts: Sequence[str], prompt: int, member: int) -> Tensor:
        """A file's pixels in the run's form, uint8 [F, H, W, 3]."""
        pairs = self.pairs[texts[prompt]]
        key = ("pair", plan.seed, plan.iteration, prompt)
        pair = pairs[noise.permutation(len(pairs), key)[0]]
        return read_clip(pair.rejected if member else pair.chosen, self.video)


def read_clip(path: Path, video: Video) -> Tensor:
    """The first frames of a video, or a picture, scaled and cut as reference images are.

    returns uint8 [F, H, W, 3]
    Raises UserError for a file that cannot be read or is too short.
    """
    if video.frames == 1:
        frames = images.read_image(path, "picture of a pair")[None]
    else:
        try:
            frames = video_reader.read(path, range(video.frames)).pixels
        except (OSError, VideoError) as error:
            raise UserError(
                f"objective.dpo_pairs: {path} gives no {video.frames} frames ({error}); correct "
                "the file, or video.frames."
            ) from None
    return torch.stack([images.cover(frame, video.height, video.width) for frame in frames])
