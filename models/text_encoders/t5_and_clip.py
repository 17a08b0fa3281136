"""T5's states of all its token places, and CLIP's pooled output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

TEXT_BATCH = 32  # prompts per forward pass of the text encoders


class TextEncoder(InPasses):
    """An `Encoder`: T5's states of all its token places and CLIP's pooled output."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read both from a pipeline's folder.  longest: tokens of a text, at most, for T5"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.clip = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.tokenizer_2, self.t5 = diffusers_folder.text_model(
            where, tokenizer="tokenizer_2", encoder="text_encoder_2", dtype=dtype, device=device
        )
        self.clip.work = Work(TEXT_BATCH, self.tokenizer.model_max_length, AT_WORK["clip"])
        self.t5.work = Work(TEXT_BATCH, self._longest_of_t5, AT_WORK["t5"])

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.clip, self._pooled), self.reading(self.t5, self._states))

    def has_tokens(self, text: str) -> bool:
        return bool(self.tokenizer_2(text, add_special_tokens=False).input_ids)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        clip = token_limit.cut(self.tokenizer, text, self.tokenizer.model_max_length)
        t5 = token_limit.cut(self.tokenizer_2, text, self._longest_of_t5)
        both = {"text_encoder": clip, "text_encoder_2": t5}
        return {part: seen for part, seen in both.items() if seen}

    @property
    def _longest_of_t5(self) -> int:
        return min(self.tokenizer_2.model_max_length, self.longest)

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = T5's longest text"""
        tokens = self._tokens(self.tokenizer_2, texts, self._longest_of_t5)
        return [{"text": text} for text in self.t5(tokens).last_hidden_state.float().cpu()]

    @torch.no_grad()
    def _pooled(self, texts: list[str]) -> list[Condition]:
        """returns "pooled" [P] each, float32 on the CPU"""
        tokens = self._tokens(self.tokenizer, texts, self.tokenizer.model_max_length)
        return [{"pooled": vector} for vector in self.clip(tokens).pooler_output.float().cpu()]

    def _tokens(self, tokenizer: Any, texts: list[str], longest: int) -> Tensor:
        """returns int64 [len(texts), longest], padded, on the device"""
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)
