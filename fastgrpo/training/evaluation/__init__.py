"""The held-out evaluation: before training, on the way and after it; its monitors and its alarm.

Imports every floor below. Read `evaluation.py` first, then `alarm.py`.
"""

from fastgrpo.training.evaluation.evaluation import (
    RESAMPLES,
    Evaluation,
    HeldOut,
    compare,
    evaluate,
)

__all__ = ["RESAMPLES", "Evaluation", "HeldOut", "compare", "evaluate"]
