"""What `--tune` answers, and every plan that does not fit."""

from dataclasses import dataclass

from fastgrpo.core.errors import UserError
from fastgrpo.tools.plan.planner import Plan
from fastgrpo.tools.plan.tuning.alternatives import Alternative, alternatives, with_adapters
from fastgrpo.tools.plan.tuning.search import Tuned, tune


@dataclass(frozen=True)
class Answer:
    """The quickest recipe near a given one, and what else there is."""

    tuned: Tuned | None  # None: nothing with the same results fits
    adapters: Alternative | None  # with adapters of the rank that was asked for
    alternatives: tuple[Alternative, ...]  # where nothing with the same results fits


def answer_of(given: Plan, rank: int | None, text: int | None) -> Answer:
    """The answer for a plan, whether or not it fits.

    rank: of adapters to try as well;  text: tokens of the longest text, as for `planner.plan`
    Raises UserError for a rank where the recipe has adapters already.
    """
    if rank and given.subject.job.lora:
        raise UserError(
            f"--lora={rank}: the recipe trains adapters already (lora.rank="
            f"{given.subject.job.recipe.lora.rank}); leave --lora out."
        )
    tuned = tune(given)
    adapters = with_adapters(given, rank, text) if rank else None
    others = () if tuned else tuple(alternatives(given, text))
    return Answer(tuned, adapters, others)
