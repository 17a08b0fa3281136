"""Every launch file starts and trains on two CPU ranks: text through the encoders to clips, rewards
and updates.

The overrides are those that docs/recipes.md lists, read from there.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fastgrpo import models
from fastgrpo.core import config
from fastgrpo.core.policy import networks_of
from fastgrpo.models.loading import policies
from fastgrpo.tools.export.export import Export, export
from tests import ROOT
from tests.fastgrpo.training.test_refl import own_reward
from tests.harness import forks, runs
from tests.harness.folders.launch_files import LAUNCH, arguments, with_images


def test_every_launch_file_is_tried_here() -> None:
    assert {file.stem for file in (ROOT / "launch").glob("*.toml")} == {*LAUNCH, "t2v_tiny"}


WITHOUT_NOISE = {
    "nft": ["optimizer.ema_decay=0.5", "objective.nft_kl=0.01"],
    "awm": ["optimizer.ema_decay=0.9", "objective.clip_range=1e-5"],
}
"""Methods of samples that are noised again, with keys that they want."""
OF_FAMILIES = {"hunyuan_video": "t2v_hunyuan", "skyreels_i2v": "i2v_skyreels"}
OF_FAMILIES |= {"flux": "t2i_flux", "wan": "t2v_wan", "wan_i2v": "i2v_wan22"}
OF_FAMILIES |= {"wan_i2v_14b": "i2v_wan", "wan_a14b": "t2v_wan22_a14b"}
OF_FAMILIES |= {"stable_diffusion_3": "t2i_sd3", "qwen_image": "t2i_qwen"}
OF_FAMILIES |= {"hunyuan_video_15": "t2v_hunyuan15", "hunyuan_video_15_i2v": "i2v_hunyuan15"}
OF_FAMILIES["wan_a14b_i2v"] = "i2v_wan22_a14b"
OF_FAMILIES |= {"z_image": "t2i_zimage", "flux_2": "t2i_flux2"}
"""A launch file of every family of rectified flows."""


@pytest.mark.parametrize("kind", WITHOUT_NOISE)
@pytest.mark.parametrize("family", OF_FAMILIES)
def test_every_flow_trains_without_noisy_steps(family: str, kind: str, tmp_path: Path) -> None:
    name = OF_FAMILIES[family]
    lines = trained(name, tmp_path, f"objective.kind={kind}", *WITHOUT_NOISE[kind])
    for line in lines:
        again, transitions = line["update/evaluated_again"], line["update/transitions"]
        assert again >= transitions > 0 < line["update/grad_norm"]
        assert line["update/max_log_ratio_first"] == 0.0 == line["reward/invalid"]


BASELINES = (
    ("t2i_flux", "dpo", ["objective.best_of_n=2"]),
    ("t2v_wan", "dpo", ["objective.best_of_n=4"]),
    ("t2i_sd", "refl", ["objective.timestep_fraction=0.16"]),
    ("t2v_hunyuan", "refl", ["objective.timestep_fraction=0.16", "model.decode_batch=1"]),
)
"""A launch file of each kind for the paper's baselines, with keys that they want."""


@pytest.mark.parametrize(("name", "kind", "keys"), BASELINES)
def test_the_papers_baselines_train_on_two_ranks(
    name: str, kind: str, keys: list[str], tmp_path: Path
) -> None:
    own = own_reward(tmp_path) if kind == "refl" else "optimizer.batch_size=4"
    for line in trained(name, tmp_path, f"objective.kind={kind}", *keys, own):
        assert line["update/transitions"] > 0 < line["update/grad_norm"]
        assert line["reward/invalid"] == 0.0 and line["update/evaluated_again"] == 0.0
        if kind == "dpo":
            assert 0.0 <= line["update/dpo_accuracy"] <= 1.0
        else:
            assert 0.0 < line["update/refl_reward"] < 255.0


def test_every_flow_is_tried_here() -> None:
    assert set(OF_FAMILIES) == set(models.known()) - {"stable_diffusion"}


def trained(name: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of two iterations on two ranks by a launch file with a tiny folder."""
    importlib.import_module(f"tests.harness.folders.{LAUNCH[name][0]}").write(folder / "model")
    settings = arguments(name, folder / "model", folder / "run", with_images(folder))
    free = (
        "rollout.shared_noise=false",
        "optimizer.updates_per_iteration=1",
        "rollout.sampler=dance",
        "objective.kl_weight=0.0",
    )
    file = str(ROOT / "launch" / f"{name}.sh")
    result = forks.run(file, [*settings, *free, *overrides], ranks=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return runs.metrics(folder / "run")


@pytest.mark.parametrize("name", LAUNCH)
def test_a_launch_file_trains_on_two_ranks(name: str, tmp_path: Path) -> None:
    family, _ = LAUNCH[name]
    model = tmp_path / "model"
    importlib.import_module(f"tests.harness.folders.{family}").write(model)
    file = str(ROOT / "launch" / f"{name}.sh")
    settings = arguments(name, model, tmp_path / "run", with_images(tmp_path))
    if name == "t2v_hunyuan":  # by torchrun itself, for all
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, file, *settings],
            env=environment,
            capture_output=True,
            text=True,
            timeout=runs.LIMIT,
        )
    else:
        result = forks.run(file, settings, ranks=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = runs.metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert line["update/max_log_ratio_first"] <= 1e-6
        assert (
            line["update/transitions"] > 0
            and line["update/grad_norm"] > 0
            and line["reward/invalid"] == 0
        )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
    if name.endswith("_lora"):
        assert_resumes_and_exports(name, [file, *settings], tmp_path)


def assert_resumes_and_exports(name: str, command: list[str], folder: Path) -> None:
    """A run of two iterations goes on to a third; diffusers loads what is exported of it."""
    file, *settings = command
    result = forks.run(file, [*settings, "run.iterations=3"], ranks=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert [line["iteration"] for line in runs.metrics(folder / "run")] == [0, 1, 2]
    export(Export(folder / "run", folder / "exported", lora="merged"))
    pipeline = DiffusionPipeline.from_pretrained(folder / "exported")
    recipe = config.load(folder / "run" / "recipe.toml")
    index = json.loads((folder / "model" / "model_index.json").read_text())
    family, kind = recipe.model.family, index["_class_name"]
    assert type(pipeline).__name__ == models.declared(family, "PIPELINE", kind)
    trained, base = (
        policies.load(recipe.model.model_copy(update={"path": str(path)}), torch.device("cpu"))
        for path in (folder / "exported", folder / "model")
    )
    parts = [getattr(pipeline, part).state_dict() for part in models.networks(family)]
    for policy, same in ((trained, True), (base, False)):  # of two networks one may be untrained
        states = [network.state_dict() for network in networks_of(policy.network).values()]
        pairs = zip(states, parts, strict=True)
        equal = [torch.equal(own[key], part[key]) for own, part in pairs for key in part]
        assert all(equal) == same, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2v_hunyuan", "i2v_skyreels", "t2i_flux", "t2i_sd", "t2v_wan"])
def test_every_family_trains_a_noisy_step_of_each_prompts_own(name: str, tmp_path: Path) -> None:
    """Two noises of each prompt, chosen by scouts in bfloat16, and rows of several times in a
    micro-batch, on two ranks.
    """
    family, _ = LAUNCH[name]
    model = tmp_path / "model"
    importlib.import_module(f"tests.harness.folders.{family}").write(model)
    settings = arguments(name, model, tmp_path / "run", with_images(tmp_path))
    settings += ["rollout.window=1", "rollout.window_schedule=per_prompt"]
    settings += ["rollout.seeds_per_prompt=2", "objective.step_weights=gradient"]
    settings += ["rollout.scouts=4", "rollout.scout_steps=3", "rollout.scout_dtype=bfloat16"]
    settings += [f"rollout.sampler={'dance' if family == 'stable_diffusion' else 'linear'}"]
    result = forks.run(str(ROOT / "launch" / f"{name}.sh"), settings, ranks=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = runs.metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert line["update/max_log_ratio_first"] <= 1e-6
        assert line["update/transitions"] == 2 * 4 and line["update/grad_norm"] > 0
        assert line["update/evaluations"] == 2 * 2
        assert line["scouts/evaluations"] == 2 * 4 * 3 and line["scouts/invalid"] == 0
        assert line["rollout/noisy_step_max"] <= 4 and line["reward/invalid"] == 0
