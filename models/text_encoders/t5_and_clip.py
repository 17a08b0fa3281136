"""T5's states of all its token places, and CLIP's pooled output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.text_encoders import token_limit

TEXT_BATCH = 32  # prompts per forward pass of the text encoders


class TextEncoder:
    """An `Encoder`: T5's states of all its token places and CLIP's pooled output."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read both from a pipeline's folder.  longest: tokens of a text, at most, for T5"""
        self.device, self.longest = device, longest
        self.tokenizer, self.clip = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.tokenizer_2, self.t5 = diffusers_folder.text_model(
            where, tokenizer="tokenizer_2", encoder="text_encoder_2", dtype=dtype, device=device
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        texts = [prompt.text for prompt in prompts]
        for text in texts:
            if not self.tokenizer_2(text, add_special_tokens=False).input_ids:
                raise UserError(
                    f"prompts: '{text}' has no tokens for the text encoder; leave it out."
                )
        parts = [
            self._conditions(texts[start : start + TEXT_BATCH])
            for start in range(0, len(texts), TEXT_BATCH)
        ]
        return [condition for part in parts for condition in part]

    def negative(self, text: str) -> Condition:
        return self._conditions([text])[0]

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        clip = token_limit.cut(self.tokenizer, text, self.tokenizer.model_max_length)
        t5 = token_limit.cut(self.tokenizer_2, text, self._longest_of_t5)
        both = {"text_encoder": clip, "text_encoder_2": t5}
        return {part: seen for part, seen in both.items() if seen}

    @property
    def _longest_of_t5(self) -> int:
        return min(self.tokenizer_2.model_max_length, self.longest)

    @torch.no_grad()
    def _conditions(self, texts: list[str]) -> list[Condition]:
        """Features of each text: "text" [L, D], L = T5's longest text, and "pooled" [P], float32 on
        the CPU.
        """
        tokens = self._tokens(self.tokenizer_2, texts, self._longest_of_t5)
        states = self.t5(tokens).last_hidden_state
        pooled = self.clip(
            self._tokens(self.tokenizer, texts, self.tokenizer.model_max_length)
        ).pooler_output
        pairs = zip(states.float().cpu(), pooled.float().cpu(), strict=True)
        return [{"text": text, "pooled": vector} for text, vector in pairs]

    def _tokens(self, tokenizer: Any, texts: list[str], longest: int) -> Tensor:
        """returns int64 [len(texts), longest], padded, on the device"""
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)
