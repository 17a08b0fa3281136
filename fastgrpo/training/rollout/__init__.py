"""From a plan of samples to trajectories: noise and noisy steps, shares of ranks, the denoising loop.

Imports core, algorithm and parallel. Read `plan.py` first, then `sampling.py`.
"""

from fastgrpo.training.rollout.dealing import Dealing, Round, batches
from fastgrpo.training.rollout.plan import Plan
from fastgrpo.training.rollout.sampling import (
    Drawn,
    SharedPrefix,
    Trajectory,
    draw,
    sample,
    sample_ode,
    shared_prefixes,
    stored,
)

__all__ = [
    "Dealing",
    "Drawn",
    "Plan",
    "Round",
    "SharedPrefix",
    "Trajectory",
    "batches",
    "draw",
    "sample",
    "sample_ode",
    "shared_prefixes",
    "stored",
]
