"""How a launch file is tried with a tiny folder: which one, its frames, the overrides of a page."""

import json
import re
import shlex
from pathlib import Path

from PIL import Image

from tests import ROOT

LAUNCH = {
    "t2v_hunyuan": ("hunyuan_video", 5),
    "t2v_hunyuan_fast": ("hunyuan_video", 5),
    "t2v_hunyuan15": ("hunyuan_video_15", 5),
    "t2v_hunyuan15_lora": ("hunyuan_video_15", 5),
    "i2v_hunyuan15": ("hunyuan_video_15_i2v", 5),
    "i2v_hunyuan15_lora": ("hunyuan_video_15_i2v", 5),
    "t2i_hunyuan": ("hunyuan_video", 1),
    "i2v_skyreels": ("skyreels_i2v", 5),
    "t2i_flux": ("flux", 1),
    "t2i_sd": ("stable_diffusion", 1),
    "t2v_wan": ("wan", 5),
    "t2v_wan22": ("wan_i2v", 5),
    "t2v_wan22_lora": ("wan_i2v", 5),
    "i2v_wan22": ("wan_i2v", 5),
    "i2v_wan22_lora": ("wan_i2v", 5),
    "i2v_wan": ("wan_i2v_14b", 5),
    "i2v_wan_lora": ("wan_i2v_14b", 5),
    "t2v_wan22_a14b": ("wan_a14b", 5),
    "t2v_wan22_a14b_lora": ("wan_a14b", 5),
    "i2v_wan22_a14b": ("wan_a14b_i2v", 5),
    "i2v_wan22_a14b_lora": ("wan_a14b_i2v", 5),
    "t2i_sd3": ("stable_diffusion_3", 1),
    "t2i_sd3_lora": ("stable_diffusion_3", 1),
    "t2i_flux2": ("flux_2", 1),
    "t2i_flux2_lora": ("flux_2", 1),
    "t2i_qwen": ("qwen_image", 1),
    "t2i_qwen_lora": ("qwen_image", 1),
    "t2i_zimage": ("z_image", 1),
    "t2i_zimage_lora": ("z_image", 1),
}
"""By a launch file's name: its tiny folder, by the family that alone reads it, and a clip's frames.
"""


def reads_image(name: str) -> bool:
    """Whether a launch file's prompts have reference images."""
    return name.startswith("i2v_")


def overrides() -> list[str]:
    """The block of docs/recipes.md."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    block = re.search(r"^```overrides\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    return shlex.split(block[1])


def with_images(folder: Path) -> Path:
    """A prompt file of image-to-video, its pictures of another aspect ratio than the clips."""
    rows = []
    for number in range(6):
        picture = Image.new("RGB", (48 + 8 * number, 40), (40 * number, 90, 160))
        picture.save(folder / f"{number}.png")
        prompt = f"a boat of kind {number} leaves the shore"
        rows.append(json.dumps({"prompt": prompt, "image": f"{number}.png"}))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


def arguments(name: str, model: Path | str, run: Path | str, prompts: Path | str) -> list[str]:
    """The overrides with which a launch file trains on the folder `model` into the folder `run`.

    prompts: the file of `with_images`, which image-to-video alone takes
    """
    folder, frames = LAUNCH[name]
    extra = [f"model.path={model}", f"run.dir={run}", f"video.frames={frames}"]
    if reads_image(name):
        extra += [f"prompts.train={prompts}"]
    if folder == "skyreels_i2v":
        extra += [f"model.network={model}/transformer"]
    return [*overrides(), *extra]
