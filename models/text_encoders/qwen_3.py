"""Qwen3's hidden states of a prompt in its own chat: of the chat's tokens alone, or three of them side
by side of all token places.

Of all places padding is behind a text where the folder's tokenizer puts it there; its states count
like others, as the network attends to them without a mask.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

SKIPPED_LAYERS = 1  # of the states of tokens alone: those before the last layer
LAYERS = (9, 18, 27)  # of the states side by side: after so many; the pipeline's own numbers
TEXT_BATCH = 8  # prompts per forward pass of the text encoder
MARK = "\x00"  # stands for the prompt in a chat; in no prompt


class ChatEncoder(InPasses):
    """What both kinds of `Encoder` here share: the network, and the chat of a prompt."""

    thinking: ClassVar[bool]  # whether an answer would begin with its thoughts

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a chat"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"model.path: {where / 'tokenizer'} has no chat template; download it again."
            )
        if hasattr(self.qwen.network, "lm_head"):
            self.qwen.keep("model")  # no logits of each token
        self.qwen.work = Work(TEXT_BATCH, longest, AT_WORK["qwen3"], states=True)

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.qwen, self._states),)

    @abstractmethod
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU"""

    def _chat(self, text: str) -> str:
        """The chat of a prompt, by the tokenizer's own template."""
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return chat

    def _length(self, chat: str) -> int:
        return len(self.tokenizer(chat, verbose=False).input_ids)

    @torch.no_grad()
    def _read(self, texts: Sequence[str], **padding: str) -> tuple[Sequence[Tensor], list[int]]:
        """All hidden states [B, L, D], the last one normalised, and the texts' numbers of tokens.

        padding: of the tokenizer's call
        """
        tokens: Any = self.tokenizer(
            [self._chat(text) for text in texts],
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
            **padding,
        ).to(self.device)
        states = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,  # nothing is generated
        ).hidden_states
        return states, tokens.attention_mask.sum(1).tolist()


class TrimmedEncoder(ChatEncoder):
    """An `Encoder`: "text" [L, D], the states of the whole chat, template included."""

    thinking = True

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        super().__init__(where, dtype, device, longest)
        around = self._length(self._chat(""))
        self.qwen.work = Work(TEXT_BATCH, longest, AT_WORK["qwen3"], states=True, around=around)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        seen = token_limit.cut(self.tokenizer, self._chat(text), self.longest)
        return {"text_encoder": seen} if seen else {}

    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = its tokens.

        A causal network: what is cut off at the end changes no state before it.
        """
        states, lengths = self._read(texts, padding="longest", padding_side="right")
        rows = zip(states[-(SKIPPED_LAYERS + 1)], lengths, strict=True)
        return [{"text": row[:length].float().cpu()} for row, length in rows]


class PaddedEncoder(ChatEncoder):
    """An `Encoder`: "text" [L, 3 D], L = all places of a text."""

    thinking = False

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        super().__init__(where, dtype, device, longest)
        network, last = self.qwen.network, max(LAYERS)
        if len(network.layers) < last:
            raise UserError(
                f"model.path: {where / 'text_encoder'} has {len(network.layers)} layers, and the "
                f"states after {last} are wanted; use the Qwen3 of FLUX.2 klein."
            )
        # the last state of all is normalised: so one layer more than are asked for
        network.layers = network.layers[: last + 1]

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        before = self._length(self._chat(MARK).split(MARK)[0])
        count = self._length(self._chat(text))
        seen = (self.longest - before, count - before)
        return {"text_encoder": seen} if count > self.longest else {}

    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [places, 3 D] each, float32 on the CPU"""
        states, _ = self._read(texts, padding="max_length")
        both = torch.cat([states[layer] for layer in LAYERS], -1).float().cpu()
        return [{"text": row} for row in both]
