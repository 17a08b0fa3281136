"""Three of Qwen3's hidden states of a prompt in its own chat, side by side, of all token places.

Padding is behind a text where the folder's tokenizer puts it there; its states count like others,
as the network attends to them without a mask.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders.passes import InPasses, Pass

LAYERS = (9, 18, 27)  # after so many of the network's layers; the pipeline's own numbers
TEXT_BATCH = 8  # prompts per forward pass of the text encoder
MARK = "\x00"  # stands for the prompt in a chat; in no prompt


class TextEncoder(InPasses):
    """An `Encoder`: "text" [L, 3 D], L = all places of a text."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a chat, to which it is padded"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"model.path: {where / 'tokenizer'} has no chat template; download it again."
            )
        self.qwen.keep("model")  # no logits of each token
        network, last = self.qwen.network, max(LAYERS)
        if len(network.layers) < last:
            raise UserError(
                f"model.path: {where / 'text_encoder'} has {len(network.layers)} layers, and the "
                f"states after {last} are wanted; use the Qwen3 of FLUX.2 klein."
            )
        # the last state of all is normalised: so one layer more than are asked for
        network.layers = network.layers[: last + 1]
        self.qwen.work = Work(TEXT_BATCH, longest, AT_WORK["qwen3"], states=True)

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.qwen, self._states),)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        before = self._length(self._chat(MARK).split(MARK)[0])
        count = self._length(self._chat(text))
        seen = (self.longest - before, count - before)
        return {"text_encoder": seen} if count > self.longest else {}

    def _chat(self, text: str) -> str:
        """The chat of a prompt, by the tokenizer's own template, without thoughts."""
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return chat

    def _length(self, chat: str) -> int:
        return len(self.tokenizer(chat, verbose=False).input_ids)

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [places, 3 D] each, float32 on the CPU"""
        tokens = self.tokenizer(
            [self._chat(text) for text in texts],
            padding="max_length",
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states: Sequence[Tensor] = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,  # nothing is generated
        ).hidden_states
        both = torch.cat([states[layer] for layer in LAYERS], -1).float().cpu()
        return [{"text": row} for row in both]
