"""A reward as a server holds it: loaded, warm, and with its identity."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import Unavailable, UserError
from fastgrpo.core.reward import Reward
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.judge import OUTAGE_S, patiently, tabulated, told

log = logging.getLogger(__name__)

VERSIONS = {name: version(name) for name in ("torch", "transformers", "pillow")}
"""Versions of the libraries of which another version may score otherwise."""


@dataclass
class Served:
    """A reward, its settings, and its scores of the golden clip once it is warm."""

    reward: Reward
    spec: RewardSpec
    # part -> score; None: the reward cannot judge that clip
    golden: dict[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def file(self) -> Path:
        """The file that defines the reward."""
        return rewards.file_of(self.spec)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what else changes scores; empty: no weights."""
        return self.reward.fingerprint

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that decides scores; replicas that differ in it are not mixed in one run.

        Options count where no fingerprint says what they do; else a path in them may differ from
        machine to machine.
        """
        settings = self.spec.model_dump(include={"name", "dtype", "frames", "threshold"})
        options = {} if self.fingerprint else self.spec.options
        content = [
            code_hash(rewards.FOLDER, self.file),
            VERSIONS,
            list(self.reward.names),
            self.fingerprint,
            settings,
            options,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def frames_used(self, frames: int, fps: float) -> list[int] | None:
        """Indices of the frames that the reward looks at in such a clip, in increasing order.

        None: all of them.
        Raises WireError where the reward cannot say, as of a rate beyond its arithmetic.
        """
        try:
            used = self.reward.frames_used(frames, fps)
        except Exception as error:  # anyone's code, about numbers that anyone sent
            raise wire.WireError(
                f"frames: {self.name} does not say which of {frames} it looks at, at fps={fps:g} "
                f"({type(error).__name__})"
            ) from None
        return None if used is None else sorted({int(index) for index in used})

    def choose(self, clip: wire.Clip, fps: float) -> tuple[Tensor, tuple[int, ...] | None]:
        """The frames that the reward looks at, of what was sent, and their indices.

        returns uint8 [n, H, W, 3] and n indices. None: all frames of the clip
        Raises WireError where a frame that it looks at was not sent.
        """
        wanted = self.frames_used(clip.of, fps)
        if wanted is None:
            if clip.at is not None and len(clip.at) < clip.of:
                raise wire.WireError(
                    f"frames: {self.name} looks at all {clip.of}, and {len(clip.at)} were sent"
                )
            return clip.pixels, None
        sent = {
            index: row
            for row, index in enumerate(clip.at if clip.at is not None else range(clip.of))
        }
        missing = [index for index in wanted if index not in sent]
        if missing:
            raise wire.WireError(f"frames: {self.name} looks at {missing[0]}, which was not sent")
        if len(wanted) == len(clip.pixels):
            return clip.pixels, tuple(wanted)
        return clip.pixels[[sent[index] for index in wanted]], tuple(wanted)

    def warm_up(self) -> None:
        """Score the golden clip, several times at once and alone: as a trial, and for clients.

        Raises UserError where the reward fails at it, other than by a ValueError: that clip may not
        be its kind. What it asks elsewhere is waited for.
        """
        clip, prompt, fps = golden_clip(self.reward)
        try:
            for count in (self._at_once, 1):
                trial = partial(self._scores, clip, prompt, fps, count)
                table = patiently(self.name, trial, OUTAGE_S)
        except UserError:
            raise
        except ValueError as error:
            said = told(error, self.file)  # of our own clip and prompt, which are no secret
            log.warning("%s cannot judge the golden clip: %s", self.name, said)
            self.golden = dict.fromkeys(self.reward.names)
            return
        except Exception as error:  # anyone's code
            raise self._refused(error, "the golden clip") from None
        values = dict(zip(self.reward.names, table[:, 0].tolist(), strict=True))
        self.golden = {
            part: value if value - value == 0.0 else None for part, value in values.items()
        }

    def try_out(self, clip: Tensor, prompt: str, fps: float) -> None:
        """Score a clip of the run's own form, several times at once.  clip: uint8 [F, H, W, 3]

        Raises UserError where the reward raises, or gives other than one score for each, and
        Unavailable as the reward does.
        """
        try:
            self._scores(clip, prompt, fps, self._at_once)
        except (torch.OutOfMemoryError, Unavailable, UserError):
            raise
        except Exception as error:  # anyone's code
            raise self._refused(error, f"a clip of {list(clip.shape)}") from None

    @property
    def _at_once(self) -> int:
        """Clips of a trial: two show whether each gets a score of its own."""
        return min(2, self.spec.batch_size)

    def _scores(self, clip: Tensor, prompt: str, fps: float, count: int) -> Tensor:
        """float32 [parts, count]: scores of a clip that is there `count` times.

        clip: uint8 [F, H, W, 3]
        """
        clips = torch.stack([clip] * count)
        with torch.no_grad():
            scores = self.reward(clips, [prompt] * count, fps)
        return tabulated(self.reward, scores, count)[0]

    def _refused(self, error: Exception, clip: str) -> UserError:
        """The message for a reward that would score nothing, by what it does at a clip."""
        remedy = "correct its file or its settings."
        if columns := rewards.columns(self.spec):
            remedy = (
                f"correct its file: of a prompt without {' and '.join(columns)}, as of this clip, "
                "the score is NaN and not valid."
            )
        return UserError(
            f"rewards.name={self.name}: at {clip} {told(error, self.file)}, so it would score "
            f"nothing; {remedy}"
        )


SCORED_WITH = ("common", "networks", "serving/judge.py")
"""Files and folders of rewards/ that every score depends on, beside the reward's own file."""


def code_hash(folder: Path, own: Path) -> str:
    """SHA-256 of the code that a reward's scores depend on, by path and content.

    folder: rewards/
    own: the reward's file, which may be elsewhere, or missing, as for one that a test defines
    """
    total = hashlib.sha256()
    roots = [own, *(folder / part for part in SCORED_WITH)]
    files = [
        file for root in roots for file in (sorted(root.rglob("*.py")) if root.is_dir() else [root])
    ]
    for file in files:
        if file.is_file():
            path = file.name if file == own else file.relative_to(folder).as_posix()
            total.update(path.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def load_served(spec: RewardSpec) -> Served:
    """Load a reward, weights and all. Raises UserError where its name or its settings are wrong."""
    return Served(rewards.load(spec), spec)


def golden_clip(reward: Reward | None) -> tuple[Tensor, str, float]:
    """A reward's own golden clip, or a drawn one of nine frames of 32 x 32.

    returns uint8 [F, H, W, 3], its prompt, its frames per second
    """
    if reward is not None and reward.golden is not None:
        return reward.golden
    meaning = shapes.meanings()[0][0]
    return torch.from_numpy(shapes.draw(meaning)), shapes.caption(meaning, 0), float(shapes.FPS)
