"""Starting in a run folder: whose run it holds, what it runs on."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import fastgrpo
from fastgrpo import rewards
from fastgrpo.checkpoint import explosion, identity, provenance
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json, replace_text
from fastgrpo.data.prompt_files import content_hash
from fastgrpo.parallel.world import World

FREE_SECTIONS = ("checkpoint", "track", "server", "distributed")
FREE_TO_CHANGE = (
    "run.dir",
    "run.resume",
    "run.max_requeues",
    "run.preflight",
    "run.deterministic",
    "model.gradient_checkpointing",
    "model.keep",
    "model.decode_batch",
    "model.text_encoders",
    "prompts.train",  # what is in the files is compared, see check_same_inputs
    "prompts.heldout",
    "prompts.cache",
    "rollout.batch_size",
    "rollout.store",
    "optimizer.batch_size",
    "evaluate.clips",
    "evaluate.every",
    "evaluate.alarm",
    "evaluate.alarm_after",
    "evaluate.alarm_lr",
    "evaluate.alarm_returns",
    *(
        RECORDED := (
            "run.iterations",
            "optimizer.lr",
            "optimizer.schedule",
            "optimizer.warmup_updates",
            "optimizer.decay_updates",
            "evaluate.prompts",
            "evaluate.seeds",
        )
    ),
)
FREE_OF_REWARDS = ("file", "where", "urls", "device", "batch_size", "path")
"""Keys of a reward that move its scores to another place or pace, and change none.

Of `path` the weights themselves are compared, see `provenance.check_rewards`.
"""
MOVABLE = ("model.path", "model.network", "prompts.train", "prompts.heldout", ".path")
"""Ends of keys that name a place whose content is compared apart."""


def check_groups(recipe: Recipe, world: World) -> None:
    """Check that every group of ranks has a sample."""
    total = recipe.prompts.per_iteration * recipe.rollout.samples_per_prompt
    if total < world.groups:
        raise UserError(
            f"prompts.per_iteration={recipe.prompts.per_iteration}: {total} samples per iteration "
            f"for {world.groups} groups of ranks; raise it, rollout.samples_per_prompt or "
            "distributed.sp, or start fewer processes."
        )


def check_folder(recipe: Recipe, world: World) -> None:
    """Check, before anything is loaded or written, that a run in the folder is of this recipe."""
    check_groups(recipe, world)
    folder = recipe.run.dir
    if not holds_run(folder):
        return
    if recipe.run.resume == "never":
        raise UserError(
            f"run.dir={folder}: holds a run already; choose another folder or run.resume=auto."
        )
    explosion.check(recipe)
    identity.check(folder)
    _check_recipes(recipe)
    check_same_inputs(folder / "inputs.json", recipe)
    provenance.check_network(recipe)


def claim_folder(recipe: Recipe, world: World) -> list[str]:
    """As `check_folder`, after damaged files are made again. On the main rank, under the lock.

    returns a notice for each file
    """
    identity.check(recipe.run.dir)
    notices = identity.restore(recipe.run.dir)
    check_folder(recipe, world)
    return notices


def _check_recipes(recipe: Recipe) -> None:
    """Compare with the recipe in the folder, and with the one that the checkpoints carry.

    The folder's may be edited where a model or prompts were moved; their content is compared apart.
    """
    folder, found = recipe.run.dir, identity.newest_beginning(recipe.run.dir)
    carried = None if found is None else found[1].files.get(identity.RECIPE)
    if carried is not None:
        check_same_recipe(config.parse(tomllib.loads(carried)), recipe, MOVABLE)
    check_same_recipe(identity.recipe_of(folder), recipe)


def holds_run(folder: Path) -> bool:
    """Whether an iteration was finished there: an attempt that failed before binds nobody."""
    metrics = folder / "metrics.jsonl"  # empty from the moment at which a tracker opens it
    logged = metrics.is_file() and metrics.stat().st_size > 0
    saved = any(folder.glob("checkpoints/step-*")) or identity.newest_noted(folder) is not None
    return logged or saved


UNBEGUN = (
    "lock",
    "heartbeats",
    "recipe.toml",
    "inputs.json",
    "environment.json",
    "metrics.jsonl",
    "reward_server.log",
)
"""What a folder has of a run that failed before it trained or encoded anything."""


def remove_unbegun(folder: Path, found: bool) -> None:
    """Remove what a run that never began has made; nothing where there is more, such as conditions.

    found: whether the folder was there before, and stays
    """
    with contextlib.suppress(OSError):
        entries = list(folder.iterdir())
        if any(entry.name not in UNBEGUN or entry.is_symlink() for entry in entries):
            return
        for entry in entries:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if not found:
            folder.rmdir()


def prepare_folder(recipe: Recipe, world: World) -> list[str]:
    """Make the run's folder with recipe, inputs and environment. On the main rank only.

    returns a notice for each change of the recipe that decides what the run learns or says
    """
    folder = recipe.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    changes = _changes(recipe) if holds_run(folder) else []
    provenance.record_changes(folder, changes)
    replace_text(folder / "recipe.toml", recipe.to_toml())
    replace_text(folder / "inputs.json", json.dumps(inputs(recipe), indent=1) + "\n")
    replace_text(folder / "environment.json", json.dumps(environment(world), indent=1) + "\n")
    return [
        f"{change['key']}: {change['from']} -> {change['to']} from here on ({provenance.CHANGES})"
        for change in changes
    ]


def _changes(recipe: Recipe) -> list[dict[str, object]]:
    """The recorded keys that the recipe has otherwise than the one in the run's folder."""
    before, now = _flat(identity.recipe_of(recipe.run.dir)), _flat(recipe)
    newest = identity.newest_noted(recipe.run.dir)
    return [
        {"after": newest, "key": key, "from": before.get(key), "to": now.get(key)}
        for key in RECORDED
        if before.get(key) != now.get(key)
    ]


def check_same_recipe(old: Recipe, new: Recipe, but: Sequence[str] = ()) -> None:
    """Refuse to go on with a run whose result would belong to neither recipe.

    but: keys that may differ beside those that are free to change
    """
    before, now = _flat(old), _flat(new)
    exploded = explosion.noted(new.run.dir)
    after = {f"optimizer.{key}" for key in explosion.FREE} if exploded else set()
    differing = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not _is_free(key)
        and key not in after
        and not key.endswith(tuple(but))
    ]
    if differing:
        raise UserError(
            f"run.dir={new.run.dir}: holds a run of another recipe ({'; '.join(differing)}); "
            "choose another run.dir, or set them back. Where only a model's folder has moved, a link "
            "at its old place will do."
        )


def inputs(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files whose content the recipe does not show."""
    files = {"prompts.train": recipe.prompts.train, "prompts.heldout": recipe.prompts.heldout}
    return {key: content_hash(file, key) for key, file in files.items() if file is not None}


def check_same_inputs(file: Path, recipe: Recipe) -> None:
    """Refuse to resume on edited prompt files: the order or the held-out prompts would differ."""
    before = read_json(file, "run.dir", "restore it, or choose another run.dir")
    now = inputs(recipe)
    for key in ("prompts.train", "prompts.heldout"):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{key}: the file has changed since the run in {recipe.run.dir} began; restore it, "
                "or choose another run.dir."
            )


def _is_free(key: str) -> bool:
    """Whether a run may go on with another value of a key."""
    section, _, rest = key.partition(".")
    of_reward = section == "rewards" and rest.partition(".")[2] in FREE_OF_REWARDS
    return of_reward or section in FREE_SECTIONS or key in FREE_TO_CHANGE


def _flat(recipe: Recipe) -> dict[str, object]:
    """Value by key, as an override names it: "run.seed", "rewards.0.dtype".

    Of a reward's options those are left out that its file calls free: they change no score, such as
    a judge's address, or their files are compared by the reward's fingerprint.
    """
    tables: dict[str, dict[str, object]] = {}
    for section, content in recipe.model_dump(mode="json").items():
        if isinstance(content, list):
            tables |= {f"{section}.{n}": entry for n, entry in enumerate(content)}
        else:
            tables[section] = content
    for n, spec in enumerate(recipe.rewards):
        free = rewards.declared(spec, "FREE_OPTIONS", ())
        kept = {key: value for key, value in spec.options.items() if key not in free}
        tables[f"rewards.{n}"]["options"] = kept
    return {
        f"{table}.{key}": value for table, fields in tables.items() for key, value in fields.items()
    }


def environment(world: World) -> dict[str, object]:
    """Versions and hardware, for the report."""
    import diffusers
    import transformers

    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "cores": os.cpu_count(),
        "ranks": world.size,
        "threads per rank": torch.get_num_threads(),
        "fastgrpo": fastgrpo.__version__,
        "commit": commit(Path(fastgrpo.__file__).resolve().parents[1]) or "unknown",
    }


def commit(root: Path) -> str:
    """The commit of the code that runs; empty where it is not known.

    root: the folder that holds the package. Installed inside another repository, as in an
    environment of the user's project, git would answer with that one's commit.
    """
    if not (root / ".git").exists():
        return _installed_commit()
    here = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            env=here,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git, as in many containers
        return ""
    return asked.stdout.strip()


def _installed_commit() -> str:
    """The commit that pip noted where it installed the package from a repository."""
    try:
        noted = metadata.distribution("fastgrpo").read_text("direct_url.json")
        return str(json.loads(noted or "{}")["vcs_info"]["commit_id"])[:7]
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return ""
