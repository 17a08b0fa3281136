"""Qwen2-VL without its language head, read at chosen tokens.

Two things differ from Qwen2-VL as transformers 5 builds it, because the judges that are made of it
(VideoAlign, HPSv3) were trained without them:
- positions are 0, 1, 2, ... on all three rotary axes, also over the tokens of what is seen
  (transformers 4.45.2 does so when a model's forward hands embeddings to the text model, as the
  references do);
- the references cast the whole model to bfloat16, in training and in scoring, and with it the
  rotary frequencies, which keep eight bits; over a thousand tokens the angles of the fastest ones
  are then off by a radian.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
)

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.networks.qwen2_vl.patches import MERGE, PATCH, TUBE

EMBEDDING = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Batch:
    """B texts, each with what it shows, as the network takes them."""

    ids: Tensor  # int64 [B, L], right-padded with anything
    patches: Tensor  # float32 [P, 1176], of all that is seen
    grids: Tensor  # int64 [B, 3], patches in time, height and width
    marks: Tensor  # int64 [B, M], where the special tokens stand

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        parts = (self.ids, self.patches, self.grids, self.marks)
        return Batch(*(part.to(device) for part in parts))


def states_at(body: Any, batch: Batch, seen_id: int) -> Tensor:
    """Last hidden states at the marks, float32 [B, M, hidden].

    body: a Qwen2VLModel;  seen_id: the token of a piece of video or image
    The padding needs no mask: attention is causal, so no token sees a later one.
    """
    embedded = body.language_model.embed_tokens(batch.ids)
    seen = body.visual(batch.patches.to(embedded.dtype), grid_thw=batch.grids).pooler_output
    embedded = embedded.masked_scatter((batch.ids == seen_id)[..., None], seen.to(embedded.dtype))
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    hidden = body.language_model(
        inputs_embeds=embedded, position_ids=positions.expand(3, *batch.ids.shape), use_cache=False
    ).last_hidden_state
    return hidden.gather(1, batch.marks[..., None].expand(-1, -1, hidden.shape[-1])).float()


def config_of(base: Mapping[str, Any], rows: int) -> Any:
    """The base model's config as a Qwen2VLConfig, with `rows` token embeddings."""
    text = base.get("text_config")
    changed = (
        {**base, "text_config": {**text, "vocab_size": rows}}
        if text
        else {**base, "vocab_size": rows}
    )
    try:
        config = Qwen2VLConfig.from_dict(changed)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"rewards.options.base: its config.json is not Qwen2-VL's ({problem}); correct it."
        ) from None
    vision = config.vision_config
    if (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) != (
        PATCH,
        MERGE,
        TUBE,
    ):
        raise UserError(
            f"rewards.options.base: its config.json has patches of {vision.temporal_patch_size} x "
            f"{vision.patch_size}, merged by {vision.spatial_merge_size}; only Qwen2-VL's {TUBE} x "
            f"{PATCH}, by {MERGE}, can be made."
        )
    return config


def empty_body(config: Any) -> Any:
    """A Qwen2VLModel without memory, but for the rotary tables, which no checkpoint holds."""
    with torch.device("meta"):
        body = Qwen2VLModel(config)
    body.language_model.rotary_emb = Qwen2VLRotaryEmbedding(config.text_config)
    body.visual.rotary_pos_emb = Qwen2VLVisionRotaryEmbedding(config.vision_config)
    return body.requires_grad_(False).eval()


def fill(body: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, coarse: bool) -> None:
    """Give an empty body its weights, tensors of any shape [...] by name, in dtype, on the CPU.

    coarse: rotary frequencies as the references' bfloat16 runs have them.
    """
    # copied out of the file: a tensor's address would decide the last bits of a product
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    body.load_state_dict(weights, strict=True, assign=True)
    if coarse:
        _round_frequencies(body)
    body.requires_grad_(False)


def rounds_frequencies(
    chosen: bool | None, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether rotary frequencies are rounded to bfloat16.

    chosen: the option. None: as the references, where dtype or the checkpoint is bfloat16
    tensors: the weights, of any shape [...]
    """
    if chosen is not None:
        return chosen
    embedding = tensors.get(EMBEDDING)
    return torch.bfloat16 in (dtype, None if embedding is None else embedding.dtype)


def check(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], more: Sequence[str], source: str
) -> None:
    """Raise UserError, naming the first few, where the weights are not exactly the network's.

    given, wanted: tensors of any shape [...] by name;  more: further wrong sizes, in words
    source: names the weights in the message
    """
    other = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    for problem, names in (
        ("lacks", [name for name in wanted if name not in given]),
        ("holds what the network has not,", [name for name in given if name not in wanted]),
        ("holds another size of", [*other, *more]),
    ):
        if names:
            raise UserError(
                f"rewards.path={source}: {problem} {_few(names)}; download it again, or correct "
                "rewards.options.base."
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _round_frequencies(body: Any) -> None:
    """Round the rotary frequencies of text and vision to bfloat16, in place."""
    text = body.language_model.rotary_emb
    text.inv_freq = text.inv_freq.bfloat16().float()
    body.visual.rotary_pos_emb = CoarseVisionRotary(body.visual.rotary_pos_emb.inv_freq)


class CoarseVisionRotary(nn.Module):
    """Angles of the vision tower's rotary embedding, in bfloat16 throughout, as in a cast model."""

    def __init__(self, frequencies: Tensor) -> None:
        """Round the frequencies, float32 [head / 4], to bfloat16."""
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies.bfloat16(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles, float32 [P, head] each.

        position_ids: int64 [P, 2], row and column of each patch
        """
        angles = (position_ids[..., None].bfloat16() * self.inv_freq).flatten(1)
        return tuple(torch.cat([f, f], -1).float() for f in (angles.cos(), angles.sin()))  # type: ignore[return-value]
