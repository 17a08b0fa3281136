"""Preflight's checks of the rewards: golden clips score twice the same on every rank, drawn clips get
scores, and those of one prompt differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from fastgrpo.core.reward import Reward
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.handshake import GOLDEN_TOLERANCE
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import Served, golden_clip
from fastgrpo.tools.preflight.finding import Finding, Parts, gathered
from fastgrpo.tools.preflight.iteration import Iteration
from fastgrpo.training.scoring.sources import Source

Golden = Mapping[str, float | None]  # part -> score; None: the reward cannot judge the clip


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One rank's scores of a reward's golden clip."""

    name: str
    scores: Golden
    again: Golden
    expected: Golden | None  # the scores that it must give, where they are known
    of: str = ""  # since when they are known
    alone: bool = True  # whether the same kernels scored that clip alone both times


def rewards(parts: Parts) -> list[Finding]:
    """One finding per reward. Raises UserError, on every rank, where a server is gone."""
    world, specs = parts.world, {spec.name: spec for spec in parts.recipe.rewards}
    tried: list[Tried] = []
    for source in parts.scorer.sources:
        tried += world.run_on_all_ranks(partial(_try, source))
    by_reward = zip(*gathered(tried, world), strict=True)
    return [_judge(ranks, GOLDEN_TOLERANCE[specs[ranks[0].name].dtype]) for ranks in by_reward]


def _try(source: Source) -> list[Tried]:
    """This rank's scores by all rewards of one source."""
    try:
        if isinstance(source, ScorerInProcess):
            return [_try_loaded(source, served) for served in source.served.values()]
        assert isinstance(source, RewardClient)
        return [_try_server(source, name) for name in source.names]
    finally:
        source.release()


def _try_loaded(source: ScorerInProcess, served: Served) -> Tried:
    """Scores of the reward's golden clip, with the written ones unless the frame rate differs."""
    first, again = (_scored(source, served.name, served.reward) for _ in range(2))
    expected: Golden | None = served.reward.golden_scores
    comparable = served.spec.fps in (None, golden_clip(served.reward)[2])
    return Tried(
        name=served.name,
        scores=first,
        again=again,
        expected=expected if comparable else None,
        of="when it was written",
    )


def _try_server(source: RewardClient, name: str) -> Tried:
    """Scores of the drawn clip, with the server's unless its clip or the frame rate differs."""
    about = source.spec_of(name)
    first, again = (_scored(source, name, None) for _ in range(2))
    drawn = about.get("golden_clip", "drawn") == "drawn"
    comparable = drawn and source.fps in (None, golden_clip(None)[2])
    return Tried(
        name=name,
        scores=first,
        again=again,
        expected=about["golden"] if comparable else None,
        of="when its server started",
        alone=about.get("batch_size") == 1 and len(source.replicas.all) == 1,
    )


def _scored(source: Source, name: str, reward: Reward | None) -> Golden:
    """Scores of the reward's golden clip.  reward: None: the drawn clip"""
    clip, prompt, fps = golden_clip(reward)
    scores = source.score(clip[None], [prompt], fps)[name]
    values = {part: score.item() for part, score in scores.values.items()}
    return {part: score if math.isfinite(score) else None for part, score in values.items()}


def _judge(ranks: tuple[Tried, ...], tolerance: float) -> Finding:
    """One reward's finding from all ranks' scores."""
    first = ranks[0]
    check = f"reward {first.name}"
    problems = [_problem(rank, tried, first, tolerance) for rank, tried in enumerate(ranks)]
    problem = next(filter(None, problems), None)
    if problem is not None:
        remedy = "its weights, settings or libraries are not those that it had there; "
        remedy += "make them the same"
        return Finding(check, False, f"the golden clip's {problem}", remedy)
    if all(score is None for score in first.scores.values()):
        return Finding(check, True, "does not judge the golden clip, which is not of its kind")
    scores = ", ".join(f"{part} {_formatted(score)}" for part, score in first.scores.items())
    known = f", as {first.of}" if first.expected is not None else ""
    return Finding(check, True, f"golden clip {scores}: twice the same{known}")


def _problem(rank: int, tried: Tried, first: Tried, tolerance: float) -> str | None:
    """The problem of a rank's scores; None where there is none."""
    scores, again, expected = tried.scores, tried.again, tried.expected
    # A server scores clips of several ranks in one batch, whose size may choose other kernels,
    # which round otherwise.
    if part := _moved(scores, again, tolerance / 100 if tried.alone else tolerance):
        both = f"{_formatted(scores[part])} and at once again {_formatted(again[part])}"
        return f"{part} is {both}, on rank {rank}"
    if expected is not None and (part := _moved(scores, expected, tolerance)):
        known = f"{_formatted(expected[part])} {tried.of}"
        return f"{part} is {_formatted(scores[part])} on rank {rank}, and was {known}"
    if part := _moved(scores, first.scores, tolerance):
        others = f"{_formatted(first.scores[part])} on rank 0"
        return f"{part} is {_formatted(scores[part])} on rank {rank}, and {others}"
    return None


def _moved(scores: Golden, other: Golden, tolerance: float) -> str | None:
    """The first part whose scores differ by more than the tolerance, relative to scores above 1."""
    for part in [part for part in scores if part in other]:
        a, b = scores[part], other[part]
        if (a is None) != (b is None):
            return part
        if a is not None and b is not None and abs(a - b) > tolerance * max(1.0, abs(b)):
            return part
    return None


def _formatted(score: float | None) -> str:
    return "none" if score is None else f"{score:.6g}"


def scoring(parts: Parts, done: Iteration) -> Finding:
    """Check that drawn clips get scores."""
    scored, valid = len(done.slots), int(done.scores.valid[done.slots].sum())
    invalid, limit = 1.0 - valid / scored, parts.recipe.server.max_invalid
    message = f"{valid} of {scored} drawn clips have a score"
    remedy = f"correct why clips of this form are refused ({parts.scorer.hint})"
    green = invalid <= limit or (valid > 0 and scored < 8)
    return Finding("scoring", green, message, remedy)


def spread(parts: Parts, done: Iteration) -> Finding:
    """Compare the rewards of one prompt's clips: GRPO learns from their differences alone.

    Yellow where none differ, as few clips may be equal by chance.
    """
    groups: dict[int, list[int]] = {}
    for slot in done.slots:
        if done.scores.valid[slot]:
            groups.setdefault(slot // done.plan.group_size, []).append(slot)
    compared = [members for members in groups.values() if len(members) > 1]
    weights, least = parts.recipe.weights, parts.recipe.objective.min_spread
    weighed = [own.double() for part, own in done.scores.values.items() if weights[part]]
    differing = sum(any(own[members].std() >= least for own in weighed) for members in compared)
    message = f"the rewards of {differing} of {len(compared)} prompts with several clips differ"
    remedy = "equal rewards teach nothing: look at the rewards' options, or raise rollout.eta"
    doubt = bool(compared) and not differing
    return Finding("spread", True, message, remedy, yellow=doubt)
