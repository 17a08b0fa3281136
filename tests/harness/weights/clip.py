"""Tiny random CLIPs in the layouts that reward models are published in: open_clip's and
transformers'.

The vocabulary is CLIP's for a handful of merges: bytes, bytes at a word's end, merges, start and
end of text.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "r e", "re d</w>", "a n</w>"]
VOCABULARY = 512 + len(MERGES) + 2
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {
        "context_length": 20,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


def network(quick_gelu: bool, image_size: int = 32) -> CLIPModel:
    """The CLIP of MODEL_CFG with large random weights, so that its scores depend on pixels, text
    and the gelu.
    """
    act = {"hidden_act": "quick_gelu" if quick_gelu else "gelu", "num_hidden_layers": 2}
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "patch_size": 8,
    } | act
    text = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
    } | act
    text |= {
        "max_position_embeddings": 20,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 2,
    }
    config = CLIPConfig(
        projection_dim=24,
        text_config=text,
        vision_config=vision | {"image_size": image_size},
        attn_implementation="eager",
    )
    model = CLIPModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        wide = 1.0 if "embedding" in name else 0.2
        tensor.copy_(
            wide * torch.randn(tensor.shape, generator=generator) + (1.0 if "norm" in name else 0.0)
        )
    model.logit_scale.fill_(3.0)
    return model


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names and shapes as open_clip saves them: the inverse of what the rewards do,
    written apart.
    """
    result = {}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        layers = {
            name.split(".")[3] for name in state if name.startswith(f"{tower}.encoder.layers.")
        }
        for layer in layers:
            here, there = (
                f"{tower}.encoder.layers.{layer}.",
                f"{prefix}transformer.resblocks.{layer}.",
            )
            for kind in ("weight", "bias"):
                joint = [state[f"{here}self_attn.{n}_proj.{kind}"] for n in ("q", "k", "v")]
                result[f"{there}attn.in_proj_{kind}"] = torch.cat(joint)
                result[f"{there}attn.out_proj.{kind}"] = state[f"{here}self_attn.out_proj.{kind}"]
                result[f"{there}ln_1.{kind}"] = state[f"{here}layer_norm1.{kind}"]
                result[f"{there}ln_2.{kind}"] = state[f"{here}layer_norm2.{kind}"]
                result[f"{there}mlp.c_fc.{kind}"] = state[f"{here}mlp.fc1.{kind}"]
                result[f"{there}mlp.c_proj.{kind}"] = state[f"{here}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        result[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        result[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        result[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    result["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    result["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    result["visual.positional_embedding"] = state[
        "vision_model.embeddings.position_embedding.weight"
    ]
    result["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    result["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    result["visual.proj"] = state["visual_projection.weight"].T
    result["text_projection"] = state["text_projection.weight"].T
    result["logit_scale"] = state["logit_scale"]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def write_merges(folder: Path) -> None:
    """merges.txt, as transformers saves a CLIPTokenizer's."""
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8"
    )


def tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer of the same vocabulary, as the oracle."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    assert sorted(letters) == sorted(ByteLevel.alphabet())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in MERGES),
    ]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge.split()) for merge in MERGES]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=20)


def write_hps(folder: Path) -> CLIPModel:
    """HPS-v2.1's layout: one torch file with the state dict inside; the tiny one needs its config
    beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = network(quick_gelu=False)
    torch.save(
        {"epoch": 1, "state_dict": to_open_clip(model.state_dict())},
        folder / "HPS_v2.1_compressed.pt",
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG}))
    write_merges(folder)
    return model


def write_open_clip(folder: Path, resize: str | None = None) -> CLIPModel:
    """DFN5B's layout: open_clip_pytorch_model.bin and open_clip_config.json; quick_gelu, as there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = network(quick_gelu=True)
    torch.save(to_open_clip(model.state_dict()), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]} | (
        {"resize_mode": resize} if resize else {}
    )
    config = {"model_cfg": MODEL_CFG | {"quick_gelu": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_merges(folder)
    return model


def write_transformers(folder: Path) -> CLIPModel:
    """PickScore's layout: config.json and model.safetensors, with an old config's end-of-text id of
    2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = network(quick_gelu=False)
    # old checkpoints carry such buffers
    old = {
        "text_model.embeddings.position_ids": torch.arange(20)[None]
    }
    save_file(model.state_dict() | old, folder / "model.safetensors")
    config = model.config.to_dict()
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config, default=str))
    write_merges(folder)
    return model
