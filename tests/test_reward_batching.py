"""How a server puts clips of many requests together, what it sends for, and what it counts."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from fastgrpo.config import RewardSpec
from fastgrpo.rewards import Reward, Scores, judge_batch, load, plain, wire
from fastgrpo.rewards.batcher import batch
from fastgrpo.rewards.client import RewardClient
from fastgrpo.rewards.in_process import ScorerInProcess
from fastgrpo.rewards.served import Served
from tests.servers import CAPTIONS, TOKEN, clips, post, running, same


class Sums:
    """The sum of a clip's pixels and fps: anything that is mixed up shows. Takes a while, so that clips gather."""

    names = ("sum", "fps")

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.shapes.append(tuple(pixels.shape))
        time.sleep(self.pause_s)
        total = pixels.flatten(1).sum(1).float()
        return Scores({"sum": total, "fps": torch.full((len(pixels),), fps)}, torch.ones(len(pixels), dtype=torch.bool))


class Choosy(Sums):
    """Looks at some frames alone, by a rule that depends on the whole clip's length and rate."""

    def __init__(self, every: float) -> None:
        super().__init__()
        self.every = every
        self.seen: list[list[bool]] = []

    def looks_at(self, frames: int, fps: float) -> list[int]:
        return [index for index in range(frames) if index % max(round(fps / self.every), 1) == 0]

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.seen.append((pixels[0].flatten(1).sum(1) > 0).tolist())
        return super().__call__(pixels[:, self.looks_at(pixels.shape[1], fps)], prompts, fps)


def picture(number: int, size: int = 4) -> Tensor:
    return torch.full((2, size, size, 3), number, dtype=torch.uint8)


def test_clips_of_many_requests_meet_by_shape_and_get_their_own_scores() -> None:
    sums = Sums(0.1)
    with running({"sums": sums}, batch_size=4, wait_s=0.02) as url, ThreadPoolExecutor(16) as threads:
        sizes = [4 if number % 3 else 8 for number in range(16)]
        bodies = [wire.encode_request([picture(n, s)], ["p"], 8.0, ["sums"]) for n, s in enumerate(sizes)]
        answers = list(threads.map(lambda body: post(url, body).json()["scores"]["sums"]["sum"], bodies))
    assert answers == [[float(n * 2 * s * s * 3)] for n, s in enumerate(sizes)]
    assert max(len_ for len_, *_ in sums.shapes) == 4  # the reward's own limit, and it was reached
    assert len(sums.shapes) < 16 and sum(shape[0] for shape in sums.shapes) == 16


def test_a_clip_waits_for_others_no_longer_than_it_may() -> None:
    with running({"sums": Sums()}, batch_size=8, wait_s=0.5) as url:
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["sums"])
        full = wire.encode_request([picture(1)] * 8, ["p"] * 8, 8.0, ["sums"])
        start = time.monotonic()
        assert post(url, body).status_code == 200
        assert 0.45 < time.monotonic() - start < 5.0
        start = time.monotonic()
        assert post(url, full).status_code == 200  # as many as the reward takes: nothing to wait for
        assert time.monotonic() - start < 0.45


def test_different_rates_and_rewards_do_not_meet() -> None:
    sums, other = Sums(0.05), Sums()
    with running({"sums": sums, "other": other}, wait_s=0.05) as url, ThreadPoolExecutor(8) as threads:
        bodies = [wire.encode_request([picture(1)], ["p"], 1.0 + n % 2, ["sums", "other"]) for n in range(8)]
        answers = list(threads.map(lambda body: post(url, body).json()["scores"], bodies))
    assert [a["sums"]["fps"] for a in answers] == [a["other"]["fps"] for a in answers] == [[1.0], [2.0]] * 4


def test_only_frames_that_are_looked_at_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    encode = wire.encode_request

    def recorded(some: Sequence[Tensor], *rest: Any) -> bytes:
        sent.append([len(clip) for clip in some])
        return encode(some, *rest)

    monkeypatch.setattr(wire, "encode_request", recorded)
    rewards: dict[str, Reward] = {"two": Choosy(4.0), "three": Choosy(8 / 3), "all": Sums()}
    pixels = torch.randint(1, 256, (3, 9, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = {name: judge_batch(reward, pixels, ["p"] * 3, 8.0) for name, reward in rewards.items()}
    with running(rewards) as url:
        for names, frames in ((["two"], 5), (["two", "three"], 6), (["three"], 3), (["two", "all"], 9)):
            with RewardClient([url], TOKEN, names) as client:
                assert same(client.score(pixels, ["p"] * 3, 8.0), {name: whole[name] for name in names})
            assert sent[-1] == [frames] * 3
    two = rewards["two"]
    assert isinstance(two, Choosy)  # with 6 of 9 frames sent it still sees its own alone, the others black
    assert two.seen[-2] == [index % 2 == 0 for index in range(9)]


def test_a_frame_that_was_not_sent_is_no_black_one() -> None:
    rewards: dict[str, Reward] = {"two": Choosy(4.0), "all": Sums()}
    with running(rewards) as url:
        for names, at in ((["two"], [0, 2, 4, 6]), (["all"], [0, 2, 4, 6, 8])):
            body = wire.encode_request([torch.ones(len(at), 8, 8, 3, dtype=torch.uint8)], ["p"], 8.0, names, at, 9)
            answer = post(url, body)
            assert answer.status_code == 400 and "looks at" in answer.text


def test_black_frames_are_made_of_the_right_ones() -> None:
    pixels = torch.randint(0, 256, (2, 5, 3, 4, 3), dtype=torch.uint8)
    expected = pixels.clone()
    expected[:, [0, 2, 3]] = 0
    assert torch.equal(batch([clip[[1, 4]] for clip in pixels], 5, (1, 4)), expected)
    assert torch.equal(batch(list(pixels), 5, None), pixels)


def test_what_its_sender_gave_up_is_not_scored() -> None:
    sums = Sums(0.5)
    with running({"sums": sums}, wait_s=0.0) as url, ThreadPoolExecutor(2) as threads:
        body = wire.encode_request([picture(1)], ["p"], 8.0, ["sums"])
        first = threads.submit(post, url, body)
        time.sleep(0.2)
        late = post(url, body, **{"X-Timeout-S": "0.1"})
        assert late.status_code == 504 and first.result().status_code == 200
        assert len(sums.shapes) == 1
        for wrong in ("0", "-1", "x", "nan", "1e99"):
            assert post(url, body, **{"X-Timeout-S": wrong}).status_code == 400


def test_metrics_count_what_happened() -> None:
    with running({"tiny_world": load(plain("tiny_world"))}) as url:
        body = wire.encode_request(list(clips()[:4]), [*CAPTIONS[:3], "not of this world"], 8.0, ["tiny_world"])
        scores = post(url, body).json()["scores"]["tiny_world"]
        assert post(url, body[:-1]).status_code == 400
        assert post(url, body, "wrong").status_code == 401
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        answer = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
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
    assert base == identity(device="cpu", batch_size=3, path="elsewhere", urls=("http://a",), where="process")
    others = [
        identity("b"),
        identity(names=("A", "B")),
        identity(dtype="bfloat16"),
        identity(frames="first"),
        identity(threshold={"A": 1.0}),
        identity(options={"k": 1}),
    ]
    assert len({base, *others}) == len(others) + 1


def test_golden_clip_is_scored_at_the_start_and_told() -> None:
    served = Served(load(plain("tiny_world")), plain("tiny_world"))
    served.warm_up()
    assert all(score is not None and score > 0.9 for score in served.golden.values())  # a clip of this very world

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


def test_in_process_respects_batch_size_and_the_rewards_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Sums] = {}

    def make(spec: RewardSpec) -> Served:
        made[spec.name] = Sums()
        return Served(made[spec.name], spec)

    monkeypatch.setattr("fastgrpo.rewards.in_process.load_served", make)
    specs = [RewardSpec(name="a", weights={}, batch_size=2, fps=3.0), RewardSpec(name="b", weights={})]
    pixels = torch.stack([picture(n) for n in range(5)])
    scores = ScorerInProcess(specs).score(pixels, ["p"] * 5, 8.0)
    assert [shape[0] for shape in made["a"].shapes] == [2, 2, 1] and [s[0] for s in made["b"].shapes] == [5]
    assert scores["a"].values["fps"].tolist() == [3.0] * 5 and scores["b"].values["fps"].tolist() == [8.0] * 5
    assert scores["a"].values["sum"].tolist() == [n * 96.0 for n in range(5)]


def test_a_reward_that_gives_too_few_scores_gives_none() -> None:
    """One score would otherwise be spread over the batch: a constant in the place of scores."""

    def few(count: int, valid: int) -> Callable[..., Scores]:
        return lambda *_: Scores({"A": torch.ones(count)}, torch.ones(valid, dtype=torch.bool))

    for count, valid in ((1, 1), (1, 3), (3, 1), (2, 2), (4, 4), (0, 0)):
        reward: Any = type("Few", (), {"names": ("A",), "__call__": staticmethod(few(count, valid))})()
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
        assert all(answer.status_code == 200 for answer in threads.map(lambda _: post(url, body), range(8)))
    assert len(seen) == 1
