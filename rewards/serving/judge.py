"""One batch of clips through one reward: a clip without a score is NaN and invalid."""

import logging
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.core.reward import Reward, Scores

log = logging.getLogger(__name__)


def judge_batch(reward: Reward, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
    """Scores of one batch, uint8 [B, F, H, W, 3].

    A clip is invalid where the reward says so, where one of its parts is not finite, or where the
    reward raised or gave another number of scores than there are clips; then every part is NaN.
    What was raised is logged by its class and place, without its text, which may quote a prompt.
    Raises torch.OutOfMemoryError as the reward does: no fault of the clips, and the next batch
    would fare no better.
    """
    values = torch.full((len(reward.names), len(pixels)), float("nan"))
    try:
        with torch.no_grad():
            scores = reward(pixels, prompts, fps)
        table = torch.stack([scores.values[part].detach().cpu().float() for part in reward.names])
        valid = scores.valid.cpu()
        # one score would be spread over all clips
        if table.shape != values.shape or valid.shape != values.shape[1:]:
            raise ValueError(
                f"{list(table.shape)} scores, {list(valid.shape)} valid, expected "
                f"{list(values.shape)}"
            )
        values = table.masked_fill(~valid, float("nan"))
    except torch.OutOfMemoryError:
        raise
    # a reward is anyone's code: whatever it raises, the run goes on without these scores
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.warning(
            "%s raised %s at %s:%s; %d clips have no score",
            type(reward).__name__,
            type(error).__name__,
            frame.filename,
            frame.lineno,
            len(pixels),
        )
    valid = torch.isfinite(values).all(0)
    values = values.masked_fill(~valid, float("nan"))
    return Scores({part: values[n].clone() for n, part in enumerate(reward.names)}, valid)
