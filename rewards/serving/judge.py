"""One batch of clips through one reward: a score that is missing is NaN."""

import logging
import random
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.core.config.checks import LONGEST_WAIT_S
from fastgrpo.core.errors import Unavailable, UserError, described
from fastgrpo.core.reward import Reward, Scores

log = logging.getLogger(__name__)
T = TypeVar("T")

OUTAGE_S = 300.0
"""Seconds without any answer to a reward that asks elsewhere, after which nobody waits for it."""

Tell = Callable[[Reward, Exception, int], None]


class Malformed(Exception):
    """Scores of another form than one of each part for each clip."""


def judge_batch(
    reward: Reward,
    pixels: Tensor,
    prompts: Sequence[str],
    fps: float,
    tell: Tell | None = None,
) -> Scores:
    """Scores of one batch, uint8 [B, F, H, W, 3].

    A score that is not finite is NaN, and the clip's other parts keep theirs: here nobody knows
    which of them a run trains on. A clip is invalid, and every part NaN, where the reward says so,
    where none of its parts is finite, or where the reward raised or gave another number of scores
    than there are clips.
    tell: takes what was raised, and B; None: it is logged by its class and place, without its text,
    which may quote a prompt
    Raises torch.OutOfMemoryError, Unavailable and UserError as the reward does: no fault of the
    clips, and the next batch would fare no better.
    """
    values = torch.full((len(reward.names), len(pixels)), float("nan"))
    try:
        with torch.no_grad():
            scores = reward(pixels, prompts, fps)
        table, valid = tabulated(reward, scores, len(pixels))
        values = table.masked_fill(~valid, float("nan"))
    except (torch.OutOfMemoryError, Unavailable, UserError):
        raise
    # a reward is anyone's code: whatever it raises, the run goes on without these scores
    except Exception as error:
        (tell or log_without_text)(reward, error, len(pixels))
    finite = torch.isfinite(values)
    values = values.masked_fill(~finite, float("nan"))
    return Scores({part: values[n].clone() for n, part in enumerate(reward.names)}, finite.any(0))


def patiently(name: str, call: Callable[[], T], outage_s: float) -> T:
    """Result of a call of the reward `name`, once what it asks elsewhere answers.

    Raises UserError after `outage_s` seconds in which nothing did.
    """
    start = since = time.monotonic()
    while True:
        try:
            return call()
        except Unavailable as trouble:
            now = time.monotonic()
            since = now if trouble.progress else since
            # other ranks wait, too, and not for ever
            if now - since > outage_s or now - start > max(LONGEST_WAIT_S - outage_s, outage_s):
                raise UserError(
                    f"rewards.name={name}: no scores after {now - start:.0f} s ({trouble}); see "
                    "that what it asks runs and is not overloaded, or raise server.outage_s. The "
                    "newest checkpoint is intact: start again to go on from it."
                ) from None
            log.warning("rewards.name=%s: %s; trying again", name, trouble)
            time.sleep(random.uniform(0.1, 1.0))  # so that ranks do not knock together


def tabulated(reward: Reward, scores: Scores, count: int) -> tuple[Tensor, Tensor]:
    """A reward's scores of `count` clips: float32 [parts, count], and bool [count].

    Raises Malformed where they are of another form: one score would be spread over all clips.
    """
    if not isinstance(scores, Scores):
        raise Malformed(f"it gave a {type(scores).__name__}, not Scores(values, valid)")
    missing = [part for part in reward.names if part not in scores.values]
    if missing:
        raise Malformed(f"it gave no part '{missing[0]}', only {', '.join(scores.values)}")
    for part in (*reward.names, "valid"):
        column = scores.valid if part == "valid" else scores.values[part]
        if not isinstance(column, Tensor) or column.shape != (count,):
            form = list(column.shape) if isinstance(column, Tensor) else type(column).__name__
            raise Malformed(f"it gave {part} {form} for {count} clips, where [{count}] is wanted")
    table = torch.stack([scores.values[part].detach().cpu().float() for part in reward.names])
    return table, scores.valid.cpu()


def told(error: Exception, file: Path | None = None) -> str:
    """What was raised at a clip: class, text and place.  file: the reward's"""
    return str(error) if isinstance(error, Malformed) else f"it raised {described(error, file)}"


def log_without_text(reward: Reward, error: Exception, count: int) -> None:
    """Log what was raised at `count` clips by its class and place.

    What is malformed is told whole: our own words, in which there is no prompt.
    """
    if isinstance(error, Malformed):
        said = str(error)
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"raised {type(error).__name__} at {frame.filename}:{frame.lineno}"
    log.warning("%s %s; %d clips have no score", type(reward).__name__, said, count)
