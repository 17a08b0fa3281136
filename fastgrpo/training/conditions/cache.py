"""The cache of conditions: each prompt goes through the text encoders once, whatever ends and resumes in between.

A folder with `manifest.json`, which says what the conditions were made of; `part-00000.safetensors` and so on, PART
prompts each, published as a whole and never changed; and `negative.safetensors`, the condition of the unconditional
branch. Parts are always encoded as a whole, so that neither the number of ranks nor a resumption changes a bit.
Conditions are read from the parts on demand: a large cache never lies in memory.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Encoder, Prompt

FORMAT = 1  # of the folder
PART = 64  # prompts per file: at most 256 MiB of a 512-token T5 in bfloat16


@dataclass(frozen=True)
class Cache:
    """A folder of conditions, and what they are made of: names and values that are all compared."""

    folder: Path
    fingerprint: Mapping[str, str]
    count: int  # prompts, encoded or skipped

    @property
    def key(self) -> str:
        """The fingerprint as one hash, which every file of the cache carries."""
        return hashlib.sha256(json.dumps(sorted(self.fingerprint.items())).encode()).hexdigest()

    @property
    def parts(self) -> int:
        return -(-self.count // PART)

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    @property
    def negative(self) -> Path:
        return self.folder / "negative.safetensors"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def prompts_of(self, number: int) -> range:
        """The indices of the prompts of a part."""
        return range(number * PART, min((number + 1) * PART, self.count))

    def complete(self, with_negative: bool) -> bool:
        """Whether everything is there. Raises UserError, naming what differs, for a folder of other conditions."""
        if not self.manifest.exists():
            return False
        self._check()
        return not self.missing() and (not with_negative or _told(self.negative).key == self.key)

    def open(self) -> list[int]:
        """Claim the folder for these conditions.  returns the parts that are still to be made

        Raises UserError, naming what differs, for a folder of other conditions.
        """
        if self.manifest.exists():
            self._check()
        else:
            content = {"format": FORMAT, "prompts": self.count, "fingerprint": dict(self.fingerprint)}
            _publish(self.manifest, (json.dumps(content, indent=1) + "\n").encode())
        return self.missing()

    def missing(self) -> list[int]:
        """The parts that are not there, damaged, or of other conditions."""
        return [number for number in range(self.parts) if _told(self.part(number)).key != self.key]

    def _check(self) -> None:
        remedy = "remove that folder, or set prompts.cache to another"
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            known, there = content["format"] == FORMAT, dict(content["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"prompts.cache={self.folder}: its manifest.json is damaged; {remedy}.") from None
        names = dict.fromkeys([*self.fingerprint, *there])
        differing = [name for name in names if self.fingerprint.get(name) != there.get(name)]
        if not known:
            differing = [f"format {content['format']} (of another version of fastgrpo)"]
        if differing:
            raise UserError(
                f"prompts.cache={self.folder}: its conditions differ from this recipe's in {', '.join(differing)}; "
                f"{remedy}."
            )


class Conditions(Sequence[Condition]):
    """Conditions by number, each read when it is asked for, in the precision in which it is stored."""

    def __init__(self, cache: Cache, with_negative: bool) -> None:
        self.cache = cache
        self.negative = _read(cache.negative, "") if with_negative else None  # the unconditional branch's
        self.skipped: dict[int, str] = {}  # number among all prompts -> what was wrong with it
        for number in range(cache.parts):
            self.skipped |= {int(index): told for index, told in _told(cache.part(number)).skipped.items()}
        self.kept = [index for index in range(cache.count) if index not in self.skipped]

    def part(self, numbers: slice) -> "Conditions":
        """A consecutive part of them, which is read on demand as well."""
        part = copy(self)
        part.kept = self.kept[numbers]
        return part

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, number: int) -> Condition: ...
    @overload
    def __getitem__(self, number: slice) -> list[Condition]: ...
    def __getitem__(self, number: int | slice) -> Condition | list[Condition]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        index = self.kept[number]
        return _read(self.cache.part(index // PART), f"{index}.")


def write_part(cache: Cache, number: int, encoder: Encoder, prompts: Sequence[Prompt], recipe: Recipe) -> None:
    """Encode one part's prompts (of all prompts of the cache) and publish it.

    Raises UserError, with file and row, for a prompt that cannot be encoded, unless prompts.bad_rows=skip.
    """
    skip = recipe.prompts.bad_rows == "skip"
    indices = cache.prompts_of(number)
    conditions, skipped = _encode(encoder, {index: prompts[index] for index in indices}, skip)
    tensors = {f"{i}.{name}": tensor for i, condition in conditions.items() for name, tensor in condition.items()}
    _write(cache.part(number), tensors, cache, recipe.model.dtype, skipped)


def write_negative(cache: Cache, encoder: Encoder, recipe: Recipe) -> None:
    """Encode and publish the condition of the unconditional branch, unless it is there."""
    if _told(cache.negative).key != cache.key:
        condition = encoder.negative(recipe.model.negative_prompt or "")
        _write(cache.negative, condition, cache, recipe.model.dtype, {})


def _encode(encoder: Encoder, prompts: Mapping[int, Prompt], skip: bool) -> tuple[dict[int, Condition], dict[int, str]]:
    """Conditions by index, and what was wrong with the prompts that have none."""
    try:
        return dict(zip(prompts, encoder(list(prompts.values())), strict=True)), {}
    except UserError as error:
        whole = error  # of one prompt at least; which one shows when each goes alone
    conditions: dict[int, Condition] = {}
    skipped: dict[int, str] = {}
    for index, prompt in prompts.items():
        try:
            conditions[index] = encoder([prompt])[0]
        except UserError as error:
            problem = f"{prompt.place}: {error}" if prompt.place else str(error)
            if not skip:
                raise UserError(f"{problem} Or set prompts.bad_rows=skip.") from None
            skipped[index] = problem
    if len(skipped) == PART:
        raise whole  # no row's fault
    return conditions, skipped


def _write(file: Path, tensors: Mapping[str, Tensor], cache: Cache, dtype: str, skipped: Mapping[int, str]) -> None:
    """Publish tensors, the floating-point ones in the network's compute precision."""
    stored = {}
    for name, tensor in tensors.items():
        kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
        # copied, for the format takes no two slices of one batch's memory
        stored[name] = torch.empty(tensor.shape, dtype=kind).copy_(tensor.detach())
    # one entry of metadata: several would be written in another order each time
    _publish(file, save(stored, {"about": json.dumps({"key": cache.key, "skipped": skipped})}))


def _publish(file: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the whole of it or nothing under its name."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _About:
    """What a file of the cache says of itself."""

    key: str = ""  # of the cache that it belongs to
    skipped: Mapping[str, str] = field(default_factory=dict)  # index of a prompt -> why it has no condition


def _told(file: Path) -> _About:
    """Read from a file of the cache; that of no cache for a missing or damaged one."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return _About(**json.loads((tensors.metadata() or {}).get("about", "{}")))
    except (OSError, SafetensorError):
        return _About()


def _read(file: Path, prefix: str) -> Condition:
    """The tensors of a file whose names start with the prefix, without it; mapped from the file, not copied."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"prompts.cache={file.parent}: {file.name} cannot be read ({error}); remove that file and start again: it "
            "is made anew."
        ) from None
