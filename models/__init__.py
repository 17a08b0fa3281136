"""Backbones: one file per family, and the folder is the registry.

A family is a file models/NAME.py with

  NETWORK: str                            the folder part that is trained: "transformer" or "unet"
  PIPELINES: tuple[str, ...]              the diffusers pipelines whose folders it reads
  MAX_..._TOKENS: int                     its limits of text lengths, for the cache of conditions
  blocks(network) -> list[nn.Module]      its repeated blocks
  load(settings, device) -> Policy        its network from streaming.outline, without weights yet
  encoder(settings, video, device)        a context manager that gives an Encoder

and what it need not have:

  NETWORKS: tuple[str, ...]               where several networks are trained, each for times of its
                                          own: their parts, NETWORK first; the policy's network is
                                          `core.policy.Experts` of them
  PIPELINE: str                           where its other parts lie in another pipeline's folder:
                                          the diffusers class that an export names
  share_sequence(network, layout)         how ranks share its sequences; without it distributed.sp
                                          is 1
  READS_IMAGE: bool                       whether a reference image is a part of its condition
  GUIDANCE_TIMES_1000: bool               whether its network takes 1000 times the embedded guidance,
                                          multiplied as model.guidance_dtype says
  plan(config) -> FamilyPlan              its sizes for `fastgrpo plan`, see sizes/, from a config
                                          of its network; taken without torch, so nothing of the
                                          file that it uses may need torch
  PUBLISHED: tuple[(part, config), ...]   with plan: the configs of its published networks, each by
                                          a part of the hub id, the last of which is ""
  simulated(config, settings) -> Policy   with plan: the policy around a network of a config, for
                                          `fastgrpo plan --simulate`

Adding one edits no other file; tests/test_family_contract.py says what a file lacks.

Imports core alone, and neither torch nor a family's libraries before `family` is called: what a
plan or an export asks of a family is read from its file by `declared`. Read `loading/policies.py`
next: it loads a recipe's family.
"""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastgrpo.core import registry
from fastgrpo.core.errors import UserError, blaming
from fastgrpo.core.files import read_json_or_none

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastgrpo.core.config import Model, Video
    from fastgrpo.core.policy import Encoder, Policy

FOLDER = Path(__file__).parent


class Family(Protocol):
    """What a file models/NAME.py has at its top level."""

    NETWORK: str
    PIPELINES: tuple[str, ...]

    def blocks(self, network: "nn.Module") -> "list[nn.Module]": ...

    def load(self, settings: "Model", device: "torch.device") -> "Policy":
        """Give the policy around a network from `streaming.outline`, which has no weights yet."""

    def encoder(
        self, settings: "Model", video: "Video", device: "torch.device"
    ) -> "AbstractContextManager[Encoder]": ...


def known() -> tuple[str, ...]:
    """Names of the families: the files here that define `load`."""
    return registry.names(FOLDER, "load")


def with_function(function: str) -> tuple[str, ...]:
    """Names of the families with a function that not all have, such as `share_sequence`."""
    return tuple(name for name in registry.names(FOLDER, function) if name in known())


def check(name: str, path: str | None = None) -> None:
    """Raise UserError where there is no family of this name, or its file is not Python.

    path: model.path, whose folder the message may name the family of
    """
    file = FOLDER / f"{name}.py"
    if name.isidentifier() and file.is_file():
        registry.check(f"model.family={name}", file, "load")
        return
    fits, one_of = _folder_of(path), f"one of {', '.join(known())}"
    if not name.isidentifier():
        raise UserError(
            f"model.family='{name}': is no family's name.{fits} Use {one_of}; a family of your own "
            "is a file models/NAME.py, called NAME."
        )
    raise UserError(
        f"model.family='{name}': no file models/{name}.py.{registry.nearest(name, known())}{fits} "
        f"Use {one_of}, or add models/{name}.py with a function load(settings, device) -> Policy."
    )


def _folder_of(path: str | None) -> str:
    """A sentence on what a folder holds; empty where there is no such folder."""
    index = None if path is None else read_json_or_none(Path(path) / "model_index.json")
    named = None if index is None else index.get("_class_name")
    if named is None:
        return ""
    return f" model.path holds a {named}, which {fitting(index or {}) or 'no family'} reads."


def fitting(index: Mapping[str, Any]) -> str | None:
    """The family of a folder with this model_index.json; None where none is.

    Of several families whose own pipeline it names, the one that trains the networks that it has.
    """
    named = index.get("_class_name")
    found = [name for name, own in pipelines().items() if own[0] == named]
    asked = {part for name in found for part in networks(name)}
    parts = {part for part in asked if index.get(part) not in (None, [None, None])}
    same = (name for name in found if set(networks(name)) == parts)
    return next(same, found[0] if found else None)


def family(name: str) -> Family:
    """The file models/NAME.py, imported with its libraries. Raises UserError where that fails."""
    check(name)
    remedy = "correct the file, or install what it imports."
    with blaming(f"model.family={name}", FOLDER / f"{name}.py", remedy):
        return cast(Family, importlib.import_module(f"{__name__}.{name}"))


def declared(name: str, constant: str, default: Any = registry.NOTHING) -> Any:
    """The value of a constant or function of models/NAME.py, without importing the file.

    Raises UserError for no such family, KeyError where the file lacks the constant and there is no
    default.
    """
    check(name)
    return registry.declared(FOLDER / f"{name}.py", constant, default)


def networks(name: str) -> tuple[str, ...]:
    """The parts of the folder that a family trains: its NETWORKS, or its one NETWORK."""
    found: tuple[str, ...] = declared(name, "NETWORKS", (declared(name, "NETWORK"),))
    return found


def reads_image(name: str) -> bool:
    """Whether a family's condition has a reference image in it, as its file declares."""
    return bool(declared(name, "READS_IMAGE", False))


def pipelines() -> dict[str, tuple[str, ...]]:
    """The diffusers pipelines whose folders each family reads, its own first."""
    return {name: declared(name, "PIPELINES") for name in known()}


def length_limits(name: str) -> dict[str, int]:
    """The family's constants MAX_..._TOKENS: how much of a prompt its text encoders see."""
    check(name)
    constants = sorted(registry.top_level(FOLDER / f"{name}.py"))
    limits = [one for one in constants if one.startswith("MAX_") and one.endswith("_TOKENS")]
    return {one: declared(name, one) for one in limits}
