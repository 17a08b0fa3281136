"""Two CLIPs' states beside each other, T5's behind them, and the CLIPs' pooled outputs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import TextNetwork, Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

TEXT_BATCH = 32  # prompts per forward pass of the text encoders
SKIPPED_LAYERS = 1  # of the CLIPs: their features are the hidden state before the last layer's


class TextEncoder(InPasses):
    """An `Encoder`: all three read the same text, and all token places count, padding too."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read them from a pipeline's folder.  longest: tokens of a text, at most, for T5"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
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
        for clip in (self.clip, self.clip_2):
            clip.work = Work(TEXT_BATCH, self._longest_of_clip, AT_WORK["clip"], states=True)
        self.t5.work = Work(TEXT_BATCH, self._longest_of_t5, AT_WORK["t5"])

    def passes(self) -> Sequence[Pass]:
        return (
            self.reading(self.clip, partial(self._of_clip, self.tokenizer, self.clip, "")),
            self.reading(self.clip_2, partial(self._of_clip, self.tokenizer_2, self.clip_2, "_2")),
            self.reading(self.t5, self._of_t5),
        )

    def has_tokens(self, text: str) -> bool:
        return bool(self.tokenizer_3(text, add_special_tokens=False).input_ids)

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

    def joined(self, features: Condition) -> Condition:
        """The features that the network takes: "text" [L, D] and "pooled" [P].

        L = places of a CLIP + places of T5;  D = T5's width, to which the CLIPs' is filled by zeros
        """
        t5 = features["t5"]
        both = torch.cat([features["clip"], features["clip_2"]], -1)
        return {
            "text": torch.cat([pad(both, (0, t5.shape[-1] - both.shape[-1])), t5]),
            "pooled": torch.cat([features["pooled"], features["pooled_2"]], -1),
        }

    @torch.no_grad()
    def _of_clip(
        self, tokenizer: Any, clip: TextNetwork, ending: str, texts: list[str]
    ) -> list[Condition]:
        """returns "clip" [places, width] and "pooled" [width] each, with `ending` in their names,
        float32 on the CPU
        """
        given = clip(
            self._tokens(tokenizer, texts, self._longest_of_clip), output_hidden_states=True
        )
        states = given.hidden_states[-(SKIPPED_LAYERS + 1)].float().cpu()
        pairs = zip(states, given[0].float().cpu(), strict=True)
        return [{f"clip{ending}": own, f"pooled{ending}": vector} for own, vector in pairs]

    @torch.no_grad()
    def _of_t5(self, texts: list[str]) -> list[Condition]:
        """returns "t5" [places, D] each, float32 on the CPU"""
        tokens = self._tokens(self.tokenizer_3, texts, self._longest_of_t5)
        return [{"t5": states} for states in self.t5(tokens).last_hidden_state.float().cpu()]

    def _tokens(self, tokenizer: Any, texts: list[str], longest: int) -> Tensor:
        """returns int64 [len(texts), longest], padded, on the device"""
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)
