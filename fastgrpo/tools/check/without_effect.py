"""Keys of a recipe that its other keys leave without effect, each with the reason.

None of them is refused: a recipe may keep them for another choice that an override makes. What the
recipe leaves at its default is not told, also where a resolved recipe writes it out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastgrpo import models
from fastgrpo.core.config import Recipe, Section
from fastgrpo.training import methods

PROCESS = "every reward scores in the trainer's process"


@dataclass(frozen=True)
class Rule:
    """Keys of one section, and when they have no effect."""

    section: str
    keys: tuple[str, ...]
    why: Callable[[Recipe], str | None]
    """The reason, to follow "has no effect"; None: they have one."""


def without_window(recipe: Recipe) -> str | None:
    """Why keys of the window have no effect."""
    return None if recipe.rollout.window else "without rollout.window"


def not_progressive(recipe: Recipe) -> str | None:
    """Why the window does not move."""
    rollout = recipe.rollout
    if rollout.window_schedule == "progressive":
        return without_window(recipe)
    return f"with rollout.window_schedule={rollout.window_schedule}"


def no_noise(recipe: Recipe) -> str | None:
    """Why keys of the noisy steps have no effect."""
    noisy = methods.traits(recipe).noisy_steps
    return None if noisy else f"with objective.kind={recipe.objective.kind}, which draws no noise"


def every_step(recipe: Recipe) -> str | None:
    """Why no step is chosen: all are trained."""
    rollout = recipe.rollout
    possible = rollout.steps if no_noise(recipe) else rollout.window or rollout.steps - 1
    return None if recipe.steps_trained < possible else f"all {possible} steps are trained"


def all_samples(recipe: Recipe) -> str | None:
    """Why no sample is chosen: all are trained."""
    count = recipe.rollout.samples_per_prompt
    whole = recipe.objective.best_of_n == count
    return f"all {count} samples of a prompt are trained" if whole else None


def own_heldout(recipe: Recipe) -> str | None:
    """Why nothing of the training prompts is held out."""
    return None if recipe.prompts.heldout is None else "with prompts.heldout"


def no_column(recipe: Recipe) -> str | None:
    """Why a column's name has no effect: text files have none."""
    named = [name for name in (recipe.prompts.train, recipe.prompts.heldout) if name is not None]
    plain = all(str(name).lower().endswith(".txt") for name in named)
    return "a .txt file has no columns" if plain else None


def no_nsfw(recipe: Recipe) -> str | None:
    """Why no row is left out for its content."""
    return None if recipe.prompts.nsfw_columns else "without prompts.nsfw_columns"


def one_network(recipe: Recipe) -> str | None:
    """Why a second network's guidance has no effect."""
    if len(models.networks(recipe.model.family)) == 1:
        return f"{recipe.model.family} has one network"
    return "without model.cfg above 1" if recipe.model.cfg == 1 else None


def nothing_recomputed(recipe: Recipe) -> str | None:
    """Why recomputing keeps nothing."""
    return None if recipe.model.gradient_checkpointing else "without model.gradient_checkpointing"


def exact_guidance(recipe: Recipe) -> str | None:
    """Why the precision of embedded guidance has no effect."""
    family = recipe.model.family
    if not models.declared(family, "GUIDANCE_TIMES_1000", False):
        return f"with model.family={family}, whose network takes no guidance times 1000"
    return "with model.dtype=float32" if recipe.model.dtype == "float32" else None


def no_server(recipe: Recipe) -> str | None:
    """Why keys of all servers have no effect."""
    return PROCESS if all(spec.where == "process" for spec in recipe.rewards) else None


def no_running_server(recipe: Recipe) -> str | None:
    """Why keys of servers that already run have no effect."""
    named = recipe.server.urls or any(spec.urls for spec in recipe.rewards)
    return no_server(recipe) or (None if named else "without server.urls")


def not_asked(recipe: Recipe) -> str | None:
    """Why the servers of all rewards have no effect: each reward names its own."""
    served = [spec for spec in recipe.rewards if spec.where == "server"]
    own = all(spec.urls for spec in served)
    return no_server(recipe) or ("every reward names its own urls" if own else None)


def never_on_the_way(recipe: Recipe) -> str | None:
    """Why there is no alarm."""
    return None if recipe.evaluate.every else "without evaluate.every"


def never_returns(recipe: Recipe) -> str | None:
    """Why a run does not go back."""
    choice = recipe.evaluate.alarm
    goes = None if choice == "return" else f"with evaluate.alarm={choice}"
    return never_on_the_way(recipe) or goes


RULES = (
    Rule("rollout", ("window_schedule",), without_window),
    Rule("rollout", ("window_every", "window_stride"), not_progressive),
    Rule("rollout", ("eta", "sampler"), no_noise),
    Rule("objective", ("timestep_choice",), every_step),
    Rule("objective", ("best_of_n",), all_samples),
    Rule("prompts", ("heldout_share",), own_heldout),
    Rule("prompts", ("column", "nsfw_columns"), no_column),
    Rule("prompts", ("max_nsfw",), no_nsfw),
    Rule("model", ("keep",), nothing_recomputed),
    Rule("model", ("guidance_dtype",), exact_guidance),
    Rule("model", ("cfg_2",), one_network),
    Rule("evaluate", ("alarm", "alarm_after"), never_on_the_way),
    Rule("evaluate", ("alarm_lr", "alarm_returns"), never_returns),
    Rule("server", ("urls",), not_asked),
    Rule("server", ("token_file",), no_running_server),
    Rule("server", ("start_timeout_s", "request_timeout_s", "outage_s"), no_server),
)


def lines(recipe: Recipe) -> list[str]:
    """A line for each key that the recipe sets in vain. Raises UserError for an unknown method."""
    found = []
    for rule in (*RULES, *_of_methods()):
        section = getattr(recipe, rule.section)
        for key in rule.keys:
            if _set(section, key) and (why := rule.why(recipe)):
                found.append(_line(f"{rule.section}.{key}", getattr(section, key), why))
    for number, spec in enumerate(recipe.rewards):
        if spec.urls and spec.where == "process":
            where = f"with where=process of {spec.name}"
            found.append(_line(f"rewards.{number}.urls", spec.urls, where))
    return found


def _of_methods() -> Iterator[Rule]:
    """The keys of [objective] that not every training method reads."""
    readers: dict[str, list[str]] = {}
    for name in methods.known():
        for key in methods.traits_of(name).own_keys:
            readers.setdefault(key, []).append(name)
    for key, names in readers.items():
        yield Rule("objective", (key,), lambda recipe, names=names: _not_read(recipe, names))  # type: ignore[misc]


def _not_read(recipe: Recipe, names: list[str]) -> str | None:
    kind = recipe.objective.kind
    return None if kind in names else f"with objective.kind={kind}; {', '.join(names)} reads it"


def _set(section: Section, key: str) -> bool:
    """Whether a recipe says something else of a key than its default."""
    named = key in section.model_fields_set
    return named and getattr(section, key) != type(section).model_fields[key].default


def _line(key: str, value: object, why: str) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return f"{key}={shown}: has no effect ({why}); leave it out."
