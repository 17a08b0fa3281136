"""VisionReward's score of clips, from the answers that its own environment wrote to a file.

VisionReward-Video (Xu et al. 2024, arXiv 2412.21059) needs transformers 4.42 and remote code, so it
answers its 29 questions elsewhere; its formula is applied here. With p_i the probability of yes:

  VisionReward    mean_i w_i (2 p_i - 1), the published mean_i w_i x_i where every p is 0 or 1
  VisionReward_p  mean_i w_i p_i, the literal reading of the "probability version" of DanceGRPO's
                  Table 5, whose formula is not published

A row of the file belongs to the clip with its pixels and its prompt, and to no other: a clip
without a row has no score.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.common import checklist, clips, options, weight_files

PARTS = ("VisionReward", "VisionReward_p")
FREE_OPTIONS = ("scores", "question_weights")
QUESTIONS = 29
WEIGHTS_SHA256 = "0c6367f244ae64fa881e93f0033f2a4362176893ed2f946223ec64a57e3c9204"
"""SHA-256 of the authors' weight.json for video, whose weights add up to 6.27717."""

Key = tuple[str, str]  # SHA-256 of a clip's pixels, prompt


class Options(Section):
    """`rewards.options` of vision_reward."""

    scores: str = ""
    """File with a JSON object a line: "pixels", "prompt", and "yes", the probability of yes of each
    question."""
    question_weights: str = ""
    """The authors' VisionReward_Video/weight.json."""
    weights_sha256: str | None = None
    """SHA-256 of another file of weights that is to be taken. None: only the authors'."""


class VisionReward(Reward):
    """Scores by the answers in a file."""

    names: tuple[str, ...] = PARTS

    def __init__(self, yes: Mapping[Key, Tensor], weights: Tensor, fingerprint: str) -> None:
        """yes: clip -> float64 [questions];  weights: float64 [questions]"""
        self.yes = yes
        self.weights = weights
        self.fingerprint = fingerprint

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """The file's scores of B clips, float32 [B] each, NaN where it has none.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: frames per second, not read
        """
        clips.check(pixels, prompts)
        missing = torch.full((len(self.weights),), math.nan, dtype=torch.float64)
        rows = [
            self.yes.get((digest(clip), prompt), missing)
            for clip, prompt in zip(pixels, prompts, strict=True)
        ]
        yes = torch.stack(rows, 1)
        values = (checklist.signed_mean(yes, self.weights), self.weights @ yes / len(self.weights))
        valid = torch.isfinite(values[0])
        return Scores({part: own.float() for part, own in zip(PARTS, values, strict=True)}, valid)


def digest(clip: Tensor) -> str:
    """SHA-256 of a clip's pixels, uint8 [F, H, W, 3], frame after frame, row after row."""
    return hashlib.sha256(clip.cpu().contiguous().numpy().tobytes()).hexdigest()


def read_answers(file: str, where: str) -> dict[Key, Tensor]:
    """Each clip's probabilities of yes, float64 [questions], by pixels and prompt.

    Raises UserError for a line that has no such answers, and for one in which no answer is yes.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}={file}: cannot be read ({error}); name the file that VisionReward's own "
            "environment wrote."
        ) from None
    found: dict[Key, Tensor] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line, f"{where}={file}, line {number}")
        key = (str(row["pixels"]).lower(), str(row["prompt"]))
        if key in found:
            raise UserError(
                f"{where}={file}, line {number}: that clip was there before; write each once."
            )
        found[key] = torch.tensor(row["yes"], dtype=torch.float64)
    if not found:
        raise UserError(f"{where}={file}: has no scores; write a JSON object a line.")
    return found


def _row(line: str, where: str) -> dict[str, object]:
    """One line's object, checked."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    texts = isinstance(row, dict) and all(
        isinstance(row.get(key), str) for key in ("pixels", "prompt")
    )
    if not isinstance(row, dict) or not texts or not isinstance(row.get("yes"), list):
        raise UserError(
            f'{where}: is no object with the texts "pixels" and "prompt" and the list "yes"; write '
            "it again."
        )
    answers = row["yes"]
    numbers = all(isinstance(p, int | float) and not isinstance(p, bool) for p in answers)
    if len(answers) != QUESTIONS or not numbers or not all(0 <= p <= 1 for p in answers):
        raise UserError(
            f'{where}: "yes" is no list of {QUESTIONS} probabilities from 0 to 1; write it again.'
        )
    if not any(answers):
        raise UserError(
            f"{where}: no answer is yes, the score -0.2164542 of a clip of which not one answer "
            "was understood; look at what VisionReward's environment printed, and write it again."
        )
    return row


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail."""
    load(spec)


def load(spec: RewardSpec) -> VisionReward:
    """The reward of the file's name."""
    chosen = options.parse(spec, Options)
    for key in ("frames", "path"):
        if getattr(spec, key) is not None:
            raise UserError(
                f"rewards.{key}={getattr(spec, key)}: vision_reward has no use for it; leave it out."
            )
    for name in ("scores", "question_weights"):
        if not getattr(chosen, name):
            raise UserError(
                f"rewards.options.{name}: missing; name the file, see "
                "docs/guides/rewards/vlm_judge.md."
            )
    file, where = chosen.question_weights, "rewards.options.question_weights"
    weights = checklist.read_weights(file, where, QUESTIONS)
    found = sha256(Path(file))
    if found != (chosen.weights_sha256 or WEIGHTS_SHA256).lower():
        raise UserError(
            f"{where}={file}: its SHA-256 is {found}, not that of VisionReward's weights; name its "
            "weight.json, use checklist for weights of your own, or accept this file with "
            "rewards.options.weights_sha256."
        )
    answers = read_answers(chosen.scores, "rewards.options.scores")
    total = weight_files.fingerprint([Path(chosen.scores), Path(file)], {})
    return VisionReward(answers, weights, total)
