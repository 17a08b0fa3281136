"""The part of a run that its recipe cannot show: the network's first weights, its rewards, and what
was changed on the way.

Noted in the run's folder before its first iteration, so that a resumed run, which reads both anew,
cannot go on with others under the same paths and addresses. Large files are hashed once and
remembered with their size and time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo import models
from fastgrpo.checkpoint import reader
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json, replace_text, sha256
from fastgrpo.models.loading import diffusers_folder, weight_files
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.run.file_hashes import hashes
from fastgrpo.training.scoring.sources import Source

FILE = "provenance.json"
HASHES = "hashes.json"
CHANGES = "changes.jsonl"
"""A line for each key that a resumed run has otherwise than before: {"after": checkpoint, "key",
"from", "to"}."""


def record_provenance(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Note the network and the rewards that a run begins with. On the main rank only.

    Reads the network's files where their hashes are not known.
    The file: {"model": {"path", "network", "revision", "variant", "commit"}, each where there is one,
    "network": {file: SHA-256}, "rewards": {name: {"fingerprint": ..., "identity": ...}}}, and with
    run.start_from "start": {"checkpoint": path, "manifest": SHA-256}
    """
    content: dict[str, Any] = {
        "model": model(recipe),
        "network": network(recipe),
        "rewards": rewards(sources),
    }
    if (start := start_of(recipe)) is not None:
        content["start"] = {"checkpoint": str(start), "manifest": _manifest_hash(start)}
    replace_text(recipe.run.dir / FILE, json.dumps(content, indent=1) + "\n")


def record_changes(run: Path, changes: Sequence[Mapping[str, object]]) -> None:
    """Add lines to the run's CHANGES. On the main rank only."""
    if changes:
        with (run / CHANGES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(change) + "\n" for change in changes)


def start_of(recipe: Recipe) -> Path | None:
    """The checkpoint whose weights a run begins with; None: it begins with those of model.path.

    The one that the run's folder notes, so that a start from a run's newest one stays what it was.
    Raises UserError where run.start_from has no whole checkpoint, or another than it was.
    """
    if recipe.run.start_from is None:
        return None
    noted = _recorded(recipe.run.dir).get("start")
    found = Path(noted["checkpoint"]) if noted else recipe.run.start_from
    try:
        if not (found / "manifest.json").is_file():
            found = reader.find(found, "newest")
        reader.check_intact(found)
    except UserError as error:
        raise UserError(f"run.start_from={recipe.run.start_from}: {error}") from None
    if noted and noted["manifest"] != _manifest_hash(found):
        raise UserError(
            f"run.start_from={recipe.run.start_from}: {found} is not the checkpoint that the run in "
            f"{recipe.run.dir} began with; restore it, or choose another run.dir."
        )
    return found


def _manifest_hash(checkpoint: Path) -> str:
    """SHA-256 of what names the hashes of all of a checkpoint's files."""
    return sha256(checkpoint / "manifest.json")


def model(recipe: Recipe) -> dict[str, str]:
    """Where the model's files were taken from; of a hub the commit, too, which a branch may leave."""
    settings = recipe.model
    named = {key: getattr(settings, key) for key in ("path", "network", "revision", "variant")}
    folder = diffusers_folder.pipeline_folder(settings, ())
    if folder.parent.name == "snapshots":
        named["commit"] = folder.name
    return {key: value for key, value in named.items() if value is not None}


def network(recipe: Recipe) -> dict[str, str]:
    """File -> SHA-256, for config and weights of the trained networks, also beneath adapters.

    A file of several networks is named with its folder's.
    """
    parts, files = models.networks(recipe.model.family), dict[Path, str]()
    for part in parts:
        where = diffusers_folder.network_folder(recipe.model, part)
        own = {where / "config.json"} | {one.file for one in weight_files.tensors(where).values()}
        files |= {file: f"{part}/{file.name}" if len(parts) > 1 else file.name for file in own}
    found = hashes(sorted(files), recipe.run.dir / HASHES)
    return {files[file]: digest for file, digest in found.items()}


def rewards(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Reward -> its fingerprint, of weights and settings, and its identity, also of code.

    The same in the trainer's process and behind a server; see serving/loaded_reward.py.
    """
    identities: dict[str, dict[str, str]] = {}
    for source in sources:
        if isinstance(source, ScorerInProcess):
            loaded = source.served.items()
            identities |= {
                name: {"fingerprint": reward.fingerprint, "identity": reward.identity}
                for name, reward in loaded
            }
        else:
            assert isinstance(source, RewardClient)
            for name in source.names:
                entry = source.spec_of(name)
                identities[name] = {
                    "fingerprint": str(entry.get("fingerprint", "")),
                    "identity": str(entry["identity"]),
                }
    return identities


def check_network(recipe: Recipe) -> None:
    """Refuse to resume over another base network.

    Adapters belong to the base network, and the KL term measures from the base network.
    """
    before = _recorded(recipe.run.dir).get("network")
    if before is None:
        return
    now = network(recipe)
    differing = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if differing:
        key = "model.path" if recipe.model.network is None else "model.network"
        raise UserError(
            f"{key}={recipe.model.network or recipe.model.path}: the network's {differing[0]} is "
            f"not the one that the run in {recipe.run.dir} began with; restore it, or choose "
            "another run.dir."
        )


def check_rewards(run: Path, sources: Sequence[Source]) -> list[str]:
    """Refuse to resume with a reward of other weights.

    run: the folder of a run that has finished an iteration
    returns a notice for each reward whose code alone has changed
    """
    before, notices = _recorded(run).get("rewards", {}), []
    for name, now in rewards(sources).items():
        known = before.get(name, now)
        if now["fingerprint"] != known["fingerprint"]:
            raise UserError(
                f"rewards.name={name}: its weights or settings are not those that scored the run "
                f"in {run} so far; restore them (on its servers, too), or choose another run.dir."
            )
        if now["identity"] != known["identity"]:
            notices.append(
                f"reward {name}: its code or a library (torch, transformers, pillow) is another "
                f"than when the run began; its scores may have moved ({run / FILE})"
            )
    return notices


def _recorded(run: Path) -> dict[str, Any]:
    """The record of a run; empty where no run got that far."""
    file = run / FILE
    if not file.exists():
        return {}
    return read_json(file, "run.dir", "restore it, or choose another run.dir")
