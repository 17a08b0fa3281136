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

    title: str = ""
    """Its name with its source, as a model card says it. Empty: the file's name."""
    noisy_steps: bool = True
    """The rollout draws noisy transitions, which the update scores.

    False: it draws with the ODE, every step may be trained, and the update noises the samples
    again."""
    keeps_states: bool = False
    """Without noisy steps: the update needs the states before the chosen steps, not the samples."""
    differentiates: bool = False
    """The loss has the rewards' gradient, through the decoder: they must be in the process."""
    pairs: bool = False
    """The loss compares two samples of a prompt, the better and the worse one, at one time: the
    selected ones are paired by their advantages, and a micro-batch has whole pairs."""
    figures: tuple[str, ...] = ()
    """Names of the method's own figures of a transition, see `training.method.Losses.figures`."""
    has_ratio: bool = True
    """The loss compares the trained policy's log-probability with the old one's."""
    average_key: str | None = None
    """The key of [objective] that, above 0, has the update evaluate the moving average of the
    weights at each state that it trains, before its first optimizer step. None: never."""
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

    own_keys: tuple[str, ...] = ("clip_range", "kl_weight")
    """The keys of [objective] that it reads and that not every method does."""

    def latents_kept(self, chosen: int, noisy: int) -> int:
        """The most latents of one sample that wait for the update.

        chosen: transitions trained per sample;  noisy: steps that draw noise
        A chosen transition has the state before it and after it, and transitions that follow each
        other share one, so 2 chosen, and never more states than noisy + 1. Without noisy steps: the
        sample itself, which the update noises again, or the chosen states.
        """
        if self.noisy_steps:
            return min(2 * chosen, noisy + 1)
        return chosen if self.keeps_states else 1


def check_without_noise(recipe: "Recipe", distance: str) -> None:
    """Raise UserError for keys that only noisy steps have, for a method without such steps.

    distance: the method's own key of the distance from the initial policy
    """
    rollout, objective = recipe.rollout, recipe.objective
    kind = f"objective.kind={objective.kind}"
    if rollout.shared_noise:
        raise UserError(
            f"rollout.shared_noise=true: {kind} draws without noise on the way, so all "
            "samples of a group would be the same; set rollout.shared_noise=false."
        )
    if rollout.window is not None:
        raise UserError(
            f"rollout.window: has no effect with {kind}, where no step is noisy; leave it out."
        )
    if rollout.sampler != "dance":
        raise UserError(
            f"rollout.sampler={rollout.sampler}: has no effect with {kind}, where no step is "
            "noisy; leave it out."
        )
    if objective.step_weights != "equal":
        raise UserError(
            f"objective.step_weights={objective.step_weights}: has no effect with {kind}; leave "
            "it out."
        )
    if objective.kl_weight:
        raise UserError(
            f"objective.kl_weight={objective.kl_weight}: is of noisy steps, and {kind} has none; "
            f"use objective.{distance}."
        )


def check_noise(recipe: "Recipe") -> None:
    """Raise UserError where a method that needs noisy steps has none."""
    eta = recipe.rollout.eta
    if eta <= 0:
        raise UserError(
            f"rollout.eta={eta}: GRPO needs a stochastic sampler; use eta > 0 (0.3 in the paper)."
        )
