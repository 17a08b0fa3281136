"""VideoAlign's network: Qwen2-VL without its language head, and a linear head read at three tokens.

Two things differ from Qwen2-VL as transformers 5 builds it, because the released model was trained
without them:
- positions are 0, 1, 2, ... on all three rotary axes, also over the video's tokens (transformers
  4.45.2 does so when a model's forward hands embeddings to the text model, as the reference does);
- the reference casts the whole model to bfloat16, in training and in scoring, and with it the
  rotary frequencies, which keep eight bits; over a thousand tokens the angles of the fastest ones
  are then off by a radian.
"""

from collections.abc import Mapping, Sequence
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
from fastgrpo.rewards.networks.videoalign.preprocess import MERGE, PATCH, TUBE

HEAD = "rm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"


class Network(nn.Module):
    """Network that turns token ids and patches of B clips into B x 3 raw scores."""

    def __init__(self, body: Any, head: Tensor) -> None:
        """Take the parts of the network.

        body: a Qwen2VLModel;  head: float32 [1 or 3, hidden]
        """
        super().__init__()
        self.body = body
        self.head = nn.Parameter(head, requires_grad=False)

    @torch.inference_mode()
    def forward(self, ids: Tensor, patches: Tensor, grids: Tensor, marks: Tensor) -> Tensor:
        """Raw scores, float32 [B, 3]: VQ, MQ, TA before normalisation.

        ids: int64 [B, L], right-padded with anything;  patches: float32 [P, 1176] of all clips
        grids: int64 [B, 3], patches in time, height and width
        marks: int64 [B, 3], where the three special tokens stand
        The padding needs no mask: attention is causal, so no token sees a later one.
        """
        embedded = self.body.language_model.embed_tokens(ids)
        seen = self.body.visual(patches.to(embedded.dtype), grid_thw=grids).pooler_output
        is_video = (ids == self.body.config.video_token_id)[..., None]
        embedded = embedded.masked_scatter(is_video, seen.to(embedded.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        hidden = self.body.language_model(
            inputs_embeds=embedded, position_ids=positions, use_cache=False
        ).last_hidden_state
        at_marks = hidden.gather(1, marks[..., None].expand(-1, -1, hidden.shape[-1])).float()
        scores = at_marks @ self.head.T  # [B, 3, 1 or 3]
        return scores[..., 0] if len(self.head) == 1 else scores.diagonal(dim1=1, dim2=2)


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


def build(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any],
    dtype: torch.dtype,
    coarse: bool,
    source: str,
) -> Network:
    """The network with these weights, in dtype, on the CPU; the head, [1 or 3, hidden], in float32.

    coarse: rotary frequencies as the reference's bfloat16 run has them.
    source: names the weights in messages
    Raises UserError where a tensor is missing, unknown or of another shape.
    """
    body = matching_body(tensors, base, source)
    # copied out of the file: a tensor's address would decide the last bits of a product
    weights = {
        name: tensor.to(dtype, copy=True) for name, tensor in tensors.items() if name != HEAD
    }
    body.load_state_dict(weights, strict=True, assign=True)
    if coarse:
        _round_frequencies(body)
    return Network(body.requires_grad_(False), tensors[HEAD].to(torch.float32, copy=True))


def matching_body(tensors: Mapping[str, Tensor], base: Mapping[str, Any], source: str) -> Any:
    """An empty Qwen2VLModel that takes exactly these weights, by name and shape [...].

    Raises UserError where none does.
    """
    missing = [name for name in (EMBEDDING, HEAD) if name not in tensors]
    if missing:
        raise UserError(f"rewards.path={source}: lacks {', '.join(missing)}; download it again.")
    body = empty_body(config_of(base, len(tensors[EMBEDDING])))
    check({n: t for n, t in tensors.items() if n != HEAD}, body.state_dict(), tensors[HEAD], source)
    return body


def check(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: Tensor, source: str
) -> None:
    """Raise UserError, naming the first few, where the weights are not exactly the network's.

    given, wanted: tensors of any shape [...] by name;  head: must be [1 or 3, hidden]
    """
    other = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    hidden = wanted[EMBEDDING].shape[1]
    if head.ndim != 2 or len(head) not in (1, 3) or head.shape[1] != hidden:
        other.append(f"{HEAD} {list(head.shape)} instead of [1, {hidden}] or [3, {hidden}]")
    for problem, names in (
        ("lacks", [name for name in wanted if name not in given]),
        ("holds what the network has not,", [name for name in given if name not in wanted]),
        ("holds another size of", other),
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
