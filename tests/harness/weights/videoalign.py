"""A tiny random VideoAlign in the published layout, with a base folder and a template of its own.

Seconds to score.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from fastgrpo.core.config import RewardSpec

RANK, ALPHA = 4, 8
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("a", "t"), ("Ġ", "a"), ("Ġa", "t"), ("o", "r"), ("e", "d"), ("Ġ", "r"), ("Ġr", "ed")]
TEMPLATE = """
Judge the clip.  
How it looks: <|VQ_reward|>
END
How it moves: <|MQ_reward|>
END
Text - {text_prompt}
How it fits the text: <|TA_reward|>
END
"""


def write(folder: Path) -> None:
    """folder/model_config.json, checkpoint-7/ with model.pth and the tokenizer, base/ and
    template.txt.
    """
    tokenizer = new_tokenizer()
    step, base = folder / "checkpoint-7", folder / "base"
    (step / "tokenizer").mkdir(parents=True)
    base.mkdir()
    tokenizer.save(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.save(str(step / "tokenizer" / "tokenizer.json"))
    config = base_config(tokenizer)
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_config.json").write_text(
        json.dumps(model_config(), indent=1), encoding="utf-8"
    )
    (folder / "template.txt").write_bytes(TEMPLATE.encode())
    torch.save(state(config, tokenizer.get_vocab_size()), step / "model.pth")


def options(folder: Path, template: str = TEMPLATE) -> dict[str, str | int | float | bool]:
    """rewards.options that fit the folder, in whose template.txt this text was written."""
    return {
        "base": str(folder / "base"),
        "template": str(folder / "template.txt"),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }


def spec(folder: Path, batch_size: int = 8, **more: str | bool) -> RewardSpec:
    """A recipe's entry for the folder. more: further options"""
    return RewardSpec(
        name="videoalign",
        weights={"VQ": 1.0, "MQ": 1.0},
        path=str(folder),
        device="cpu",
        batch_size=batch_size,
        options=options(folder) | more,
    )


def new_tokenizer() -> Tokenizer:
    """Byte-level pairs as Qwen2's, with a few merges and the base model's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def base_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as the base model's: flat, of transformers 4, with more rows than the tokenizer
    has entries.
    """
    return {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vocab_size": tokenizer.get_vocab_size() + 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **{
            f"{name}_token_id": tokenizer.token_to_id(f"<|{name}|>")
            for name in ("vision_start", "vision_end")
        },
        **{
            f"{name}_token_id": tokenizer.token_to_id(f"<|{name}_pad|>")
            for name in ("image", "video")
        },
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def model_config() -> dict[str, Any]:
    """model_config.json as published, without the settings of its training."""
    return {
        "data_config": {
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "training_args": {},
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "use_rslora": False,
        },
        "inference_config": {
            "VQ_mean": 0.3,
            "VQ_std": 1.2,
            "MQ_mean": -0.2,
            "MQ_std": 0.7,
            "TA_mean": 0.1,
            "TA_std": 0.9,
        },
    }


def state(config: Mapping[str, Any], rows: int, output_dim: int = 1) -> dict[str, Tensor]:
    """A PEFT state dict with random weights, large enough that scores depend on clip and text.

    rows: of the token embedding, as many as the tokenizer has entries
    """
    shapes = {
        name: tensor.shape
        for name, tensor in meta_body({**config, "vocab_size": rows}).state_dict().items()
    }
    random = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        place = "base_model.model." + re.sub(r"^language_model\.", "model.", name)
        module, kind = place.rsplit(".", 1)
        gain = kind == "weight" and len(shape) == 1
        fan = shape[1:].numel() if len(shape) > 1 and "embed_tokens" not in name else 1
        tensor = (
            torch.randn(shape, generator=random) * (0.1 if len(shape) == 1 else 1.2 / fan**0.5)
            + gain
        )
        if re.search(r"layers\.\d+\..*_proj$", module):
            found[f"{module}.base_layer.{kind}"] = tensor
            if kind == "weight":
                found[f"{module}.lora_A.default.weight"] = (
                    torch.randn(RANK, shape[1], generator=random) / 6
                )
                found[f"{module}.lora_B.default.weight"] = (
                    torch.randn(shape[0], RANK, generator=random) / 6
                )
        else:
            found[place] = tensor
    hidden = int(config["hidden_size"])
    found["base_model.model.lm_head.weight"] = found["base_model.model.model.embed_tokens.weight"]
    found["base_model.model.rm_head.weight"] = torch.randn(output_dim, hidden, generator=random) / 4
    return found


def meta_body(config: Mapping[str, Any]) -> Any:
    """The network's shape alone."""
    with torch.device("meta"):
        return Qwen2VLModel(Qwen2VLConfig.from_dict(dict(config)))
