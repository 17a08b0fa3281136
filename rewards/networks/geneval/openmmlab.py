"""The benchmark's own weights, of OpenMMLab's Mask2Former, in transformers' Mask2FormerModel.

GenEval's detector is mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco of mmdetection 2, the instance
model. Its 649 tensors have other names, hold q, k and v as one, and Swin merges patches in another
order of channels; what they compute is the same.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError

CONFIG: dict[str, Any] = {
    "backbone_config": {
        "model_type": "swin",
        "image_size": 224,
        "patch_size": 4,
        "embed_dim": 96,
        "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "drop_path_rate": 0.0,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
}
"""Mask2FormerConfig of the checkpoint; what is not said has transformers' default."""

HEAD = "class_predictor."
DROPPED = re.compile(r"backbone\.stages\.\d+\.blocks\.\d+\.attn\.w_msa\.relative_position_index")
SWIN, DECODER = "pixel_level_module.encoder.swin", "pixel_level_module.decoder"
BLOCK, LAYER = rf"{SWIN}.encoder.layers.\1.blocks.\2", r"transformer_module.decoder.layers.\1"
OLD_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\."
OLD_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\."
PIXELS = r"panoptic_head\.pixel_decoder\."
OLD_ENCODER = rf"{PIXELS}encoder\.layers\.(\d+)\."
RULES = tuple(
    (re.compile(pattern + r"(?=\.|$|_)"), name)
    for pattern, name in (
        (r"backbone\.patch_embed\.projection", f"{SWIN}.embeddings.patch_embeddings.projection"),
        (r"backbone\.patch_embed\.norm", f"{SWIN}.embeddings.norm"),
        (rf"{OLD_BLOCK}norm1", rf"{BLOCK}.layernorm_before"),
        (rf"{OLD_BLOCK}norm2", rf"{BLOCK}.layernorm_after"),
        (rf"{OLD_BLOCK}attn\.w_msa\.qkv", rf"{BLOCK}.attention.QKV"),
        (rf"{OLD_BLOCK}attn\.w_msa\.proj", rf"{BLOCK}.attention.o_proj"),
        (
            rf"{OLD_BLOCK}attn\.w_msa\.relative_position_bias_table",
            rf"{BLOCK}.attention.relative_position_bias.relative_position_bias_table",
        ),
        (rf"{OLD_BLOCK}ffn\.layers\.0\.0", rf"{BLOCK}.mlp.fc1"),
        (rf"{OLD_BLOCK}ffn\.layers\.1", rf"{BLOCK}.mlp.fc2"),
        (r"backbone\.stages\.(\d+)\.downsample", rf"{SWIN}.encoder.layers.\1.downsample"),
        (r"backbone\.norm(\d)", r"pixel_level_module.encoder.hidden_states_norms.STAGE\1"),
        (rf"{PIXELS}input_convs", f"{DECODER}.input_projections"),
        (rf"{OLD_ENCODER}attentions\.0", rf"{DECODER}.encoder.layers.\1.self_attn"),
        (rf"{OLD_ENCODER}norms\.0", rf"{DECODER}.encoder.layers.\1.self_attn_layer_norm"),
        (rf"{OLD_ENCODER}norms\.1", rf"{DECODER}.encoder.layers.\1.final_layer_norm"),
        (rf"{OLD_ENCODER}ffns\.0\.layers\.0\.0", rf"{DECODER}.encoder.layers.\1.fc1"),
        (rf"{OLD_ENCODER}ffns\.0\.layers\.1", rf"{DECODER}.encoder.layers.\1.fc2"),
        (rf"{PIXELS}level_encoding\.weight", f"{DECODER}.level_embed"),
        (rf"{PIXELS}lateral_convs\.0", f"{DECODER}.adapter_1"),
        (rf"{PIXELS}output_convs\.0", f"{DECODER}.layer_1"),
        (rf"{PIXELS}mask_feature", f"{DECODER}.mask_projection"),
        (rf"{OLD_LAYER}attentions\.0\.attn", rf"{LAYER}.cross_attn"),
        (rf"{OLD_LAYER}attentions\.1\.attn\.in_proj", rf"{LAYER}.self_attn.QKV"),
        (rf"{OLD_LAYER}attentions\.1\.attn\.out_proj", rf"{LAYER}.self_attn.out_proj"),
        (rf"{OLD_LAYER}norms\.0", rf"{LAYER}.cross_attn_layer_norm"),
        (rf"{OLD_LAYER}norms\.1", rf"{LAYER}.self_attn_layer_norm"),
        (rf"{OLD_LAYER}norms\.2", rf"{LAYER}.final_layer_norm"),
        (rf"{OLD_LAYER}ffns\.0\.layers\.0\.0", rf"{LAYER}.fc1"),
        (rf"{OLD_LAYER}ffns\.0\.layers\.1", rf"{LAYER}.fc2"),
        (r"panoptic_head\.transformer_decoder\.post_norm", "transformer_module.decoder.layernorm"),
        (r"panoptic_head\.query_embed", "transformer_module.queries_embedder"),
        (r"panoptic_head\.query_feat", "transformer_module.queries_features"),
        (r"panoptic_head\.level_embed", "transformer_module.level_embed"),
        (
            r"panoptic_head\.mask_embed\.(\d)",
            r"transformer_module.decoder.mask_predictor.mask_embedder.HALF\1.0",
        ),
        (r"panoptic_head\.cls_embed", HEAD.removesuffix(".")),
    )
)
"""Beginning of a name -> that of transformers; capitals are taken apart below."""


def to_transformers(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """OpenMMLab's tensors, of any shape [...], under the names of Mask2FormerModel, and the head's.

    source: names the weights in messages
    Raises UserError for a name that is not the instance model's.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if DROPPED.fullmatch(name):
            continue
        rule = next((rule for rule in RULES if rule[0].match(name)), None)
        if rule is None:
            raise UserError(
                f"rewards.path={source}: holds {name}, which GenEval's detector has not; give "
                "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco, the instance model of mmdetection."
            )
        found |= _split(rule[0].sub(rule[1], name, count=1), tensor)
    width = CONFIG["backbone_config"]["embed_dim"] * 2**3
    # the last norm of Swin, which no feature goes through
    found[f"{SWIN}.layernorm.weight"] = torch.ones(width)
    found[f"{SWIN}.layernorm.bias"] = torch.zeros(width)
    return found


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor, of any shape [...], as the one or three of transformers."""
    if "QKV" in name:
        name = name.replace("QKV_", "QKV.")
        thirds = tensor.chunk(3)
        return {name.replace("QKV", f"{one}_proj"): t for one, t in zip("qkv", thirds, strict=True)}
    if ".downsample." in name:
        return {name: merged_order(tensor)}
    name = re.sub(r"STAGE(\d)", lambda match: f"stage{int(match[1]) + 1}", name)
    name = re.sub(r"HALF(\d)", lambda match: str(int(match[1]) // 2), name)
    return {re.sub(r"\.conv\b", ".0", re.sub(r"\.gn\b", ".1", name)): tensor}


def merged_order(tensor: Tensor) -> Tensor:
    """Channels of four merged patches, from mmdetection's order to transformers'.  [..., 4 C]

    There nn.Unfold gives 4 c + 2 row + column; here the patches follow one another,
    (2 column + row) C + c.
    """
    parts = tensor.unflatten(-1, (-1, 2, 2))  # [..., C, row, column]
    order = (*range(parts.ndim - 3), parts.ndim - 1, parts.ndim - 2, parts.ndim - 3)
    return parts.permute(order).flatten(-3).contiguous()
