"""Queries, keys and values of diffusers' joint attention, for families that share sequences."""

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

LAYERS = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


def heads(attn: Any, x: Tensor, names: tuple[str, ...] = LAYERS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by the layers of these names, the first two normalised.

    x: [B, S, C];  returns [B, S, H, D] each
    """
    query, key, value, norm_query, norm_key = (getattr(attn, name, None) for name in names)
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (query, key, value))  # type: ignore[misc]
    return (q if norm_query is None else norm_query(q)), (k if norm_key is None else norm_key(k)), v


def rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys with their positions.

    x: [B, S, H, D];  table: cosines and sines, [S, D] each;  returns like x
    """
    turned: Tensor = apply_rotary_emb(x, table, sequence_dim=1)
    return turned
