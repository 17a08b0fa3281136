"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): objects, numbers, colours and places.

Parts: `GenEval`, the benchmark's verdict, 1 or 0; `graded`, how much of the prompt a picture shows,
0 to 1, the reward to train on; `exact`, 1 where nothing is missing or too many. The detector has
the benchmark's own weights, of OpenMMLab, in plain torch; a detector that was trained again is the
reward geneval_hf. Departures: pictures reach the detector with their channels in order, which some
reward servers exchange, and see networks/geneval/rules.py of `graded`.
"""

from pathlib import Path

from fastgrpo.core.config import RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Download, RewardSize
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.geneval import judge
from fastgrpo.rewards.networks.geneval.detector import of_openmmlab

FRAMES = "first"
# Mask2Former with Swin-S and CLIP ViT-L/14; tokens: for the detector's 0.44e12 FLOPs at 800 x 800
# and an object's colour
SIZE = RewardSize(parameters=0.497e9, tokens=650, frames_scored=count_by(FRAMES))

PARTS = ("GenEval", "graded", "exact")
DOWNLOADS = {
    "path": Download(
        "https://github.com/open-mmlab/mmdetection",
        ("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",),
    ),
    "options.clip": Download(
        "openai/clip-vit-large-patch14",
        ("model.safetensors", "config.json", "preprocessor_config.json", "merges.txt"),
    ),
    "options.rows": Download(
        "https://github.com/djghosh13/geneval", ("prompts/evaluation_metadata.jsonl",)
    ),
}
REMEDY = (
    "give mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth, from "
    "mmdetection's model zoo"
)


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; no weights are read."""
    judge.check_spec(spec, locate)


def columns(spec: RewardSpec) -> tuple[str, ...]:
    """The columns of the prompts' own rows that are read, where no file of rows is named."""
    return () if spec.options.get("rows") else ("include",)


def locate(spec: RewardSpec) -> Path:
    """The file of the detector's weights. Raises UserError where there is none."""
    if spec.path is None or paths.is_hub_id(spec.path) or not Path(spec.path).is_file():
        told = "missing" if spec.path is None else "no such file"
        where = "rewards.path" if spec.path is None else f"rewards.path={spec.path}"
        raise UserError(f"{where}: {told}; {REMEDY}.")
    return Path(spec.path)


def load(spec: RewardSpec) -> judge.GenEval:
    """The reward of the file's name."""
    return judge.load(spec, PARTS, locate, of_openmmlab)
