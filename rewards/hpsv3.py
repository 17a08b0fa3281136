"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): human preference by a Qwen2-VL-7B. Part HPSv3.

github.com/MizzenAI/HPSv3. The score is the first of the head's two outputs, without a bound; a
clip's is the mean of its frames'. Departures from the reference:
- a user's text is never read as a special token (see networks/qwen2_vl/reader.py);
- frames are judged as they are, where DanceGRPO's trainers write a file and read it again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.core.config import RewardSpec, Section, paths
from fastgrpo.core.config.checks import failing
from fastgrpo.core.errors import UserErrors
from fastgrpo.core.reward import Download, Reward, RewardSize, Scores
from fastgrpo.rewards.common import clips, options, weight_files
from fastgrpo.rewards.common.frames import Rule, choose, count_by, rule_of
from fastgrpo.rewards.networks.hpsv3.network import Network, build, renamed
from fastgrpo.rewards.networks.hpsv3.preprocess import PIXELS, view
from fastgrpo.rewards.networks.hpsv3.prompt import FORM, TEMPLATE
from fastgrpo.rewards.networks.qwen2_vl import template as templates
from fastgrpo.rewards.networks.qwen2_vl.body import EMBEDDING, Batch, rounds_frequencies
from fastgrpo.rewards.networks.qwen2_vl.patches import View
from fastgrpo.rewards.networks.qwen2_vl.reader import Reader

log = logging.getLogger(__name__)

FRAMES = "first"
# without the language head, which is not loaded; tokens of a picture and about 600 of text
SIZE = RewardSize(parameters=7.75e9, tokens=256 + 600, frames_scored=count_by(FRAMES))

PARTS = ("HPSv3",)
FILE = "HPSv3.safetensors"
DOWNLOADS = {
    "path": Download("MizzenAI/HPSv3", ("HPSv3.safetensors",)),
    "options.base": Download("Qwen/Qwen2-VL-7B-Instruct", ("config.json", "tokenizer.json")),
    "options.template": Download(
        "https://github.com/MizzenAI/HPSv3", ("hpsv3/dataset/data_collator_qwen.py",)
    ),
}
PUBLISHED = "Qwen/Qwen2-VL-7B-Instruct"
"""The hub repository of the base model, of which the config and the tokenizer alone are read."""
REMEDY = f"give {FILE}, from the hub repository MizzenAI/HPSv3, or its folder"
BASE_REMEDY = f"name a folder or hub id of {PUBLISHED}: its config.json and tokenizer.json"


class Options(Section):
    """`rewards.options` of hpsv3."""

    template: str | None = None
    """The official repository's data_collator_qwen.py, or a text file with the whole template."""
    template_sha256: str | None = None
    """SHA-256 of a template that is accepted instead of the official one."""
    base: str | None = None
    """Folder or hub id of Qwen2-VL-7B-Instruct. None: beside the weights, else from the hub."""
    coarse_rotary: bool | None = None
    """Whether rotary frequencies are rounded to bfloat16.

    None: as the reference, where dtype or the checkpoint is bfloat16.
    """


@dataclass(frozen=True)
class Input:
    """A frame and its prompt, ready for the network."""

    ids: list[int]
    view: View


@dataclass(frozen=True)
class Rating:
    """How frames become a clip's score."""

    rule: Rule  # which frames
    batch_size: int  # frames per forward pass
    longest: int  # tokens of text and picture together


class HPSv3(Reward):
    """The mean preference of a clip's frames."""

    names: tuple[str, ...] = PARTS

    def __init__(self, network: Network, reader: Reader, rating: Rating, fingerprint: str) -> None:
        """Take a network that is on its device.  fingerprint: hash of all that makes the scores"""
        self.network = network
        self.reader = reader
        self.rating = rating
        self.fingerprint = fingerprint

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Mean score of the frames that are used, of each of B clips, float32 [B].

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: not used
        A prompt that is too long, or a result that is not finite, makes its clip invalid. With
        batch_size 1 no bit depends on the other clips; above, only the last bits do.
        Raises ValueError for pixels of another form, or frames over 200 times longer than wide.
        """
        clips.check(pixels, prompts)
        chosen = pixels[:, self.frames_used(pixels.shape[1], fps)].cpu()
        raw = torch.full(chosen.shape[:2], float("nan"))
        frames = [(clip, frame) for clip in range(len(chosen)) for frame in range(chosen.shape[1])]
        for start in range(0, len(frames), self.rating.batch_size):
            ready = {
                place: made
                for place in frames[start : start + self.rating.batch_size]
                if (made := self._prepare(chosen[place], prompts[place[0]])) is not None
            }
            if ready:
                places = torch.tensor([*ready])
                raw[places[:, 0], places[:, 1]] = self._score([*ready.values()])
        scores = raw.mean(1)
        valid = scores.isfinite()
        return Scores({PARTS[0]: scores.masked_fill(~valid, float("nan"))}, valid)

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are scored, of a clip of that many."""
        return choose(self.rating.rule, frames)

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes for one clip: its frames as they are and as they are seen, in float32, twice."""
        return 24.0 * frames * max(height * width, PIXELS)

    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return (self.network,)

    def _prepare(self, frame: Tensor, prompt: str) -> Input | None:
        """A frame, uint8 [H, W, 3], and its prompt. None: the prompt does not fit."""
        seen = view(frame)
        try:
            ids = self.reader(prompt, seen.tokens)
        except ValueError as error:
            log.warning("a clip has no score: %s", error)
            return None
        if len(ids) > self.rating.longest:
            log.warning(
                "a clip has no score: its text and picture are %d tokens, above %d",
                len(ids),
                self.rating.longest,
            )
            return None
        return Input(ids, seen)

    def _score(self, inputs: Sequence[Input]) -> Tensor:
        """Scores, float32 [N] on the CPU, of one forward pass."""
        longest = max(len(one.ids) for one in inputs)
        filler = self.reader.filler_id
        batch = Batch(
            ids=torch.tensor([one.ids + [filler] * (longest - len(one.ids)) for one in inputs]),
            patches=torch.cat([one.view.patches for one in inputs]),
            grids=torch.tensor([one.view.grid for one in inputs]),
            marks=torch.tensor([self.reader.marks(one.ids) for one in inputs]),
        )
        scores: Tensor = self.network(batch.to(self.network.body.device))
        return scores.cpu()


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; no weights are read."""
    mistakes = failing([partial(one, spec) for one in (_template, options.device, _local_files)])
    if mistakes:
        raise UserErrors(mistakes)


def _template(spec: RewardSpec) -> tuple[Options, str, str]:
    """The options, the text of the template that they name, and its SHA-256."""
    chosen = options.parse(spec, Options)
    file = templates.check_named(chosen.template, TEMPLATE)
    text = templates.read(file, TEMPLATE)
    return chosen, text, templates.check(text, chosen.template_sha256, file, TEMPLATE)


def _local_files(spec: RewardSpec) -> None:
    """Raise UserError where files that are not on the hub are missing; nothing is fetched."""
    if spec.path is None or not paths.is_hub_id(spec.path):
        _weights(spec)
    base = options.parse(spec, Options).base
    if base is not None and not paths.is_hub_id(base):
        _base_files(base, Path())


def _weights(spec: RewardSpec) -> Path:
    """The file of the weights. Raises UserError where there is none."""
    return weight_files.locate(spec.path, [FILE], beside=[], where="rewards.path", remedy=REMEDY)


def _base_files(base: str | None, folder: Path) -> tuple[Path, Path]:
    """The base model's config.json and tokenizer.json.

    folder: of the weights, where they are looked for without a base
    Raises UserError where one is missing.
    """
    names = ("config.json", "tokenizer.json")
    beside = [folder / name for name in names]
    if base is None and all(file.is_file() for file in beside):
        return beside[0], beside[1]
    config, tokenizer = (
        weight_files.locate(
            base or PUBLISHED, [name], beside=[], where="rewards.options.base", remedy=BASE_REMEDY
        )
        for name in names
    )
    return config, tokenizer


def load(spec: RewardSpec) -> HPSv3:
    """The reward of spec.path, the published file or its folder, on the spec's device.

    Raises UserError for a wrong path, option, template, config or checkpoint.
    """
    chosen, template, template_hash = _template(spec)
    device, dtype = options.device(spec), options.dtype(spec)
    file = _weights(spec)
    config_file, tokenizer_file = _base_files(chosen.base, file.parent)
    base: dict[str, Any] = weight_files.read_json(config_file)
    tensors = renamed(weight_files.read(file), str(file))
    coarse = rounds_frequencies(chosen.coarse_rotary, dtype, tensors)
    network = build(tensors, base, dtype, coarse=coarse, source=str(file))
    config, rows = network.body.config, len(tensors[EMBEDDING])
    reader = Reader(tokenizer_file, template, FORM, config.image_token_id, rows)
    network.to(device)
    rule = rule_of(spec, FRAMES)
    scoring = {
        "template": template_hash,
        "base": base,
        "dtype": spec.dtype,
        "coarse_rotary": coarse,
        "frames": rule,
    }
    fingerprint = weight_files.fingerprint([file, tokenizer_file], scoring)
    rating = Rating(rule, spec.batch_size, config.text_config.max_position_embeddings)
    return HPSv3(network, reader, rating, fingerprint)
