"""UMT5's states of a prompt's own tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.text_encoders import token_limit

TEXT_BATCH = 16  # prompts per forward pass of the text encoder


class TextEncoder:
    """An `Encoder`: UMT5's states of the prompt's own tokens and the closing one."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a text, at most"""
        self.device, self.longest = device, longest
        self.tokenizer, self.umt5 = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        texts = [prompt.text for prompt in prompts]
        for text in texts:
            if not self.tokenizer(prompt_clean(text), add_special_tokens=False).input_ids:
                raise UserError(
                    f"prompts: '{text}' has no tokens for the text encoder; leave it out."
                )
        parts = [
            self._states(texts[start : start + TEXT_BATCH])
            for start in range(0, len(texts), TEXT_BATCH)
        ]
        return [{"text": states} for part in parts for states in part]

    def negative(self, text: str) -> Condition:
        return {"text": self._states([text])[0]}

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        seen = token_limit.cut(self.tokenizer, prompt_clean(text), self.longest)
        return {"text_encoder": seen} if seen else {}

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Tensor]:
        """returns float32 [L, D] each on the CPU, L = its tokens.

        HTML and broken Unicode are mended first.
        """
        tokens = self.tokenizer(
            [prompt_clean(text) for text in texts],
            padding="max_length",
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = (
            self.umt5(tokens.input_ids, attention_mask=tokens.attention_mask)
            .last_hidden_state.float()
            .cpu()
        )
        return [
            row[:length]
            for row, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)
        ]
