"""Classifier-free guidance as a folder's guider does it, for pipelines whose guidance is a part of
the folder.

`model.cfg` says the scale s of u + s (c - u), as for every family; the folder says the rest.
"""

from pathlib import Path

from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.models.loading.weight_files import read_json

KIND = "ClassifierFreeGuidance"  # diffusers' class
FILE = "guider/guider_config.json"


def read_rescale(where: Path, cfg: float) -> float:
    """guidance_rescale of the folder's guider.

    cfg: model.cfg
    Raises UserError for another kind of guider, one that guides a part of the steps, and a scale
    for a network that was distilled to need none.
    """
    config = read_json(where / FILE)
    named = config.get("_class_name")
    if named != KIND:
        raise UserError(
            f"model.path: {FILE} is a {named}, not a {KIND}; use a folder with that one, or change "
            "that file in a copy of the folder."
        )
    start, stop = config.get("start", 0.0), config.get("stop", 1.0)
    if (start, stop) != (0, 1):
        raise UserError(
            f"model.path: {FILE} has start={start} and stop={stop}: guidance of a part of the "
            "steps, which is not trained; set them to 0.0 and 1.0 there."
        )
    if cfg != 1 and not guides(config):
        raise UserError(
            f"model.cfg={cfg}: {FILE} of model.path guides with nothing, as a distilled model's "
            "does; leave model.cfg out."
        )
    return float(config.get("guidance_rescale", 0.0))


def guides(config: dict[str, object]) -> bool:
    """Whether a guider's config has a second branch: enabled, and not of the scale of one branch.

    diffusers' original formulation, c + s (c - u), is u + (s + 1)(c - u).
    """
    scale = config.get("guidance_scale", 7.5)
    alone = 0 if config.get("use_original_formulation") else 1
    return bool(config.get("enabled", True)) and scale != alone


def guided(without: Tensor, with_text: Tensor, scale: float, rescale: float) -> Tensor:
    """u + s (c - u), by a share brought to the standard deviation of c (Lin et al. 2023, arXiv
    2305.08891, section 3.4).

    without, with_text: u and c, [B, ...];  rescale: that share, 0 to 1;  returns like them
    """
    both = without + scale * (with_text - without)
    if not rescale:
        return both
    axes = tuple(range(1, both.ndim))
    std_text, std_both = (v.std(axes, keepdim=True) for v in (with_text, both))
    return rescale * both * (std_text / std_both) + (1 - rescale) * both
