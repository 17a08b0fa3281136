"""Where the trainer gets scores: from reward servers, or from rewards in its own process. Both give the same bits."""

import logging
import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx
import torch
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.rewards import Scores, judge, load, wire

log = logging.getLogger(__name__)

PASSING = (408, 429, 502, 503, 504)  # answers of a server that may take the same request later
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
REQUEST_BYTES = 64 * 2**20  # a batch of more pixels goes as several requests, well below the server's cap


class RewardClient:
    """Scores from one or more servers that hold the same rewards. Threads may share it.

    Scoring has no side effect, so a request that failed on its way is simply sent again, to the replica with the
    fewest requests under way, after a pause that doubles and is drawn at random, so that many ranks do not knock
    together.
    """

    def __init__(
        self, urls: Sequence[str], token: str, names: Sequence[str], timeout_s: float = 60.0, outage_s: float = 300.0
    ) -> None:
        """urls: http://host:port each;  timeout_s: for one request;  outage_s: of failures before giving up."""
        for url in urls:
            check_url(url)
        if not urls:
            raise UserError("server.urls: empty; name at least one reward server")
        self.names = tuple(names)
        self.outage_s = outage_s
        self._under_way = dict.fromkeys((url.rstrip("/") for url in urls), 0)
        self._lock = threading.Lock()
        self._random = random.Random()  # its own, so that pauses disturb no one's random numbers
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # a proxy for the internet must not get the cluster's own traffic
        )

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """pixels: uint8 [B, F, H, W, 3];  returns each reward's Scores, NaN and invalid where it had none.

        Raises UserError where the token is wrong, the request is refused, or no server answered for `outage_s`.
        """
        if not len(pixels) == len(prompts) > 0:
            raise ValueError(f"prompts={len(prompts)}: there are {len(pixels)} clips; give one prompt for each")
        clip_bytes = max(pixels[:1].numel(), 1)
        at_once = min(max(REQUEST_BYTES // clip_bytes, 1), wire.MAX_CLIPS)
        answers: list[dict[str, Scores]] = []
        for start in range(0, len(pixels), at_once):
            some, of = list(pixels[start : start + at_once]), list(prompts[start : start + at_once])
            try:
                body = wire.encode_request(some, of, fps, self.names)
            except wire.WireError as error:
                raise UserError(f"video: no reward server takes these clips: {error}") from None
            answers.append(self._send(body, len(some)))
        return {name: join([answer[name] for answer in answers]) for name in self.names}

    def _send(self, body: bytes, count: int) -> dict[str, Scores]:
        """Scores of a request's `count` clips, however many attempts that takes."""
        pause = FIRST_PAUSE_S
        failed: str | None = None
        give_up = float("inf")
        while True:
            url = self._choose(failed)
            retry_after = 0.0
            try:
                response = self._http.post(f"{url}/v1/score", content=body, headers={"Content-Type": wire.CONTENT_TYPE})
                if response.status_code not in PASSING:
                    return self._read(url, response, count)
                trouble, retry_after = f"status {response.status_code}", seconds(response.headers.get("retry-after"))
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            finally:
                self._release(url)
            now = time.monotonic()
            give_up = min(give_up, now + self.outage_s)
            if now >= give_up:
                raise UserError(
                    f"server.urls={url}: no scores for {self.outage_s:g} s ({trouble}); "
                    "see that the reward server runs and is not overloaded, or raise server.outage_s"
                )
            log.warning("reward server %s: %s; trying again", url, trouble)
            wait = max(retry_after, pause * self._random.uniform(0.5, 1.0))
            time.sleep(min(wait, give_up - now))
            pause, failed = min(2.0 * pause, LONGEST_PAUSE_S), url

    def wait_ready(self, timeout_s: float) -> dict[str, list[str]]:
        """The parts of each reward, once every server takes requests; UserError after timeout_s or a wrong token."""
        deadline = time.monotonic() + timeout_s
        specs = {url: self._wait_for(url, deadline, timeout_s) for url in self._under_way}
        for url, spec in specs.items():
            missing = [name for name in self.names if name not in spec]
            if missing:
                has = ", ".join(spec)
                raise UserError(f"server.urls={url}: has no reward '{missing[0]}', only {has}; start it with that one")
            if any(spec[name] != other[name] for other in specs.values() for name in self.names if name in other):
                raise UserError(f"server.urls={url}: differs from the other servers; start all with the same version")
        return specs[url]

    def _wait_for(self, url: str, deadline: float, timeout_s: float) -> dict[str, list[str]]:
        """The rewards of a server and their parts, once it is ready."""
        while True:
            try:
                response = self._http.get(f"{url}/readyz", timeout=5.0)
                if response.is_success:
                    return self._spec(url, self._http.get(f"{url}/v1/spec", timeout=5.0))
                trouble = f"status {response.status_code}"
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise UserError(
                    f"server.urls={url}: reward server unreachable for {timeout_s:g} s ({trouble}); "
                    "start it, or correct the address"
                )
            time.sleep(FIRST_PAUSE_S)

    def _spec(self, url: str, response: httpx.Response) -> dict[str, list[str]]:
        self._refuse(url, response)
        try:
            rewards: dict[str, list[str]] = response.json()["rewards"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"server.urls={url}: no reward server answers there; correct the address") from None
        return rewards

    def _choose(self, failed: str | None) -> str:
        """The replica with the fewest requests under way; one that just failed only where there is no other."""
        with self._lock:
            url = min(self._under_way, key=lambda u: (u == failed, self._under_way[u], self._random.random()))
            self._under_way[url] += 1
            return url

    def _release(self, url: str) -> None:
        with self._lock:
            self._under_way[url] -= 1

    def _read(self, url: str, response: httpx.Response, count: int) -> dict[str, Scores]:
        self._refuse(url, response)
        try:
            return wire.decode_scores(response.content, self.names, count)
        except wire.WireError as error:
            raise UserError(f"server.urls={url}: {error}; start the server with this version of fastgrpo") from None

    def _refuse(self, url: str, response: httpx.Response) -> None:
        """Raise UserError for an answer that trying again would not change."""
        if response.status_code in (401, 403):
            raise UserError(
                f"server.token_file: wrong token for {url} ({response.status_code}); "
                "give the token that the server was started with"
            )
        if not response.is_success:
            raise UserError(
                f"server.urls={url}: refused with status {response.status_code}: {response.text[:300]}; see its log"
            )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ScorerInProcess:
    """The same rewards without a server: the scores are equal bit for bit."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._rewards = {name: load(name) for name in names}
        self._lock = threading.Lock()  # as in the server, a reward scores one batch at a time

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """pixels: uint8 [B, F, H, W, 3];  returns each reward's Scores, NaN and invalid where it had none."""
        with self._lock:
            return {name: judge(reward, list(pixels), prompts, fps) for name, reward in self._rewards.items()}


def seconds(text: str | None) -> float:
    """A Retry-After header in seconds, at most LONGEST_PAUSE_S; 0 where it is absent or a date."""
    return min(float(text), LONGEST_PAUSE_S) if text is not None and text.isascii() and text.isdigit() else 0.0


def join(batches: Sequence[Scores]) -> Scores:
    """The scores of consecutive batches as one."""
    values = {part: torch.cat([batch.values[part] for batch in batches]) for part in batches[0].values}
    return Scores(values, torch.cat([batch.valid for batch in batches]))


def check_url(url: str) -> None:
    """Raise UserError for what is no server's address."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"server.urls={url}: not a server's address; write it as http://host:port")
