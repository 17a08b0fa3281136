"""Two CLIPs' states beside each other, T5's behind them, and the CLIPs' pooled outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.text_encoders import token_limit

TEXT_BATCH = 32  # prompts per forward pass of the text encoders
SKIPPED_LAYERS = 1  # of the CLIPs: their features are the hidden state before the last layer's


class TextEncoder:
    """An `Encoder`: all three read the same text, and all token places count, padding too."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read them from a pipeline's folder.  longest: tokens of a text, at most, for T5"""
        self.device, self.longest = device, longest
        parts = (
            diffusers_folder.text_model(
                where,
                tokenizer=f"tokenizer{number}",
                encoder=f"text_encoder{number}",
                dtype=dtype,
                device=device,
            )
            for number in ("", "_2", "_3")
        )
        (
            (self.tokenizer, self.clip),
            (self.tokenizer_2, self.clip_2),
            (self.tokenizer_3, self.t5),
        ) = parts

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        texts = [prompt.text for prompt in prompts]
        for text in texts:
            if not self.tokenizer_3(text, add_special_tokens=False).input_ids:
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
        readers = (
            ("text_encoder", self.tokenizer, self._longest_of_clip),
            ("text_encoder_2", self.tokenizer_2, self._longest_of_clip),
            ("text_encoder_3", self.tokenizer_3, self._longest_of_t5),
        )
        both = {part: token_limit.cut(reader, text, longest) for part, reader, longest in readers}
        return {part: seen for part, seen in both.items() if seen}

    @property
    def _longest_of_clip(self) -> int:
        """Token places of either CLIP: diffusers' pipeline asks the first one's tokenizer alone."""
        return int(self.tokenizer.model_max_length)

    @property
    def _longest_of_t5(self) -> int:
        return min(self.tokenizer_3.model_max_length, self.longest)

    @torch.no_grad()
    def _conditions(self, texts: list[str]) -> list[Condition]:
        """Features of each text: "text" [L, D] and "pooled" [P], float32 on the CPU.

        L = places of a CLIP + places of T5;  D = T5's width, to which the CLIPs' is filled by zeros
        """
        states, pooled = [], []
        for tokenizer, clip in ((self.tokenizer, self.clip), (self.tokenizer_2, self.clip_2)):
            tokens = self._tokens(tokenizer, texts, self._longest_of_clip)
            given = clip(tokens, output_hidden_states=True)
            states.append(given.hidden_states[-(SKIPPED_LAYERS + 1)])
            pooled.append(given[0])
        t5 = self.t5(self._tokens(self.tokenizer_3, texts, self._longest_of_t5)).last_hidden_state
        both = torch.cat(states, -1)
        text = torch.cat([pad(both, (0, t5.shape[-1] - both.shape[-1])), t5], 1)
        pairs = zip(text.float().cpu(), torch.cat(pooled, -1).float().cpu(), strict=True)
        return [{"text": features, "pooled": vector} for features, vector in pairs]

    def _tokens(self, tokenizer: Any, texts: list[str], longest: int) -> Tensor:
        """returns int64 [len(texts), longest], padded, on the device"""
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)
