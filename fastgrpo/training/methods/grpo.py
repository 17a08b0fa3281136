"""DanceGRPO (arXiv 2505.07818): the clipped ratio between the trained and the old policy."""

from fastgrpo.algorithm import objectives
from fastgrpo.core.method import Traits
from fastgrpo.training.methods.policy_gradient import PolicyGradient

TRAITS = Traits(title="GRPO (DanceGRPO, arXiv 2505.07818)")
METHOD = PolicyGradient(objectives.grpo, objectives.outside_clip_range)
