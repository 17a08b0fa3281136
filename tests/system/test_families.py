"""Every launch file starts and trains on two CPU ranks: text through the encoders to clips, rewards
and updates.

The overrides are those that docs/recipes.md lists, read from there.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.harness import forks, runs

LAUNCH = {
    "t2v_hunyuan": ("hunyuan_video", 5),
    "t2v_hunyuan_fast": ("hunyuan_video", 5),
    "t2i_hunyuan": ("hunyuan_video", 1),
    "i2v_skyreels": ("skyreels_i2v", 5),
    "t2i_flux": ("flux", 1),
    "t2i_sd": ("stable_diffusion", 1),
    "t2v_wan": ("wan", 5),
}


def overrides() -> list[str]:
    """The block of docs/recipes.md."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    block = re.search(r"^```overrides\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    return shlex.split(block[1])


def with_images(folder: Path) -> Path:
    """A prompt file of image-to-video, with pictures of another aspect ratio than the clips."""
    rows = []
    for number in range(6):
        Image.new("RGB", (48 + 8 * number, 40), (40 * number, 90, 160)).save(
            folder / f"{number}.png"
        )
        rows.append(
            json.dumps(
                {"prompt": f"a boat of kind {number} leaves the shore", "image": f"{number}.png"}
            )
        )
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


def test_every_launch_file_is_tried_here() -> None:
    assert {file.stem for file in (ROOT / "launch").glob("*.toml")} == {*LAUNCH, "t2v_tiny"}


@pytest.mark.parametrize("name", LAUNCH)
def test_a_launch_file_trains_on_two_ranks(name: str, tmp_path: Path) -> None:
    family, frames = LAUNCH[name]
    model = tmp_path / "model"
    importlib.import_module(f"tests.harness.folders.{family}").write(model)
    extra = [f"model.path={model}", f"run.dir={tmp_path / 'run'}", f"video.frames={frames}"]
    if family == "skyreels_i2v":
        extra += [
            f"model.network={model / 'transformer'}",
            f"prompts.train={with_images(tmp_path)}",
        ]
    file, arguments = str(ROOT / "launch" / f"{name}.sh"), [*overrides(), *extra]
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
            [*command, file, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=runs.LIMIT,
        )
    else:
        result = forks.run(file, arguments, ranks=2)
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
