"""How a server puts clips of many requests together, what it sends for, and what it counts."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving import loaded_reward, wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.judge import judge_batch
from fastgrpo.rewards.serving.loaded_reward import Served, code_hash
from fastgrpo.rewards.serving.server import batcher, logs
from fastgrpo.rewards.serving.server.admission import Admission, Refusal
from fastgrpo.rewards.serving.server.batcher import batch
from fastgrpo.rewards.serving.server.metrics import Meters
from tests.harness.servers import CAPTIONS, TOKEN, clips, post, running, same


class Sums(Reward):
    """The sum of a clip's pixels and fps: anything that is mixed up shows.

    Takes a while, so that clips gather.
    """

    names = ("sum", "fps")

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.shapes: list[tuple[int, ...]] = []
        self.begun = threading.Event()

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.shapes.append(tuple(pixels.shape))
        self.begun.set()
        time.sleep(self.pause_s)
        total = pixels.flatten(1).sum(1).float()
        return Scores(
            {"sum": total, "fps": torch.full((len(pixels),), fps)},
            torch.ones(len(pixels), dtype=torch.bool),
        )


class Choosy(Sums):
    """Looks at some frames alone, by a rule that depends on the whole clip's length and rate."""

    def __init__(self, every: float) -> None:
        super().__init__()
        self.every = every
        self.seen: list[list[bool]] = []

    def frames_used(self, frames: int, fps: float) -> list[int]:
        return [index for index in range(frames) if index % max(round(fps / self.every), 1) == 0]

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.seen.append((pixels[0].flatten(1).sum(1) > 0).tolist())
        return super().__call__(pixels[:, self.frames_used(pixels.shape[1], fps)], prompts, fps)


def picture(number: int, size: int = 4) -> Tensor:
    return torch.full((2, size, size, 3), number, dtype=torch.uint8)


def test_clips_of_many_requests_meet_by_shape_and_get_their_own_scores() -> None:
    sums = Sums(0.1)
    with (
        running({"sums": sums}, batch_size=4, wait_s=0.02) as url,
        ThreadPoolExecutor(16) as threads,
    ):
        sizes = [4 if number % 3 else 8 for number in range(16)]
        bodies = [
            wire.encode_request([picture(n, s)], ["p"], 8.0, ["sums"]) for n, s in enumerate(sizes)
        ]
        answers = list(
            threads.map(lambda body: post(url, body).json()["scores"]["sums"]["sum"], bodies)
        )
    assert answers == [[float(n * 2 * s * s * 3)] for n, s in enumerate(sizes)]
    assert max(len_ for len_, *_ in sums.shapes) == 4  # the reward's own limit, and it was reached
    assert len(sums.shapes) < 16 and sum(shape[0] for shape in sums.shapes) == 16


def test_a_clip_waits_for_others_no_longer_than_it_may() -> None:
    with running({"sums": Sums()}, batch_size=8, wait_s=2.0) as url:
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["sums"])
        full = wire.encode_request([picture(1)] * 8, ["p"] * 8, 8.0, ["sums"])
        start = time.monotonic()
        assert post(url, body).status_code == 200
        assert time.monotonic() - start > 1.9
        start = time.monotonic()
        # as many as the reward takes: nothing to wait for
        assert post(url, full).status_code == 200
        assert time.monotonic() - start < 1.9


def test_different_rates_and_rewards_do_not_meet() -> None:
    sums, other = Sums(0.05), Sums()
    with (
        running({"sums": sums, "other": other}, wait_s=0.05) as url,
        ThreadPoolExecutor(8) as threads,
    ):
        bodies = [
            wire.encode_request([picture(1)], ["p"], 1.0 + n % 2, ["sums", "other"])
            for n in range(8)
        ]
        answers = list(threads.map(lambda body: post(url, body).json()["scores"], bodies))
    assert (
        [a["sums"]["fps"] for a in answers]
        == [a["other"]["fps"] for a in answers]
        == [[1.0], [2.0]] * 4
    )


def test_only_frames_that_are_looked_at_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    encode = wire.encode_request

    def recorded(some: Sequence[Tensor], *rest: Any, **at: Any) -> bytes:
        sent.append([len(clip) for clip in some])
        return encode(some, *rest, **at)

    monkeypatch.setattr(wire, "encode_request", recorded)
    rewards: dict[str, Reward] = {"two": Choosy(4.0), "three": Choosy(8 / 3), "all": Sums()}
    pixels = torch.randint(
        1, 256, (3, 9, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    whole = {name: judge_batch(reward, pixels, ["p"] * 3, 8.0) for name, reward in rewards.items()}
    with running(rewards) as url:
        for names, frames in (
            (["two"], 5),
            (["two", "three"], 6),
            (["three"], 3),
            (["two", "all"], 9),
        ):
            with RewardClient([url], TOKEN, names) as client:
                assert same(
                    client.score(pixels, ["p"] * 3, 8.0), {name: whole[name] for name in names}
                )
            assert sent[-1] == [frames] * 3
    two = rewards["two"]
    # with 6 of 9 frames sent it still sees its own alone, the others black
    assert isinstance(two, Choosy)
    assert two.seen[-2] == [index % 2 == 0 for index in range(9)]


def test_a_frame_that_was_not_sent_is_no_black_one() -> None:
    rewards: dict[str, Reward] = {"two": Choosy(4.0), "all": Sums()}
    with running(rewards) as url:
        for names, at in ((["two"], [0, 2, 4, 6]), (["all"], [0, 2, 4, 6, 8])):
            body = wire.encode_request(
                [torch.ones(len(at), 8, 8, 3, dtype=torch.uint8)],
                prompts=["p"],
                fps=8.0,
                rewards=names,
                at=at,
                of=9,
            )
            answer = post(url, body)
            assert answer.status_code == 400 and "looks at" in answer.text


def test_black_frames_are_made_of_the_right_ones() -> None:
    pixels = torch.randint(0, 256, (2, 5, 3, 4, 3), dtype=torch.uint8)
    expected = pixels.clone()
    expected[:, [0, 2, 3]] = 0
    assert torch.equal(batch([clip[[1, 4]] for clip in pixels], 5, (1, 4)), expected)
    assert torch.equal(batch(list(pixels), 5, None), pixels)


def test_what_its_sender_gave_up_is_not_scored() -> None:
    sums = Sums(2.0)
    with running({"sums": sums}, wait_s=0.0) as url, ThreadPoolExecutor(2) as threads:
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["sums"])
        first = threads.submit(post, url, body)
        sums.begun.wait(30.0)
        late = post(url, body, **{"X-Timeout-S": "0.1"})
        assert late.status_code == 504 and first.result().status_code == 200
        assert len(sums.shapes) == 1
        for wrong in ("0", "-1", "x", "nan", "1e99"):
            assert post(url, body, **{"X-Timeout-S": wrong}).status_code == 400


def test_what_waits_behind_another_shape_is_given_up_in_time() -> None:
    """Its sender hears of it while a batch is scored, not after: by then it would have given up on
    the server.
    """
    sums = Sums(3.0)
    with running({"sums": sums}, wait_s=0.0) as url, ThreadPoolExecutor(2) as threads:
        first = threads.submit(post, url, wire.encode_request([picture(1)], ["p"], 8.0, ["sums"]))
        sums.begun.wait(30.0)
        other = wire.encode_request([picture(1, 8)], ["p"], 8.0, ["sums"])
        assert post(url, other, **{"X-Timeout-S": "0.2"}).status_code == 504
        assert not first.done()
        assert first.result().status_code == 200


def test_a_slow_server_loses_no_sample() -> None:
    pixels = torch.stack([picture(n) for n in range(4)])
    with (
        running({"sums": Sums(0.12)}, batch_size=4) as url,
        RewardClient([url], TOKEN, ["sums"], timeout_s=1.2, outage_s=60.0) as client,
        ThreadPoolExecutor(32) as threads,
    ):
        answers = list(
            threads.map(lambda _: client.score(pixels, ["p"] * 4, 8.0)["sums"], range(32))
        )
        events = client.take_events()
    assert all(answer.valid.all() for answer in answers)
    assert events["requests_turned_away"] > 0 and "clips_given_up" not in events


@pytest.mark.parametrize("place", ["batch", "meters"])
def test_a_batch_that_fails_ends_neither_the_scoring_nor_tells_its_text(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = [RuntimeError("not enough memory for a secret prompt")]

    def once(call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any) -> Any:
            if left:
                raise left.pop()
            return call(*arguments)

        return failing

    target: Any = batcher if place == "batch" else Meters
    monkeypatch.setattr(target, "batch", once(target.batch))
    with running({"sums": Sums()}) as url:
        body = wire.encode_request([picture(1)] * 2, ["p"] * 2, 8.0, ["sums"])
        assert post(url, body).status_code == 500
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        assert post(url, body).json()["scores"]["sums"]["sum"] == [96.0, 96.0]
    assert (
        "a batch of 2 clips for sums failed: RuntimeError at" in caplog.text
        and "secret" not in caplog.text
    )


def test_a_server_whose_scoring_has_ended_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"sums": Sums()}) as url:
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        monkeypatch.setattr(batcher.Batcher, "_due", lambda *_: 1 / 0)
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["sums"])
        assert post(url, body).status_code == 500
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
        assert post(url, body).status_code == 503


class Full(Sums):
    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_no_memory_is_no_invalid_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"full": Full()}) as url:
        assert post(url, wire.encode_request([picture(1)], ["p"], 8.0, ["full"])).status_code == 500
    monkeypatch.setattr(
        "fastgrpo.rewards.serving.in_process.load_served", lambda spec: Served(Full(), spec)
    )
    scorer = ScorerInProcess([RewardSpec(name="full", weights={}, batch_size=3)])
    with pytest.raises(
        UserError, match=r"rewards.batch_size=3: the GPU has no room for full; lower it, or give it"
    ):
        scorer.score(picture(1)[None], ["p"], 8.0)


def test_a_request_that_one_reward_refuses_leaves_nothing_waiting() -> None:
    sums = Sums()
    with running({"sums": sums, "two": Choosy(4.0)}) as url:
        at = [0, 1, 3, 5]
        body = wire.encode_request(
            [torch.ones(4, 8, 8, 3, dtype=torch.uint8)],
            prompts=["p"],
            fps=8.0,
            rewards=["sums", "two"],
            at=at,
            of=9,
        )
        assert post(url, body).status_code == 400
        whole = wire.encode_request([picture(1)], ["p"], 8.0, ["two", "sums"])
        assert post(url, whole).status_code == 200
    assert len(sums.shapes) == 1


def test_one_that_waited_for_room_in_vain_lets_smaller_ones_in() -> None:
    async def scene() -> None:
        admission = Admission(100, 5.0)
        entered: list[str] = []

        async def ask(name: str, length: int, longest: float) -> None:
            async with admission.room(length, longest):
                entered.append(name)

        async with admission.room(60):
            big = asyncio.create_task(ask("big", 90, 0.1))
            await asyncio.sleep(0)
            small = asyncio.create_task(ask("small", 30, 5.0))
            with pytest.raises(Refusal, match="429"):
                await big
            await asyncio.wait_for(small, 0.5)  # while the first one is still there
        assert entered == ["small"] and admission.bytes == 0

    asyncio.run(scene())


def test_the_log_has_no_text_of_exceptions_of_other_libraries() -> None:
    error = KeyError("a secret prompt")
    told = (type(error), error, None)
    messages = (
        f"Task exception was never retrieved\nfuture: <Task finished exception={error!r}>",
        f"Exception in callback done(<Task finished exception={error!r}>)\nhandle: <Handle>",
    )
    lines = [
        logs.JsonLines().format(logging.LogRecord("asyncio", logging.ERROR, "f", 1, text, (), told))
        for text in messages
    ]
    assert [json.loads(line)["message"] for line in lines] == [
        "Task exception was never retrieved",
        "Exception in callback done",
    ]
    assert all(json.loads(line)["error"] == "KeyError" and "secret" not in line for line in lines)
    uvicorn = logging.LogRecord(
        "uvicorn.error", logging.ERROR, "f", 1, "Exception in ASGI application\nsecret", (), told
    )
    assert (
        json.loads(logs.JsonLines().format(uvicorn))["message"] == "Exception in ASGI application"
    )


def test_metrics_count_what_happened() -> None:
    with running({"tiny_world": load(plain("tiny_world"))}) as url:
        body = wire.encode_request(
            list(clips()[:4]), [*CAPTIONS[:3], "not of this world"], 8.0, ["tiny_world"]
        )
        scores = post(url, body).json()["scores"]["tiny_world"]
        assert post(url, body[:-1]).status_code == 400
        assert post(url, body, "wrong").status_code == 401
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        answer = httpx.get(
            f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False
        )
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    for status in ("200", "400", "401"):
        assert found["reward_requests_total", status] == 1
    assert found["reward_clips_total", "tiny_world"] == 4
    assert found["reward_invalid_clips_total", "tiny_world"] == 1
    assert found["reward_batch_seconds_count", "tiny_world"] == 1
    assert found["reward_score_count", "VQ", "tiny_world"] == 3
    assert found["reward_score_sum", "VQ", "tiny_world"] == pytest.approx(sum(scores["VQ"][:3]))
    assert found["reward_bytes_in_flight",] == found["reward_clips_waiting",] == 0
    assert CAPTIONS[0] not in answer.text and TOKEN not in answer.text


# ---- what tells rewards apart, and the golden clip


def test_identity_covers_all_that_decides_scores() -> None:
    def identity(fingerprint: str = "a", names: tuple[str, ...] = ("A",), **fields: Any) -> str:
        reward: Any = SimpleNamespace(names=names, fingerprint=fingerprint)
        return Served(reward, RewardSpec(name="x", weights={}, **fields)).identity

    base = identity()
    assert base == identity(
        device="cpu", batch_size=3, path="elsewhere", urls=("http://a",), where="process"
    )
    assert base == identity(options={"tokenizer": "/a/path"})  # its effect is in the fingerprint
    assert identity("") != identity("", options={"k": 1})  # nothing else says what it does
    others = [
        identity("b"),
        identity(names=("A", "B")),
        identity(dtype="bfloat16"),
        identity(frames="first"),
        identity(threshold={"A": 1.0}),
        identity(""),
    ]
    assert len({base, *others}) == len(others) + 1


def test_identity_covers_options_of_rewards_without_weights() -> None:
    def identity(name: str, **fields: Any) -> str:
        spec = RewardSpec(name=name, weights={}, **fields)
        return Served(load(spec), spec).identity

    # its default
    assert identity("video_stats") == identity("video_stats", options={"jpeg_quality": 95})
    assert identity("video_stats") != identity("video_stats", options={"jpeg_quality": 90})
    binary: dict[str, Any] = {"threshold": {"jpeg": 5.0}}
    assert identity("video_stats", **binary) != identity(
        "video_stats", options={"jpeg_quality": 90}, **binary
    )


def test_identity_covers_the_code_of_all_files_and_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (
        "a.py",
        "b.py",
        "common/shared.py",
        "networks/clip/net.py",
        "serving/judge.py",
        "serving/wire.py",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    first = code_hash(tmp_path, tmp_path / "a.py")
    assert code_hash(tmp_path, tmp_path / "a.py") == first != code_hash(tmp_path, tmp_path / "b.py")
    for name in files:
        (tmp_path / name).write_text("# changed")
        changed = code_hash(tmp_path, tmp_path / "a.py") != first
        # which no score of `a` depends on
        assert changed == (name not in ("b.py", "serving/wire.py")), name
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "common" / "shared.py").rename(tmp_path / "common" / "renamed.py")
    assert code_hash(tmp_path, tmp_path / "a.py") != first
    before = Served(load(plain("tiny_world")), plain("tiny_world")).identity
    monkeypatch.setitem(loaded_reward.VERSIONS, "torch", "0.4")
    assert Served(load(plain("tiny_world")), plain("tiny_world")).identity != before


def test_golden_clip_is_scored_at_the_start_and_told() -> None:
    tiny = Served(load(plain("tiny_world")), plain("tiny_world"))
    tiny.warm_up()
    # a clip of this very world
    assert all(score is not None and score > 0.9 for score in tiny.golden.values())

    class Narrow(Sums):
        def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
            raise ValueError("only 1 x 1")

    narrow = Served(Narrow(), plain("x"))
    narrow.warm_up()
    assert narrow.golden == {"sum": None, "fps": None}

    class Own(Narrow):
        golden = (torch.ones(1, 1, 1, 3, dtype=torch.uint8), "p", 2.0)
        __call__ = Sums.__call__

    own = Served(Own(), plain("x"))
    own.warm_up()
    assert own.golden == {"sum": 3.0, "fps": 2.0}


# ---- in the trainer's process


def test_in_process_respects_batch_size_and_the_rewards_own_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[str, Sums] = {}

    def make(spec: RewardSpec) -> Served:
        made[spec.name] = Sums()
        return Served(made[spec.name], spec)

    monkeypatch.setattr("fastgrpo.rewards.serving.in_process.load_served", make)
    specs = [
        RewardSpec(name="a", weights={}, batch_size=2, fps=3.0),
        RewardSpec(name="b", weights={}),
    ]
    pixels = torch.stack([picture(n) for n in range(5)])
    scores = ScorerInProcess(specs).score(pixels, ["p"] * 5, 8.0)
    assert [shape[0] for shape in made["a"].shapes] == [2, 2, 1] and [
        s[0] for s in made["b"].shapes
    ] == [5]
    assert (
        scores["a"].values["fps"].tolist() == [3.0] * 5
        and scores["b"].values["fps"].tolist() == [8.0] * 5
    )
    assert scores["a"].values["sum"].tolist() == [n * 96.0 for n in range(5)]


def test_a_reward_that_gives_too_few_scores_gives_none() -> None:
    """One score would otherwise be spread over the batch: a constant in the place of scores."""

    def few(count: int, valid: int) -> Callable[..., Scores]:
        return lambda *_: Scores({"A": torch.ones(count)}, torch.ones(valid, dtype=torch.bool))

    for count, valid in ((1, 1), (1, 3), (3, 1), (2, 2), (4, 4), (0, 0)):
        reward: Any = type(
            "Few", (), {"names": ("A",), "__call__": staticmethod(few(count, valid))}
        )()
        scores = judge_batch(reward, torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), ["p"] * 3, 8.0)
        assert not scores.valid.any() and scores.values["A"].isnan().all()


def test_scoring_uses_one_thread_whatever_comes() -> None:
    seen: set[int] = set()

    class Where(Sums):
        def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
            seen.add(threading.get_ident())
            return super().__call__(pixels, prompts, fps)

    with running({"a": Where(), "b": Where()}) as url, ThreadPoolExecutor(4) as threads:
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["a", "b"])
        assert all(
            answer.status_code == 200 for answer in threads.map(lambda _: post(url, body), range(8))
        )
    assert len(seen) == 1
