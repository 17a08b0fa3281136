"""One request to any of several servers: sent again until it is answered well or given up."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from fastgrpo.rewards.serving.client.replicas import LONGEST_PAUSE_S, Patience, Replica, Replicas

T = TypeVar("T")

ATTEMPTS = 2  # at a request that a living server does not answer well, before it is given up


class ReplicaMismatch(Exception):
    """A replica whose scores are not those of the others."""


class Busy(Exception):
    """A server that will take the same request later."""

    def __init__(self, said: str, pause_s: float) -> None:
        super().__init__(said)
        self.pause_s = pause_s


class Bad(Exception):
    """An answer of a living server that is no good: late, an error of its own, or nonsense."""


class GivenUp(Exception):
    """A request that no server answered well in time; its text is the last trouble."""

    def __init__(self, trouble: Exception, turned_away: bool) -> None:
        """turned_away: whether it was turned away at last, and would be taken later."""
        super().__init__(told(trouble))
        self.turned_away = turned_away


def persist(
    replicas: Replicas,
    call: Callable[[Replica], T],
    longest_s: float,
    count: Callable[[str], None] = lambda event: None,
) -> T:
    """Result of `call` with some replica, however many attempts that takes.

    call: raises ReplicaMismatch, Busy, Bad or httpx.RequestError
    longest_s: seconds that a request takes at most which is turned away while others are answered
    count: takes the name of each event
    Raises GivenUp, the Outage of the replicas, and what else `call` raises.
    """
    bad, last, patience = 0, None, Patience(replicas, longest_s)
    while True:
        replica = replicas.take(last)
        pause, turned_away = 0.0, False
        try:
            result = call(replica)
            replicas.succeeded(replica)
            return result
        except ReplicaMismatch as mismatch:
            trouble: Exception = mismatch
            replicas.bar(replica, str(mismatch))
        except Busy as busy:
            trouble, turned_away = busy, True
            count("requests_turned_away")
            pause = replicas.busy(replica, str(busy), busy.pause_s)
        except Bad as error:
            trouble, bad = error, bad + 1
            count("requests_bad")
            replicas.failed(replica, str(error), lives=True)
        except httpx.RequestError as error:
            trouble = error
            count("requests_failed")
            replicas.failed(replica, told(error))
        finally:
            replicas.release(replica)
        if bad >= ATTEMPTS or patience.ends(turned_away):
            raise GivenUp(trouble, turned_away)
        time.sleep(pause)
        last = replica


def told(trouble: Exception) -> str:
    """What went wrong, for a log: an error of the transport with its class."""
    transport = isinstance(trouble, httpx.RequestError)
    return f"{type(trouble).__name__}: {trouble}" if transport else str(trouble)


def retry_after(response: httpx.Response, default: float) -> float:
    """Seconds of a Retry-After header, at most LONGEST_PAUSE_S.

    default: where the header is absent or a date
    """
    text = response.headers.get("retry-after")
    if text is None or not text.isascii() or not text.isdigit():
        return default
    return min(float(text), LONGEST_PAUSE_S)
