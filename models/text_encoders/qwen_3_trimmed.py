"""Qwen3's hidden states of a prompt's chat, of its own tokens alone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

SKIPPED_LAYERS = 1  # the text features are the hidden state before the last layer
TEXT_BATCH = 16  # prompts per forward pass of the text encoder


class TextEncoder(InPasses):
    """An `Encoder`: "text" [L, D], the states of the whole chat, template included."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a chat"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        if hasattr(self.qwen.network, "lm_head"):
            self.qwen.keep("model")  # no logits of each token
        around = len(self.tokenizer(self._chat(""))["input_ids"])
        self.qwen.work = Work(TEXT_BATCH, longest, AT_WORK["qwen3"], states=True, around=around)

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.qwen, self._states),)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        seen = token_limit.cut(self.tokenizer, self._chat(text), self.longest)
        return {"text_encoder": seen} if seen else {}

    def _chat(self, text: str) -> str:
        """The chat of a prompt, up to where an answer with its thoughts would begin."""
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return chat

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = its tokens.

        A causal network: what is cut off at the end changes no state before it.
        """
        tokens = self.tokenizer(
            [self._chat(text) for text in texts],
            max_length=self.longest,
            padding="longest",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,  # nothing is generated
        ).hidden_states[-(SKIPPED_LAYERS + 1)]
        lengths = tokens.attention_mask.sum(1).tolist()
        return [
            {"text": row[:length].float().cpu()}
            for row, length in zip(states, lengths, strict=True)
        ]
