"""Latents to pixels to rewards with the gradient, for methods that differentiate the rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo.core.config import Recipe
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.training.scoring.sources import Source


@dataclass(frozen=True, kw_only=True)
class InProcessJudge:
    """A `training.method.Judge` by the rewards of the trainer's process.

    Decoding and judging are computed again in the backward, `model.decode_batch` samples at a time,
    so that no more than their graph is in memory at once.
    """

    policy: Policy
    recipe: Recipe
    texts: Sequence[str]  # of the iteration's prompts
    conditions: Sequence[Condition]  # of the same
    sources: Sequence[Source]

    def __call__(self, x_0: Tensor, slots: Sequence[int]) -> Tensor:
        """The weighted sum of the rewards of samples.

        x_0: [B, C, F, H, W] float32;  returns float32 [B]
        """
        group_size = self.recipe.rollout.samples_per_prompt
        prompts = [slot // group_size for slot in slots]
        texts = [self.texts[prompt] for prompt in prompts]
        at_once = self.recipe.model.decode_batch or len(x_0)
        scores = []
        for start in range(0, len(x_0), at_once):
            part = slice(start, start + at_once)
            condition = stack([self.conditions[prompt] for prompt in prompts[part]])
            given = x_0[part], condition, texts[part]
            scores.append(checkpoint(self._score, *given, use_reentrant=False))
        return torch.cat(scores)

    def _score(self, x_0: Tensor, condition: Condition, texts: Sequence[str]) -> Tensor:
        """The same of few samples.  x_0: [b, C, F, H, W];  returns float32 [b]"""
        frames = self.policy.frames(x_0, condition)
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32)).clamp(-1, 1)
        frames = rearrange((frames + 1) * 127.5, "b c f h w -> b f h w c")
        total = torch.zeros(len(x_0), device=x_0.device)
        for source in self.sources:
            if isinstance(source, ScorerInProcess):  # others have monitors alone
                scores = source.differentiable(frames, texts, self.recipe.video.fps)
                for part, weight in self.recipe.weights.items():
                    if weight and part in scores:
                        total = total + weight * scores[part].to(x_0.device)
        return total
