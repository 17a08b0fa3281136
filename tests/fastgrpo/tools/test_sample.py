"""Sampling: the same prompt and seed give the same clip from any source, on any number of ranks, in
any company.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastgrpo.checkpoint.checkpoints import Checkpoints
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.config import Checkpoint
from fastgrpo.core.policy import Decoded, Prompt, stack
from fastgrpo.data import video, video_reader
from fastgrpo.models.loading import diffusers_folder, policies, streaming
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import open_world
from fastgrpo.tools.sample import contact_sheet, sample, sample_files
from fastgrpo.tools.sample.source import Asked, find
from fastgrpo.training import rollout
from fastgrpo.training.trainer import Trainer
from tests import ROOT
from tests.harness import forks, runs
from tests.harness.folders import skyreels_i2v
from tests.harness.tiny import FOLDER, PROMPTS, VIDEO, without_gpus

CPU = torch.device("cpu")
THREE = (
    "--prompt",
    PROMPTS[0],
    "--prompt",
    PROMPTS[1],
    "--prompt",
    PROMPTS[2],
    "--seeds",
    "3",
    "4",
    "--steps",
    "4",
)
ONE = ("--prompt", PROMPTS[1], "--steps", "3")


@pytest.fixture(scope="module")
def run(two_rank_run: Path) -> Path:
    return two_rank_run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "exported"
    assert cli.main(["export", str(run), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def three(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts and two seeds by one rank, beside the base model."""
    return draw(run, tmp_path_factory.mktemp("sampled") / "three", *THREE, "--against-base")


def draw(source: Path, out: Path, *options: str) -> Path:
    assert cli.main(["sample", str(source), "--out", str(out), *options]) == 0
    return out


def only(folder: Path) -> bytes:
    """The one clip or image of a folder."""
    (entry,) = json.loads((folder / sample_files.MANIFEST).read_text())["samples"]
    return (folder / entry["file"]).read_bytes()


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(run: Path, three: Path, tmp_path: Path) -> None:
    command = ["sample", str(run), "--out", str(tmp_path / "two"), *THREE, "--against-base"]
    result = forks.run("fastgrpo.cli", command, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"6 samples, sheet.png and manifest.json in {tmp_path / 'two'}\n" in result.stdout
    one, two = (
        {file.name: file.read_bytes() for file in f.iterdir()} for f in (three, tmp_path / "two")
    )
    assert one == two and len(one) == 6 * 3 + 2


def test_the_manifest_names_every_file_with_its_prompt_and_seed(run: Path, three: Path) -> None:
    manifest = json.loads((three / "manifest.json").read_text())
    assert manifest["weights"] == "step 2, EMA" and manifest["checkpoint"] == str(
        run / "checkpoints" / "step-2"
    )
    assert manifest["settings"]["steps"] == 4 and manifest["settings"]["guidance"] is None
    assert [(entry["prompt"], entry["seed"]) for entry in manifest["samples"]] == [
        (prompt, seed) for prompt in PROMPTS for seed in (3, 4)
    ]
    named = {entry[key] for entry in manifest["samples"] for key in ("file", "base", "beside")}
    assert (
        named | {"manifest.json", "sheet.png"} == {file.name for file in three.iterdir()}
        and len(named) == 18
    )
    footage = video_reader.read(three / manifest["samples"][0]["file"])
    clip, fps = footage.pixels, footage.fps
    assert tuple(clip.shape) == (9, 192, 192, 3) and fps == 8.0


def test_a_clip_depends_on_its_prompt_and_seed_alone(
    three: Path, run: Path, tmp_path: Path
) -> None:
    """Not on the other prompts and seeds, nor on their order."""
    alone = draw(run, tmp_path / "alone", "--prompt", PROMPTS[1], "--seeds", "4", "--steps", "4")
    assert only(alone) == (three / f"001-{sample.slug(PROMPTS[1])}-seed4.mp4").read_bytes()
    assert only(alone) != (three / f"001-{sample.slug(PROMPTS[1])}-seed3.mp4").read_bytes()


def test_the_export_gives_the_runs_clips(three: Path, exported: Path, tmp_path: Path) -> None:
    again = draw(exported, tmp_path / "again", *THREE)
    names = sorted(file.name for file in again.glob("*.mp4"))
    assert len(names) == 6
    for name in names:
        assert (again / name).read_bytes() == (three / name).read_bytes(), name


def test_against_base_has_the_base_models_clips(three: Path, tmp_path: Path) -> None:
    """Those that the recipe's own base folder gives with the same seed."""
    (tmp_path / "recipe.toml").write_text(runs.RECIPE.read_text().replace("../", f"{ROOT}/"))
    base = draw(tmp_path / "recipe.toml", tmp_path / "base", *THREE)
    for file in base.glob("*.mp4"):
        assert file.read_bytes() == (three / f"{file.stem}-base.mp4").read_bytes()
        assert file.read_bytes() != (three / file.name).read_bytes(), "training moved nothing"
    beside = video_reader.read(three / f"000-{sample.slug(PROMPTS[0])}-seed3-beside.mp4").pixels
    left = video_reader.read(three / f"000-{sample.slug(PROMPTS[0])}-seed3-base.mp4").pixels
    right = video_reader.read(three / f"000-{sample.slug(PROMPTS[0])}-seed3.mp4").pixels
    assert tuple(beside.shape) == (9, 216, 392, 3)
    # but for the encoder's loss
    for half, clip in (
        (beside[:, 24:, :192], left),
        (beside[:, 24:, 200:], right),
    ):
        assert (half.float() - clip.float()).abs().mean() < 2


def test_weights_of_the_average_the_optimizer_and_another_step_differ(
    run: Path, tmp_path: Path
) -> None:
    choices = {
        "ema": [],
        "raw": ["--raw-weights"],
        "first": ["--step", "1"],
        "best": ["--step", "best"],
    }
    for name, options in choices.items():
        draw(run, tmp_path / name, *ONE, *options)
    clips = {name: only(tmp_path / name) for name in choices}
    assert clips["ema"] != clips["raw"] and clips["ema"] != clips["first"]
    best = json.loads((run / "checkpoints" / "step-2" / "progress.json").read_text())["best"]
    assert clips["best"] == clips["first" if best == "step-1" else "ema"]


def test_the_weights_are_those_that_the_trainer_samples_with(run: Path) -> None:
    """Loaded whole and cast, as against DCP into sharded float32 masters that FSDP casts and
    gathers.
    """
    overrides = ("model.dtype=bfloat16",)
    recipe = config.load(run / "recipe.toml", overrides)
    model = recipe.model
    policy = find(Asked(str(run), raw=True, overrides=overrides)).snapshot.load(CPU)
    shape = policy.latent_shape(VIDEO)
    grid = policy.time_grid(3, None, shape)
    with policies.encoder(model, VIDEO, CPU) as encode:
        condition = stack(encode([Prompt(PROMPTS[0])]))
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    ours = rollout.sample_ode(policy, x, grid, condition)
    with without_gpus(), open_world() as world:
        trained = policies.load(model, CPU, recipe.lora)
        sharding.shard(trained, world, torch.bfloat16)
        trainer = Trainer.create(trained, recipe.optimizer, None)
        Checkpoints(run / "checkpoints", Checkpoint(), world).load(trainer)
        with sharding.gathered(trained.network):
            expected = rollout.sample_ode(trained, x, grid, condition)
    assert torch.equal(ours, expected)


def test_weights_are_read_straight_into_the_compute_precision(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No float32 copy comes before: twice the memory of a GPU that would hold the network."""
    filled: list[torch.dtype] = []

    def fill(network: nn.Module, *others: Any) -> None:
        filled.extend(parameter.dtype for parameter in network.parameters())
        assert all(parameter.is_meta for parameter in network.parameters())
        real(network, *others)

    real = streaming.fill
    monkeypatch.setattr(streaming, "fill", fill)
    find(Asked(str(run), overrides=("model.dtype=bfloat16",))).snapshot.load(CPU)
    assert set(filled) == {torch.bfloat16}


def test_images_and_other_sizes_from_a_folder_without_a_recipe(tmp_path: Path) -> None:
    size = ["--family", "hunyuan_video", "--frames", "1", "--height", "48", "--width", "32"]
    out = draw(
        FOLDER, tmp_path / "images", *size, *ONE, "--seeds", "0", "1", "2", "--batch-size", "2"
    )
    images = sorted(out.glob("0*.png"))
    assert [Image.open(file).size for file in images] == [(32, 48)] * 3
    assert len({file.read_bytes() for file in images}) == 3
    short = draw(
        FOLDER,
        tmp_path / "short",
        "--recipe",
        str(runs.RECIPE),
        *ONE,
        "--frames",
        "5",
        "--fps",
        "4",
    )
    (file,) = short.glob("*.mp4")
    footage = video_reader.read(file)
    clip, fps = footage.pixels, footage.fps
    assert len(clip) == 5 and fps == 4.0


def test_prompts_that_are_cut_are_counted_and_marked_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    long = "a red circle " * 40
    file.write_text(f"a red circle\n{long}moves left\n{long}moves right\n")
    options = ("--recipe", str(runs.RECIPE), "--prompts", str(file), "--frames", "5")
    out = draw(FOLDER, tmp_path / "out", *options, "--steps", "2")
    said = capsys.readouterr().err
    assert "prompts: 2 are longer than an encoder sees (text_encoder_2 cuts 2), such as " in said
    assert f"; all are named in {out / sample_files.MANIFEST}" in said
    entries = json.loads((out / sample_files.MANIFEST).read_text())["samples"]
    marks = [entry.get("tokens_seen") for entry in entries]
    assert marks[0] is None and marks[1] is not None and marks[2] is not None
    seen, count = marks[2]["text_encoder_2"]
    assert 0 < seen < count


def test_image_to_video_with_guidance(tmp_path: Path) -> None:
    skyreels_i2v.write(tmp_path / "model")
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (40, 40), (30, 30, 200)).save(tmp_path / "blue.png")
    size = [
        "--family",
        "skyreels_i2v",
        "--frames",
        "5",
        "--height",
        "32",
        "--width",
        "32",
        "--steps",
        "2",
    ]
    choices = {
        "red": ["--image", str(tmp_path / "red.png"), "--cfg", "2"],
        "blue": ["--image", str(tmp_path / "blue.png"), "--cfg", "2"],
        "stronger": ["--image", str(tmp_path / "red.png"), "--cfg", "5"],
        "not": [
            "--image",
            str(tmp_path / "red.png"),
            "--cfg",
            "2",
            "--negative-prompt",
            "a green hill",
        ],
    }
    for name, options in choices.items():
        draw(tmp_path / "model", tmp_path / name, *size, "--prompt", "two birds", *options)
    assert len({only(tmp_path / name) for name in choices}) == 4


def test_held_out_prompts_and_files_of_prompts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(f"{PROMPTS[2]}\n{PROMPTS[0]}\n")
    mine = draw(
        run,
        tmp_path / "mine",
        "--prompts",
        str(tmp_path / "mine.txt"),
        "--steps",
        "2",
        "--limit",
        "1",
    )
    manifest = json.loads((mine / "manifest.json").read_text())
    assert [entry["prompt"] for entry in manifest["samples"]] == [PROMPTS[2]]
    assert cli.main(["sample", str(run), "--steps", "2"]) == 0
    manifest = json.loads((run / "samples" / "step-2" / "manifest.json").read_text())
    heldout = (ROOT / "data" / "tiny_world_heldout.txt").read_text().splitlines()
    # as many as the run evaluates
    assert [entry["prompt"] for entry in manifest["samples"]] == heldout[:1]


def test_only_samples_are_replaced_and_only_when_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = draw(run, tmp_path / "out", *ONE)
    before = only(out)
    assert complaint(capsys, [str(run), "--out", str(out), *ONE]).endswith(
        "exists already; give --overwrite, or choose another folder."
    )
    draw(run, out, *ONE, "--seeds", "7", "--overwrite")
    assert only(out) != before and len(list(out.iterdir())) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    line = complaint(capsys, [str(run), "--out", str(tmp_path / "mine"), "--overwrite", *ONE])
    assert (
        "has no manifest.json, so it is not replaced" in line
        and (tmp_path / "mine" / "thesis").exists()
    )


def test_what_fails_half_way_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, pixels: Tensor, fps: float) -> None:
        assert path.parent.name == "out.partial"
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(video, "write_mp4", full)
    line = complaint(capsys, [str(run), "--out", str(tmp_path / "out"), *ONE])
    assert line.endswith("out: no space left on the disk; free some and start again.")
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_told_marked_and_not_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE overflows for the second of three seeds."""
    to_pixels, calls = diffusers_folder.to_pixels, []

    def overflowing(frames: Tensor) -> Decoded:
        calls.append(len(frames))
        return to_pixels(frames * (float("inf") if len(calls) == 2 else 1.0))

    monkeypatch.setattr(diffusers_folder, "to_pixels", overflowing)
    capsys.readouterr()
    out = draw(run, tmp_path / "out", *ONE, "--seeds", "0", "1", "2")
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("1 of them are not finite") and len(told) == 2
    samples = json.loads((out / sample_files.MANIFEST).read_text())["samples"]
    assert [entry["finite"] for entry in samples] == [True, False, True]
    monkeypatch.undo()
    table = tmp_path / "scores.json"
    command = ["score", str(out), "--reward", "tiny_world", "--json", str(table)]
    assert cli.main(command) == 0
    scored = json.loads(table.read_text())["files"]
    assert ["file" in entry["invalid"] for entry in scored] == [False, True, False]


def test_weights_that_are_not_finite_give_no_samples_but_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*_: Any, **__: Any) -> Tensor:
        return torch.full((3, *shape), float("nan"))

    shape = policies.load(config.load(runs.RECIPE).model, CPU).latent_shape(
        find(Asked(str(run))).video
    )
    monkeypatch.setattr(rollout, "sample_ode", spoilt)
    options = [*ONE, "--seeds", "0", "1", "2", "--batch-size", "3"]
    line = complaint(capsys, [str(run), "--out", str(tmp_path / "out"), *options])
    assert line.startswith("fastgrpo: model: no sample of step ") and not list(tmp_path.iterdir())


def complaint(capsys: pytest.CaptureFixture[str], options: Sequence[str]) -> str:
    capsys.readouterr()
    assert cli.main(["sample", *options]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("fastgrpo: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_mistakes_are_one_line(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x")]
    cases = {
        (str(tmp_path), *out): "neither a run folder nor one in the diffusers layout",
        ("none.toml", *out): "no such recipe",
        (str(tmp_path / "none"), *out): f"source={tmp_path / 'none'}: no such file or folder",
        ("runs/none", *out): "source=runs/none: no such file or folder",
        (str(FOLDER), *out, "--family", "hunyuan_video"): "--frames: missing; without a recipe",
        (str(FOLDER), *out): "which family?",
        (str(runs.RECIPE), *out, "--against-base"): "--against-base: the source is a base model",
        (str(runs.RECIPE), *out, "--raw-weights"): "--raw-weights: is for a run folder",
        (str(runs.RECIPE),): "--out: missing",
        (str(exported), *out, "--step", "2"): "--step: is for a run folder",
        (str(run), *out, "--step", "9"): "keeps no such checkpoint; use one of 1, 2.",
        (str(run), *out, "--family", "flux"): "a run folder has its own recipe",
        (
            str(run),
            *out,
            "--frames",
            "8",
        ): "video.frames=8: must be a multiple of 4, plus 1; use 5 or 9.",
        (str(run), *out, "--frames", "0"): "video.frames=0: must be a whole number above 0.",
        (str(run), *out, "--negative-prompt", "blurry"): "has no effect without guidance",
        (str(run), *out, "--prompt", "a", "--prompts", "b"): "give --prompt or --prompts, not both",
        (str(run), *out, "--prompt", "a", "--image", "b.png"): "hunyuan_video takes no reference",
        (str(run), *out, "--seeds", "1", "1"): "one is named twice",
        (str(run), *out, "--set", "model.gidance=3"): "did you mean 'model.guidance'?",
    }
    for options, message in cases.items():
        assert message in complaint(capsys, options)
    assert not list(tmp_path.iterdir())


def test_a_sheet_has_a_cell_for_every_sample(three: Path) -> None:
    """Thumbnails are the clips' own frames: here enlarged by 3, at the places that the layout
    says.
    """
    page = np.asarray(Image.open(three / "sheet.png"))
    clip = video_reader.read(three / f"000-{sample.slug(PROMPTS[0])}-seed3.mp4").pixels
    # the mp4 is enlarged by 6
    first = clip[0, ::6, ::6].numpy().repeat(3, 0).repeat(3, 1).astype(float)
    top = 16 + 2 * 8 + 16 + 98  # title, gaps, caption, the base model's row
    assert np.abs(page[top : top + 96, 8 : 8 + 96] - first).mean() < 6  # the encoder's loss


def test_frames_on_the_sheet_are_evenly_spaced() -> None:
    size = VIDEO.model_copy(update={"frames": 53, "height": 480, "width": 640})
    clip = torch.arange(53, dtype=torch.uint8)[:, None, None, None].expand(53, 480, 640, 3)
    thumbs = contact_sheet.thumbnails(clip, size)
    assert tuple(thumbs.shape) == contact_sheet.thumbnail_shape(size) == (6, 144, 192, 3)
    assert thumbs[:, 0, 0, 0].tolist() == [0, 10, 21, 31, 42, 52]
