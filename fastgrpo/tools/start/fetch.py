"""Everything that a recipe needs from hubs: what it is, how large, under which licence, and where it
goes; then the download itself, by the hub's own client, which goes on where it was interrupted.

Each file is compared with the hash that the hub has of it. What lies elsewhere than on a hub is
listed with its address.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.core.reward import Download
from fastgrpo.models.loading.source import FETCHED, chosen

GB = 1e9


@dataclass(frozen=True)
class Need:
    """Files of one repository that a key of the recipe names."""

    key: str
    repository: str  # of a hub, NAME or NAME@REVISION; or an address from which it is got by hand
    files: tuple[str, ...]  # patterns; of a model's folder those of its families
    target: Path | None  # the folder that they go into; None: the hub's cache
    whole_model: bool = False
    variant: str | None = None  # of a whole model's weights

    @property
    def by_hand(self) -> bool:
        """Whether no hub has it."""
        return "://" in self.repository


@dataclass(frozen=True)
class Listed:
    """What a hub says of a need."""

    need: Need
    files: dict[str, Any]  # name -> the hub's entry
    licence: str
    gated: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size or 0 for entry in self.files.values())

    def line(self) -> str:
        """The need for a person."""
        gate = ", gated: accept its terms there" if self.gated else ""
        where = self.need.target or "the hub's cache"
        return (
            f"{self.need.key}: {self.need.repository}, {len(self.files)} file"
            f"{'s' * (len(self.files) > 1)}, "
            f"{self.size / GB:,.2f} GB, licence {self.licence}{gate} -> {where}"
        )


def needs(recipe: Recipe) -> list[Need]:
    """What the recipe names and this machine would take from elsewhere, each once."""
    found: list[Need] = []
    model = recipe.model
    for key, name in (("model.path", model.source), ("model.network", model.network)):
        if name is not None and not Path(name).exists() and paths.is_hub_id(name):
            found.append(Need(key, name, FETCHED, None, whole_model=True, variant=model.variant))
    for number, spec in enumerate(recipe.rewards):
        if not (spec.where == "server" and (spec.urls or recipe.server.urls)):
            found += _of_reward(spec, f"rewards.{number}")
    return list({(one.repository, one.files, one.target): one for one in found}.values())


def _of_reward(spec: RewardSpec, where: str) -> Iterator[Need]:
    """The downloads that a reward's file declares, as far as they are not here."""
    declared: dict[str, Download] = rewards.declared(spec, "DOWNLOADS", {})
    for key, download in declared.items():
        value = spec.path if key == "path" else spec.options.get(key.removeprefix("options."))
        text = None if value is None else str(value)
        if text is None and (download.by_hand or key == "path"):
            continue  # the reward says so itself, or goes without
        if text is None or (paths.is_hub_id(text) and not Path(text).exists()):
            yield Need(f"{where}.{key}", text or download.repository, download.files, None)
        elif not Path(text).exists():
            target = Path(text)
            one_file = target.name in download.files
            files = (target.name,) if one_file else download.files
            folder = target.parent if one_file else target
            yield Need(f"{where}.{key}", download.repository, files, folder)


def look_up(need: Need, api: HfApi) -> Listed:
    """What a hub says of a need. Raises UserError where it has none of it, or does not show it."""
    name, revision = paths.hub_name(need.repository)
    try:
        info = api.model_info(name, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise UserError(_gate(need)) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{need.key}={need.repository}: no hub repository of that name that this machine may "
            "see; correct it, or set HF_TOKEN where it is private."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(_unreachable(need, error)) from None
    entries = {entry.rfilename: entry for entry in info.siblings or []}
    files = {name: entries[name] for name in _chosen(need, list(entries))}
    if not files:
        raise UserError(
            f"{need.key}={need.repository}: has no {' or '.join(need.files)}; correct the name."
        )
    card = getattr(info, "card_data", None) or {}
    licence = str(card.get("license") or "not stated")
    return Listed(need, files, licence, bool(info.gated))


def _chosen(need: Need, names: Sequence[str]) -> list[str]:
    """The files of a repository that are read.

    Raises UserError for a model whose weights are not there in a form that is read.
    """
    if not need.whole_model:
        return [name for name in names if any(fnmatch(name, one) for one in need.files)]
    found = chosen(names, need.variant)
    where = f"{need.key}={need.repository}"
    if need.variant is not None and not any(f".{need.variant}" in name for name in found):
        raise UserError(
            f"model.variant={need.variant}: {where} has no weights of it; leave it out."
        )
    parts = {name.rpartition("/")[0] for name in found if name.endswith("/config.json")}
    read = {name.rpartition("/")[0] for name in found if name.endswith(".safetensors")}
    pickled = {name.rpartition("/")[0] for name in names if name.endswith(".bin")}
    if alone := sorted((parts & pickled) - read):
        raise UserError(
            f"{where}: has its weights of {alone[0]} only as .bin, pickles, which are not read; "
            "name a revision that has .safetensors, such as refs/pr/1, in model.revision."
        )
    return found


def check_room(listed: Sequence[Listed]) -> None:
    """Raise UserError where the files do not fit where they go."""
    wanted: dict[Path, int] = {}
    for one in listed:
        folder = one.need.target or Path(constants.HF_HUB_CACHE)
        there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
        wanted[there] = wanted.get(there, 0) + one.size
    for folder, size in wanted.items():
        if (free := shutil.disk_usage(folder).free) < size:
            raise UserError(
                f"{folder}: {free / GB:,.2f} GB are free there, and {size / GB:,.2f} GB are to be "
                "fetched; make room, or set HF_HOME to another disk."
            )


def fetch(listed: Listed) -> Path:
    """Download the files of a need, or what is missing of them, and compare their hashes.

    returns the folder. Raises UserError for a gate, a hub that is gone and a damaged file, which is
    removed.
    """
    need = listed.need
    name, revision = paths.hub_name(need.repository)
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, local_dir=need.target, allow_patterns=list(listed.files)
            )
        )
    except GatedRepoError:
        raise UserError(_gate(need)) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(_unreachable(need, error)) from None
    for file, entry in listed.files.items():
        if not _is_whole(folder / file, entry):
            (folder / file).resolve().unlink(missing_ok=True)
            (folder / file).unlink(missing_ok=True)
            raise UserError(
                f"{need.key}={need.repository}: {file} is not what the hub has of it, and was "
                "removed; start again."
            )
    return folder


def _is_whole(file: Path, entry: Any) -> bool:
    """Whether a file has the hub's hash: SHA-256 of a large file, git's own of a small one."""
    if not file.is_file() or (entry.size is not None and file.stat().st_size != entry.size):
        return False
    if entry.lfs is not None:
        return sha256(file) == entry.lfs.sha256
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return entry.blob_id is None or blob == entry.blob_id


def _gate(need: Need) -> str:
    name, _ = paths.hub_name(need.repository)
    return (
        f"{need.key}={need.repository}: gated; accept its terms at {constants.ENDPOINT}/{name} and "
        "set HF_TOKEN to a token of that account."
    )


def _unreachable(need: Need, error: Exception) -> str:
    problem = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"{need.key}={need.repository}: could not be fetched ({problem[:120]}); start again where "
        "the hub is in reach, and it goes on where it was."
    )
