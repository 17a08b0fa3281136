"""The command that sends mutated requests: its mutants are of every kind, and none gets a 5xx."""

import random
import time

import pytest

from benchmarks.rewards import mutations
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving import wire
from tests.harness.servers import TOKEN, running


def test_mutants_are_refused_or_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "TOKEN", TOKEN)
    result = mutations.Result()
    with running({name: load(plain(name)) for name in mutations.NAMES}) as url:
        mutations.send(url, 200, time.monotonic() + 60.0, random.Random(0), result)
    assert result.statuses.total() == 200 and not result.worst
    assert {200, 400} <= set(result.statuses) <= {200, 400, 413, 422}


def test_mutations_reach_every_part_of_the_reader() -> None:
    """What is refused, by the first word of the reason."""
    rng, reasons = random.Random(0), set()
    for _ in range(3000):
        try:
            wire.decode_request(bytearray(mutations.mutated(rng)))
            reasons.add("well-formed")
        except wire.WireError as error:
            reasons.add(str(error).partition(":")[0].partition(".")[0])
    parts = {"body", "header", "__metadata__", "request", "prompts", "rewards", "fps", "frames"}
    assert reasons >= parts | {"clip", "well-formed"}
