"""Qwen2.5-VL's states of a prompt's own tokens in a chat, and ByT5's of what the prompt quotes.

Quoted text, "..." or between curly quotes, is what a clip shows as letters: ByT5 reads it byte by
byte. A prompt without quotes has no such states.
"""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import (
    extract_glyph_texts,
    format_text_input,
)
from torch import Tensor

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders.passes import InPasses, Pass

SYSTEM: str = (
    signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
)
"""What the network was trained with; its line breaks are runs of spaces."""
MARK = "\x00"  # stands for the prompt in a chat; in no prompt
SKIPPED_LAYERS = 2  # of Qwen: the text features are the third hidden state from the end
TEXT_BATCH = 16  # prompts per forward pass of the text encoders


class TextEncoder(InPasses):
    """An `Encoder`: "text" [L, D] of Qwen and "glyphs" [G, E] of ByT5, each of its own length."""

    def __init__(
        self, where: Path, dtype: torch.dtype, device: torch.device, longest: tuple[int, int]
    ) -> None:
        """Read both from a pipeline's folder.

        longest: tokens of a prompt and what follows it for Qwen, of quoted text for ByT5
        """
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.tokenizer_2, self.byt5 = diffusers_folder.text_model(
            where, tokenizer="tokenizer_2", encoder="text_encoder_2", dtype=dtype, device=device
        )

        crop, around = self._tokens_before(), len(self._ids(self._chat("")))
        self.qwen.work = Work(
            TEXT_BATCH, longest[0] + crop, AT_WORK["qwen"], states=True, around=around
        )
        self.byt5.work = Work(1, longest[1], AT_WORK["t5"])

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.byt5, self._glyphs), self.reading(self.qwen, self._states))

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        crop, quoted = self._tokens_before(), extract_glyph_texts(text)
        lengths = {"text_encoder": len(self._ids(self._chat(text))) - crop}
        if quoted:
            lengths["text_encoder_2"] = len(self.tokenizer_2(quoted, verbose=False).input_ids)
        limits = zip(lengths.items(), self.longest, strict=False)
        return {part: (most, length) for (part, length), most in limits if length > most}

    def _chat(self, text: str) -> str:
        """The chat of a prompt; an empty one is a space."""
        (messages,) = format_text_input([text], SYSTEM)
        chat: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return chat

    def _tokens_before(self) -> int:
        """Tokens of the chat before the prompt: 108 with Qwen's tokenizer."""
        return len(self._ids(self._chat(MARK).split(MARK)[0]))

    def _ids(self, chat: str) -> list[int]:
        """Tokens of a chat, which writes its own marks."""
        tokens = self.tokenizer(chat, add_special_tokens=False, verbose=False)
        ids: list[int] = tokens.input_ids
        return ids

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = its tokens.

        A causal network: what is cut off at the end changes no state before it.
        """
        crop = self._tokens_before()
        tokens = self.tokenizer(
            [self._chat(text) for text in texts],
            add_special_tokens=False,
            max_length=self.longest[0] + crop,
            padding="longest",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
        ).hidden_states[-(SKIPPED_LAYERS + 1)]
        lengths = tokens.attention_mask.sum(1).tolist()
        return [
            {"text": row[crop:length].float().cpu()}
            for row, length in zip(states, lengths, strict=True)
        ]

    @torch.no_grad()
    def _glyphs(self, texts: list[str]) -> list[Condition]:
        """returns "glyphs" [G, E] each, float32 on the CPU, G = the quoted text's tokens, 0 without
        quotes
        """
        return [{"glyphs": self._glyphs_of(text)} for text in texts]

    def _glyphs_of(self, text: str) -> Tensor:
        """A text's own.  returns [G, E]"""
        quoted = extract_glyph_texts(text)
        if quoted is None:
            return torch.zeros(0, self.byt5.config.d_model)
        tokens = self.tokenizer_2(
            quoted, max_length=self.longest[1], truncation=True, return_tensors="pt"
        )
        states: Tensor = self.byt5(tokens.input_ids.to(self.device)).last_hidden_state
        return states[0].float().cpu()
