"""The mathematics of the method, as pure functions.

Imports core alone; knows no model and no process group. Read `transitions.py` first, then
`objectives.py`: the loss. Other packages may rely on the names that this module exports.
"""

from fastgrpo.algorithm.advantages import group_advantages
from fastgrpo.algorithm.transitions import (
    ddim_transition,
    gaussian_log_prob,
    sde_transition,
    time_grid,
)

__all__ = [
    "ddim_transition",
    "gaussian_log_prob",
    "group_advantages",
    "sde_transition",
    "time_grid",
]
