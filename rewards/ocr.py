"""Rendered text: how near the text in a picture is to the text that the prompt asks for. Part OCR.

The idea is flow_grpo's text-rendering reward (Liu et al. 2025, arXiv 2505.05470). Departures:
- what was read is compared as a whole, surplus letters included; there a picture that contains the
  text anywhere has full marks, which pays for endless text (`rule` = "flow_grpo" does so here);
- a prompt that asks for no text has no score, instead of an error or 0;
- a clip is the mean of all its chosen frames, not of those with a score above 0;
- pictures reach the engine in its own order of channels.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.config.checks import failing
from fastgrpo.core.errors import UserError, UserErrors
from fastgrpo.core.reward import Reward, Scores, row_of
from fastgrpo.data.lettering import lettering
from fastgrpo.rewards.common import clips, options, prompt_rows, weight_files
from fastgrpo.rewards.common.frames import Rule, choose, rule_of
from fastgrpo.rewards.networks.ocr import engine as engines
from fastgrpo.rewards.networks.ocr.engine import Engine
from fastgrpo.rewards.networks.ocr.matching import plain, quoted, similarity

log = logging.getLogger(__name__)

FRAMES = 4
PARTS = ("OCR",)
GOLDEN = {'a sign that says "OPEN"': "OPEN"}
"""The prompt of the clip that a server scores at its start, and the text that is drawn for it."""
SHOWN = 6  # pictures of a text, each with a letter less than the one before


class Options(Section):
    """`rewards.options` of ocr."""

    rows: str | None = None
    """File with a row for each prompt that says its text. None: the prompt's own row, where
    prompts.reward_columns names `text_column`, else its first quoted part."""
    prompt_column: str = "prompt"
    """Column of `rows` with the prompt."""
    text_column: str = "text"
    """Column of `rows`, or of the prompts' own rows, with the text that a picture should show."""
    rule: Literal["edit", "flow_grpo"] = "edit"
    """edit: the normalised edit distance; flow_grpo: 1, too, where the text is contained."""
    surplus: Annotated[float, Field(ge=0, le=1)] = 1.0
    """What a letter before or after the text costs: 1 as any other edit, 0 nothing."""
    threads: Annotated[int, Field(gt=0)] = 1
    """Threads that read one picture."""


class Ocr(Reward):
    """Text of pictures against the text asked for; each is read alone, so batching changes no bit."""

    names: tuple[str, ...] = PARTS

    def __init__(self, engine: Engine, settings: Options, rule: Rule, fingerprint: str) -> None:
        """Take an engine.  rule: which frames;  fingerprint: hash of all that makes the scores"""
        self.engine = engine
        self.settings = settings
        self.rule = rule
        self.fingerprint = fingerprint
        self.targets = _targets(settings)
        prompt, text = next(iter((self.targets or GOLDEN).items()))
        self.golden = (drawn(text)[None], prompt, 8.0)
        self.golden_scores = None if self.targets else {PARTS[0]: 1.0}
        self.examples = examples(list((self.targets or {'a sign "MONDAY"': "MONDAY"}).items()))

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Mean similarity of the frames that are used, float32 [B] in [0, 1].

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: not used
        A clip whose prompt asks for no text is invalid.
        Raises ValueError for pixels of another form.
        """
        clips.check(pixels, prompts)
        chosen = pixels[:, self.frames_used(pixels.shape[1], fps)].cpu().numpy()
        scores = torch.full((len(prompts),), float("nan"))
        for n, prompt in enumerate(prompts):
            target = self.target(prompt)
            if target is None:
                log.warning("a clip has no score: its prompt asks for no text: %.60r", prompt)
                continue
            near = [
                similarity(
                    self.engine(frame),
                    target,
                    self.settings.surplus,
                    contained_is_perfect=self.settings.rule == "flow_grpo",
                )
                for frame in chosen[n]
            ]
            scores[n] = sum(near) / len(near)
        return Scores({PARTS[0]: scores}, ~scores.isnan())

    def target(self, prompt: str) -> str | None:
        """The text that a picture of this prompt should show. None: it asks for no letter."""
        if self.targets is None:
            own = row_of(prompt).get(self.settings.text_column)
            text = quoted(prompt) if own is None else str(own)
        else:
            text = self.targets.get(" ".join(prompt.split()))  # as prompts of a file are read
        return text if text is not None and plain(text) else None

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are read, of a clip of that many."""
        return choose(self.rule, frames)

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes for one clip: its frames are read one after the other.

        160 bytes per pixel is above what pictures of 1024 and 2048 pixels took.
        """
        return 160.0 * height * width


def _targets(settings: Options) -> dict[str, str] | None:
    """Prompt -> text of the file that the options name. None: they name none."""
    if settings.rows is None:
        return None
    found = prompt_rows.read(settings.rows, settings.prompt_column, settings.text_column)
    return {prompt: str(values[settings.text_column]) for prompt, values in found.items()}


def drawn(text: str, size: int = 40) -> Tensor:
    """A picture of black text on white, uint8 [H, W, 3].  size: of the letters, pixels"""
    font, (shown,) = lettering([text], size)
    width = int(font.getlength(shown))
    picture = Image.new("RGB", (width + 2 * size, 3 * size), "white")
    ImageDraw.Draw(picture).text((size, size), shown, fill="black", font=font)
    return torch.from_numpy(np.array(picture))


def examples(targets: Sequence[tuple[str, str]]) -> tuple[Tensor, list[str]]:
    """Clips that show less and less of the text they are asked for.

    targets: prompts and their texts, taken in turn;  returns uint8 [6, 9, H, W, 3] and the prompts
    """
    asked = [targets[n % len(targets)] for n in range(SHOWN)]
    pictures = [drawn(text[: max(1, len(text) - n)]) for n, (_, text) in enumerate(asked)]
    width = max(picture.shape[1] for picture in pictures)
    white = torch.full((SHOWN, 9, pictures[0].shape[0], width, 3), 255, dtype=torch.uint8)
    for n, picture in enumerate(pictures):
        white[n, :, :, : picture.shape[1]] = picture
    return white, [prompt for prompt, _ in asked]


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings with which `load` would fail; no model is loaded."""
    mistakes = failing([partial(one, spec) for one in (_settings, _machine)])
    if mistakes:
        raise UserErrors(mistakes)


def _settings(spec: RewardSpec) -> Options:
    """The options. Raises UserError where they, or the rows that they name, are wrong."""
    chosen = options.parse(spec, Options)
    _targets(chosen)
    return chosen


def _machine(spec: RewardSpec) -> None:
    """Raise UserError for keys that choose what this engine has not, or a missing package."""
    if spec.path is not None:
        raise UserError(f"rewards.path={spec.path}: ocr brings its own models; leave it out.")
    if spec.device not in ("auto", "cpu") or spec.dtype != "float32":
        key, value = ("device", spec.device) if spec.dtype == "float32" else ("dtype", spec.dtype)
        raise UserError(f"rewards.{key}={value}: ocr reads on the CPU, in float32; leave it out.")
    engines.model_files()


def load(spec: RewardSpec) -> Ocr:
    """The reward of the file's name. Raises UserError as `check_spec`."""
    _machine(spec)
    chosen, rule = options.parse(spec, Options), rule_of(spec, FRAMES)
    scoring = {
        "rule": chosen.rule,
        "surplus": chosen.surplus,
        "columns": [chosen.prompt_column, chosen.text_column],
        "frames": rule,
        "versions": engines.versions(),
    }
    rows = [] if chosen.rows is None else [Path(chosen.rows)]
    fingerprint = weight_files.fingerprint([*engines.model_files(), *rows], scoring)
    return Ocr(engines.build(chosen.threads), chosen, rule, fingerprint)
