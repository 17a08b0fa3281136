"""Scores from reward servers, also when a server is slow, busy, gone or different."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import torch
from torch import Tensor

from fastgrpo.core.config.checks import LONGEST_WAIT_S
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Scores
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.persist import (
    Bad,
    Busy,
    GivenUp,
    ReplicaMismatch,
    persist,
    retry_after,
)
from fastgrpo.rewards.serving.client.replicas import Replica, Replicas
from fastgrpo.rewards.serving.handshake import Spec, compare, differs, read_spec
from fastgrpo.rewards.serving.in_process import join

log = logging.getLogger(__name__)
T = TypeVar("T")

# a batch of more pixels goes as several requests, well below the server's cap
REQUEST_BYTES = 64 * 2**20
# share of the time limit for which a clip may wait to be scored; the rest is for scoring it
PATIENCE = 0.8
ASK_TIMEOUT_S = 5.0  # for what takes no scoring


class RewardClient:
    """Scores from one or more servers that hold the same rewards. Threads may share it.

    Scoring has no side effect, so a request that failed on its way is simply sent again, to another
    replica where there is one. While every replica is gone it waits, for at most `outage_s`. A
    request whose turn did not come in time is sent again like one that was turned away, for as long
    as the servers answer others, but not so long that the ranks' own time limit ends the run. One
    that a living server cannot answer well, or not in time although its turn had come, is tried
    once more; then its clips are invalid.
    """

    at_once = 4  # requests under way: enough that one is read while another is scored
    shares_device = False  # the servers have memory of their own
    arriving = 0

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        names: Sequence[str],
        timeout_s: float = 60.0,
        outage_s: float = 300.0,
        fps: float | None = None,
    ) -> None:
        """Take the servers' addresses; nothing is sent yet.

        urls: http://host:port each;  timeout_s: seconds for one request;  outage_s: seconds without
        any answer that end the run;  fps: sent in place of the clips' own. None: the clips' own
        """
        for url in urls:
            check_url(url)
        if not urls:
            raise UserError("server.urls: empty; name at least one reward server")
        self.names = tuple(names)
        self.timeout_s = timeout_s
        self.fps = fps
        self.replicas = Replicas(urls, outage_s)
        self._lock = threading.Lock()
        self._events: Counter[str] = Counter()
        self._expected: Spec | None = None
        self._used: dict[tuple[int, float], list[int] | None] = {}
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=60.0
            ),
            trust_env=False,  # a proxy for the internet must not get the cluster's own traffic
        )

    def call_beside(self, log_file: Path) -> None:
        """Call the server what it is, a child of the trainer: nobody gave its address.

        log_file: its log, which messages point to
        """
        for replica in self.replicas.all:
            replica.log_file = log_file

    # ---- scores

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """Scores of B clips by each reward, NaN and invalid where a reward had none.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: frames per second
        Raises UserError where the token is wrong, the request is refused, or no server answered for
        `outage_s`.
        """
        if not len(pixels) == len(prompts) > 0:
            raise ValueError(
                f"prompts={len(prompts)}: there are {len(pixels)} clips; give one prompt for each"
            )
        fps, frames = self.fps or fps, pixels.shape[1]
        at = self._frames_used(frames, fps)
        if at is not None:
            # none of the rewards looks at the other frames: they need not travel
            pixels = pixels[:, at]
        size = max(pixels[:1].numel(), 1)
        at_once = min(max(REQUEST_BYTES // size, 1), wire.MAX_CLIPS)
        answers: list[dict[str, Scores]] = []
        for start in range(0, len(pixels), at_once):
            end = start + at_once
            clips, texts = list(pixels[start:end]), list(prompts[start:end])
            try:
                body = wire.encode_request(clips, texts, fps, self.names, at=at, of=frames)
            except wire.WireError as error:
                raise UserError(f"video: no reward server takes these clips: {error}") from None
            answers.append(self._send(body, len(clips)))
        return {name: join([answer[name] for answer in answers]) for name in self.names}

    def _send(self, body: bytes, count: int) -> dict[str, Scores]:
        """Scores of a request's `count` clips, invalid where living servers answered badly."""

        def post(replica: Replica) -> dict[str, Scores]:
            headers = {
                "Content-Type": wire.CONTENT_TYPE,
                "X-Timeout-S": f"{PATIENCE * self.timeout_s:g}",
            }
            try:
                response = self._http.post(f"{replica.url}/v1/score", content=body, headers=headers)
            except (httpx.ReadTimeout, httpx.WriteTimeout):
                # raises where the server is not late but gone
                self._http.get(f"{replica.url}/livez", timeout=ASK_TIMEOUT_S)
                raise Bad(f"no answer within {self.timeout_s:g} s") from None
            check_answer(replica, response)
            try:
                return wire.decode_scores(
                    response.content,
                    self.names,
                    count,
                    expected=self._spec_values("parts"),
                    identities=self._spec_values("identity"),
                )
            except wire.OtherReward as error:  # it was started anew since we met it
                raise ReplicaMismatch(differs(str(error))) from None
            except wire.WireError as error:
                raise Bad(str(error)) from None

        scores = self._persist(post)
        if scores is None:
            log.warning("%d clips have no score: no server answered for them well", count)
            self._count("clips_given_up", count)
            return {
                name: nothing(parts, count) for name, parts in self._spec_values("parts").items()
            }
        return scores

    def _persist(self, call: Callable[[Replica], T]) -> T | None:
        """Result of `call` with some replica, however many attempts that takes.

        None: living replicas answered badly.
        Raises UserError in an outage, and for an answer that trying again would not change.
        """

        def attempt(replica: Replica) -> T:
            if not replica.known:
                self._meet(replica)
                self.replicas.live()
            return call(replica)

        # less what one more request may take at the end
        longest_s = LONGEST_WAIT_S - 2 * self.timeout_s
        try:
            return persist(self.replicas, attempt, longest_s, self._count)
        except GivenUp:
            return None

    def _count(self, event: str, number: int = 1) -> None:
        with self._lock:
            self._events[event] += number

    def take_events(self) -> dict[str, int]:
        """Counts of what went wrong since the last call."""
        with self._lock:
            events, self._events = self._events, Counter()
        return dict(events)

    # ---- what the servers are

    def wait_ready(self, timeout_s: float) -> Spec:
        """The spec of each reward, once every server takes requests.

        Raises UserError after timeout_s seconds, or for a wrong token.
        """
        deadline = time.monotonic() + timeout_s
        for replica in self.replicas.all:
            self._wait_for(replica, deadline, timeout_s)
        assert self._expected is not None
        return self._expected

    def expect(self, spec: Spec) -> None:
        """Take only replicas with this spec, as another rank found it."""
        self._expected = {name: spec[name] for name in self.names}

    def spec_of(self, name: str) -> Mapping[str, Any]:
        """The servers' spec of a reward, see `GET /v1/spec`."""
        assert self._expected is not None
        return self._expected[name]

    def _wait_for(self, replica: Replica, deadline: float, timeout_s: float) -> None:
        while True:
            try:
                self._meet(replica)
                return
            except ReplicaMismatch as mismatch:
                raise UserError(f"{replica.where}: {mismatch}; start all servers alike") from None
            except (Busy, Bad, httpx.RequestError) as error:
                trouble = (
                    f"{type(error).__name__}: {error}"
                    if isinstance(error, httpx.RequestError)
                    else str(error)
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"{replica.where}: reward server unreachable for {timeout_s:g} s "
                    f"({trouble}); start it, or correct the address"
                )
            time.sleep(0.2)

    def _meet(self, replica: Replica) -> None:
        """Ask a replica for its spec.

        Raises ReplicaMismatch where its rewards are not those that the others have.
        """
        check_answer(replica, self._http.get(f"{replica.url}/readyz", timeout=ASK_TIMEOUT_S))
        spec = self._ask_spec(replica, "")
        missing = [name for name in self.names if name not in spec]
        if missing:
            raise ReplicaMismatch(f"has no reward '{missing[0]}', only {', '.join(spec)}")
        with self._lock:
            if self._expected is None:
                self._expected = {name: spec[name] for name in self.names}
            for name, one in self._expected.items():
                compare(name, one, spec[name])
        replica.known = True

    def _ask_spec(self, replica: Replica, query: str) -> Spec:
        response = self._http.get(f"{replica.url}/v1/spec{query}", timeout=ASK_TIMEOUT_S)
        check_answer(replica, response)
        try:
            return read_spec(response.content)
        except wire.WireError:
            raise UserError(
                f"{replica.where}: no reward server answers there; correct the address"
            ) from None

    def _frames_used(self, frames: int, fps: float) -> list[int] | None:
        """Indices of the frames that any of the rewards looks at in such a clip.

        None: all of them.
        """
        form = (frames, fps)
        if form not in self._used:
            spec = self._persist(
                lambda replica: self._ask_spec(replica, f"?frames={frames}&fps={fps!r}")
            )
            if spec is None:
                return None
            wanted = [spec[name].get("looks_at") for name in self.names]
            union = {
                int(index) for one in wanted for index in (range(frames) if one is None else one)
            }
            self._used[form] = sorted(union) if len(union) < frames else None
        return self._used[form]

    def _spec_values(self, key: str) -> dict[str, Any]:
        """The value of `key` in each reward's spec; every replica is asked before it is used."""
        assert self._expected is not None
        return {name: self._expected[name][key] for name in self.names}

    @property
    def hint(self) -> str:
        """Where a clip's missing score is told."""
        logs = dict.fromkeys(replica.see for replica in self.replicas.all)
        return f"see {', '.join(logs)}"

    # ---- end

    def release(self) -> None:
        """Give nothing back: nothing is held here between phases."""

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_answer(replica: Replica, response: httpx.Response) -> None:
    """Raise for any answer but success.

    Busy or Bad from a living server, a transport error for one that is not there, UserError where
    trying again would not help.
    """
    status = response.status_code
    if response.is_success:
        return
    if status in (401, 403):
        raise UserError(
            f"server.token_file: wrong token for {replica.url} ({status}); give the token that the server "
            "was started with"
        )
    # 504: its turn did not come in time; the server scores others' clips
    if status in (408, 429, 504):
        raise Busy(f"status {status}", retry_after(response, 0.5))
    if status in (502, 503):
        raise httpx.NetworkError(f"status {status}")
    if status >= 500:
        raise Bad(f"status {status}")
    raise UserError(
        f"{replica.where}: refused with status {status}: {response.text[:300]}; see {replica.see}"
    )


def nothing(parts: Sequence[str], count: int) -> Scores:
    """The scores of `count` clips without one: NaN, float32 [count], and invalid."""
    return Scores(
        {part: torch.full((count,), math.nan) for part in parts},
        torch.zeros(count, dtype=torch.bool),
    )


def check_url(url: str) -> None:
    """Raise UserError for what is no server's address."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"server.urls={url}: not a server's address; write it as http://host:port")
