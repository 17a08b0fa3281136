"""DanceGRPO: the clipped objective of the ratio between the trained policy and the one that drew (arXiv 2505.07818)."""

from fastgrpo.algorithm import objectives
from fastgrpo.training.policy_gradient import PolicyGradient

METHOD = PolicyGradient(objectives.grpo, objectives.outside_clip_range)
