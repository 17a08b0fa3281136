"""One rank of two, through the real stopwatch, gather, heartbeat and tracker, with work that only
sleeps.  argv: folder

In the second iteration the second rank is slow in its rollout and its decoding takes MEMORY_MIB
more; in the third it stops itself (SIGSTOP) in its decoding, and the first waits for it for ever.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fastgrpo.core.processes import die_with
from fastgrpo.parallel.world import World, open_world
from fastgrpo.run import heartbeat
from fastgrpo.run.heartbeat import HeartbeatWriter
from fastgrpo.run.rank_times import Ranks
from fastgrpo.run.stopping import Signals, Stop
from fastgrpo.run.tracker import Tracker

ITERATIONS, PIECES = 3, 2
WORK_S, SLOW_S = 0.02, 1.0  # per piece
MEMORY_MIB = 128


def iterate(iteration: int, world: World, stop: Stop, ranks: Ranks, tracker: Tracker) -> None:
    odd = world.rank == 1
    watch = ranks.watch(iteration)
    for _ in watch.pieces(stop.poll_before(range(PIECES)), "rollout", then="reward"):
        time.sleep(SLOW_S if odd and iteration == 1 else WORK_S)
        watch.lap("rollout", then="decode")
        if odd and iteration == 1:
            bytearray(b"x") * (MEMORY_MIB * 2**20)
        if odd and iteration == 2:
            while not told(ranks.heart):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGSTOP)
        watch.lap("decode")
    time.sleep(WORK_S)
    watch.lap("reward", then="wait")
    world.barrier()
    watch.lap("wait", then="update")
    time.sleep(3 * WORK_S)
    watch.lap("update")
    spread = ranks.gather(iteration, watch)
    tracker.log(iteration, {"reward/sum": 1.0} | watch.metrics() | spread.metrics(), spread.note())


def told(heart: HeartbeatWriter) -> bool:
    """Whether the file says what this rank is doing."""
    beat = heartbeat.read(heart.file.parent.parent)[1]
    return (beat.iteration, beat.phase) == (2, "decode")


def main(folder: Path) -> None:
    with (
        open_world() as world,
        Signals() as signals,
        HeartbeatWriter(folder, world.rank, world.size, 0.2) as heart,
        Tracker(folder, world.main, ITERATIONS) as tracker,
    ):
        stop, ranks = Stop(folder, signals, world), Ranks(folder, world, heart)
        for iteration in range(ITERATIONS):
            iterate(iteration, world=world, stop=stop, ranks=ranks, tracker=tracker)


if __name__ == "__main__":
    die_with(os.getppid())
    main(Path(sys.argv[1]))
