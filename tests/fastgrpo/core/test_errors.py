"""Errors that ranks send each other arrive as they were."""

import pickle

import pytest

from fastgrpo.core.errors import Exploded, Hacked, Sent, Unavailable, UserError, UserErrors
from fastgrpo.core.processes import OneRankError
from fastgrpo.rewards.serving.client.replicas import Outage
from fastgrpo.training.scoring.sources import NoScores

ERRORS = (
    UserError("key=1: wrong; mend it."),
    UserErrors(["one; mend it.", "two; mend it."]),
    Exploded("weights: not finite", drawn=True),
    Hacked("the reward may be hacked"),
    Unavailable("nobody answers", progress=True),
    Outage("no server for 300 s", "ConnectError"),
    NoScores("too few scores"),
    OneRankError("this rank alone"),
)


def kinds(above: type[Sent]) -> set[type[Sent]]:
    return {kind for below in above.__subclasses__() for kind in (below, *kinds(below))}


def test_every_kind_is_tried() -> None:
    own = {kind for kind in kinds(Sent) if kind.__module__.startswith("fastgrpo.")}
    assert own == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_it_was_sent(error: Sent) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert (found.args, vars(found)) == (error.args, vars(error))
