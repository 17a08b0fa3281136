"""Export: what two ranks saved, loaded by diffusers, is the checkpoint's network bit for bit, and
is never whole in memory on the way."""

import errno
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo import models
from fastgrpo.algorithm import noise
from fastgrpo.checkpoint import reader
from fastgrpo.checkpoint.reader import Weights
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Lora
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt, stack
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import DOWN, UP, save_adapters
from fastgrpo.tools.export import shard_writer
from fastgrpo.tools.export.export import Export, export
from fastgrpo.tools.sample.source import Asked, Snapshot, find
from fastgrpo.training import rollout
from tests import ROOT
from tests.harness import forks, runs
from tests.harness.tiny import FOLDER, VIDEO

PROMPT = "a red circle moves left slowly"
STEPS = 4


@pytest.fixture(scope="module")
def run(two_rank_run: Path) -> Path:
    return two_rank_run


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, put together by DCP's own tool."""
    return runs.checkpoint(run, 2, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its moving average, in several files."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert cli.main(["export", str(run), str(folder), "--max-shard-size", "2MB"]) == 0
    return folder


def part(saved: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f".{kind}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.items()
        if name.startswith(prefix)
    }


def network_of(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "transformer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_the_files_hold_the_moving_average_or_the_raw_weights(
    run: Path, saved: dict[str, Tensor], exported: Path, tmp_path: Path
) -> None:
    assert_same(network_of(exported), part(saved, "ema"))
    export(Export(run, tmp_path / "raw", raw=True))
    assert_same(network_of(tmp_path / "raw"), part(saved, "model"))
    name = "proj_out.weight"
    assert not torch.equal(part(saved, "ema")[name], part(saved, "model")[name])
    export(Export(run, tmp_path / "half", dtype="bfloat16"))
    assert_same(
        network_of(tmp_path / "half"), {n: t.bfloat16() for n, t in part(saved, "ema").items()}
    )


def test_files_stay_below_the_size_and_the_index_names_them(exported: Path) -> None:
    files = sorted((exported / "transformer").glob("*.safetensors"))
    assert [file.name[24:] for file in files] == [
        f"0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert all(file.stat().st_size < 2e6 + 20_000 for file in files)
    index = json.loads(
        (exported / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in network_of(exported).values())


def test_split_keeps_order_and_gives_a_large_tensor_its_own_file() -> None:
    layout = {
        name: (torch.Size([count]), torch.float32)
        for name, count in zip("abcde", (5, 5, 30, 4, 1), strict=True)
    }
    assert shard_writer.split(layout, 40) == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (1e5, torch.float16, "--dtype=float16: w has values up to 1e+05, which are infinite in"),
        (-3.4e38, torch.bfloat16, "--dtype=bfloat16: w has values up to 3.4e+38"),
        (float("nan"), torch.float32, "checkpoint: w is not finite"),
        (float("inf"), torch.float16, "checkpoint: w is not finite"),
    ],
)
def test_a_value_that_a_cast_would_lose_is_named(
    value: float, dtype: torch.dtype, told: str, tmp_path: Path
) -> None:
    tensor = torch.tensor([0.0, value, 1.0])
    layout = {"w": (tensor.shape, dtype)}
    with pytest.raises(UserError, match=re.escape(told)):
        shard_writer.write_file(tmp_path / "w.safetensors", layout, lambda name: tensor)
    state = {f"w{DOWN}": tensor[:2].reshape(1, 2), f"w{UP}": tensor.reshape(3, 1)}
    with pytest.raises(UserError, match=re.escape(told.replace("w ", f"w{DOWN} "))):
        save_adapters(state, tmp_path / "a.safetensors", "unet", Lora(rank=1), dtype)
    assert not (tmp_path / "a.safetensors").exists()


def test_mixed_dtypes_and_odd_shapes_read_back(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "whole": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "yes": torch.tensor([True, False, True]),
    }
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    shard_writer.write_network(tmp_path, layout, tensors.__getitem__, 10**9)
    assert_same(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), tensors)
    read = shard_writer.open_network(tmp_path)
    assert_same({name: read(name) for name in tensors}, tensors)


def test_the_other_parts_are_the_base_folders(run: Path, exported: Path, tmp_path: Path) -> None:
    base = {file.relative_to(FOLDER): file for file in FOLDER.rglob("*") if file.is_file()}
    others = {name: file for name, file in base.items() if name.parts[0] != "transformer"}
    for name, file in others.items():
        assert (exported / name).read_bytes() == file.read_bytes(), name
    found = {file.relative_to(exported) for file in exported.rglob("*") if file.is_file()}
    assert {name for name in found if name.parts[0] != "transformer"} == {
        *others,
        Path("README.md"),
        Path("recipe.toml"),
    }
    assert cli.main(["export", str(run), str(tmp_path / "linked"), "--link"]) == 0
    assert (tmp_path / "linked" / "vae" / "config.json").stat().st_nlink > 1
    assert (exported / "vae" / "config.json").stat().st_nlink == 1


def test_the_card_says_what_it_is(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "# run, step 2, EMA" in card
    assert "Mean over the samples of iteration 2: weighted sum" in card and "| TA |" in card
    assert "Trained by GRPO (DanceGRPO, arXiv 2505.07818) with fastgrpo" in card
    assert "ema_decay = 0.5" in card and "# a HunyuanVideoPipeline" in card


def draw(pipeline: DiffusionPipeline, x: Tensor) -> Tensor:
    text = DEFAULT_PROMPT_TEMPLATE["template"]
    template = {
        "template": text,
        "crop_start": len(pipeline.tokenizer(text.split("{}")[0])["input_ids"]),
    }
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=PROMPT,
        prompt_template=template,
        guidance_scale=6.0,
        num_inference_steps=STEPS,
        height=32,
        width=32,
        num_frames=9,
        latents=x,
        output_type="latent",
    )
    return result.frames


def ode(snapshot: Snapshot, x: Tensor) -> Tensor:
    """Our sampler, with the shift of the folder's scheduler, as the pipeline has it."""
    policy = snapshot.load(torch.device("cpu"))
    with policies.encoder(snapshot.model, VIDEO, torch.device("cpu")) as encode:
        condition = stack(encode([Prompt(PROMPT)]))
    return rollout.sample_ode(policy, x, policy.time_grid(STEPS, None, (8, 3, 8, 8)), condition)


def test_diffusers_samples_the_checkpoints_clip_bit_for_bit(
    run: Path, saved: dict[str, Tensor], exported: Path
) -> None:
    x = noise.normal([("clip",)], (8, 3, 8, 8))
    pipeline = DiffusionPipeline.from_pretrained(exported)
    assert type(pipeline).__name__ == "HunyuanVideoPipeline"
    clip = draw(pipeline, x)
    base = DiffusionPipeline.from_pretrained(FOLDER)
    assert (draw(base, x) - clip).abs().max() > 0.01, "training moved nothing"
    # laid out in memory by torch, see shards.ALIGNMENT
    base.transformer.load_state_dict(part(saved, "ema"), assign=True)
    assert torch.equal(draw(base, x), clip)

    ours = [ode(find(Asked(str(source))).snapshot, x) for source in (run, exported)]
    assert torch.equal(*ours)
    torch.testing.assert_close(ours[0], clip, atol=1e-4, rtol=0)


def big_run(folder: Path) -> int:
    """A run folder with a checkpoint of a network of many tensors.  returns its bytes"""
    base = folder / "base"
    base.mkdir()
    for file in FOLDER.iterdir():
        (base / file.name).symlink_to(file)
    (base / "LICENSE.md").write_text("as is")
    (base / "whole_model.safetensors").write_bytes(b"the old weights in one file")
    (base / "transformer").unlink()
    (base / "transformer").mkdir()
    shape = json.loads((FOLDER / "transformer" / "config.json").read_text())
    shape |= {
        "num_layers": 3,
        "num_single_layers": 2,
        "num_attention_heads": 16,
        "attention_head_dim": 32,
    }
    shape |= {"rope_axes_dim": [8, 12, 12]}
    (base / "transformer" / "config.json").write_text(json.dumps(shape))
    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel.from_config(shape)
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in network.state_dict().items()}
    checkpoint = folder / "run" / "checkpoints" / "step-1"
    dcp.save({"model": state}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    recipe = (
        runs.RECIPE.read_text()
        .replace("builtin:tiny_hunyuan_video", str(base))
        .replace("../", f"{ROOT}/")
    )
    (folder / "run" / "recipe.toml").write_text(recipe)
    return sum(tensor.nbytes for tensor in state.values())


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Resident memory grows by a fraction of the model while it is exported."""
    size = big_run(tmp_path)
    assert size > 100e6
    done = forks.run(
        "tests.harness.workers.export", [str(tmp_path / "run"), str(tmp_path / "exported")]
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    (file,) = (tmp_path / "exported" / "transformer").glob("*.safetensors")
    assert file.stat().st_size > size
    assert {file.name for file in (tmp_path / "exported").iterdir() if file.is_file()} == {
        "LICENSE.md",
        "README.md",
        "model_index.json",
        "recipe.toml",
    }
    assert grown < size / 3, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        "flux",
        "flux_2",
        "hunyuan_video_15",
        "hunyuan_video_15_i2v",
        "qwen_image",
        "skyreels_i2v",
        "stable_diffusion",
        "stable_diffusion_3",
        "wan",
        "wan_i2v",
        "wan_a14b",
        "wan_a14b_i2v",
        "wan_i2v_14b",
        "z_image",
    ],
)
def test_every_familys_export_is_its_pipeline(family: str, tmp_path: Path) -> None:
    importlib.import_module(f"tests.harness.folders.{family}").write(tmp_path / "base")
    overrides = [f"model.family={family}", f"model.path={tmp_path / 'base'}"]
    # its other parts lie in HunyuanVideo's folder, which names another pipeline
    if family == "skyreels_i2v":
        overrides += [
            f"model.network={tmp_path / 'base'}",
            f"model.path={tmp_path / 'hunyuan_video'}",
        ]
        importlib.import_module("tests.harness.folders.hunyuan_video").write(
            tmp_path / "hunyuan_video"
        )
    recipe = config.load(runs.RECIPE, overrides)
    network = policies.load(recipe.model, torch.device("cpu")).network
    state = {name: 1.5 * tensor.detach() for name, tensor in network.state_dict().items()}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    dcp.save({"model": state}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    export(Export(tmp_path / "run", tmp_path / "exported"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    parts = models.networks(family)
    for part in parts:
        prefix = f"{part}." if len(parts) > 1 else ""
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        assert_same(getattr(pipeline, part).state_dict(), own)
    kind = models.declared(family, "PIPELINE", models.pipelines()[family][0])
    assert type(pipeline).__name__ == kind


def test_what_diffusers_keeps_in_float32_is_exported_so(tmp_path: Path) -> None:
    """Wan in bfloat16: the file has what a pipeline of that precision computes with."""
    importlib.import_module("tests.harness.folders.wan").write(tmp_path / "base")
    recipe = config.load(runs.RECIPE, ["model.family=wan", f"model.path={tmp_path / 'base'}"])
    network = policies.load(recipe.model, torch.device("cpu")).network
    state = {name: 1.5 * tensor.detach() for name, tensor in network.state_dict().items()}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    dcp.save({"model": state}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    export(Export(tmp_path / "run", tmp_path / "half", dtype="bfloat16"))
    staying = {"norm2", "scale_shift_table", "time_embedder"}
    rounded = {n: t if staying & set(n.split(".")) else t.bfloat16() for n, t in state.items()}
    assert_same(network_of(tmp_path / "half"), rounded)
    loaded = WanTransformer3DModel.from_pretrained(
        tmp_path / "half" / "transformer", torch_dtype=torch.bfloat16
    )
    assert_same(loaded.state_dict(), rounded)


def told_code(card: Path) -> str:
    """The Python code of a model card."""
    return card.read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_card_loads_the_network_that_was_trained(tmp_path: Path) -> None:
    """SkyReels: its adapters go onto its own network, not onto that of HunyuanVideo's folder, which
    they fit too.
    """
    for family in ("skyreels_i2v", "hunyuan_video"):
        importlib.import_module(f"tests.harness.folders.{family}").write(tmp_path / family)
    parts = [
        f"model.path={tmp_path / 'hunyuan_video'}",
        f"model.network={tmp_path / 'skyreels_i2v'}",
    ]
    recipe = config.load(runs.RECIPE, ["model.family=skyreels_i2v", *parts, "lora.rank=2"])
    network = policies.load(recipe.model, torch.device("cpu"), recipe.lora).network
    state = {name: p.detach() + 0.1 for name, p in network.named_parameters() if p.requires_grad}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    dcp.save({"model": state}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    kinds: tuple[Literal["apart", "merged"], ...] = ("apart", "merged")
    for kind in kinds:
        export(Export(tmp_path / "run", tmp_path / kind, lora=kind))
        code = told_code(tmp_path / kind / "README.md")
        assert (
            "NETWORK is the folder of its network" in (tmp_path / kind / "README.md").read_text()
        ) == (kind == "apart")
        places = {
            "FOLDER": tmp_path / kind,
            "BASE": tmp_path / "hunyuan_video",
            "NETWORK": tmp_path / "skyreels_i2v",
        }
        for name, place in places.items():
            code = code.replace(f'"{name}"', f'"{place}"')
        names: dict[str, Any] = {}
        exec(code, names)  # as its reader does
        pipeline = names["pipeline"]
        assert (
            type(pipeline).__name__ == "HunyuanSkyreelsImageToVideoPipeline"
            and "HunyuanSkyreels" in code
        )
        found = pipeline.transformer.state_dict()
        if kind == "merged":
            own = load_file(
                tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors"
            )
        else:
            own = load_file(
                tmp_path / "skyreels_i2v" / "transformer" / "diffusion_pytorch_model.safetensors"
            )
            assert sum(".lora_B." in name for name in found) == len(state) // 2
        for name, tensor in own.items():
            layer, _, kept = name.rpartition(".")
            at = name if name in found else f"{layer}.base_layer.{kept}"
            assert torch.equal(found[at], tensor), name


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of adapters that are not zero, with an alpha of its own."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    recipe = config.load(runs.RECIPE, ["lora.rank=3", "lora.alpha=2.0", "optimizer.ema_decay=0.5"])
    network = policies.load(recipe.model, torch.device("cpu"), recipe.lora).network
    state = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    for n, name in enumerate(name for name in state if ".lora_B." in name):
        state[name] = 0.2 * torch.randn(
            state[name].shape, generator=torch.Generator().manual_seed(n)
        )
    checkpoint = folder / "checkpoints" / "step-5"
    ema = {name: 0.5 * tensor for name, tensor in state.items()}
    dcp.save({"model": state, "ema": ema}, checkpoint_id=checkpoint, no_dist=True)
    runs.write_manifest(checkpoint)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder


@pytest.mark.filterwarnings("ignore")
def test_adapters_apart_and_merged_sample_the_runs_clip(adapted: Path, tmp_path: Path) -> None:
    """Through diffusers' own loading of either, and through ours."""
    x = noise.normal([("clip",)], (8, 3, 8, 8))
    expected = ode(find(Asked(str(adapted))).snapshot, x)
    for kind in ("apart", "merged"):
        assert cli.main(["export", str(adapted), str(tmp_path / kind), "--lora", kind]) == 0
        ours = ode(find(Asked(str(tmp_path / kind))).snapshot, x)
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(draw(merged, x), expected, atol=2e-4, rtol=0)
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    before = draw(pipeline, x)
    pipeline.load_lora_weights(tmp_path / "apart")
    torch.testing.assert_close(draw(pipeline, x), expected, atol=2e-4, rtol=0)
    assert (before - expected).abs().max() > 0.05
    assert {file.name for file in (tmp_path / "apart").iterdir()} == {
        "README.md",
        "recipe.toml",
        shard_writer.ADAPTERS,
    }
    assert 'pipeline.load_lora_weights("FOLDER")' in (tmp_path / "apart" / "README.md").read_text()


def test_merging_needs_safetensors_of_the_base(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"has no diffusion_pytorch_model\.safetensors; download that folder again",
    ):
        shard_writer.open_network(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), UserError("damaged")])
def test_what_fails_half_way_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = Weights.read
    count = 0

    def failing(self: Weights, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 30:
            raise error
        return whole(self, name)

    monkeypatch.setattr(Weights, "read", failing)
    with pytest.raises(UserError, match=r"DST=.*: no space left on the disk; free some|damaged"):
        export(Export(run, tmp_path / "model"))
    assert count == 30 and not list(tmp_path.iterdir())


def test_a_disk_that_fills_with_another_part_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copyfile

    def failing(source: str | Path, target: str) -> object:
        if "text_encoder" in str(source):
            raise OSError(errno.ENOSPC, "full", target)
        return whole(source, target)

    monkeypatch.setattr("fastgrpo.tools.export.export.shutil.copyfile", failing)
    with pytest.raises(UserError, match=r"DST=.*: no space left on the disk; free some"):
        export(Export(run, tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, cut = tmp_path / "empty", tmp_path / "cut"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "recipe.toml").write_text("")
    (cut / "checkpoints").mkdir(parents=True)
    (cut / "recipe.toml").write_text((run / "recipe.toml").read_text())
    (cut / "checkpoints" / "step-2").mkdir()
    for file in (run / "checkpoints" / "step-2").iterdir():
        (cut / "checkpoints" / "step-2" / file.name).write_bytes(file.read_bytes()[:-9])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    cases: dict[Callable[[], list[str]], str] = {
        lambda: [str(tmp_path), "x"]: "so not a run folder; give a run.dir",
        lambda: [str(empty), "x"]: "has no checkpoint yet",
        lambda: [str(run), "there"]: "exists already; choose another folder",
        lambda: [str(run), "x", "--step", "7"]: "keeps no such checkpoint; use one of 1, 2.",
        lambda: [str(run), "x", "--step", "last"]: "--step=last: not a checkpoint",
        lambda: [str(run), "x", "--lora", "merged"]: "trained no adapters; leave it out",
        lambda: [
            str(run),
            "x",
            "--max-shard-size",
            "five",
        ]: "--max-shard-size=five: not a size; write it as 5GB",
        lambda: [str(cut), "x"]: "manifest.json is missing or unreadable",
    }
    for options, message in cases.items():
        source, target, *rest = options()
        assert cli.main(["export", source, str(tmp_path / target), *rest]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fastgrpo: ") and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_of_another_network_is_named(run: Path, exported: Path) -> None:
    weights = Weights(reader.find(run, "newest"), raw=False)
    shapes = {name: weights.layout(name)[0] for name in weights.names}
    name = weights.names[0]
    with pytest.raises(UserError, match=f"{name} is no tensor of the network; model.path or"):
        reader.check_names({n: s for n, s in shapes.items() if n != name}, set(), weights)
    with pytest.raises(UserError, match=rf"{name} is \[.*\], but \[1\] in the network"):
        reader.check_names(shapes | {name: torch.Size([1])}, set(), weights)
    with pytest.raises(UserError, match=r"has no another.weight \(and 0 more\)"):
        reader.check_names(shapes, {*shapes, "another.weight"}, weights)
