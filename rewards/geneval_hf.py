"""GenEval's rules with a detector of transformers, which is not the benchmark's.

The same architecture after another training run has other scores, so above all counting, at a
threshold of 0.9, differs. The parts have names of their own, so that no table takes them for
GenEval: `GenEval_hf`, `graded_hf`, `exact_hf`, as those of geneval.
"""

from pathlib import Path

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Download, RewardSize
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.geneval import judge
from fastgrpo.rewards.networks.geneval.detector import of_transformers

FRAMES = "first"
# as of geneval
SIZE = RewardSize(parameters=0.497e9, tokens=650, frames_scored=count_by(FRAMES))

PARTS = ("GenEval_hf", "graded_hf", "exact_hf")
DOWNLOADS = {
    "path": Download(
        "facebook/mask2former-swin-small-coco-instance",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
    ),
    "options.clip": Download(
        "openai/clip-vit-large-patch14",
        ("model.safetensors", "config.json", "preprocessor_config.json", "merges.txt"),
    ),
    "options.rows": Download(
        "https://github.com/djghosh13/geneval", ("prompts/evaluation_metadata.jsonl",)
    ),
}
REMEDY = "give the downloaded folder of facebook/mask2former-swin-small-coco-instance"


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; no weights are read."""
    judge.check_spec(spec, locate)


def columns(spec: RewardSpec) -> tuple[str, ...]:
    """The columns of the prompts' own rows that are read, where no file of rows is named."""
    return () if spec.options.get("rows") else ("include",)


def locate(spec: RewardSpec) -> Path:
    """The detector's folder. Raises UserError where there is none."""
    if spec.path is None or not (Path(spec.path) / "config.json").is_file():
        where = "rewards.path" if spec.path is None else f"rewards.path={spec.path}"
        raise UserError(f"{where}: no folder with a config.json; {REMEDY}.")
    return Path(spec.path)


def load(spec: RewardSpec) -> judge.GenEval:
    """The reward of the file's name."""
    return judge.load(spec, PARTS, locate, of_transformers)
