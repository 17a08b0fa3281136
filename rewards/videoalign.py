"""VideoAlign (VideoReward): visual quality, motion quality and text alignment by a Qwen2-VL-2B.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv 2501.13918);
github.com/KwaiVGI/VideoAlign. Scores equal the reference's: same frames, pixels, text, positions
and weights. Departures from the reference:
- a clip that cannot be judged has no score; the DanceGRPO code scores it -1;
- a user's text is never read as a special token (see networks/qwen2_vl/reader.py);
- adapters are folded into the weights in float32 and the head is applied in float32, where the
  reference's bfloat16 run rounds in between.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.config.checks import failing
from fastgrpo.core.errors import UserError, UserErrors
from fastgrpo.core.reward import Download, Reward, RewardSize, Scores
from fastgrpo.rewards.common import clips, options, weight_files
from fastgrpo.rewards.networks.qwen2_vl import template as templates
from fastgrpo.rewards.networks.qwen2_vl.body import EMBEDDING, Batch, rounds_frequencies
from fastgrpo.rewards.networks.qwen2_vl.patches import View
from fastgrpo.rewards.networks.qwen2_vl.reader import Reader
from fastgrpo.rewards.networks.videoalign import sampling
from fastgrpo.rewards.networks.videoalign.checkpoint import (
    BASE,
    check_precision,
    find,
    find_folder,
    read,
)
from fastgrpo.rewards.networks.videoalign.config import PARTS, Published, published
from fastgrpo.rewards.networks.videoalign.network import Network, build
from fastgrpo.rewards.networks.videoalign.preprocess import frame_indices, view
from fastgrpo.rewards.networks.videoalign.prompt import FORM, TEMPLATE

log = logging.getLogger(__name__)

DOWNLOADS = {
    "path": Download("KlingTeam/VideoReward", ("model_config.json", "checkpoint-*/*")),
    "options.base": Download("Qwen/Qwen2-VL-2B-Instruct", ("config.json", "tokenizer.json")),
    "options.template": Download("https://github.com/KwaiVGI/VideoAlign", ("prompt_template.py",)),
}
LEAST_FRAMES = sampling.LEAST_FRAMES


def frames_scored(spec: RewardSpec, frames: int, fps: float) -> int:
    """Number of frames that the network reads of a clip, by the published config.

    frames: of the clip;  fps: frames per second
    """
    return sampling.sampled(frames, fps, sampling.PUBLISHED_FPS)


# assumed of Qwen2-VL-2B, for a frame of 448 x 448
SIZE = RewardSize(parameters=2.2e9, tokens=1300, frames_scored=frames_scored)


class Options(Section):
    """`rewards.options` of videoalign."""

    template: str | None = None
    """The official repository's prompt_template.py, or a text file with the template."""
    template_sha256: str | None = None
    """SHA-256 of a template that is accepted instead of the official one."""
    base: str | None = None
    """Folder or hub id of Qwen2-VL-2B-Instruct. None: what model_config.json names.

    Not needed once converted.
    """
    raw: bool = False
    """Scores as the network gives them, without the checkpoint's mean and standard deviation."""
    coarse_rotary: bool | None = None
    """Whether rotary frequencies are rounded to bfloat16.

    None: as the reference, where dtype or the checkpoint is bfloat16.
    """


@dataclass(frozen=True)
class Input:
    """A clip and its prompt, ready for the network."""

    ids: list[int]
    view: View


class VideoAlign(Reward):
    """VQ, MQ and TA of clips, at the declared fps: at another fps the frames are another clip."""

    names: tuple[str, ...] = PARTS

    def __init__(
        self,
        network: Network,
        reader: Reader,
        settings: Published,
        batch_size: int,
        longest: int,
        fingerprint: str,
    ) -> None:
        """Take a network that is on its device.

        batch_size: clips per forward pass;  longest: tokens of text and video together
        fingerprint: hash of all that makes the scores
        """
        self.network = network
        self.reader = reader
        self.settings = settings
        self.batch_size = batch_size
        self.longest = longest
        self.fingerprint = fingerprint

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """VQ, MQ and TA of B clips, float32 [B] each.

        pixels: uint8 [B, F, H, W, 3], F >= 2;  prompts: B texts;  fps: frames per second, above 0
        A prompt that is too long, or a result that is not finite, makes its clip invalid. With
        batch_size 1 no bit depends on the other clips; above, only the last bits do.
        Raises ValueError for pixels of another form, a single frame, or a frame over 200 times
        longer than wide.
        """
        clips.check(pixels, prompts)
        if not fps > 0.0:
            raise ValueError(f"fps={fps}: must be above 0; say how fast the clips play")
        raw = torch.full((len(prompts), len(PARTS)), float("nan"))
        for start in range(0, len(prompts), self.batch_size):
            some = range(start, min(start + self.batch_size, len(prompts)))
            ready = {
                i: made
                for i in some
                if (made := self._prepare(pixels[i].cpu(), prompts[i], fps)) is not None
            }
            if ready:
                raw[list(ready)] = self._score(list(ready.values()))
        mean, std = torch.tensor([self.settings.mean, self.settings.std], dtype=torch.float64)
        values = ((raw.double() - mean) / std).float()
        valid = values.isfinite().all(1)
        values[~valid] = float("nan")
        return Scores({part: values[:, n].clone() for n, part in enumerate(PARTS)}, valid)

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are sampled: only these need to travel to a server."""
        if frames < LEAST_FRAMES:
            return list(range(frames))
        return frame_indices(frames, fps, self.settings.fps)

    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return (self.network,)

    def _prepare(self, clip: Tensor, prompt: str, fps: float) -> Input | None:
        """A clip and its prompt as the network's input. None: the prompt does not fit.

        clip: uint8 [F, H, W, 3];  fps: frames per second
        """
        seen = view(clip, fps, self.settings.fps, self.settings.most_pixels)
        try:
            ids = self.reader(prompt, seen.tokens)
        except ValueError as error:
            log.warning("a clip has no score: %s", error)
            return None
        if len(ids) > self.longest:
            log.warning(
                "a clip has no score: its text and video are %d tokens, above %d",
                len(ids),
                self.longest,
            )
            return None
        return Input(ids, seen)

    def _score(self, inputs: Sequence[Input]) -> Tensor:
        """Raw scores, float32 [N, 3] on the CPU, of one forward pass."""
        device = self.network.head.device
        longest = max(len(one.ids) for one in inputs)
        ids = torch.tensor(
            [one.ids + [self.reader.filler_id] * (longest - len(one.ids)) for one in inputs]
        )
        batch = Batch(
            ids=ids,
            patches=torch.cat([one.view.patches for one in inputs]),
            grids=torch.tensor([one.view.grid for one in inputs]),
            marks=torch.tensor([self.reader.marks(one.ids) for one in inputs]),
        )
        scores: Tensor = self.network(batch.to(device))
        return scores.cpu()


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; no weights are read."""
    several = (_template, options.device, lambda one: find_folder(one.path))
    mistakes = failing([partial(one, spec) for one in several])
    if mistakes:
        raise UserErrors(mistakes)


def _template(spec: RewardSpec) -> tuple[Options, str]:
    """The options, and the text of the template that they name."""
    chosen = options.parse(spec, Options)
    if spec.frames is not None:
        raise UserError(
            f"rewards.frames={spec.frames}: videoalign chooses its frames by rewards.fps; leave it "
            "out."
        )
    return chosen, templates.read(templates.check_named(chosen.template, TEMPLATE), TEMPLATE)


def load(spec: RewardSpec) -> VideoAlign:
    """The reward of spec.path, a published or converted folder, on the spec's device.

    Raises UserError for a wrong path, option, template, config or checkpoint.
    """
    chosen, template = _template(spec)
    device, dtype = options.device(spec), options.dtype(spec)
    assert chosen.template is not None
    file, accepted = Path(chosen.template), chosen.template_sha256
    template_hash = templates.check(template, accepted, file, TEMPLATE)
    checkpoint = find(spec.path, chosen.base)
    settings = published(checkpoint.content, chosen.raw)
    check_precision(checkpoint, dtype)
    if checkpoint.tokenizer is None:
        raise UserError(f"rewards.options.base: no tokenizer.json; {BASE}.")
    tensors = read(checkpoint, dtype).tensors
    coarse = rounds_frequencies(chosen.coarse_rotary, dtype, tensors)
    source = str(checkpoint.files[-1])
    network = build(tensors, checkpoint.base, dtype, coarse=coarse, source=source)
    config = network.body.config
    rows = len(tensors[EMBEDDING])
    reader = Reader(checkpoint.tokenizer, template, FORM, config.video_token_id, rows)
    network.to(device)
    scoring = {
        "template": template_hash,
        "content": checkpoint.content,
        "base": checkpoint.base,
        "dtype": spec.dtype,
        "raw": chosen.raw,
        "coarse_rotary": coarse,
    }
    fingerprint = weight_files.fingerprint([*checkpoint.files, checkpoint.tokenizer], scoring)
    return VideoAlign(
        network=network,
        reader=reader,
        settings=settings,
        batch_size=spec.batch_size,
        longest=config.text_config.max_position_embeddings,
        fingerprint=fingerprint,
    )
