"""Flow-DPPO (arXiv 2606.11025): no gradient where the KL divergence from the old policy is large and would grow."""

from fastgrpo.algorithm import objectives
from fastgrpo.core.method import Traits
from fastgrpo.training.policy_gradient import PolicyGradient

TRAITS = Traits(clips_ratio=False)
METHOD = PolicyGradient(objectives.dppo, objectives.outside_divergence, needs_old_mean=True)
