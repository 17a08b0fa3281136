"""The cache of conditions: each prompt goes through the text encoders once, also over resumptions.

The cache is a folder of `manifest.json`, the conditions' fingerprint; `part-00000.safetensors` and
so on, PART prompts each, published as a whole and never changed; and `negative.safetensors`, the
condition of the unconditional branch. Beside each lies its hash in the format of sha256sum: what
does not fit it is made anew. Parts are always encoded as a whole, so that neither the
number of ranks nor a resumption changes a bit. Conditions are read from the parts on demand: a
large cache never lies in memory.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
from fastgrpo.core.files import replace_bytes, replace_text
from fastgrpo.core.policy import Condition, Encoder, Prompt
from fastgrpo.models.text_encoders.passes import joined
from fastgrpo.run.file_hashes import hashes

FORMAT = 1  # of the folder
PART = 64  # prompts per file: at most 256 MiB of a 512-token T5 in bfloat16


@dataclass(frozen=True)
class Cache:
    """A folder of conditions and their fingerprint."""

    folder: Path
    fingerprint: Mapping[str, str]  # what the conditions are made of, by name; all is compared
    count: int  # prompts, encoded or skipped

    @property
    def key(self) -> str:
        """The fingerprint as one hash, which every file of the cache carries."""
        return hashlib.sha256(json.dumps(sorted(self.fingerprint.items())).encode()).hexdigest()

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-self.count // PART)

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:05d}.safetensors"

    @property
    def negative(self) -> Path:
        """The file of the unconditional branch's condition."""
        return self.folder / "negative.safetensors"

    @property
    def manifest(self) -> Path:
        """The file of the fingerprint."""
        return self.folder / "manifest.json"

    def prompts_of(self, number: int) -> range:
        """The indices of the prompts of a part."""
        return range(number * PART, min((number + 1) * PART, self.count))

    def complete(self, with_negative: bool) -> bool:
        """Whether no part is missing.

        Raises UserError, naming the difference, for a folder of other conditions.
        """
        if not self.manifest.exists():
            return False
        self._check()
        return not self.missing() and (not with_negative or self.intact([self.negative])[0])

    def open(self) -> list[int]:
        """Claim the folder for these conditions.  returns the parts that are missing

        Raises UserError, naming the difference, for a folder of other conditions.
        """
        if self.manifest.exists():
            self._check()
        else:
            content = {
                "format": FORMAT,
                "prompts": self.count,
                "fingerprint": dict(self.fingerprint),
            }
            replace_text(self.manifest, json.dumps(content, indent=1) + "\n", on_disk=True)
        for leftover in self.folder.glob("*.partial"):  # of a killed process
            leftover.unlink()
        return self.missing()

    def cut(self, number: int) -> dict[int, Mapping[str, Sequence[int]]]:
        """Index of a part's prompt that an encoder cuts -> (tokens seen, tokens) by encoder."""
        return {int(index): seen for index, seen in _about(self.part(number)).cut.items()}

    def cut_negative(self) -> Mapping[str, Sequence[int]]:
        """The encoders that cut the unconditional branch's text, as in `cut`."""
        return _about(self.negative).cut.get("negative", {})

    def missing(self) -> list[int]:
        """The parts that are missing, damaged, or of other conditions."""
        intact = self.intact([self.part(number) for number in range(self.parts)])
        return [number for number, whole in enumerate(intact) if not whole]

    def wrong(self) -> list[str]:
        """The names of files that are there, and are not what was written for these conditions."""
        files = [self.negative, *(self.part(number) for number in range(self.parts))]
        there = [file for file in files if file.exists()]
        return [
            file.name for file, whole in zip(there, self.intact(there), strict=True) if not whole
        ]

    def intact(self, files: Sequence[Path]) -> list[bool]:
        """Whether each file is of these conditions, and is what was written."""
        ours = [file for file in files if file.is_file() and _about(file).key == self.key]
        digests = hashes(ours, self.folder / "hashes.json")
        return [file in digests and _noted(file) == _note(file, digests[file]) for file in files]

    def _check(self) -> None:
        """Raise UserError where the manifest is damaged or has another fingerprint."""
        remedy = "remove that folder, or set prompts.cache to another"
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            known, stored = content["format"] == FORMAT, dict(content["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"prompts.cache={self.folder}: its manifest.json is damaged; {remedy}.",
            ) from None
        names = dict.fromkeys([*self.fingerprint, *stored])
        differing = [name for name in names if self.fingerprint.get(name) != stored.get(name)]
        if not known:
            differing = [f"format {content['format']} (of another version of fastgrpo)"]
        if differing:
            raise UserError(
                f"prompts.cache={self.folder}: its conditions differ from this recipe's in "
                f"{', '.join(differing)}; {remedy}."
            )


class Conditions(Sequence[Condition]):
    """Conditions by number, read from the cache on demand in the stored precision."""

    def __init__(self, cache: Cache, with_negative: bool) -> None:
        self.cache = cache
        # of the unconditional branch
        self.negative = _read(cache.negative, "") if with_negative else None
        self.skipped: dict[int, str] = {}  # index among all prompts -> its problem
        for number in range(cache.parts):
            skipped = _about(cache.part(number)).skipped
            self.skipped |= {int(index): problem for index, problem in skipped.items()}
        self.indices = [index for index in range(cache.count) if index not in self.skipped]

    def leave_out(self, problems: Mapping[int, str]) -> None:
        """Skip more of the prompts.  problems: index among all prompts -> its problem"""
        self.skipped |= problems
        self.indices = [index for index in self.indices if index not in problems]

    def part(self, numbers: slice) -> "Conditions":
        """A consecutive part of the conditions, also read on demand."""
        part = copy(self)
        part.indices = self.indices[numbers]
        return part

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, number: int) -> Condition: ...
    @overload
    def __getitem__(self, number: slice) -> list[Condition]: ...
    def __getitem__(self, number: int | slice) -> Condition | list[Condition]:
        if isinstance(number, slice):
            return [self[single] for single in range(len(self))[number]]
        index = self.indices[number]
        return _read(self.cache.part(index // PART), f"{index}.")


@dataclass(frozen=True)
class Step:
    """One pass of an encoder over a cache's parts."""

    encoder: Encoder
    run: Callable[[Sequence[Prompt]], list[Condition]]  # of the pass
    first: bool
    last: bool


def write_part(
    cache: Cache,
    number: int,
    step: Step,
    prompts: Sequence[Prompt],
    recipe: Recipe,
) -> None:
    """Send one part's prompts through a pass; after the last one the part is published.

    Until then what is known of them waits in a file of its own, which a new start removes.

    prompts: all prompts of the cache
    Raises UserError, with file and row, for a prompt that cannot be encoded, unless
    prompts.bad_rows=skip.
    """
    waiting = cache.part(number).with_suffix(".passes.partial")
    known = {} if step.first else _waiting(waiting, cache.prompts_of(number))
    indices = cache.prompts_of(number) if step.first else known
    skip = recipe.prompts.bad_rows == "skip"
    found, problems = _encode(step.run, {index: prompts[index] for index in indices}, skip)
    features = {index: {**known.get(index, {}), **own} for index, own in found.items()}
    skipped = {} if step.first else dict(_about(waiting).skipped)
    skipped |= {str(index): why for index, why in problems.items()}
    if not step.last:
        about = _About(key=cache.key, skipped=skipped)
        waiting.write_bytes(_content(_named(features), recipe.model.dtype, about))
        return
    conditions = {index: joined(step.encoder, own) for index, own in features.items()}
    cut = {str(index): step.encoder.cut(prompts[index].text) for index in conditions}
    seen = {index: own for index, own in cut.items() if own}
    about = _About(key=cache.key, skipped=skipped, cut=seen)
    _write(cache.part(number), _named(conditions), recipe.model.dtype, about)
    waiting.unlink(missing_ok=True)


def _named(conditions: Mapping[int, Condition]) -> dict[str, Tensor]:
    """A part's tensors, of any shapes [...], by the names that they have in a file."""
    return {
        f"{index}.{name}": tensor
        for index, condition in conditions.items()
        for name, tensor in condition.items()
    }


def _waiting(file: Path, indices: Sequence[int]) -> dict[int, Condition]:
    """What earlier passes found of a part's prompts, without those that they left out."""
    left_out = _about(file).skipped
    return {index: _read(file, f"{index}.") for index in indices if str(index) not in left_out}


def write_negative(cache: Cache, encoder: Encoder, condition: Condition, recipe: Recipe) -> None:
    """Publish the condition of the unconditional branch."""
    text = recipe.model.negative_prompt or ""
    cut = {"negative": seen} if (seen := encoder.cut(text)) else {}
    _write(cache.negative, condition, recipe.model.dtype, _About(key=cache.key, cut=cut))


def _encode(
    encoder: Callable[[Sequence[Prompt]], list[Condition]],
    prompts: Mapping[int, Prompt],
    skip: bool,
) -> tuple[dict[int, Condition], dict[int, str]]:
    """(conditions by index, problems by index of the prompts without a condition)."""
    try:
        return dict(zip(prompts, encoder(list(prompts.values())), strict=True)), {}
    except UserError as error:
        whole = error  # of at least one prompt, which shows when each is encoded alone
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


@dataclass(frozen=True)
class _About:
    """The metadata of a file of the cache."""

    key: str = ""  # of the cache that the file belongs to
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Index of a prompt -> why it has no condition."""
    cut: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    """Index of a prompt, or "negative" -> (tokens seen, tokens) by encoder, of those it is cut by."""


def _about(file: Path) -> _About:
    """The metadata of a file of the cache; empty for a missing or damaged file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return _About(**json.loads((tensors.metadata() or {}).get("about", "{}")))
    except (OSError, SafetensorError, ValueError, TypeError):
        return _About()


def _hash_file(file: Path) -> Path:
    """The file beside a file of the cache that holds its hash."""
    return file.with_suffix(".sha256")


def _note(file: Path, digest: str) -> str:
    """The line that `sha256sum --check` reads; with the name, so that it fits this file alone."""
    return f"{digest}  {file.name}\n"


def _noted(file: Path) -> str | None:
    """The line beside a file of the cache; None where there is none."""
    try:
        return _hash_file(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _content(tensors: Mapping[str, Tensor], dtype: str, about: _About) -> bytes:
    """A file of tensors of any shapes [...], the floating-point ones in the compute precision."""
    stored = {}
    for name, tensor in tensors.items():
        kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
        # copied, for the format takes no two slices of one batch's memory
        stored[name] = torch.empty(tensor.shape, dtype=kind).copy_(tensor.detach())
    # one entry of metadata: several would be written in another order each time
    return save(stored, {"about": json.dumps(vars(about))})


def _write(file: Path, tensors: Mapping[str, Tensor], dtype: str, about: _About) -> None:
    """Publish tensors of any shapes [...]."""
    content = _content(tensors, dtype, about)
    digest = hashlib.sha256(content).hexdigest()
    # the hash first: a kill in between leaves a part that is missing, and never one without a hash
    replace_text(_hash_file(file), _note(file, digest), on_disk=True)
    replace_bytes(file, content, on_disk=True)


def _read(file: Path, prefix: str) -> Condition:
    """A file's tensors whose names start with a prefix, named without it; mapped, not copied."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"prompts.cache={file.parent}: {file.name} cannot be read ({error}); remove that file "
            "and start again: it is made anew."
        ) from None
