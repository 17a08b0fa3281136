"""A Llama's hidden states of a prompt's own tokens in a template, and CLIP's pooled output."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from fastgrpo.core.policy import Condition
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.text_encoders import AT_WORK
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
SKIPPED_LAYERS = 2  # of the Llama: the text features are the third hidden state from the end
TEXT_BATCH = 32  # prompts per forward pass of the text encoders


class TextEncoder(InPasses):
    """An `Encoder`: Llama features and CLIP's pooled output."""

    def __init__(
        self, where: Path, dtype: torch.dtype, device: torch.device, longest: tuple[int, int]
    ) -> None:
        """Read both from a pipeline's folder.  longest: tokens of a text for the Llama, for CLIP"""
        self.device, self.longest, self.batch = device, longest, TEXT_BATCH
        self.tokenizer, self.llama = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.tokenizer_2, self.clip = diffusers_folder.text_model(
            where, tokenizer="tokenizer_2", encoder="text_encoder_2", dtype=dtype, device=device
        )
        around = len(self.tokenizer(TEMPLATE.format(""))["input_ids"])
        tokens = longest[0] + self._template_tokens()
        self.llama.work = Work(TEXT_BATCH, tokens, AT_WORK["llama"], states=True, around=around)
        self.clip.work = Work(TEXT_BATCH, longest[1], AT_WORK["clip"])

    def passes(self) -> Sequence[Pass]:
        return (
            self.reading(self.clip, self._clip_features),
            self.reading(self.llama, self._llama_features),
        )

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        crop = self._template_tokens()
        llama = token_limit.cut(
            self.tokenizer, TEMPLATE.format(text), longest=self.longest[0] + crop
        )
        clip = token_limit.cut(self.tokenizer_2, text, self.longest[1])
        own = {"text_encoder": (llama[0] - crop, llama[1] - crop)} if llama else {}
        return own | ({"text_encoder_2": clip} if clip else {})

    def _template_tokens(self) -> int:
        """Tokens of the template before the text: 95 with Llama 3's tokenizer."""
        return len(self.tokenizer(TEMPLATE.split("{}")[0])["input_ids"])

    @torch.no_grad()
    def _llama_features(self, texts: list[str]) -> list[Condition]:
        """Hidden states of the prompt's own tokens and the closing one.

        returns "text" [L, D] each, float32 on the CPU, L = its length
        """
        crop = self._template_tokens()
        tokens = self.tokenizer(
            [TEMPLATE.format(text) for text in texts],
            max_length=self.longest[0] + crop,
            padding="longest",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.llama(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,  # nothing is generated
        ).hidden_states[-(SKIPPED_LAYERS + 1)]
        lengths = tokens.attention_mask.sum(1).tolist()
        return [
            {"text": row[crop:length].float().cpu()}
            for row, length in zip(states, lengths, strict=True)
        ]

    @torch.no_grad()
    def _clip_features(self, texts: list[str]) -> list[Condition]:
        """Pooled CLIP output of the raw prompts.  returns "pooled" [D] each, float32 on the CPU"""
        tokens = self.tokenizer_2(
            texts,
            padding="max_length",
            max_length=self.longest[1],
            truncation=True,
            return_tensors="pt",
        )
        pooled = self.clip(tokens.input_ids.to(self.device)).pooler_output.float().cpu()
        return [{"pooled": vector} for vector in pooled]
