"""Clips of many requests, put together into batches of one shape, and scored one batch at a time.

A clip waits for others of its shape for at most `wait_s`, and not at all once there are as many as the reward takes at
once. While a batch is scored, the next one gathers. A reward scores every clip on its own (see `Reward`), so how clips
meet changes nothing but the speed.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastgrpo.rewards import Scores, judge_batch
from fastgrpo.rewards.meters import Meters
from fastgrpo.rewards.served import Served
from fastgrpo.rewards.wire import Clip


@dataclass(frozen=True)
class Key:
    """What the clips of a batch have in common."""

    reward: str
    of: int  # frames of the whole clip
    at: tuple[int, ...] | None  # those that are here; none = all
    size: torch.Size  # of a frame
    fps: float


@dataclass
class Job:
    """One clip that waits for one reward."""

    pixels: Tensor  # uint8 [len(at) or of, H, W, 3]
    prompt: str
    deadline: float  # on the clock of time.monotonic, as `arrived`
    result: asyncio.Future[tuple[list[float], bool]]
    arrived: float = field(default_factory=time.monotonic)


class Expired(Exception):
    """The sender of a clip does not wait for it any more."""


class Batcher:
    """The queue before the rewards of one process, and the thread that scores. Lives on an event loop."""

    def __init__(self, served: Mapping[str, Served], wait_s: float) -> None:
        self.served = served
        self.wait_s = wait_s
        self.meters: Meters | None = None
        # one thread: rewards need not be thread-safe, and a GPU gains nothing from two
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._waiting: dict[Key, deque[Job]] = {}
        self._news = asyncio.Event()

    def clips_waiting(self) -> int:
        return sum(len(jobs) for jobs in self._waiting.values())

    async def score(
        self, name: str, clips: Sequence[Clip], prompts: Sequence[str], fps: float, deadline: float
    ) -> Scores:
        """A reward's scores of the clips of one request. Raises Expired where that takes until after the deadline."""
        loop = asyncio.get_running_loop()
        served = self.served[name]
        jobs: list[Job] = []
        for clip, prompt in zip(clips, prompts, strict=True):
            pixels, at = served.choose(clip, fps)
            jobs.append(Job(pixels, prompt, deadline, loop.create_future()))
            key = Key(name, clip.of, at, pixels.shape[1:], fps)
            self._waiting.setdefault(key, deque()).append(jobs[-1])
        self._news.set()
        rows = await asyncio.gather(*(job.result for job in jobs))
        table = torch.tensor([values for values, _ in rows], dtype=torch.float32)
        values = {part: table[:, column] for column, part in enumerate(served.reward.names)}
        return Scores(values, torch.tensor([valid for _, valid in rows], dtype=torch.bool))

    async def run(self) -> None:
        """Score what waits, for ever."""
        while True:
            self._news.clear()
            key, patience = self._due(time.monotonic())
            if key is not None:
                await self._score(key, self._take(key))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._news.wait()

    def _due(self, now: float) -> tuple[Key | None, float | None]:
        """What to score now, or how long to wait for more, for ever where nothing waits."""
        if not self._waiting:
            return None, None
        oldest = min(self._waiting, key=lambda key: self._waiting[key][0].arrived)
        left = self._waiting[oldest][0].arrived + self.wait_s - now
        if left <= 0.0:
            return oldest, None
        for key, jobs in self._waiting.items():
            if len(jobs) >= self.served[key.reward].spec.batch_size:
                return key, None
        return None, left

    def _take(self, key: Key) -> list[Job]:
        """The oldest clips of a key, at most as many as its reward takes at once; those that came too late fail."""
        jobs, now = self._waiting[key], time.monotonic()
        taken: list[Job] = []
        while jobs and len(taken) < self.served[key.reward].spec.batch_size:
            job = jobs.popleft()
            if job.deadline >= now:
                taken.append(job)
            elif not job.result.done():
                job.result.set_exception(Expired())
                if self.meters is not None:
                    self.meters.expired.labels(key.reward).inc()
        if not jobs:
            del self._waiting[key]
        return taken

    async def _score(self, key: Key, jobs: list[Job]) -> None:
        if not jobs:
            return
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self.thread, self._judge, key, jobs)
        except MemoryError as error:  # of the batch itself; what a reward raises is an invalid score
            for job in jobs:
                if not job.result.done():
                    job.result.set_exception(error)
            return
        if self.meters is not None:
            self.meters.batch(key.reward, scores, time.perf_counter() - start)
        table = torch.stack(list(scores.values.values()), 1).tolist()
        for job, row, valid in zip(jobs, table, scores.valid.tolist(), strict=True):
            if not job.result.done():  # its request was dropped
                job.result.set_result((row, valid))

    def _judge(self, key: Key, jobs: Sequence[Job]) -> Scores:
        """Score a batch; in the scoring thread."""
        pixels = batch([job.pixels for job in jobs], key.of, key.at)
        return judge_batch(self.served[key.reward].reward, pixels, [job.prompt for job in jobs], key.fps)


def batch(clips: Sequence[Tensor], of: int, at: tuple[int, ...] | None) -> Tensor:
    """uint8 [B, of, H, W, 3] of clips [len(at) or of, H, W, 3]; frames that were not sent are black."""
    if at is None or len(at) == of:
        return clips[0][None] if len(clips) == 1 else torch.stack(list(clips))
    # calloc of numpy: what stays black is never touched and takes no memory
    pixels = torch.from_numpy(np.zeros((len(clips), of, *clips[0].shape[1:]), dtype=np.uint8))
    for row, clip in enumerate(clips):
        pixels[row, list(at)] = clip
    return pixels
