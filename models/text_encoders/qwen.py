"""Qwen2.5-VL's hidden states of a prompt's own tokens in a template."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

TEMPLATE = (  # of diffusers' QwenImagePipeline, which the network was trained with
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
TEXT_BATCH = 16  # prompts per forward pass of the text encoder


class TextEncoder(InPasses):
    """An `Encoder`: the last hidden state of the template's rest, from the prompt on."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Read it from a pipeline's folder.  longest: tokens of a text and of what follows it"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.qwen = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        # the language model alone: no image, and no logits of each token
        self.qwen.keep("model.language_model")
        around = len(self.tokenizer(TEMPLATE.format(""))["input_ids"])
        tokens = longest + self._template_tokens()
        self.qwen.work = Work(TEXT_BATCH, tokens, AT_WORK["qwen"], around=around)

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.qwen, self._states),)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        crop = self._template_tokens()
        seen = token_limit.cut(self.tokenizer, TEMPLATE.format(text), self.longest + crop)
        return {"text_encoder": (seen[0] - crop, seen[1] - crop)} if seen else {}

    def _template_tokens(self) -> int:
        """Tokens of the template before the text: 34 with Qwen's tokenizer."""
        return len(self.tokenizer(TEMPLATE.split("{}")[0])["input_ids"])

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = its tokens.

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
        states = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            use_cache=False,  # nothing is generated
        ).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [
            {"text": row[crop:length].float().cpu()}
            for row, length in zip(states, lengths, strict=True)
        ]
