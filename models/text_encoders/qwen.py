"""Qwen2.5-VL's hidden states of a prompt's own tokens in a template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.text_encoders import token_limit

TEMPLATE = (  # of diffusers' QwenImagePipeline, which the network was trained with
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
TEXT_BATCH = 16  # prompts per forward pass of the text encoder


class TextEncoder:
    """An `Encoder`: the last hidden state of the template's rest, from the prompt on."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a text and of what follows it"""
        self.device, self.longest = device, longest
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        conditions: list[Condition] = []
        for start in range(0, len(prompts), TEXT_BATCH):
            texts = [prompt.text for prompt in prompts[start : start + TEXT_BATCH]]
            conditions.extend({"text": states} for states in self._states(texts))
        return conditions

    def negative(self, text: str) -> Condition:
        return self([Prompt(text)])[0]

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        crop = self._template_tokens()
        seen = token_limit.cut(self.tokenizer, TEMPLATE.format(text), self.longest + crop)
        return {"text_encoder": (seen[0] - crop, seen[1] - crop)} if seen else {}

    def _template_tokens(self) -> int:
        """Tokens of the template before the text: 34 with Qwen's tokenizer."""
        return len(self.tokenizer(TEMPLATE.split("{}")[0])["input_ids"])

    def _states(self, texts: list[str]) -> list[Tensor]:
        """returns float32 [L, D] each on the CPU, L = its tokens.

        A causal network: what is cut off at the end changes no state before it.
        """
        crop = self._template_tokens()
        tokens = self.tokenizer(
            [TEMPLATE.format(text) for text in texts],
            max_length=self.longest + crop,
            padding="longest",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # the language model alone: no image, and no logits of each token
        states = self.qwen.model.language_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [row[crop:length].float().cpu() for row, length in zip(states, lengths, strict=True)]
