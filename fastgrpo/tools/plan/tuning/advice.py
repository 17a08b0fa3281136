"""What to give up where a recipe is slow or does not fit, the least first.

In order of what it costs in fidelity to the recipe: nothing (keys of speed alone), then adapters in
place of all weights, fewer trained steps (a window), fewer denoising steps, fewer prompts, smaller
groups, and last what changes the samples themselves: fewer frames, smaller pictures. Each rung
keeps what those before it gave up, and is tuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fastgrpo.core.config import Recipe, checks
from fastgrpo.core.errors import UserError
from fastgrpo.tools.plan.planner import Plan, plan
from fastgrpo.tools.plan.tuning import choices
from fastgrpo.tools.plan.tuning.alternatives import LORA_RANKS, shorter, smaller
from fastgrpo.tools.plan.tuning.choices import Choice
from fastgrpo.tools.plan.tuning.search import Tuned, tune
from fastgrpo.training import methods

WINDOW: Choice = {"rollout.window": 4, "rollout.tail_steps": 8}  # as in one_node/t2v_hunyuan
STEPS = (
    16,
    10,
)  # the public training script's, and about the fewest that still look like the model
FEWEST_PROMPTS = 4
GROUPS = (8, 6)
SHARES = (0.5, 0.25)  # of the frames, and then of the picture's area


@dataclass(frozen=True)
class Advice:
    """A rung: what is given up, and the quickest plan that is left."""

    change: str  # in words
    given_up: tuple[str, ...]  # overrides that change results, of all rungs so far
    tuned: Tuned | None  # None: nothing fits

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.given_up, *(self.tuned.overrides if self.tuned else ()))


def advise(given: Plan, within: float, text: int | None) -> list[Advice]:
    """Rungs from the recipe itself to the first whose iteration takes at most `within` seconds, or
    to the last.

    given: whatever its memory;  text: tokens of the longest text, as for `planner.plan`
    """
    found = [Advice("nothing but speed and memory", (), tune(given))]
    choice: dict[str, object] = {}
    for change, more in _rungs(given):
        if (tuned := found[-1].tuned) is not None and tuned.plan.seconds <= within:
            break
        changed = _changed(given, {**choice, **more}, text)
        if changed is None:
            continue
        choice.update(more)
        given_up = tuple(choices.override(key, to) for key, to in choice.items())
        found.append(Advice(change, given_up, tune(changed)))
    return found


def _changed(given: Plan, choice: Choice, text: int | None) -> Plan | None:
    """The plan with these values.  None: a run would refuse them"""
    job = given.subject.job
    recipe = choices.changed(job.recipe, choice)
    try:
        checks.check(recipe)
        return plan(
            recipe,
            gpus=job.gpus,
            machine=given.machine,
            ranks_per_node=job.ranks_per_node,
            text=text,
        )
    except UserError:
        return None


def _rungs(given: Plan) -> Iterator[tuple[str, Choice]]:
    """(what is given up, the values that do it), the least first."""
    recipe = given.subject.job.recipe
    if not recipe.lora.rank:
        yield f"adapters of rank {LORA_RANKS[0]}", choices.adapters(recipe, LORA_RANKS[0])
    yield from _fewer_evaluations(recipe)
    lines = (("frames", shorter(given)), ("picture", smaller(given)))
    for what, line in lines:
        for share in SHARES:
            if line:
                number = min(range(len(line)), key=lambda n: abs(_size(given, line[n]) - share))
                size = " x ".join(str(to) for to in line[number].values())
                yield f"{what}: {size}", line[number]


def _fewer_evaluations(recipe: Recipe) -> Iterator[tuple[str, Choice]]:
    """Rungs that leave each sample as large as it is."""
    rollout, prompts = recipe.rollout, recipe.prompts.per_iteration
    if rollout.window is None and methods.traits(recipe).noisy_steps:
        yield f"noise in a window of {WINDOW['rollout.window']} steps", WINDOW
    for steps in STEPS:
        if steps < rollout.steps:
            yield f"{steps} denoising steps", {"rollout.steps": steps}
    while prompts > FEWEST_PROMPTS:
        prompts = max(FEWEST_PROMPTS, prompts // 2)
        yield f"{prompts} prompts per iteration", {"prompts.per_iteration": prompts}
    for size in GROUPS:
        if size < rollout.samples_per_prompt:
            yield f"{size} samples per prompt", {"rollout.samples_per_prompt": size}


def _size(given: Plan, choice: Choice) -> float:
    """The share of the recipe's frames, or of its picture's area, that a choice leaves."""
    video = given.subject.job.recipe.video
    share = 1.0
    for key, to in choice.items():
        share *= to / getattr(video, key.removeprefix("video."))
    return share
