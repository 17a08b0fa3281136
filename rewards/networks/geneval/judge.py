"""GenEval as a reward: what its two files, with the benchmark's weights and with others, share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.config.checks import failing
from fastgrpo.core.errors import UserError, UserErrors
from fastgrpo.core.reward import PromptText, Reward, Scores, row_of
from fastgrpo.rewards.common import clips, options, prompt_rows, weight_files
from fastgrpo.rewards.common.frames import Rule, choose, rule_of
from fastgrpo.rewards.networks.clip import clip_reward
from fastgrpo.rewards.networks.geneval import colours
from fastgrpo.rewards.networks.geneval.colours import Colours
from fastgrpo.rewards.networks.geneval.detector import Detector, weights_in
from fastgrpo.rewards.networks.geneval.rules import (
    Found,
    Specification,
    correct,
    exact,
    graded,
    grouped,
    specification,
)

log = logging.getLogger(__name__)

FRAMES: Rule = "first"
GOLDEN = PromptText("a photo of a bench", {"include": [{"class": "bench", "count": 1}]})
DETECTING = 1.5e9  # bytes at 800 x 1333; one picture at 800 x 800 took 0.88e9 on a CPU


class Options(Section):
    """`rewards.options` of geneval and geneval_hf."""

    rows: str | None = None
    """GenEval's evaluation_metadata.jsonl, or another file of such rows: what each prompt asks.
    None: the prompts' own rows, with prompts.reward_columns = ["tag", "include", "exclude"]."""
    prompt_column: str = "prompt"
    """Column of `rows` with the prompt."""
    clip: str | None = None
    """Folder or hub id of openai/clip-vit-large-patch14, which tells colours."""
    tokenizer: str | None = None
    """Folder or hub repository of CLIP's merges. None: beside the weights, else the public one."""


@dataclass(frozen=True)
class Settings:
    """What a GenEval reward is made of, beside its networks."""

    names: tuple[str, str, str]  # parts: correct, graded, exact
    asked: dict[str, Specification] | None  # by prompt. None: each prompt's own row says it
    rule: Rule  # which frames
    batch_size: int  # pictures per forward pass
    fingerprint: str  # hash of all that makes the scores


class GenEval(Reward):
    """Whether a picture shows the objects, numbers, colours and places that its prompt names."""

    names: tuple[str, ...] = ()  # set by __init__

    def __init__(self, detector: Detector, colour: Colours, settings: Settings) -> None:
        """Take networks that are on their device."""
        self.detector = detector
        self.colour = colour
        self.settings = settings
        self.names = settings.names
        self.fingerprint = settings.fingerprint
        grey = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
        prompt = GOLDEN if settings.asked is None else next(iter(settings.asked))
        self.golden = (grey, prompt, 8.0)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Means over the frames that are used, of each of B clips, float32 [B] in [0, 1].

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: not used
        A prompt without a row, or a network's output that is not finite, makes its clip invalid.
        Raises ValueError for pixels of another form.
        """
        clips.check(pixels, prompts)
        chosen = pixels[:, self.frames_used(pixels.shape[1], fps)].cpu()
        table = torch.full((len(prompts), len(self.names)), float("nan"))
        asked = [self._specification(prompt) for prompt in prompts]
        rows = [row for row, known in enumerate(asked) if known is not None]
        places = [(row, frame) for row in rows for frame in range(chosen.shape[1])]
        judged: dict[int, list[tuple[float, float, float]]] = {}
        for start in range(0, len(places), self.settings.batch_size):
            some = places[start : start + self.settings.batch_size]
            found = self.detector(torch.stack([chosen[place] for place in some]))
            for place, objects in zip(some, found, strict=True):
                known = asked[place[0]]
                assert known is not None  # of `rows` alone
                verdict = self._judge(chosen[place], known, objects)
                judged.setdefault(place[0], []).append(verdict)
        for row, verdicts in judged.items():
            table[row] = torch.tensor(verdicts).mean(0)
        parts = {name: table[:, n].clone() for n, name in enumerate(self.names)}
        return Scores(parts, table.isfinite().all(1))

    def _specification(self, prompt: str) -> Specification | None:
        """What a prompt asks. None: nothing says it, which is logged."""
        if self.settings.asked is not None:
            known = self.settings.asked.get(" ".join(prompt.split()))
            problem = "" if known else "no row of rewards.options.rows is of"
        else:
            try:
                known, problem = specification(row_of(prompt)), ""
            except ValueError as error:
                known, problem = None, f"the row {error} of"
        if problem:
            log.warning("a clip has no score: %s %.80r", problem, prompt)
        return known

    def _judge(
        self, picture: Tensor, asked: Specification, found: list[Found] | None
    ) -> tuple[float, float, float]:
        """The three numbers of a picture, uint8 [H, W, 3]; NaN where the detector failed."""
        if found is None:
            return (float("nan"),) * 3
        groups, known = grouped(found, asked.counting), dict[Found, str]()

        def colour_of(one: Found) -> str:
            if one not in known:
                known[one] = self.colour(picture, one)
            return known[one]

        rules: tuple[Callable[..., float], ...] = (correct, graded, exact)
        values = [float(rule(asked, groups, colour_of)) for rule in rules]
        return values[0], values[1], values[2]

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are judged, of a clip of that many."""
        return choose(self.settings.rule, frames)

    def memory(self, frames: int, height: int, width: int) -> float:
        """Bytes for one clip: its frames in float32, twice, and what the detector makes of a batch."""
        detected = min(frames, self.settings.batch_size)
        return 24.0 * frames * height * width + detected * DETECTING

    def modules(self) -> Sequence[nn.Module]:
        """The networks."""
        return (self.detector, *self.colour.clip.modules())


Locate = Callable[[RewardSpec], Path]


def check_spec(spec: RewardSpec, locate: Locate) -> None:
    """Raise UserError for settings and files with which `load` would fail; no weights are read.

    locate: the detector's file or folder; raises UserError where there is none
    """
    mistakes = failing([partial(one, spec) for one in (_asked, _precision, locate, _clip)])
    if mistakes:
        raise UserErrors(mistakes)


def _precision(spec: RewardSpec) -> None:
    options.device(spec)
    if spec.dtype != "float32":
        raise UserError(
            f"rewards.dtype={spec.dtype}: GenEval's thresholds are those of float32; leave it out."
        )


def _clip(spec: RewardSpec) -> tuple[Options, str]:
    """The options, and the path of the CLIP that they name."""
    chosen = options.parse(spec, Options)
    if chosen.clip is None:
        raise UserError(f"rewards.options.clip: missing; {colours.PUBLISHED.remedy}.")
    try:
        clip_reward.check_spec(colours.spec_of(spec, chosen.clip), colours.PUBLISHED)
    except UserError as error:
        raise UserError(str(error).replace("rewards.path", "rewards.options.clip", 1)) from None
    return chosen, chosen.clip


def _asked(spec: RewardSpec) -> dict[str, Specification] | None:
    """Prompt -> what it asks. None: each prompt's own row says it.

    Raises UserError where the options name rows that are none.
    """
    chosen = options.parse(spec, Options)
    if chosen.rows is None:
        return None
    found = {}
    for prompt, row in prompt_rows.read(chosen.rows, chosen.prompt_column).items():
        try:
            found[prompt] = specification(row)
        except ValueError as error:
            raise UserError(
                f"rewards.options.rows={chosen.rows}: the row of {prompt[:60]!r} {error}; "
                "correct it."
            ) from None
    return found


def load(
    spec: RewardSpec,
    names: tuple[str, str, str],
    locate: Locate,
    detector: Callable[[Path], Detector],
) -> GenEval:
    """The reward of a spec, on its device.

    names: its parts;  locate: the detector's file or folder;  detector: reads that
    Raises UserError as `check_spec`, and for weights that are not the networks'.
    """
    _precision(spec)
    asked, (chosen, clip) = _asked(spec), _clip(spec)
    path, device = locate(spec), options.device(spec)
    colour = colours.build(spec, clip, chosen.tokenizer)
    files = [path / "config.json", weights_in(path)] if path.is_dir() else [path]
    rows = [] if chosen.rows is None else [Path(chosen.rows)]
    scoring = {"clip": colour.clip.fingerprint, "frames": rule_of(spec, FRAMES), "parts": names}
    settings = Settings(
        names=names,
        asked=asked,
        rule=rule_of(spec, FRAMES),
        batch_size=spec.batch_size,
        fingerprint=weight_files.fingerprint([*files, *rows], scoring),
    )
    return GenEval(detector(path).to(device), colour, settings)
