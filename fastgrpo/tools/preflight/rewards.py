"""Preflight's check of the rewards: each scores its golden clip as it must, twice, on every rank."""

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
from fastgrpo.training.scoring.sources import Source

Golden = Mapping[str, float | None]  # part -> score; None: the reward cannot judge that clip


@dataclass(frozen=True)
class Tried:
    """One rank's scores of a reward's golden clip."""

    name: str
    scores: Golden
    again: Golden
    expected: Golden | None  # what it must score, where that is known
    of: str = ""  # since when that is known
    alone: bool = True  # whether both times the same kernels scored that clip and no other beside it


def rewards(parts: Parts) -> list[Finding]:
    """One finding per reward. Raises UserError, on every rank, where a server is gone."""
    world, specs = parts.world, {spec.name: spec for spec in parts.recipe.rewards}
    tried = [one for source in parts.scorer.sources for one in world.run_on_all_ranks(partial(_try, source))]
    by_reward = zip(*gathered(tried, world), strict=True)
    return [_judge(ranks, GOLDEN_TOLERANCE[specs[ranks[0].name].dtype]) for ranks in by_reward]


def _try(source: Source) -> list[Tried]:
    """This rank's scores by one source, all of its rewards."""
    try:
        if isinstance(source, ScorerInProcess):
            return [_try_here(source, one) for one in source.served.values()]
        assert isinstance(source, RewardClient)
        return [_try_server(source, name) for name in source.names]
    finally:
        source.release()


def _try_here(source: ScorerInProcess, one: Served) -> Tried:
    """The reward's golden clip, and what it must score where that is written down, unless it is told another rate."""
    first, again = (_scored(source, one.name, one.reward) for _ in range(2))
    expected: Golden | None = one.reward.golden_scores
    comparable = one.spec.fps in (None, golden_clip(one.reward)[2])
    return Tried(one.name, first, again, expected if comparable else None, "when it was written")


def _try_server(source: RewardClient, name: str) -> Tried:
    """The drawn clip, unless the server's golden clip is another one, or at another frame rate."""
    spec = source.spec_of(name)
    first, again = (_scored(source, name, None) for _ in range(2))
    comparable = spec.get("golden_clip", "drawn") == "drawn" and source.fps in (None, golden_clip(None)[2])
    alone = spec.get("batch_size") == 1 and len(source.replicas.all) == 1
    return Tried(name, first, again, spec["golden"] if comparable else None, "when its server started", alone)


def _scored(source: Source, name: str, reward: Reward | None) -> Golden:
    """The golden clip's scores.  reward: None: the drawn clip"""
    clip, prompt, fps = golden_clip(reward)
    scores = source.score(clip[None], [prompt], fps)[name]
    found = {part: values.item() for part, values in scores.values.items()}
    return {part: score if math.isfinite(score) else None for part, score in found.items()}


def _judge(ranks: tuple[Tried, ...], tolerance: float) -> Finding:
    """One reward's finding from all ranks' scores."""
    first = ranks[0]
    check = f"reward {first.name}"
    problems = [_problem(rank, one, first, tolerance) for rank, one in enumerate(ranks)]
    problem = next((one for one in problems if one is not None), None)
    if problem is not None:
        remedy = "its weights, settings or libraries are not those that it had there; make them the same"
        return Finding(check, False, f"the golden clip's {problem}", remedy)
    if all(score is None for score in first.scores.values()):
        return Finding(check, True, "does not judge the golden clip, which is not of its kind")
    told = ", ".join(f"{part} {_text(score)}" for part, score in first.scores.items())
    known = f", as {first.of}" if first.expected is not None else ""
    return Finding(check, True, f"golden clip {told}: twice the same{known}")


def _problem(rank: int, one: Tried, first: Tried, tolerance: float) -> str | None:
    """What is wrong with a rank's scores, if anything."""
    # A server scores clips of several ranks in one batch, whose size may choose other kernels, which round otherwise.
    if (part := _moved(one.scores, one.again, tolerance / 100 if one.alone else tolerance)) is not None:
        return f"{part} is {_text(one.scores[part])} and at once again {_text(one.again[part])}, on rank {rank}"
    if one.expected is not None and (part := _moved(one.scores, one.expected, tolerance)) is not None:
        return f"{part} is {_text(one.scores[part])} on rank {rank}, and was {_text(one.expected[part])} {one.of}"
    if (part := _moved(one.scores, first.scores, tolerance)) is not None:
        return f"{part} is {_text(one.scores[part])} on rank {rank}, and {_text(first.scores[part])} on rank 0"
    return None


def _moved(scores: Golden, other: Golden, tolerance: float) -> str | None:
    """The first part whose scores are further apart than the tolerance, times the score where that is above 1."""
    for part in [part for part in scores if part in other]:
        a, b = scores[part], other[part]
        if (a is None) != (b is None):
            return part
        if a is not None and b is not None and abs(a - b) > tolerance * max(1.0, abs(b)):
            return part
    return None


def _text(score: float | None) -> str:
    return "none" if score is None else f"{score:.6g}"
