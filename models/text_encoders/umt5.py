"""UMT5's states of a prompt's own tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

TEXT_BATCH = 16  # prompts per forward pass of the text encoder


class TextEncoder(InPasses):
    """An `Encoder`: UMT5's states of the prompt's own tokens and the closing one."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a text, at most"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.umt5 = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.umt5.work = Work(TEXT_BATCH, longest, AT_WORK["umt5"])

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.umt5, self._states),)

    def has_tokens(self, text: str) -> bool:
        return bool(self.tokenizer(prompt_clean(text), add_special_tokens=False).input_ids)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        seen = token_limit.cut(self.tokenizer, prompt_clean(text), self.longest)
        return {"text_encoder": seen} if seen else {}

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = its tokens.

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
            {"text": row[:length]}
            for row, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)
        ]
