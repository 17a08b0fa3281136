"""One iteration: conditions, rollout, scores, update; and the held-out evaluation.

Imports every floor below. Read `rollout/sampling.py` first, then `update.py`; the losses' methods
are in `methods/`.
"""
