"""The contract of every reward, checked on drawn clips; a reward that breaks it is told the rule.

Read by `fastgrpo check-reward` for any reward, and by a test for those of rewards/.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import Unavailable, UserError, described
from fastgrpo.core.reward import Reward, RewardSize, Scores
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.handshake import GOLDEN_TOLERANCE
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import golden_clip
from fastgrpo.rewards.serving.server.child import launch_beside

FPS = 8.0
RATES = (0.5, 1.0, 7.5, 8.0, 24.0, 60.0)  # frames per second
LENGTHS = (*range(1, 12), 16, 17, 33, 53, 81, 128)  # frames
ROUNDING = 1e-5  # of networks, where the size of a batch may choose other kernels
MEANINGS = shapes.meanings()[0][:6]
CAPTIONS = [shapes.caption(meaning, i) for i, meaning in enumerate(MEANINGS)]


def clips() -> Tensor:
    """uint8 [6, 9, 32, 32, 3], imperfect, so that the scores use all their bits."""
    noise = np.random.default_rng(0).normal(0.0, 6.0, (6, 9, 32, 32, 3))
    pixels = np.stack([shapes.draw(meaning) for meaning in MEANINGS]) + noise
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Tried:
    """Clips to try a reward with, which must differ, and a prompt for each."""

    pixels: Tensor  # uint8 [B, F, H, W, 3]
    prompts: list[str]


def examples(spec: RewardSpec, reward: Reward) -> Tried:
    """The reward's own; where it has none, the tiny world's clips.

    Raises UserError where it has none and reads more of a prompt's row than its text.
    """
    if reward.examples is None:
        if columns := rewards.columns(spec):
            raise UserError(
                f"rewards.name={spec.name}: reads {' and '.join(columns)} of each prompt's row, "
                "which drawn clips do not have; add --rows FILE, a prompt file that has them."
            )
        return Tried(clips(), CAPTIONS)
    pixels, prompts = reward.examples
    return Tried(pixels, list(prompts))


@dataclass(frozen=True)
class Case:
    """A reward, and the clips that it is tried with."""

    spec: RewardSpec
    reward: Reward
    pixels: Tensor  # uint8 [B, F, H, W, 3]
    prompts: list[str]

    @property
    def least(self) -> int:
        return rewards.least_frames(self.spec)

    def scores(self, pixels: Tensor | None = None, prompts: list[str] | None = None) -> Scores:
        """Scores of these clips, or of others.  pixels: uint8 [B, F, H, W, 3]"""
        with torch.no_grad():
            return self.reward(
                self.pixels if pixels is None else pixels, prompts or self.prompts, FPS
            )


def contract(
    spec: RewardSpec, rules: Sequence[str] | None = None, tried: Tried | None = None
) -> dict[str, list[str]]:
    """What a reward breaks, by rule; an empty list where it keeps one.

    rules: None: all of RULES but `server`, which starts a process
    tried: None: the reward's examples
    Raises UserError where the reward cannot be loaded.
    """
    reward = rewards.load(spec)
    tried = tried or examples(spec, reward)
    case = Case(spec, reward, tried.pixels, tried.prompts)
    chosen = [name for name in RULES if name != "server"] if rules is None else rules
    return {name: _broken(RULES[name][0], case) for name in chosen}


def _broken(rule: Callable[[Case], Iterator[str]], case: Case) -> list[str]:
    """What a reward breaks of one rule; what it raises is that, too."""
    found: list[str] = []
    try:
        found.extend(rule(case))
    except (UserError, Unavailable) as error:
        found.append(str(error))
    except Exception as error:  # anyone's code
        found.append(f"it raised {described(error, rewards.file_of(case.spec))}")
    return found


def seconds_per_clip(spec: RewardSpec, tried: Tried | None) -> tuple[float, str]:
    """Seconds for one clip, in a batch of clips that the reward has not seen, and the clips' size.

    tried: None: the reward's examples
    """
    reward = rewards.load(spec)
    tried = tried or examples(spec, reward)
    with torch.no_grad():
        reward(tried.pixels, tried.prompts, FPS)  # the first call may take longer
        start = time.perf_counter()
        reward(255 - tried.pixels, tried.prompts, FPS)
    _, frames, height, width, _ = tried.pixels.shape
    seconds = (time.perf_counter() - start) / len(tried.pixels)
    return seconds, f"{frames} frames of {height} x {width}"


def declaration(case: Case) -> Iterator[str]:
    """SIZE and LEAST_FRAMES are what the planner and the run take them for; a reload is the same
    reward.
    """
    size = rewards.declared(case.spec, "SIZE", None)
    if size is not None and (
        not isinstance(size, RewardSize) or min(size.parameters, size.tokens) <= 0
    ):
        yield f"SIZE is {size!r}, no RewardSize with parameters and tokens"
    if case.least < 1:
        yield f"LEAST_FRAMES is {case.least}"
    if rewards.load(case.spec).fingerprint != case.reward.fingerprint:
        yield "the fingerprint changes from one load to the next"


def form(case: Case) -> Iterator[str]:
    """Parts have names, and every part has float32 [B] scores."""
    names = case.reward.names
    if (
        not isinstance(names, tuple)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        yield f"names is {names!r}, no tuple of texts"
        return
    before = case.pixels.clone()
    scores, count = case.scores(), len(case.pixels)
    if not torch.equal(before, case.pixels):
        yield "the pixels are changed in place"
    if set(scores.values) != set(names):
        yield f"scores of {sorted(scores.values)} where names says {sorted(names)}"
    for part, column in scores.values.items():
        if column.dtype != torch.float32 or column.shape != (count,):
            yield f"{part} is {column.dtype} {list(column.shape)}, not float32 [{count}]"
    if scores.valid.dtype != torch.bool or scores.valid.shape != (count,):
        yield f"valid is {scores.valid.dtype} {list(scores.valid.shape)}, not bool [{count}]"


def values(case: Case) -> Iterator[str]:
    """Clips that differ have scores that differ, which no constant does."""
    scores = case.scores()
    yield from masked(scores)
    if not scores.valid.all():
        yield "a good clip has no score"
    if all(column.unique().numel() == 1 for column in scores.values.values()):
        yield "every clip has the same score in every part"


def masked(scores: Scores) -> Iterator[str]:
    """A clip is finite in every part, or NaN in every part and not valid."""
    for part, column in scores.values.items():
        if not column[scores.valid].isfinite().all():
            yield f"{part} is not finite in a valid clip"
        if not column[~scores.valid].isnan().all():
            yield f"{part} is a number, not NaN, in a clip without a score"


def batches(case: Case) -> Iterator[str]:
    """A clip's score is the same alone, in another order and beside other clips."""
    whole = table(case.scores())
    alone = [
        table(case.scores(case.pixels[i : i + 1], [case.prompts[i]])) for i in range(len(whole))
    ]
    if not close(torch.cat(alone), whole):
        yield "a clip alone has another score than in a batch"
    turned = table(case.scores(case.pixels.flip(0), case.prompts[::-1]))
    if not close(turned.flip(0), whole):
        yield "the order of a batch changes scores"


def odd_prompts(case: Case) -> Iterator[str]:
    """Odd prompts have a score or none, and change nothing for the clips beside them."""
    plain = table(case.scores())
    for odd in ("", " ", "word " * 5000, "<|VQ_reward|>", "\N{SNOWMAN}"):
        scores = case.scores(prompts=[odd, *case.prompts[1:]])
        yield from masked(scores)
        if not close(table(scores)[1:], plain[1:]):
            yield f"the prompt {odd[:20]!r} changes the scores of other clips"


def unread_prompts(case: Case) -> Iterator[str]:
    """A reward that says that it reads no prompts gives the same scores for others."""
    if not case.reward.reads_prompts and not torch.equal(
        table(case.scores()), table(case.scores(prompts=[""] * len(case.prompts)))
    ):
        yield "reads_prompts is False, and prompts change scores"


def frames(case: Case) -> Iterator[str]:
    """The frames used lie in the clip, are as many as a plan counts, and the others change
    nothing.
    """
    size = rewards.declared(case.spec, "SIZE", None)
    for length, fps in product((n for n in LENGTHS if n >= case.least), RATES):
        used = case.reward.frames_used(length, fps)
        indices = list(range(length)) if used is None else used
        if not indices or not set(indices) <= set(range(length)):
            yield f"frames_used({length}, {fps}) is {used}, not in the clip"
            return
        if isinstance(size, RewardSize) and size.frames_scored(case.spec, length, fps) != len(
            set(indices)
        ):
            yield f"a plan counts other frames than the {len(indices)} of frames_used({length}, {fps})"
    used = case.reward.frames_used(case.pixels.shape[1], FPS)
    if used is not None:
        black = torch.zeros_like(case.pixels)
        black[:, used] = case.pixels[:, used]
        if not torch.equal(table(case.scores(black)), table(case.scores())):
            yield "frames outside frames_used change scores"


def least_frames(case: Case) -> Iterator[str]:
    """The shortest clip that is judged has LEAST_FRAMES frames."""
    for length in range(1, min(max(case.least, 4), case.pixels.shape[1]) + 1):
        try:
            case.scores(case.pixels[:2, :length], case.prompts[:2])
            if length < case.least:
                yield f"a clip of {length} frames is judged, LEAST_FRAMES is {case.least}"
        except ValueError:
            if length >= case.least:
                yield f"a clip of {length} frames is refused, LEAST_FRAMES is {case.least}"


def table(scores: Scores) -> Tensor:
    """float32 [B, parts], NaN made a number that no score has, so that equal tables are equal."""
    return torch.stack(list(scores.values.values()), 1).nan_to_num(nan=-1e30)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tables of scores, float32 [B, parts], are equal but for rounding."""
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


def golden(case: Case) -> Iterator[str]:
    """The golden clip scores the same each time, and what is written down."""
    clip, prompt, fps = golden_clip(case.reward)
    try:
        first, again = (case.reward(clip[None], [prompt], fps) for _ in range(2))
    except ValueError:  # the drawn clip may not be its kind
        return
    if not close(table(first), table(again)):
        yield "the golden clip has another score the second time"
    tolerance = GOLDEN_TOLERANCE[case.spec.dtype]
    for part, expected in (case.reward.golden_scores or {}).items():
        score = float(first.values[part][0])
        if not abs(score - expected) <= tolerance * max(1.0, abs(expected)):
            yield f"the golden clip scores {part}={score:.6g}, and {expected:.6g} is written down"


def server(case: Case) -> Iterator[str]:
    """Behind a reward server it scores as in this process."""
    spec, tolerance = case.spec, GOLDEN_TOLERANCE[case.spec.dtype]
    inside = ScorerInProcess([spec]).score(case.pixels, case.prompts, FPS)[spec.name]
    with (
        TemporaryDirectory(prefix="check-reward-") as folder,
        launch_beside([spec], Path(folder)) as (url, token),
        RewardClient([url], token, [spec.name]) as client,
    ):
        outside = client.score(case.pixels, case.prompts, FPS)[spec.name]
    if not torch.equal(inside.valid, outside.valid):
        yield "behind a server other clips have a score"
    elif not torch.allclose(table(inside), table(outside), rtol=tolerance, atol=tolerance):
        yield "behind a server its scores differ"


RULES: dict[str, tuple[Callable[[Case], Iterator[str]], str]] = {
    "declaration": (declaration, "the file's top says what is so; a reload is the same reward"),
    "form": (form, "one float32 score for each part and clip; the pixels stay as they are"),
    "values": (values, "clips that differ have scores that differ; no NaN in a valid clip"),
    "batches": (batches, "a clip scores the same alone, in another order and beside others"),
    "odd_prompts": (odd_prompts, "odd prompts change nothing for the clips beside them"),
    "unread_prompts": (
        unread_prompts,
        "prompts change scores only where it says that it reads them",
    ),
    "frames": (frames, "frames that it does not name change nothing"),
    "least_frames": (least_frames, "it takes clips from its LEAST_FRAMES on"),
    "golden": (golden, "the golden clip scores the same each time"),
    "server": (server, "behind a reward server it scores the same"),
}
"""Each rule with its check and what a reward keeps."""
