"""Where a recipe's model lies: a folder, or the local copy of a hub repository at a revision.

Which variant of its weights is read (`model.variant`, such as "fp16") is known to the folder, so
that it holds for all that is read of it: network, VAE and text encoders.
"""

import inspect
import typing
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PosixPath
from typing import Any, Self

from fastgrpo.core.config import Model, paths
from fastgrpo.core.errors import UserError

# of a hub repository: all folders, and of its top what a family or an export reads, no whole-model
# files
FETCHED = (
    "*/*",
    "*.json",
    "*.md",
    "*.txt",
    "*.toml",
    "LICENSE*",
    "NOTICE*",
    "diffusion_pytorch_model*",
    "pytorch_lora_weights*",
)
NOT_FETCHED = (  # other formats, which no family reads
    "*.bin",
    "*.bin.index.*json",
    "*.msgpack",
    "*.h5",
    "*.ckpt",
    "*.pb",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*openvino*",
)
VARIANTS = ("fp16", "bf16", "non_ema")  # that are not fetched where none is asked for
WEIGHTS = ("*.safetensors", "*.safetensors.index.*json")
PLAIN = ("*model.safetensors", "*model-*.safetensors", "*model.safetensors.index.json")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Folder(PosixPath):
    """A model's folder, and below it its parts, with the variant of the weights that are read.

    Where a part has none of that variant, its plain weights are.
    """

    variant: str | None = None

    @classmethod
    def of(cls, path: Path, variant: str | None) -> Self:
        """The folder of a path."""
        folder = cls(path)
        folder.variant = variant
        return folder

    def __truediv__(self, name: Any) -> Self:
        return type(self).of(Path(self).joinpath(name), self.variant)


def locate(settings: Model, key: str = "path") -> Folder:
    """The local folder of model.path or model.network, fetched where it is a hub id.

    Raises UserError where it is no folder, and where no part of model.path has the variant.
    """
    named = settings.source if key == "path" else str(getattr(settings, key))
    where = f"model.{key}={named}"
    if (folder := Path(named)).is_dir():
        _refuse_cache_folder(where, folder)
    elif not paths.is_hub_id(named):
        raise UserError(
            f"{where}: no such folder; give a folder in the diffusers layout or a hub id."
        )
    else:
        folder = _fetched(where, named, settings.variant)
    if key == "path" and settings.variant is not None:
        _check_variant(where, folder, settings.variant)
    return Folder.of(folder, settings.variant)


def _fetched(where: str, repository: str, variant: str | None) -> Path:
    """The hub's local copy. Raises UserError where there is none and the hub gives none."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return fetch(repository, variant)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{where}: neither a folder nor on the hub ({problem}); correct the path, or write"
            " it as ./NAME where a folder is meant."
        ) from None


def fetch(repository: str, variant: str | None = None) -> Path:
    """The local copy of a hub repository, without what no family reads.

    repository: NAME, or NAME@REVISION;  variant: of the weights, where a part has it
    """
    from huggingface_hub import snapshot_download

    name, revision = paths.hub_name(repository)

    def download(allowed: Sequence[str], ignored: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=list(ignored),
            )
        )

    others = [pattern for other in VARIANTS for pattern in patterns(other) if other != variant]
    if variant is None:
        return download(FETCHED, [*NOT_FETCHED, *others])
    download(FETCHED, [*NOT_FETCHED, *others, *PLAIN])  # configs, tokenizers, licences
    folder = download([f"*/{own}" for own in patterns(variant)], NOT_FETCHED)
    parts = [file.parent for file in (*folder.glob("config.json"), *folder.glob("*/config.json"))]
    lacking = [part for part in parts if not any(any(part.glob(own)) for own in patterns(variant))]
    if lacking and len(lacking) < len(parts):  # else there is no such variant, as is told next
        below = [f"{part.name}/*" for part in lacking if part != folder]
        download([*below, "diffusion_pytorch_model*"], [*NOT_FETCHED, *others])
    return folder


def patterns(variant: str) -> tuple[str, ...]:
    """Names of a variant's files of weights, as diffusers and transformers write them."""
    return (f"*.{variant}.*", f"*.{variant}-*")


def chosen(names: Sequence[str], variant: str | None) -> list[str]:
    """The files of a model's hub repository that are read, of all its files."""
    kept = [name for name in names if _any(name, FETCHED) and not _any(name, NOT_FETCHED)]
    own = () if variant is None else patterns(variant)
    has = {name.rpartition("/")[0] for name in kept if _any(name, WEIGHTS) and _any(name, own)}
    others = tuple(one for other in VARIANTS if other != variant for one in patterns(other))
    return [
        name
        for name in kept
        if not _any(name, WEIGHTS)
        or _any(name, own)
        or (name.rpartition("/")[0] not in has and not _any(name, others))
    ]


def _any(name: str, several: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in several)


def _check_variant(where: str, folder: Path, variant: str) -> None:
    """Raise UserError where no part of a model's folder has weights of the variant."""
    found = {
        file.relative_to(folder) for pattern in WEIGHTS for file in folder.glob(f"*/{pattern}")
    }
    names = {file.name for file in found}
    if any(_any(name, patterns(variant)) for name in names):
        return
    others = [other for other in VARIANTS if any(_any(name, patterns(other)) for name in names)]
    remedy = f"set it to {' or '.join(others)}, or leave it out" if others else "leave it out"
    raise UserError(f"model.variant={variant}: {where} has no weights of it; {remedy}.")


def _refuse_cache_folder(where: str, folder: Path) -> None:
    """Raise UserError for the folder in the hub's cache that has a repository's snapshots."""
    snapshots = sorted((folder / "snapshots").glob("*")) if (folder / "refs").is_dir() else []
    if snapshots:
        raise UserError(
            f"{where}: a repository in the hub's cache; name one of its snapshots, such as "
            f"{snapshots[0]}, or its hub id."
        )


def refuse_file(settings: Model, pipeline: str) -> None:
    """Raise UserError, with the command that makes a folder of it, where a single file is named.

    pipeline: the family's own, a diffusers class
    """
    for key in ("path", "network"):
        named = getattr(settings, key)
        if named is not None and Path(named).is_file():
            raise UserError(f"model.{key}={named}: {_made_a_folder(key, Path(named), pipeline)}")


def _made_a_folder(key: str, file: Path, pipeline: str) -> str:
    """What is wrong with a single file as a model, and the command that converts it."""
    import diffusers

    if file.suffix not in SINGLE_FILES:
        return "is a file; give a folder in the diffusers layout or a hub id."
    whole, target = getattr(diffusers, pipeline), file.with_suffix("")
    if key == "path" and hasattr(whole, "from_single_file"):
        kind, place, then = pipeline, target, f"model.path={target}"
    else:  # a file with the network alone
        part, kind = _network_of(whole)
        place, then = target / part, f"model.network={target}"
        then += ", and model.path to the folder of the other parts" if key == "path" else ""
    made = f"diffusers.{kind}.from_single_file('{file}').save_pretrained('{place}')"
    return (
        f'is a single file, which is not read; convert it once: python -c "import diffusers; {made}"'
        f"; then set {then}."
    )


def _network_of(pipeline: Any) -> tuple[str, str]:
    """The part of a pipeline that is trained, and its class, as the constructor names them."""
    parameters = inspect.signature(pipeline.__init__).parameters
    part = next(name for name in ("transformer", "unet") if name in parameters)
    annotation = parameters[part].annotation
    return part, next(iter(typing.get_args(annotation)), annotation).__name__
