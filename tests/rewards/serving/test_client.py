"""The client among several servers: which it asks, what it makes of bad answers, and when it gives
up.
"""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from fastgrpo.core.config.checks import LONGEST_WAIT_S
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.parallel.world import TIMEOUT
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.client.persist import Busy
from fastgrpo.rewards.serving.client.replicas import Replica, Replicas
from tests.harness import forks
from tests.harness.servers import CAPTIONS, TOKEN, clips, running, same


class One(Reward):
    """Scores 1, or another value; the fingerprint says which weights it has."""

    names = ("A",)

    def __init__(self, fingerprint: str = "w", pause_s: float = 0.0, value: float = 1.0) -> None:
        self.fingerprint = fingerprint
        self.pause_s = pause_s
        self.value = value

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        time.sleep(self.pause_s)
        return Scores(
            {"A": torch.full((len(pixels),), self.value)}, torch.ones(len(pixels), dtype=torch.bool)
        )


# ---- which replica


def test_of_two_the_less_busy_is_taken() -> None:
    replicas = Replicas([f"http://r{n}" for n in range(4)], 10.0)
    taken = [replicas.take() for _ in range(400)]
    counts = Counter(replica.url for replica in taken)
    assert sum(counts.values()) == 400 and max(counts.values()) - min(counts.values()) <= 12
    # With all of its requests under way a replica is taken only against itself, which two draws
    # never are.
    for replica in taken:
        if replica.url != "http://r0":
            replicas.release(replica)
    assert all(replicas.take().url != "http://r0" for _ in range(30))


def test_one_that_fails_rests_and_is_tried_with_a_single_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("fastgrpo.rewards.serving.client.replicas.time.monotonic", lambda: clock[0])
    replicas = Replicas(["http://a", "http://b"], 1000.0)
    a, b = replicas.all
    rests = []
    for _ in range(8):
        replicas.failed(a, "gone")
        rests.append(a.rests_until - clock[0])
        assert all(replicas.take() is b for _ in range(20))
        clock[0] = a.rests_until
    assert all(
        0.5 * full <= rest <= full
        for rest, full in zip(rests, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10], strict=True)
    )
    # b has 160 under way
    trial = next(replica for replica in iter(replicas.take, None) if replica is a)
    assert all(replicas.take() is b for _ in range(20))  # while the trial lasts
    replicas.succeeded(trial)
    assert replicas.take() is a


def test_an_outage_is_all_replicas_failing_without_a_success_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("fastgrpo.rewards.serving.client.replicas.time.monotonic", lambda: clock[0])
    replicas = Replicas(["http://a", "http://b"], 5.0)
    a, b = replicas.all
    replicas.failed(a, "gone")
    clock[0] = 4.0
    replicas.succeeded(b)
    clock[0] = 6.0  # 6 s after a's failure, but b has served
    replicas.failed(a, "gone")
    clock[0] = 10.9
    replicas.failed(b, "late", lives=True)  # one that lives is none
    clock[0] = 15.0
    replicas.failed(b, "gone, too")
    clock[0] = 19.9
    replicas.failed(a, "gone")
    clock[0] = 20.0
    with pytest.raises(
        UserError,
        match=r"server.urls=http://a: no scores for 5 s \(gone\).*newest checkpoint is intact",
    ):
        replicas.take()


# ---- replicas that differ


def test_replicas_with_other_weights_are_refused() -> None:
    with (
        running({"one": One("w")}) as first,
        running({"one": One("v")}) as second,
        RewardClient([first, second], TOKEN, ["one"]) as client,
        pytest.raises(
            UserError, match=f"server.urls={second}: its 'one' differs from that of the other"
        ),
    ):
        client.wait_ready(5.0)


def test_a_replica_that_comes_back_with_other_weights_gets_no_requests() -> None:
    with ExitStack() as stack:
        with running({"one": One("w")}) as second:
            port = int(second.rsplit(":", 1)[1])
            first = stack.enter_context(running({"one": One("w")}))
            client = stack.enter_context(
                RewardClient([first, second], TOKEN, ["one"], outage_s=20.0)
            )
            client.wait_ready(5.0)
        stack.enter_context(running({"one": One("v", value=2.0)}, port=port))
        deadline = time.monotonic() + 10.0
        while not client.replicas.all[1].barred and time.monotonic() < deadline:
            assert client.score(clips()[:1], CAPTIONS[:1], 8.0)["one"].values["A"].tolist() == [1.0]
        assert "differs" in client.replicas.all[1].barred


def test_another_rank_takes_only_what_the_first_one_found() -> None:
    with running({"one": One("w")}) as url, RewardClient([url], TOKEN, ["one"]) as first:
        found = first.wait_ready(5.0)
    with running({"one": One("v")}) as url, RewardClient([url], TOKEN, ["one"]) as second:
        second.expect(json.loads(json.dumps(found)))
        with pytest.raises(UserError, match="differs from that of the other servers"):
            second.score(clips(), CAPTIONS, 8.0)


# ---- answers that are bad, and answers that do not come


@contextmanager
def pretending(answer: Callable[[int, int], tuple[int, object]]) -> Iterator[str]:
    """A server that says it is a good one; answer: (requests so far, clips) -> (status, JSON) of
    /v1/score.
    """
    count = [0]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            one = {
                "parts": ["A"],
                "identity": "i",
                "golden": {"A": 1.0},
                "dtype": "float32",
                "looks_at": None,
            }
            self._say(200, {"rewards": {"one": one}})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                count[0] += 1
                number = count[0]
            self._say(*answer(number, body.count(b'"U8"')))

        def _say(self, status: int, value: object) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def good(count: int) -> tuple[int, object]:
    return answered([1.0] * count, [True] * count)


def answered(scores: list[float], valid: list[bool], part: str = "A") -> tuple[int, object]:
    return 200, {
        "scores": {"one": {part: scores}},
        "valid": {"one": valid},
        "identity": {"one": "i"},
    }


WRONG: dict[str, tuple[int, Any]] = {
    "too few": answered([1.0], [True]),
    "beyond float32": answered([1e39] * 2, [True] * 2),
    "other part": answered([1.0] * 2, [True] * 2, "B"),
    "no scores": (200, {"identity": {"one": "i"}}),
    "its own error": (500, {}),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_answers_are_tried_again_then_invalid_and_counted(what: str) -> None:
    with (
        pretending(lambda _, count: WRONG[what]) as url,
        RewardClient([url], TOKEN, ["one"], outage_s=30.0) as client,
    ):
        scores = client.score(clips()[:2], CAPTIONS[:2], 8.0)["one"]
        assert not scores.valid.any() and scores.values["A"].isnan().all()
        assert client.take_events() == {"requests_bad": 2, "clips_given_up": 2}
        assert client.take_events() == {}
    with (
        pretending(lambda number, count: WRONG[what] if number == 1 else good(count)) as url,
        RewardClient([url], TOKEN, ["one"], outage_s=30.0) as client,
    ):
        assert client.score(clips()[:2], CAPTIONS[:2], 8.0)["one"].values["A"].tolist() == [
            1.0,
            1.0,
        ]
        assert client.take_events() == {"requests_bad": 1}


def test_a_late_answer_of_a_living_server_makes_invalid_clips_not_an_outage() -> None:
    slow = One(pause_s=0.8)
    with (
        running({"one": slow}) as url,
        RewardClient([url], TOKEN, ["one"], timeout_s=0.3, outage_s=20.0) as client,
    ):
        client.wait_ready(5.0)
        scores = client.score(clips()[:1], CAPTIONS[:1], 8.0)["one"]
        assert not scores.valid.any()
        events = client.take_events()
        events.pop("requests_turned_away", 0)  # while its first attempt was still being scored
        assert events == {"requests_bad": 2, "clips_given_up": 1}
        slow.pause_s = 0.0
        time.sleep(1.0)
        assert client.score(clips()[:1], CAPTIONS[:1], 8.0)["one"].valid.all()


def test_what_trying_again_would_not_change_is_told_at_once() -> None:
    with (
        pretending(lambda *_: (413, "too long")) as url,
        RewardClient([url], TOKEN, ["one"]) as client,
    ):
        start = time.monotonic()
        with pytest.raises(UserError, match=f"server.urls={url}: refused with status 413"):
            client.score(clips()[:1], CAPTIONS[:1], 8.0)
        assert time.monotonic() - start < 3.0


def test_turned_away_is_tried_again_without_leaving_the_server() -> None:
    turned_away: tuple[int, object] = (429, "full")
    with (
        pretending(lambda number, count: turned_away if number < 3 else good(count)) as url,
        RewardClient([url], TOKEN, ["one"], outage_s=30.0) as client,
    ):
        assert client.score(clips()[:1], CAPTIONS[:1], 8.0)["one"].valid.all()
        assert client.take_events() == {"requests_turned_away": 2}
        assert client.replicas.all[0].failures == 0


# ---- how long one request is sent again


class Clock:
    """In the place of a module's `time`: it passes in sleep alone, and where a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("client", "persist", "replicas"):
        monkeypatch.setattr(f"fastgrpo.rewards.serving.client.{module}.time", clock)
    monkeypatch.setattr(
        RewardClient, "_meet", lambda self, replica: setattr(replica, "known", True)
    )
    return clock


def right(client: RewardClient, replica: Replica) -> None:
    client.replicas.succeeded(replica)


def wrong(client: RewardClient, replica: Replica) -> None:
    client.replicas.failed(replica, "status 500", lives=True)


def none(client: RewardClient, replica: Replica) -> None:
    pass


def persist(
    clock: Clock,
    takes_s: float,
    others: Callable[[RewardClient, Replica], None],
    until_s: float,
    error: Exception,
) -> tuple[str | None, float]:
    """What comes of a request that raises `error` until so long after its start, and the seconds
    that it took.

    takes_s: each attempt;  others: answers that another request gets meanwhile.  Limits: a minute
    for each, 300 s
    """
    start = clock.now
    with RewardClient(["http://a"], TOKEN, ["one"], timeout_s=60.0, outage_s=300.0) as client:

        def call(replica: Replica) -> str:
            clock.now += takes_s
            others(client, replica)
            if clock.now - start < until_s:
                raise error
            return "scores"

        return client._persist(call), clock.now - start


def test_a_slow_server_is_waited_for_beyond_the_limit_of_an_outage(clock: Clock) -> None:
    found, took = persist(
        clock, takes_s=48.0, others=right, until_s=1300.0, error=Busy("status 504", 0.5)
    )
    assert found == "scores" and 1300.0 <= took < 1360.0


def test_nor_is_it_waited_for_until_the_ranks_time_limit(clock: Clock) -> None:
    found, took = persist(
        clock, takes_s=60.0, others=right, until_s=math.inf, error=Busy("status 429", 1.0)
    )
    assert found is None and 1300.0 < took <= LONGEST_WAIT_S + 60.0 < TIMEOUT.total_seconds()


def test_a_server_that_turns_everything_away_is_an_outage(clock: Clock) -> None:
    start = clock.now
    with pytest.raises(UserError, match=r"no scores for 300 s \(status 429\)"):
        persist(clock, takes_s=5.0, others=none, until_s=math.inf, error=Busy("status 429", 1.0))
    assert 300.0 <= clock.now - start < 320.0


def test_one_that_answers_no_other_well_is_not_waited_for(clock: Clock) -> None:
    found, took = persist(
        clock, takes_s=5.0, others=wrong, until_s=math.inf, error=Busy("status 429", 1.0)
    )
    assert found is None and 300.0 < took < 330.0


def test_a_request_that_breaks_its_connections_is_given_up_while_others_are_answered(
    clock: Clock,
) -> None:
    found, took = persist(
        clock, takes_s=1.0, others=right, until_s=math.inf, error=httpx.ReadError("reset")
    )
    assert found is None and 300.0 < took < 320.0


# ---- a replica killed in mid-run


@contextmanager
def process(folder: Path, port: int) -> Iterator[tuple[forks.Started, str]]:
    """`fastgrpo serve-rewards tiny_world` and its url, once it is ready."""
    token, ready = folder / "token", folder / f"ready-{time.monotonic_ns()}"
    token.write_text(TOKEN)
    arguments = [
        "serve-rewards",
        "tiny_world",
        "--port",
        str(port),
        "--token-file",
        str(token),
        "--ready-file",
        str(ready),
    ]
    child = forks.start("fastgrpo.cli", arguments, errors=folder / "server.log")
    try:
        deadline = time.monotonic() + 60.0
        while not ready.exists():
            assert child.poll() is None and time.monotonic() < deadline, (
                folder / "server.log"
            ).read_text()
            time.sleep(0.05)
        yield child, json.loads(ready.read_text())["url"]
    finally:
        child.kill()


def test_a_replica_killed_and_restarted_in_mid_run_changes_no_score(tmp_path: Path) -> None:
    rewards: dict[str, Reward] = {"tiny_world": load(plain("tiny_world"))}
    stop, answers = threading.Event(), []

    def ask(client: RewardClient) -> None:
        while not stop.is_set():
            answers.append(client.score(clips(), CAPTIONS, 8.0))

    with running(rewards) as first, ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        with RewardClient([first], TOKEN, ["tiny_world"]) as alone:
            undisturbed = alone.score(clips(), CAPTIONS, 8.0)
        with process(tmp_path, 0) as (child, second):
            client = stack.enter_context(
                RewardClient([first, second], TOKEN, ["tiny_world"], outage_s=30.0)
            )
            client.wait_ready(10.0)
            jobs = [threads.submit(ask, client) for _ in range(3)]
            time.sleep(0.5)
            child.kill()
            time.sleep(0.5)
        with process(tmp_path, int(second.rsplit(":", 1)[1])):
            deadline, back = time.monotonic() + 60.0, client.replicas.all[1]
            while not (len(answers) > 20 and back.known and back.failures == 0):
                assert time.monotonic() < deadline and not any(job.done() for job in jobs)
                time.sleep(0.05)
            time.sleep(0.3)
            stop.set()
            for job in jobs:
                job.result()
    assert all(same(answer, undisturbed) for answer in answers)
    events = client.take_events()
    assert events.get("requests_failed", 0) >= 1 and "clips_given_up" not in events
