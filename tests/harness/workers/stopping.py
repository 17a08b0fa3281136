"""One rank of two: what it did of its pieces of work until all stopped.

argv: folder, who is asked to stop and how

The first rank has three pieces, the second one. Writes FOLDER/HOW/RANK: the pieces begun, and how
it ended.
"""

import os
import signal
import sys
from pathlib import Path

from fastgrpo.core.processes import die_with, leave
from fastgrpo.parallel.world import World, open_world
from fastgrpo.run.stopping import POLL_S, Signals, Stop, Stopped


def work(folder: Path, how: str, world: World) -> None:
    with Signals() as signals:
        stop = Stop(folder, signals, world)
        world.barrier()  # the first rank's forgets a file that is there
        begun, end = 0, "all done"
        try:
            for _ in stop.poll_before(range(1 if world.rank else 3)):
                begun += 1
                if how == "second rank" and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if how == "first rank" and begun == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if how == "file" and begun == 1:
                    world.barrier()  # the first rank has looked for the file once, and found none
                    if world.rank == 1:
                        stop.file.touch()
                    world.barrier()
                    stop._polled -= POLL_S  # as if the time until the next look had passed
        except Stopped:
            end = "stopped"
            stop.tell()
        (folder / str(world.rank)).write_text(f"{begun} {end}")


if __name__ == "__main__":
    die_with(os.getppid())
    with open_world() as world:
        for name in sys.argv[2:]:
            place = Path(sys.argv[1]) / name
            place.mkdir(exist_ok=True)
            world.barrier()
            work(place, name, world)
    leave(0)
