"""One iteration: conditions, rollout, scores, update; and the held-out evaluation.

Imports every floor below. Read `rollout.py` first, then `update.py`. `methods/` has what is trained by what loss.
"""
