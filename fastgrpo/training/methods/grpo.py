"""DanceGRPO (arXiv 2505.07818): the clipped ratio between the trained and the old policy."""

from fastgrpo.algorithm import objectives
from fastgrpo.training.policy_gradient import PolicyGradient

METHOD = PolicyGradient(objectives.grpo, objectives.outside_clip_range)
