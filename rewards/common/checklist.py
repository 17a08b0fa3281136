"""A checklist's questions and weights, and the score that its answers make.

The form is VisionReward's (Xu et al. 2024, arXiv 2412.21059): a text file with one yes-or-no
question on each line, and a JSON list with one weight for each. With p_i the probability of yes,
score = mean_i w_i (2 p_i - 1), which is its published mean_i w_i x_i where every answer is certain.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.core.errors import UserError

MOST = 256  # questions


def signed_mean(yes: Tensor, weights: Tensor) -> Tensor:
    """Mean of w (2 p - 1) over the questions.

    yes: [questions, ...], probabilities;  weights: [questions];  returns [...]
    """
    return torch.tensordot(weights, 2 * yes - 1, dims=1) / len(weights)


def read_questions(file: str, where: str) -> list[str]:
    """The questions in a text file, one a line; [[prompt]] or {prompt} stands for the clip's.

    Raises UserError, which names the option `where`.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}={file}: cannot be read ({error}); name a text file with one question a line."
        ) from None
    found = [line.strip().replace("[[prompt]]", "{prompt}") for line in lines if line.strip()]
    if not 1 <= len(found) <= MOST:
        raise UserError(
            f"{where}={file}: has {len(found)} questions; write 1 to {MOST}, one a line."
        )
    doubled = next((one for one in found if found.count(one) > 1), None)
    if doubled is not None:
        raise UserError(f"{where}={file}: asks {doubled[:60]!r} twice; leave one of them out.")
    return found


def read_weights(file: str, where: str, count: int) -> Tensor:
    """The weights in a JSON list: float64 [count].

    Raises UserError, which names the option `where`, for anything but `count` numbers, not all 0.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where}={file}: cannot be read ({error}); name a JSON list of numbers."
        ) from None
    good = isinstance(content, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        for one in content
    )
    if not good or not any(content):
        raise UserError(
            f"{where}={file}: is no JSON list of finite numbers, not all 0; write one weight for "
            "each question."
        )
    if len(content) != count:
        raise UserError(
            f"{where}={file}: has {len(content)} weights for {count} questions; write one for each."
        )
    return torch.tensor(content, dtype=torch.float64)
