"""What a text encoder weighs and holds at work, by running it without contents.

FakeTensorMode on the CPU, transformers' classes of the published sizes, bfloat16, PyTorch's own
attention. `fastgrpo.models.sizes.text_encoders` has these figures in closed form.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plan.decoders import Held

T5: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
BYT5 = T5 | {"d_model": 1472, "d_ff": 3584, "num_heads": 6}


def _llama(layers: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128320,
    )
    return transformers.LlamaModel(config)


def _qwen(layers: int) -> Any:
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    return transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(config)


def _qwen3(layers: int, width: int, inner: int) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=151936,
    )
    return transformers.Qwen3Model(config)


def _clip(width: int, heads: int, layers: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return transformers.CLIPTextModelWithProjection(config)


ENCODERS: dict[str, Callable[[int], Any]] = {  # of a number of layers
    "T5_XXL": lambda layers: transformers.T5EncoderModel(
        transformers.T5Config(**T5, num_layers=layers, vocab_size=32128)
    ),
    "BYT5_SMALL": lambda layers: transformers.T5EncoderModel(
        transformers.T5Config(**BYT5, num_layers=layers, vocab_size=1510)
    ),
    "UMT5_XXL": lambda layers: transformers.UMT5EncoderModel(
        transformers.UMT5Config(**T5, num_layers=layers, vocab_size=256384)
    ),
    "LLAMA_3_8B": _llama,
    "QWEN_2_5_VL_7B": _qwen,
    "QWEN_3_4B": lambda layers: _qwen3(layers, 2560, 9728),
    "QWEN_3_8B": lambda layers: _qwen3(layers, 4096, 12288),
    "CLIP_L": lambda layers: _clip(768, 12, layers),
    "CLIP_G": lambda layers: _clip(1280, 20, layers),
}


def held(name: str, batch: int, tokens: int, layers: int, **inputs: object) -> float:
    """Bytes at the peak beyond the weights of encoding `batch` texts of so many tokens.

    name: of ENCODERS, of which the first layers run;  inputs: more that its forward takes
    """
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        network = ENCODERS[name](layers).eval()
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        if not name.startswith(("CLIP", "T5")):
            inputs["attention_mask"] = torch.ones_like(ids)
        with Held() as most:
            for parameter in network.parameters():
                most.known[parameter.untyped_storage()] = True  # weights are not counted
            network(ids, **inputs)
    return float(most.most)
