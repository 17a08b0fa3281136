"""GenEval's detector: a Mask2Former, with the sizes and the post-processing of mmdetection 2.

Transformers' own processor is not used: it thresholds masks at another size, sorts by another score
and paints objects over one another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import weight_files
from fastgrpo.rewards.networks.geneval import openmmlab
from fastgrpo.rewards.networks.geneval.names import CLASSES
from fastgrpo.rewards.networks.geneval.rules import THRESHOLD, Found

LONG, SHORT = 1333, 800  # that a picture is fitted into, pixels
UNIT = 32  # multiple of both sides, after padding
MOST = 100  # objects of a picture
MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of red, green, blue
STD = (58.395, 57.12, 57.375)


class Detector(nn.Module):
    """Network that finds objects in pictures."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        """Take the parts of the network.

        body: a Mask2FormerModel;  head: [..., hidden] -> [..., 81], the last for no object
        """
        super().__init__()
        self.body = body
        self.head = head

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> list[list[Found] | None]:
        """The objects of each picture whose score is above 0.3, the best first, on the CPU.

        pictures: uint8 [N, H, W, 3].  returns None for a picture whose output is not finite
        """
        shown, inner = prepared(pictures)
        weight = self.head.weight
        output = self.body(shown.to(weight.device, weight.dtype), output_hidden_states=True)
        states = output.transformer_decoder_intermediate_states[-1]  # [Q, N, hidden]
        logits = self.head(states).transpose(0, 1).float()
        masks = output.masks_queries_logits[-1].float()  # [N, Q, h / 4, w / 4]
        outer = (shown.shape[-2], shown.shape[-1])
        size = (pictures.shape[1], pictures.shape[2])
        return [
            objects(one, mask, outer, inner, size) if one.isfinite().all() else None
            for one, mask in zip(logits, masks, strict=True)
        ]


def prepared(pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The network's input, and the (height, width) of it that is no padding.

    pictures: uint8 [N, H, W, 3].  returns float32 [N, 3, h, w], h and w multiples of 32
    """
    height, width = pictures.shape[1:3]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    frames = pictures.permute(0, 3, 1, 2).float()
    # as OpenCV on bytes: bilinear without antialiasing, rounded to whole grey levels
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(each, device=frames.device).view(3, 1, 1) for each in (MEAN, STD))
    padding = [-side % UNIT for side in size]
    return F.pad((frames - mean) / std, (0, padding[1], 0, padding[0])), size


def objects(
    logits: Tensor,
    masks: Tensor,
    outer: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
) -> list[Found]:
    """The objects of a picture whose score is above 0.3, the best first.

    logits: float32 [Q, 81], the last for no object;  masks: float32 [Q, h, w], logits
    outer, inner, size: (height, width) of the network's input, without its padding, of the picture
    The 100 best of queries and classes together; an object's score is its probability times the
    mean probability of its mask's pixels. Nothing is suppressed.
    """
    likely = logits.softmax(-1)[:, :-1]
    best = likely.flatten().topk(min(MOST, likely.numel()))
    # what is not above the threshold here cannot be so times a mean probability
    kept = best.values > THRESHOLD
    chances, places = best.values[kept], best.indices[kept]
    found = []
    for chance, place in zip(chances.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, likely.shape[1])
        mask = F.interpolate(masks[None, query : query + 1], outer, mode="bilinear")
        mask = F.interpolate(mask[..., : inner[0], : inner[1]], size, mode="bilinear")[0, 0]
        inside = mask > 0
        sure = (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        score = chance * float(sure)
        if score > THRESHOLD:
            found.append(Found(CLASSES[label], score, extent(inside), inside.cpu()))
    return sorted(found, key=lambda one: -one.score)


def extent(mask: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask, bool [H, W], right and bottom one past its last pixel; 0s of an empty one."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def of_openmmlab(file: Path) -> Detector:
    """The detector with the benchmark's own weights, in float32, on the CPU.

    Raises UserError for a file that is not exactly that checkpoint.
    """
    tensors = openmmlab.to_transformers(weight_files.read(file), str(file))
    config = Mask2FormerConfig(**openmmlab.CONFIG, num_labels=len(CLASSES))
    with torch.device("meta"):
        body, head = Mask2FormerModel(config), nn.Linear(config.hidden_dim, len(CLASSES) + 1)
    wanted = body.state_dict()
    whole = wanted | {openmmlab.HEAD + name: t for name, t in head.state_dict().items()}
    _check(tensors, whole, str(file))
    # made anew with memory: what no checkpoint holds is made by the constructor
    body = Mask2FormerModel(config)
    body.load_state_dict({name: tensors[name] for name in wanted}, strict=True)
    _fill(head, tensors)
    return _frozen(body, head)


def _fill(head: nn.Linear, tensors: Mapping[str, Tensor]) -> None:
    """Give the class head its weights, [81, hidden] and [81]."""
    weights = {name: tensors[openmmlab.HEAD + name].float() for name in ("weight", "bias")}
    head.load_state_dict(weights, strict=True, assign=True)


def _frozen(body: Any, head: nn.Linear) -> Detector:
    return Detector(body, head).requires_grad_(False).eval()


def of_transformers(folder: Path) -> Detector:
    """The detector of a folder in transformers' layout, in float32, on the CPU.

    Raises UserError where its config or weights are not a Mask2Former's of 80 classes.
    """
    try:
        body, told = Mask2FormerModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"rewards.path={folder}: no Mask2Former of transformers ({problem}); download "
            "facebook/mask2former-swin-small-coco-instance."
        ) from None
    tensors = weight_files.read(weights_in(folder))
    head = nn.Linear(body.config.hidden_dim, len(CLASSES) + 1)
    given = {name: t for name, t in tensors.items() if name.startswith(openmmlab.HEAD)}
    _check(given, {openmmlab.HEAD + name: t for name, t in head.state_dict().items()}, str(folder))
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise UserError(f"rewards.path={folder}: lacks {lacking[0]}; download it again.")
    _fill(head, tensors)
    return _frozen(body.float(), head)


def weights_in(folder: Path) -> Path:
    """The file of weights that transformers takes of a folder. Raises UserError without one."""
    return weight_files.locate(
        str(folder),
        ("model.safetensors", "pytorch_model.bin"),
        beside=[],
        where="rewards.path",
        remedy="download the whole repository",
    )


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError where tensors, of any shape [...], are not exactly the network's by name."""
    for name in sorted({*given, *wanted}):
        shapes = [list(t[name].shape) if name in t else None for t in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"rewards.path={source}: {name} is {shapes[0]}, where GenEval's detector has "
                f"{shapes[1]}; download the instance model again."
            )
