"""What a training method declares of itself without importing torch: a plan and `fastgrpo check`
ask for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgrpo.core.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.core.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Traits:
    """How a method draws its samples and what it keeps of them; the defaults are GRPO's."""

    noisy_steps: bool = True
    """The rollout draws noisy transitions, which the update scores.

    False: it draws with the ODE, every step may be trained, and the update noises the samples
    again."""
    old_velocities: bool = False
    """The rollout also evaluates the policy that drew the sample at each chosen step."""
    average_draws: bool = False
    """The moving average of the weights draws the samples; the trained weights are set aside
    meanwhile.
    """
    clips_ratio: bool = True
    """The objective clips the plain ratio at objective.clip_range."""
    old_means: bool = False
    """The update keeps the old policy's mean of each transition that it evaluates before its first
    step."""
    reference_key: str = "kl_weight"
    """The key of [objective] that, above 0, asks for the initial policy."""

    def latents_kept(self, chosen: int, noisy: int) -> int:
        """The most latents of one sample that wait for the update.

        chosen: transitions trained per sample;  noisy: steps that draw noise
        A chosen transition has the state before it and after it, and transitions that follow each
        other share one, so 2 chosen, and never more states than noisy + 1. Without noisy steps: a
        noised state and a velocity for each chosen step, and the sample itself.
        """
        return min(2 * chosen, noisy + 1) if self.noisy_steps else 2 * chosen + 1


def check_noise(recipe: "Recipe") -> None:
    """Raise UserError where a method that needs noisy steps has none."""
    eta = recipe.rollout.eta
    if eta <= 0:
        raise UserError(
            f"rollout.eta={eta}: GRPO needs a stochastic sampler; use eta > 0 (0.3 in the paper)."
        )
