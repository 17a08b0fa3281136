"""Clips of many requests, put together into batches of one shape, and scored one batch at a time.

A clip waits for others of its shape for at most `wait_s`, and not at all once there are as many as
the reward takes at once. While a batch is scored, the next one gathers. A reward scores every clip
on its own (see `Reward`), so how clips meet changes nothing but the speed.
"""

import asyncio
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastgrpo.core.errors import Unavailable, UserError
from fastgrpo.core.reward import Scores
from fastgrpo.core.units import MIB
from fastgrpo.rewards.serving.judge import judge_batch
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.rewards.serving.server.metrics import Meters
from fastgrpo.rewards.serving.wire import Clip

log = logging.getLogger(__name__)

TICK_S = 0.1  # between looks at what waits too long while a batch is scored


@dataclass(frozen=True, kw_only=True)
class Key:
    """Properties that all clips of a batch share."""

    reward: str
    of: int  # frames of the whole clip
    at: tuple[int, ...] | None  # those that are here. None: all
    size: torch.Size  # of a frame
    fps: float


@dataclass(kw_only=True)
class Job:
    """One clip that waits for one reward."""

    pixels: Tensor  # uint8 [len(at) or of, H, W, 3]
    prompt: str
    deadline: float  # on the clock of time.monotonic, as `arrived`
    result: asyncio.Future[tuple[list[float], bool]]
    arrived: float = field(default_factory=time.monotonic)


class Expired(Exception):
    """A clip that waited until its sender would not wait any more."""


class TooLarge(Exception):
    """A clip that a reward takes more memory for than the server has."""


class Failed(Exception):
    """A batch that could not be scored, by no fault of its clips."""


class Refused(Exception):
    """A reward that no clip would get a score of until its settings are corrected."""


class Batcher:
    """The queue before the rewards of one process, and the thread that scores.

    Lives on an event loop.
    """

    def __init__(
        self, served: Mapping[str, Served], wait_s: float, max_working: float = math.inf
    ) -> None:
        """max_working: bytes that judging a batch may take"""
        self.served = served
        self.wait_s = wait_s
        self.max_working = max_working
        self.meters: Meters | None = None
        # one thread: rewards need not be thread-safe, and a GPU gains nothing from two
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._waiting: dict[Key, deque[Job]] = {}
        self._news = asyncio.Event()

    def clips_waiting(self) -> int:
        return sum(len(jobs) for jobs in self._waiting.values())

    async def score(
        self,
        names: Sequence[str],
        clips: Sequence[Clip],
        prompts: Sequence[str],
        fps: float,
        deadline: float,
    ) -> dict[str, Scores]:
        """Each reward's scores of the clips of one request.

        Raises TooLarge for a clip that needs more memory than there is, Expired where one waits
        until after the deadline, Failed where its batch could not be scored, Unavailable and Refused
        as a reward does, and WireError where a frame that a reward looks at was not sent; then no
        clip of the request waits any more.
        """
        loop = asyncio.get_running_loop()
        # before any of them waits: all do, or none
        chosen = {name: [self.served[name].choose(clip, fps) for clip in clips] for name in names}
        for name in names:
            for pixels, _ in chosen[name]:
                self._check_memory(name, pixels.shape)
        jobs: dict[str, list[Job]] = {name: [] for name in names}
        for name in names:
            for clip, prompt, (pixels, at) in zip(clips, prompts, chosen[name], strict=True):
                result = loop.create_future()
                job = Job(pixels=pixels, prompt=prompt, deadline=deadline, result=result)
                jobs[name].append(job)
                key = Key(reward=name, of=clip.of, at=at, size=pixels.shape[1:], fps=fps)
                self._waiting.setdefault(key, deque()).append(job)
        self._news.set()
        try:
            await asyncio.gather(*(job.result for one in jobs.values() for job in one))
        finally:
            for job in (job for one in jobs.values() for job in one):
                job.result.cancel()  # nothing to those that are done
        return {
            name: self._table(name, [job.result.result() for job in one])
            for name, one in jobs.items()
        }

    def _check_memory(self, name: str, shape: torch.Size) -> None:
        """Raise TooLarge where judging one clip [F, H, W, 3] takes more than there is."""
        needed = self.served[name].reward.memory(*shape[:3])
        if needed > self.max_working:
            raise TooLarge(
                f"{name} takes {needed / MIB:.0f} MiB to judge a clip of {list(shape)}, above the "
                f"server's {self.max_working / MIB:.0f} (--max-working); send smaller clips"
            )

    def _most(self, key: Key) -> int:
        """Clips of a key that are judged at a time: as its reward is set, and as fits in memory."""
        reward = self.served[key.reward]
        frames = key.of if key.at is None else len(key.at)
        needed = max(reward.reward.memory(frames, key.size[0], key.size[1]), 1.0)
        return max(min(reward.spec.batch_size, int(min(self.max_working / needed, 1e6))), 1)

    def _table(self, name: str, rows: Sequence[tuple[list[float], bool]]) -> Scores:
        """Scores, float32 [B] for each part, of B rows.

        rows: scores by part, and whether they are valid, of each clip
        """
        table = torch.tensor([values for values, _ in rows], dtype=torch.float32)
        values = {
            part: table[:, column] for column, part in enumerate(self.served[name].reward.names)
        }
        return Scores(values, torch.tensor([valid for _, valid in rows], dtype=torch.bool))

    async def run(self) -> None:
        """Score what waits, for ever. Where that fails, what waits fails and the error goes on."""
        try:
            await self._loop()
        except Exception as error:
            log.critical("scoring has ended: %s", raised_at(error))
            for jobs in self._waiting.values():
                fail(jobs, Failed())
            raise

    async def _loop(self) -> None:
        while True:
            self._news.clear()
            self._expire()
            key, patience = self._due(time.monotonic())
            if key is not None:
                await self._score(key, self._take(key))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._news.wait()

    def _due(self, now: float) -> tuple[Key | None, float | None]:
        """The key to score now, or seconds to wait for more clips. None: nothing waits."""
        if not self._waiting:
            return None, None
        oldest = min(self._waiting, key=lambda key: self._waiting[key][0].arrived)
        left = self._waiting[oldest][0].arrived + self.wait_s - now
        if left <= 0.0:
            return oldest, None
        for key, jobs in self._waiting.items():
            if len(jobs) >= self._most(key):
                return key, None
        return None, left

    def _take(self, key: Key) -> list[Job]:
        """The oldest clips of a key, at most as many as its reward takes at once."""
        jobs = self._waiting[key]
        count = min(len(jobs), self._most(key))
        taken = [jobs.popleft() for _ in range(count)]
        if not jobs:
            del self._waiting[key]
        return taken

    def _expire(self) -> None:
        """Fail what waits too long, of every key, and forget what nobody waits for."""
        now = time.monotonic()
        for key, jobs in list(self._waiting.items()):
            for job in jobs:
                if job.deadline < now and not job.result.done():
                    job.result.set_exception(Expired())
                    if self.meters is not None:
                        self.meters.expired.labels(key.reward).inc()
            self._waiting[key] = deque(job for job in jobs if not job.result.done())
            if not self._waiting[key]:
                del self._waiting[key]

    async def _score(self, key: Key, jobs: list[Job]) -> None:
        start = time.perf_counter()
        try:
            scoring = asyncio.get_running_loop().run_in_executor(
                self.thread, self._judge, key, jobs
            )
            while not (await asyncio.wait([scoring], timeout=TICK_S))[0]:
                self._expire()
            scores = scoring.result()
            if self.meters is not None:
                self.meters.batch(key.reward, scores, time.perf_counter() - start)
            table = torch.stack(list(scores.values.values()), 1).tolist()
            for job, row, valid in zip(jobs, table, scores.valid.tolist(), strict=True):
                if not job.result.done():  # its request was dropped
                    job.result.set_result((row, valid))
        except Unavailable as trouble:
            log.warning("%s has no scores for now: %s", key.reward, trouble)
            fail(jobs, trouble)
        except UserError as mistake:
            log.error("%s gives no scores: %s", key.reward, mistake)
            fail(jobs, Refused(str(mistake)))
        # an error of the batch itself, such as no memory: no clip's fault, and the next one goes on
        except Exception as error:
            log.error(
                "a batch of %d clips for %s failed: %s", len(jobs), key.reward, raised_at(error)
            )
            fail(jobs, Failed())

    def _judge(self, key: Key, jobs: Sequence[Job]) -> Scores:
        """Score a batch; in the scoring thread."""
        pixels = batch([job.pixels for job in jobs], key.of, key.at)
        return judge_batch(
            self.served[key.reward].reward, pixels, [job.prompt for job in jobs], key.fps
        )


def raised_at(error: Exception) -> str:
    """An error's class and where it was raised, without its text, which may quote a prompt."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def fail(jobs: Iterable[Job], reason: Exception) -> None:
    """Tell the senders that there will be no score."""
    for job in jobs:
        if not job.result.done():
            job.result.set_exception(reason)


def batch(clips: Sequence[Tensor], of: int, at: tuple[int, ...] | None) -> Tensor:
    """One tensor of several clips, where frames that were not sent are black.

    clips: uint8 [len(at) or of, H, W, 3] each.  returns uint8 [B, of, H, W, 3]
    """
    if at is None or len(at) == of:
        return clips[0][None] if len(clips) == 1 else torch.stack(list(clips))
    # calloc of numpy: what stays black is never touched and takes no memory
    pixels = torch.from_numpy(np.zeros((len(clips), of, *clips[0].shape[1:]), dtype=np.uint8))
    for row, clip in enumerate(clips):
        pixels[row, list(at)] = clip
    return pixels
