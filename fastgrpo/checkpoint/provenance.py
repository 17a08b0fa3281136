"""What a recipe cannot show of a run: which weights the network began with, and which rewards score it.

Noted in the run's folder before its first iteration, so that a resumed run, which reads both anew, cannot go on with
others under the same paths and addresses. Large files are hashed once and remembered with their size and time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo import models
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json, replace_text
from fastgrpo.models.loading import diffusers_folder, weight_files
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.run.file_hashes import hashes
from fastgrpo.training.scoring.sources import Source

FILE = "provenance.json"
HASHES = "hashes.json"


def record_provenance(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Note what a run begins with. On the main rank only; reads the network's files where their hashes are not known.

    The file: {"network": {file: SHA-256}, "rewards": {name: {"fingerprint": ..., "identity": ...}}}
    """
    content = {"network": network(recipe), "rewards": rewards(sources)}
    replace_text(recipe.run.dir / FILE, json.dumps(content, indent=1) + "\n")


def network(recipe: Recipe) -> dict[str, str]:
    """File -> SHA-256, of the config and the weights of the network that is trained, also beneath adapters."""
    where = diffusers_folder.network_folder(recipe.model, models.declared(recipe.model.family, "NETWORK"))
    files = {where / "config.json"} | {place.file for place in weight_files.tensors(where).values()}
    return {file.name: digest for file, digest in hashes(sorted(files), recipe.run.dir / HASHES).items()}


def rewards(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Reward -> its fingerprint, of weights and settings, and its identity, of code and libraries too; see served.py.

    The same in the trainer's process and behind a server.
    """
    found: dict[str, dict[str, str]] = {}
    for source in sources:
        if isinstance(source, ScorerInProcess):
            held = source.served.items()
            found |= {name: {"fingerprint": one.fingerprint, "identity": one.identity} for name, one in held}
        else:
            assert isinstance(source, RewardClient)
            for name in source.names:
                told = source.spec_of(name)
                found[name] = {"fingerprint": str(told.get("fingerprint", "")), "identity": str(told["identity"])}
    return found


def check_network(recipe: Recipe) -> None:
    """Refuse to resume over another base: adapters belong to it, and the KL term measures from it."""
    before = _recorded(recipe.run.dir).get("network")
    if before is None:
        return
    now = network(recipe)
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if differing:
        key = "model.path" if recipe.model.network is None else "model.network"
        raise UserError(
            f"{key}={recipe.model.network or recipe.model.path}: the network's {differing[0]} is not the one that the "
            f"run in {recipe.run.dir} began with; restore it, or choose another run.dir."
        )


def check_rewards(run: Path, sources: Sequence[Source]) -> list[str]:
    """Refuse to resume with a reward of other weights.  returns what to tell of those whose code alone is another

    run: the folder of a run that has finished an iteration
    """
    before, notices = _recorded(run).get("rewards", {}), []
    for name, now in rewards(sources).items():
        known = before.get(name, now)
        if now["fingerprint"] != known["fingerprint"]:
            raise UserError(
                f"rewards.name={name}: its weights or settings are not those that scored the run in {run} so far; "
                "restore them (on its servers, too), or choose another run.dir."
            )
        if now["identity"] != known["identity"]:
            notices.append(
                f"reward {name}: its code or a library (torch, transformers, pillow) is another than when the run "
                f"began; its scores may have moved ({run / FILE})"
            )
    return notices


def _recorded(run: Path) -> dict[str, Any]:
    """What was noted; nothing where no run got that far."""
    file = run / FILE
    return read_json(file, "run.dir", "restore it, or choose another run.dir") if file.exists() else {}
