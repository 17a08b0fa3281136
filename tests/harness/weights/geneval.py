"""A tiny random Mask2Former, its weights under OpenMMLab's names, and rows as GenEval's.

Written apart from the reward's own map of names, from transformers' names to OpenMMLab's.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerModel

CONFIG: dict[str, Any] = {
    "backbone_config": {
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 3, 4],
        "window_size": 2,
        "drop_path_rate": 0.0,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 48,
    "dim_feedforward": 64,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "num_queries": 10,
}
NAMES = (
    (r"^pixel_level_module\.encoder\.swin\.embeddings\.", "backbone.patch_embed."),
    (r"patch_embeddings\.", ""),
    (r"^pixel_level_module\.encoder\.swin\.encoder\.layers\.", "backbone.stages."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.o_proj", "attn.w_msa.proj"),
    (r"attention\.relative_position_bias\.", "attn.w_msa."),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"^pixel_level_module\.decoder\.input_projections\.(\d)\.0", r"P.input_convs.\1.conv"),
    (r"^pixel_level_module\.decoder\.input_projections\.(\d)\.1", r"P.input_convs.\1.gn"),
    (r"^pixel_level_module\.decoder\.level_embed", "P.level_encoding.weight"),
    (r"^pixel_level_module\.decoder\.adapter_1\.0", "P.lateral_convs.0.conv"),
    (r"^pixel_level_module\.decoder\.adapter_1\.1", "P.lateral_convs.0.gn"),
    (r"^pixel_level_module\.decoder\.layer_1\.0", "P.output_convs.0.conv"),
    (r"^pixel_level_module\.decoder\.layer_1\.1", "P.output_convs.0.gn"),
    (r"^pixel_level_module\.decoder\.mask_projection", "P.mask_feature"),
    (r"^pixel_level_module\.decoder\.encoder", "P.encoder"),
    (r"(P\.encoder.*)self_attn_layer_norm", r"\1norms.0"),
    (r"(P\.encoder.*)final_layer_norm", r"\1norms.1"),
    (r"(P\.encoder.*)self_attn\.", r"\1attentions.0."),
    (r"^transformer_module\.decoder\.layers", "T.layers"),
    (r"(T\..*)cross_attn_layer_norm", r"\1norms.0"),
    (r"(T\..*)self_attn_layer_norm", r"\1norms.1"),
    (r"(T\..*)final_layer_norm", r"\1norms.2"),
    (r"(T\..*)cross_attn\.", r"\1attentions.0.attn."),
    (r"(T\..*)self_attn\.out_proj", r"\1attentions.1.attn.out_proj"),
    (r"([PT]\..*)\.fc1", r"\1.ffns.0.layers.0.0"),
    (r"([PT]\..*)\.fc2", r"\1.ffns.0.layers.1"),
    (r"^transformer_module\.decoder\.layernorm", "T.post_norm"),
    (r"^transformer_module\.queries_embedder", "panoptic_head.query_embed"),
    (r"^transformer_module\.queries_features", "panoptic_head.query_feat"),
    (r"^transformer_module\.level_embed", "panoptic_head.level_embed"),
    (r"^P\.", "panoptic_head.pixel_decoder."),
    (r"^T\.", "panoptic_head.transformer_decoder."),
    (r"^class_predictor", "panoptic_head.cls_embed"),
)


def network() -> tuple[Any, torch.nn.Linear]:
    """A tiny Mask2FormerModel with random weights, and a head that is sure of its classes."""
    torch.manual_seed(5)
    body = Mask2FormerModel(Mask2FormerConfig(**CONFIG, num_labels=80)).eval()
    head = torch.nn.Linear(32, 81)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
            if name.startswith("pixel_level_module.encoder.swin.layernorm"):
                parameter.copy_(torch.ones(parameter.shape) * name.endswith("weight"))
        head.weight.mul_(20.0)
    return body.requires_grad_(False), head.requires_grad_(False)


def to_openmmlab(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of mmdetection's checkpoint; state: the body's, and class_predictor.*"""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("pixel_level_module.encoder.swin.layernorm"):
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            three = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            tensor = torch.cat(three)
            name = re.sub(r"attention\.q_proj", "attn.w_msa.qkv", name)
            name = re.sub(r"self_attn\.q_proj\.", "attentions.1.attn.in_proj_", name)
        if ".downsample." in name:
            parts = tensor.unflatten(-1, (2, 2, -1))  # [..., column, row, C]
            order = (*range(parts.ndim - 3), parts.ndim - 1, parts.ndim - 2, parts.ndim - 3)
            tensor = parts.permute(order).flatten(-3).contiguous()
        for pattern, other in NAMES:
            name = re.sub(pattern, other, name)
        name = re.sub(
            r"^pixel_level_module\.encoder\.hidden_states_norms\.stage(\d)",
            lambda match: f"backbone.norm{int(match[1]) - 1}",
            name,
        )
        name = re.sub(
            r"^transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0",
            lambda match: f"panoptic_head.mask_embed.{2 * int(match[1])}",
            name,
        )
        found[name] = tensor
    for name in [n for n in found if n.endswith("relative_position_bias_table")]:
        index = name.replace("bias_table", "index")
        found[index] = torch.zeros(4, 4, dtype=torch.int64)
    return found


def write(folder: Path) -> None:
    """folder/detector.pth as mmdetection saves it."""
    body, head = network()
    state = body.state_dict() | {f"class_predictor.{n}": t for n, t in head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"meta": {"CLASSES": ("person",)}, "state_dict": to_openmmlab(state)}
    torch.save(saved, folder / "detector.pth")


def write_transformers(folder: Path) -> None:
    """folder/config.json and model.safetensors as transformers saves the whole model."""
    from safetensors.torch import save_file

    body, head = network()
    folder.mkdir(parents=True, exist_ok=True)
    body.config.save_pretrained(folder)
    state = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    state |= {f"class_predictor.{name}": tensor for name, tensor in head.state_dict().items()}
    owned = {name: tensor.clone() for name, tensor in state.items()}
    save_file(owned | {"criterion.empty_weight": torch.ones(81)}, folder / "model.safetensors")
