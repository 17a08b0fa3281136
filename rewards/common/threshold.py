"""Any reward as a binary one: 1 where a part reaches a value, else 0, as DanceGRPO's rewards."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, RewardWrapper, Scores


class Thresholded(RewardWrapper):
    """A reward with a further part `P_above` for some parts P; the other parts stay as they are."""

    def __init__(self, reward: Reward, thresholds: Mapping[str, float]) -> None:
        super().__init__(reward)
        self.thresholds = dict(thresholds)
        self.names = (*reward.names, *(above(part) for part in thresholds))
        if reward.fingerprint:
            content = json.dumps([reward.fingerprint, self.thresholds], sort_keys=True)
            self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Scores of the reward, and for each threshold `P_above`.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: frames per second
        returns P_above as float32 [B]: 1 where P is at least the value, 0 below, NaN where P is
        invalid
        The comparison is made in float32, the precision of the scores: a score that prints as the
        value reaches it.
        """
        scores = self.reward(pixels, prompts, fps)
        values = dict(scores.values)
        for part, value in self.thresholds.items():
            score = scores.values[part].float()
            failed = ~scores.valid | ~torch.isfinite(score)
            values[above(part)] = (score >= value).float().masked_fill(failed, float("nan"))
        return Scores(values, scores.valid)


def above(part: str) -> str:
    """The name of the binary part."""
    return f"{part}_above"


def wrap(reward: Reward, thresholds: Mapping[str, float]) -> Reward:
    """The reward with its binary parts. Raises UserError for a part that it does not have."""
    for part in thresholds:
        if part not in reward.names:
            raise UserError(
                f"rewards.threshold.{part}: the reward has no part '{part}'; its parts are "
                f"{', '.join(reward.names)}."
            )
        if above(part) in reward.names:
            raise UserError(
                f"rewards.threshold.{part}: the reward has a part '{above(part)}' of its own; "
                "leave it out."
            )
    return Thresholded(reward, thresholds)
