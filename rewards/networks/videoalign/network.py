"""VideoAlign's network: Qwen2-VL's body and a linear head that is read at three tokens."""

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

HEAD = "rm_head.weight"


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
    def forward(self, batch: Batch) -> Tensor:
        """Raw scores, float32 [B, 3]: VQ, MQ, TA before normalisation.

        batch: of B clips, with three marks each
        """
        at_marks = states_at(self.body, batch, self.body.config.video_token_id)
        scores = at_marks @ self.head.T  # [B, 3, 1 or 3]
        return scores[..., 0] if len(self.head) == 1 else scores.diagonal(dim1=1, dim2=2)


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
    fill(body, {name: t for name, t in tensors.items() if name != HEAD}, dtype, coarse)
    return Network(body, tensors[HEAD].to(torch.float32, copy=True))


def matching_body(tensors: Mapping[str, Tensor], base: Mapping[str, Any], source: str) -> Any:
    """An empty Qwen2VLModel that takes exactly these weights, by name and shape [...].

    Raises UserError where none does.
    """
    missing = [name for name in (EMBEDDING, HEAD) if name not in tensors]
    if missing:
        raise UserError(f"rewards.path={source}: lacks {', '.join(missing)}; download it again.")
    body = empty_body(config_of(base, len(tensors[EMBEDDING])))
    wanted, head = body.state_dict(), tensors[HEAD]
    hidden = wanted[EMBEDDING].shape[1]
    wrong_head = head.ndim != 2 or len(head) not in (1, 3) or head.shape[1] != hidden
    said = f"{HEAD} {list(head.shape)} instead of [1, {hidden}] or [3, {hidden}]"
    given = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    check(given, wanted, [said] * wrong_head, source)
    return body
