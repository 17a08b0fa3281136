"""Flow-DPPO (arXiv 2606.11025): no gradient where a large KL divergence would grow.

The divergence is the trained policy's from the old one.
"""

from fastgrpo.algorithm import objectives
from fastgrpo.core.method import Traits
from fastgrpo.training.methods.policy_gradient import PolicyGradient

TRAITS = Traits(
    title="Flow-DPPO (arXiv 2606.11025)",
    clips_ratio=False,
    old_means=True,
    own_keys=("max_kl", "kl_weight"),
)
METHOD = PolicyGradient(objectives.dppo, objectives.outside_divergence, needs_old_mean=True)
