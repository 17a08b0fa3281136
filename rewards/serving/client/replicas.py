"""Choice among several servers: who takes the next request, who rests, and when all have failed."""

import logging
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.errors import UserError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class Outage(UserError):
    """No server has answered for as long as may be."""

    def __init__(self, message: str, trouble: str) -> None:
        """trouble: what the last one did instead."""
        super().__init__(message)
        self.trouble = trouble


@dataclass(kw_only=True)
class Replica:
    """One server as its client sees it. Times are of time.monotonic."""

    url: str
    kind: str = "reward server"
    key: str = "server.urls"  # the recipe's key that names it
    under_way: int = 0  # requests
    failures: int = 0  # in a row
    rests_until: float = 0.0  # no request before
    known: bool = False  # its rewards are the ones that we want; asked again after each failure
    barred: str = ""  # why it is never asked again
    # of a server beside the trainer, whose address the user did not give and is not shown
    log_file: Path | None = None

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"{self.kind} {self.url if self.log_file is None else 'beside the trainer'}"

    @property
    def where(self) -> str:
        """What a message to the user begins with."""
        return f"{self.key}={self.url}" if self.log_file is None else self.name

    @property
    def see(self) -> str:
        """Where the user learns more."""
        return f"the log of {self.url}" if self.log_file is None else str(self.log_file)

    def takes(self, now: float) -> bool:
        """Whether the replica may be given a request; after failures one at a time, as a trial."""
        return (
            not self.barred and now >= self.rests_until and not (self.failures and self.under_way)
        )


class Replicas:
    """Servers that hold the same rewards. Threads may share it.

    Of two drawn at random the one with fewer requests under way is taken (power of two choices: no
    herd runs to the one that looked idle last). One that fails rests, at first shortly, after each
    failure longer, and then gets a single request as a trial: the circuit breaker. Only when
    nothing has succeeded anywhere for `outage_s` since a failure is it an outage.
    """

    def __init__(
        self,
        urls: Sequence[str],
        outage_s: float,
        kind: str = "reward server",
        key: str = "server.urls",
    ) -> None:
        """kind: what messages call them;  key: the recipe's key that names them."""
        names = dict.fromkeys(url.rstrip("/") for url in urls)
        self.all = [Replica(url=url, kind=kind, key=key) for url in names]
        self.outage_s = outage_s
        self._lock = threading.Lock()
        self._random = random.Random()  # its own, so that pauses disturb no one's random numbers
        self._trouble_since: float | None = None
        self._last_trouble: tuple[Replica, str] | None = None
        self._last_success = -math.inf

    def take(self, other_than: Replica | None = None) -> Replica:
        """A replica for one request, once there is one that takes it; give it back with `release`.

        other_than: taken only where there is no other.
        Raises Outage in an outage, UserError where all are barred.
        """
        while True:
            with self._lock:
                self._check_outage()
                self._check_barred()
                now = time.monotonic()
                able = [replica for replica in self.all if replica.takes(now)]
                able = [replica for replica in able if replica is not other_than] or able
                if able:
                    some = self._random.sample(able, min(2, len(able)))
                    chosen = min(some, key=lambda replica: replica.under_way)
                    chosen.under_way += 1
                    return chosen
            time.sleep(0.05)

    def release(self, replica: Replica) -> None:
        with self._lock:
            replica.under_way -= 1

    def succeeded(self, replica: Replica) -> None:
        """Note a right answer of a replica, which ends its trouble."""
        with self._lock:
            if replica.failures:
                log.info("%s is back", replica.name)
            replica.failures, replica.rests_until = 0, 0.0
            self._trouble_since = None
            self._last_success = time.monotonic()

    def served_since(self, moment: float) -> bool:
        """Whether any replica has given a right answer since a moment, of time.monotonic."""
        with self._lock:
            return self._last_success >= moment

    def live(self) -> None:
        """Note that a server lives, whatever becomes of the request: no outage."""
        with self._lock:
            self._trouble_since = None

    def failed(self, replica: Replica, trouble: str, lives: bool = False) -> None:
        """Let a replica rest after a failure.

        lives: whether its server answered at all, so that there is no outage
        Raises UserError in an outage.
        """
        with self._lock:
            if lives:
                self._trouble_since = None
            else:
                self._note(replica, trouble)
            replica.known = False
            replica.failures += 1
            longest = min(FIRST_PAUSE_S * 2.0 ** (replica.failures - 1), LONGEST_PAUSE_S)
            replica.rests_until = time.monotonic() + longest * self._random.uniform(0.5, 1.0)
            log.warning("%s: %s; trying again", replica.name, trouble)
            self._check_outage()

    def busy(self, replica: Replica, trouble: str, pause_s: float) -> float:
        """Note that a replica turned a request away.

        returns seconds to wait, at random, so that ranks do not knock together
        Raises UserError in an outage.
        """
        with self._lock:
            self._note(replica, trouble)
            self._check_outage()
            return pause_s * self._random.uniform(0.5, 1.5)

    def bar(self, replica: Replica, why: str) -> None:
        """Give a replica no more requests. Raises UserError where no other replica is left."""
        with self._lock:
            replica.barred = why
            log.error("%s: %s; it gets no more requests", replica.name, why)
            self._check_barred()

    def _check_barred(self) -> None:
        if all(one.barred for one in self.all):
            last = self.all[-1]
            raise UserError(f"{last.where}: {last.barred}; start all servers alike")

    def _note(self, replica: Replica, trouble: str) -> None:
        self._last_trouble = (replica, trouble)
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()

    def _check_outage(self) -> None:
        if self._trouble_since is None or time.monotonic() - self._trouble_since < self.outage_s:
            return
        assert self._last_trouble is not None  # noted with the trouble
        replica, trouble = self._last_trouble
        raise Outage(
            f"{replica.where}: no scores for {self.outage_s:g} s ({trouble}); see that the "
            f"{replica.kind} runs and is not overloaded ({replica.see}), or raise "
            "server.outage_s. The newest checkpoint is intact: start again to go on from it.",
            f"{replica.url}: {trouble}",
        )


@dataclass
class Patience:
    """Time for which one request is sent again while the servers answer others.

    At most `outage_s`. A request that is turned away does not count once another has been answered
    since: the server is slow, not stuck, and the request's turn will come. But no request takes
    more than `longest_s`, since other ranks wait for it.
    """

    replicas: Replicas
    longest_s: float
    since: float = math.inf  # the trouble that counts; of time.monotonic
    until: float = math.inf  # likewise

    def ends(self, turned_away: bool) -> bool:
        """Whether to give the request up, which was just turned away or else failed."""
        now = time.monotonic()
        if turned_away and self.replicas.served_since(self.since):
            self.since = now
        self.since = min(self.since, now)
        self.until = min(self.until, now + max(self.longest_s, self.replicas.outage_s))
        return now > min(self.until, self.since + self.replicas.outage_s)
