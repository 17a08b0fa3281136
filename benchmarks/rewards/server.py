"""How many raw clips go through the reward server, with a reward that does nothing, against reading
their bytes alone.

    python -m benchmarks.rewards.server                      1, 16 and 64 clients
    python -m benchmarks.rewards.server --clients 1 4 --seconds 3 --frames 9 --size 64

Clients and server share the machine. A clip is 53 x 480 x 480 pixels, 37 MB, one per request.
"bare" is the same POST to a server that reads the body and answers "ok": what no reward server can
beat. A clip that is turned away (429) is sent again; a request that gets no scores would be counted
as lost.
"""

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn
from torch import Tensor

from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.app import make_app
from fastgrpo.rewards.serving.server.process import serving

TOKEN = "benchmark"


class Nothing(Reward):
    """A reward that looks at one pixel."""

    names = ("first",)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        return Scores(
            {"first": pixels[:, 0, 0, 0, 0].float()}, torch.ones(len(pixels), dtype=torch.bool)
        )


async def bare(scope: dict[str, object], receive: object, send: object) -> None:
    """An ASGI application that reads a body and says ok."""
    if scope["type"] != "http":
        return
    body = bytearray()
    more = True
    while more:
        message = await receive()  # type: ignore[operator]
        body += message.get("body", b"")
        more = message.get("more_body", False)
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    await send(start)  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]


def serve(kind: str) -> None:
    """The server's process: prints its port and serves until it is ended."""
    limits = Limits()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if kind == "bare":
            config = uvicorn.Config(bare, log_config=None, access_log=False, lifespan="off")
        else:
            config = serving(make_app([Served(Nothing(), plain("nothing"))], TOKEN, limits), limits)
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(config).run(sockets=[listener])


@dataclass
class Result:
    """What the clients of one round saw."""

    seconds: list[float] = field(default_factory=list)  # per clip, from the call to its score
    lost: int = 0
    turned_away: int = 0
    wall: float = 0.0


def measure(url: str, kind: str, clients: int, duration: float, clip: Tensor) -> Result:
    """`clients` threads that send clip after clip for `duration` seconds."""
    result, lock = Result(), threading.Lock()
    end = time.monotonic() + duration
    body = wire.encode_request([clip], ["p"], 8.0, ["nothing"])
    client = RewardClient([url], TOKEN, ["nothing"], timeout_s=600.0, outage_s=600.0)
    http = httpx.Client(timeout=600.0, trust_env=False, limits=httpx.Limits(max_connections=None))

    def work() -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            if kind == "bare":
                good = http.post(url, content=body).is_success
            else:
                scores = client.score(clip[None], ["p"], 8.0)["nothing"]
                good = (
                    bool(scores.valid.all())
                    and scores.values["first"].item() == clip[0, 0, 0, 0].item()
                )
            with lock:
                result.seconds.append(time.monotonic() - start)
                result.lost += not good

    start = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.wall = time.monotonic() - start
    result.turned_away = client.take_events().get("requests_turned_away", 0)
    client.close()
    http.close()
    return result


def peak_memory(pid: int) -> float:
    """MiB that a process ever had in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


class Watch(threading.Thread):
    """Asks the server's metrics now and then; the largest values of the queue and of the bytes in
    flight.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.done = threading.Event()
        self.largest = {"reward_clips_waiting": 0.0, "reward_bytes_in_flight": 0.0}

    def run(self) -> None:
        with httpx.Client(
            headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=60.0
        ) as http:
            while not self.done.wait(0.1):
                for line in http.get(f"{self.url}/metrics").text.splitlines():
                    name, _, value = line.partition(" ")
                    if name in self.largest:
                        self.largest[name] = max(self.largest[name], float(value))


def round_of(kind: str, clients: int, duration: float, clip: Tensor) -> None:
    """One line: a server of its own, so that its peak memory is this round's."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.rewards.server", "--serve", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        while kind == "server":
            try:
                httpx.get(f"{url}/readyz", trust_env=False, timeout=60.0).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        before = peak_memory(child.pid)
        watch = Watch(url)
        if kind == "server":
            watch.start()
        result = measure(url, kind=kind, clients=clients, duration=duration, clip=clip)
        watch.done.set()
        peak = peak_memory(child.pid)
        p50, p99 = np.percentile(result.seconds, [50, 99])
        speed = len(result.seconds) / result.wall
        queue = f"{watch.largest['reward_clips_waiting']:.0f} clips" if kind == "server" else "-"
        flight = (
            f"{watch.largest['reward_bytes_in_flight'] / 2**20:.0f}" if kind == "server" else "-"
        )
        print(
            f"{kind:<7}{clients:>8}{len(result.seconds):>7}{speed:>9.2f}{p50:>8.2f}{p99:>8.2f}"
            f"{queue:>11}{flight:>8}{result.turned_away:>6}{result.lost:>6}{before:>8.0f}{peak:>8.0f}",
            flush=True,
        )
    finally:
        child.terminate()
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="how long clients start new requests"
    )
    parser.add_argument("--frames", type=int, default=53)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--serve", choices=["bare", "server"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    clip = torch.randint(
        0, 256, (arguments.frames, arguments.size, arguments.size, 3), dtype=torch.uint8
    )
    print(
        f"clips of {list(clip.shape)}, {clip.numel() / 1e6:.1f} MB; {os.cpu_count()} CPUs for "
        "clients and server"
    )
    print(
        f"{'':<7}{'clients':>8}{'clips':>7}{'clips/s':>9}{'p50 s':>8}{'p99 s':>8}{'queue':>11}{'flight':>8}{'429s':>6}"
        f"{'lost':>6}{'RSS 0':>8}{'peak':>8}   (flight, RSS, peak: MiB of the server)"
    )
    for clients in arguments.clients:
        for kind in ("bare", "server"):
            round_of(kind, clients, arguments.seconds, clip)


if __name__ == "__main__":
    main()
