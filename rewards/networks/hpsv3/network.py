"""HPSv3's network: Qwen2-VL's body and a head of three layers that is read at one token.

The published file has the flat names of transformers 4.45: `visual.*`, `model.*`, `lm_head.weight`
and `rm_head.*`. They are mapped strictly; the language head, which no score uses, is left out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.networks.qwen2_vl.body import (
    EMBEDDING,
    Batch,
    check,
    config_of,
    empty_body,
    fill,
    states_at,
)

HEAD = "rm_head."
UNUSED = "lm_head.weight"
RENAMED = {"visual.": "visual.", "model.": "language_model.", HEAD: HEAD}
"""Prefix of the published file -> that of Qwen2VLModel of transformers 5, or of the head."""


class Network(nn.Module):
    """Network that turns token ids and patches of B pictures into B scores."""

    def __init__(self, body: Any, head: nn.Sequential) -> None:
        """Take the parts of the network.

        body: a Qwen2VLModel;  head: [..., hidden] -> [..., 2], in float32
        """
        super().__init__()
        self.body = body
        self.head = head

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Scores, float32 [B]: the first of the head's two outputs, the mean of the preference.

        batch: of B pictures, with one mark each
        The second output is what the training's loss takes for the spread; nobody scores with it.
        """
        at_mark = states_at(self.body, batch, self.body.config.image_token_id)[:, 0]
        outputs: Tensor = self.head(at_mark)
        return outputs[:, 0]


def empty_head(hidden: int) -> nn.Sequential:
    """The head without memory; its places in the file's names are 0, 3 and 5."""
    with torch.device("meta"):
        layers = [nn.Linear(hidden, 1024), nn.Linear(1024, 16), nn.Linear(16, 2)]
        return nn.Sequential(
            layers[0], nn.ReLU(), nn.Dropout(0.05), layers[1], nn.ReLU(), layers[2]
        )


def renamed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights, of any shape [...], under the names of Qwen2VLModel and of the head.

    source: names the weights in messages
    Raises UserError for a name that the published layout has not.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in RENAMED if name.startswith(prefix)), None)
        if prefix is not None:
            found[RENAMED[prefix] + name.removeprefix(prefix)] = tensor
        elif name != UNUSED:
            raise UserError(
                f"rewards.path={source}: holds what HPSv3 has not, {name}; give the published "
                "HPSv3.safetensors as it is."
            )
    return found


def build(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Any],
    dtype: torch.dtype,
    coarse: bool,
    source: str,
) -> Network:
    """The network with these renamed weights, in dtype, on the CPU; the head in float32.

    tensors: of any shape [...];  base: config.json of Qwen2-VL-7B-Instruct
    coarse: rotary frequencies as the reference's bfloat16 run has them
    source: names the weights in messages
    Raises UserError where a tensor is missing, unknown or of another shape.
    """
    if EMBEDDING not in tensors:
        raise UserError(
            f"rewards.path={source}: lacks model.embed_tokens.weight; download it again."
        )
    body = empty_body(config_of(base, len(tensors[EMBEDDING])))
    wanted = body.state_dict()
    head = empty_head(wanted[EMBEDDING].shape[1]).eval()
    whole = wanted | {HEAD + name: tensor for name, tensor in head.state_dict().items()}
    check(tensors, whole, (), source)
    fill(body, {name: tensors[name] for name in wanted}, dtype, coarse)
    weights = {name: tensors[HEAD + name] for name in head.state_dict()}
    owned = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    head.load_state_dict(owned, assign=True)
    return Network(body, head.requires_grad_(False))
