"""A model as hubs have it: variants of its weights, revisions, snapshots of symbolic links, pickles
and single files. Against the plain folder of the tiny world, whose numbers are in all of them.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from safetensors.torch import load_file

from fastgrpo.checkpoint import provenance
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Model
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.models.loading import diffusers_folder, policies, source, weight_files
from fastgrpo.tools.export import export
from fastgrpo.tools.plan import subject
from fastgrpo.training.conditions import fingerprint
from tests.harness import runs
from tests.harness.tiny import FOLDER, VIDEO

CPU = torch.device("cpu")
COMMIT, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world in float16 as variant "fp16" in all parts, the network in several files; and
    plain weights of the network beside it, which are other numbers.
    """
    folder = tmp_path_factory.mktemp("half") / "model"
    pipeline = HunyuanVideoPipeline.from_pretrained(FOLDER, torch_dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="300KB")
    for parameter in pipeline.transformer.parameters():
        parameter.data.zero_()
    pipeline.transformer.save_pretrained(folder.parent / "zeros")  # in the folder it removes others
    file = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(folder.parent / "zeros" / file, folder / "transformer" / file)
    assert list(folder.glob("transformer/*.index.fp16.json"))
    assert list(folder.glob("text_encoder/model*fp16*"))
    return folder


def settings(path: Path | str, **more: object) -> Model:
    return Model.model_validate({"family": "hunyuan_video", "path": str(path), **more})


def numbers(given: Model) -> dict[str, torch.Tensor]:
    """Weights of the network and of the VAE, and the features of a prompt."""
    policy = policies.load(given, CPU)
    with policies.encoder(given, VIDEO, CPU) as encode:
        (condition,) = encode([Prompt("a red circle moves left slowly")])
    parts = {"network": policy.network.state_dict(), "vae": policy.vae.state_dict()}
    found = {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}
    return found | dict(condition)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return numbers(settings(FOLDER))


def assert_rounded(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """Weights equal the plain ones as float16 has them, features nearly so."""
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        if "." in name and tensor.is_floating_point() and "rope" not in name:
            assert torch.equal(found[name], tensor.half().float()), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, atol=2e-2, rtol=2e-2)


def test_a_variant_is_read_of_every_part(half: Path, plain: dict[str, torch.Tensor]) -> None:
    assert_rounded(numbers(settings(half, variant="fp16")), plain)
    with pytest.raises(UserError, match=r"only as a variant \(.*fp16.*\); set model\.variant=fp16"):
        policies.load(settings(half), CPU)


def test_a_part_without_the_variant_is_read_plainly(half: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(half, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.copytree(FOLDER / "vae", folder / "vae")
    vae = policies.load(settings(folder, variant="fp16"), CPU).vae.state_dict()
    own = load_file(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(vae[name], tensor) for name, tensor in own.items())


def test_a_variant_that_there_is_not_is_told_with_those_that_there_are(half: Path) -> None:
    for folder, remedy in ((half, "set it to fp16, or leave it out"), (FOLDER, "leave it out")):
        with pytest.raises(UserError, match=rf"model\.variant=bf16: .* of it; {remedy}\.$"):
            source.locate(settings(folder, variant="bf16"))


def test_an_export_of_a_variant_has_plain_names(half: Path, tmp_path: Path) -> None:
    folder = source.locate(settings(half, variant="fp16"))
    for part in ("vae", "text_encoder", "transformer"):
        export.copy_part(folder / part, tmp_path / part, shutil.copyfile)
        read = weight_files.tensors(source.Folder.of(half / part, "fp16"))
        copied = weight_files.tensors(tmp_path / part)
        assert {n: p.file.name for n, p in copied.items()}.keys() == read.keys()
        assert not list((tmp_path / part).glob("*.fp16.json"))
        for name, place in copied.items():
            own = load_file(place.file)[place.key]
            assert torch.equal(own, load_file(read[name].file)[read[name].key])


def test_conditions_of_another_variant_are_others(half: Path, tmp_path: Path) -> None:
    """A part that has both: its cache of conditions is not mistaken for the other's."""
    folder = shutil.copytree(half, tmp_path / "model")
    shutil.copytree(FOLDER / "text_encoder", folder / "text_encoder", dirs_exist_ok=True)
    found = []
    for variant in ("variant=fp16", "decode_batch=1"):  # the latter changes nothing of it
        recipe = config.load(runs.RECIPE, [f"model.path={folder}", f"model.{variant}"])
        found.append(fingerprint.fingerprint(recipe, [], tmp_path / "hashes.json"))
    differing = {key for key in found[0] if found[0][key] != found[1][key]}
    assert differing >= {"text_encoder"} and "tokenizer" not in differing


def as_snapshot(folder: Path, repository: Path, commit: str, branch: str = "main") -> Path:
    """A folder as the hub's cache has it: files by their hashes, and links to them."""
    snapshot = repository / "snapshots" / commit
    for number, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        blob = repository / "blobs" / f"{commit}{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path(*[".."] * len(link.relative_to(repository).parent.parts)) / "blobs" / blob.name
        )
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with a repository of two commits: main is the plain one, branch half the other."""
    hub = tmp_path / "hub"
    as_snapshot(FOLDER, hub / "models--owner--tiny", COMMIT)
    as_snapshot(half, hub / "models--owner--tiny", OTHER, "half")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    return hub


def test_a_snapshot_of_links_is_a_folder_like_any(
    cache: Path, plain: dict[str, torch.Tensor]
) -> None:
    snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model_index.json").is_symlink()
    found = numbers(settings(snapshot))
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    assert cli.main(["check", str(runs.RECIPE), f"model.path={snapshot}"]) == 0


def test_a_link_whose_blob_is_gone_is_missing(cache: Path) -> None:
    snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
    (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    with pytest.raises(UserError, match=r"transformer has no diffusion_pytorch_model\.safetensors"):
        policies.load(settings(snapshot), CPU)


def test_the_repository_itself_in_the_cache_is_refused(cache: Path) -> None:
    with pytest.raises(
        UserError, match=rf"name one of its snapshots, such as .*{COMMIT}, or its hub id"
    ):
        source.locate(settings(cache / "models--owner--tiny"))


def test_a_revision_and_a_variant_of_a_hub_id(
    cache: Path, plain: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Loaded, planned and noted; the same by NAME@REVISION."""
    named = ["model.path=owner/tiny", "model.revision=half", "model.variant=fp16"]
    recipe = config.load(runs.RECIPE, [*named, f"run.dir={tmp_path / 'run'}"])
    assert_rounded(numbers(recipe.model), plain)
    snapshots = cache / "models--owner--tiny" / "snapshots"
    assert subject.local_folders(recipe.model.source) == [snapshots / OTHER]
    assert subject.local_folders("owner/tiny")[0] == snapshots / COMMIT
    assert subject.local_folders("owner/tiny@gone") == []
    assert source.locate(settings("owner/tiny@half", variant="fp16")) == snapshots / OTHER
    assert source.locate(settings("owner/tiny")) == snapshots / COMMIT
    noted = {"path": "owner/tiny", "revision": "half", "variant": "fp16", "commit": OTHER}
    assert provenance.model(recipe) == noted
    (tmp_path / "run").mkdir()
    hashed = provenance.network(recipe)
    assert "diffusion_pytorch_model.safetensors" not in hashed and len(hashed) > 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"model.path={FOLDER}", "model.revision=v1"],
            "model.revision=v1: is of a hub repository",
        ),
        (
            ["model.path=a/b@v1", "model.revision=v2"],
            "names a revision already; use model.path=a/b",
        ),
    ],
)
def test_a_revision_of_nothing_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(runs.RECIPE, overrides)


def said(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `fastgrpo check` says of a mistake, one line."""
    assert cli.main(["check", str(runs.RECIPE), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [
        ("transformer", "diffusion_pytorch_model", "diffusers.HunyuanVideoTransformer3DModel"),
        ("vae", "diffusion_pytorch_model", "diffusers.AutoencoderKLHunyuanVideo"),
        ("text_encoder", "pytorch_model", "transformers.LlamaModel"),
    ],
)
def test_pickles_are_refused_with_the_command_that_converts_them(
    part: str, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command does."""
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(file), folder / part / f"{name}.bin")
    before = load_file(file)
    file.unlink()
    told = said(capsys, f"model.path={folder}")
    assert f"{folder / part} has its weights only as {name}.bin, a pickle" in told
    command = told.split('python -c "')[1].split('"')[0]
    assert command.startswith(f"import {kind.partition('.')[0]}; {kind}.from_pretrained('")
    exec(command, {})  # as its reader does
    assert cli.main(["check", str(runs.RECIPE), f"model.path={folder}"]) == 0
    after = load_file(file)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "key", "made"),
    [
        ("stable_diffusion", "path", "diffusers.StableDiffusionPipeline.from_single_file("),
        ("flux", "path", "diffusers.FluxPipeline.from_single_file("),
        ("flux", "network", "diffusers.FluxTransformer2DModel.from_single_file("),
        ("wan", "path", "diffusers.WanTransformer3DModel.from_single_file("),
    ],
)
def test_a_single_file_is_refused_with_the_command_that_converts_it(
    family: str, key: str, made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("safetensors", "ckpt"):
        file = tmp_path / f"v1.5.{suffix}"
        file.touch()
        recipe = settings(file if key == "path" else "a/b", family=family)
        recipe = recipe.model_copy(update={"network": str(file)} if key == "network" else {})
        with pytest.raises(UserError, match="is a single file, which is not read") as caught:
            policies.load(recipe, CPU)
        told = str(caught.value)
        assert told.startswith(f"model.{key}={file}: ") and made in told
        whole = key == "path" and "Pipeline" in made
        place = tmp_path / "v1.5" if whole else tmp_path / "v1.5" / "transformer"
        assert f".save_pretrained('{place}')" in told
        assert f"then set model.{'path' if whole else 'network'}={tmp_path / 'v1.5'}" in told
        if key == "path":
            assert "is a single file" in said(
                capsys, f"model.family={family}", f"model.path={file}"
            )


def test_an_index_names_files_of_its_own_variant(half: Path) -> None:
    """The oracle of the harness: what diffusers wrote is in the layout that was meant."""
    index = json.loads(next((half / "transformer").glob("*.index.fp16.json")).read_text())
    assert {".fp16" in name for name in index["weight_map"].values()} == {True}
    assert (
        diffusers_folder.read_json(half / "model_index.json")["_class_name"]
        == "HunyuanVideoPipeline"
    )
