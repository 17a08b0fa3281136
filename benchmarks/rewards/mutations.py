"""Mutated requests against a real reward server: statuses, memory, and how good requests fare.

    python -m benchmarks.rewards.mutations --bodies 100000
    python -m benchmarks.rewards.mutations --seconds 300 --seed 1

Each body is a good request to which one to three mutations were done: to its bytes, to the values
of its JSON, to its structure. One client sends good requests all the while. The exit code is 1
where a mutated body got a 5xx or no answer (0), or scores afterwards are not those from before.
"""

import argparse
import copy
import http.client
import json
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rewards.server import peak_memory
from fastgrpo.core.reward import PromptText
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient

TOKEN = "benchmark of mutated requests"
NAMES = ["tiny_world", "video_stats"]
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 5e-324, 1e308, "", "\ud800", "\udfff",
    "a\0b", "\x1b[2J", "é" * 300, "a" * 70_000, [], {}, [[]], [None], {"": 0}, [0] * 300, "U8",
    "tiny_world", "video_stats", ["tiny_world"], ["\ud83d"], {"of": 3, "at": [0, 1, 2]},
)  # fmt: skip
"""Values in place of others: what JSON can write, and no request means."""

DROPPED = 0
"""In place of a status: the connection ended without an answer."""


ROW = {"text": "OPEN", "tag": "counting", "include": [{"class": "dog", "count": 2}], "at": None}
"""What the prompts' rows say, a value of each of JSON's kinds."""


@dataclass
class Parts:
    """A request taken apart."""

    header: dict[str, Any]
    request: Any
    data: bytearray

    def body(self) -> bytes:
        """The bytes of the request."""
        entries = dict(self.header)
        if "__metadata__" in entries:
            entries["__metadata__"] = {"request": json.dumps(self.request)}
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + bytes(self.data)


def good(rng: random.Random) -> Parts:
    """A small request that scores."""
    frames, size = rng.choice(((3, 8), (4, 4), (9, 32)))
    count = rng.randint(1, 3)
    clips = [
        torch.full((frames, size, size, 3), rng.randrange(256), dtype=torch.uint8)
        for _ in range(count)
    ]
    names = rng.sample(NAMES, rng.randint(1, 2))
    prompt = PromptText("a red circle", ROW)
    body = wire.encode_request(clips, [prompt] * count, 8.0, names)
    (length,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + length])
    return Parts(
        header, json.loads(header["__metadata__"]["request"]), bytearray(body[8 + length :])
    )


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def another_value(parts: Parts, rng: random.Random) -> None:
    """Put an odd value, or a neighbour's, in the place of one."""
    tree = rng.choice((parts.header, parts.request))
    found = list(places(tree)) if isinstance(tree, dict | list) else []
    if not found:
        return
    container, key = rng.choice(found)
    if rng.random() < 0.2:
        del container[key]
    else:
        other, other_key = rng.choice(found)
        odd = rng.choice(ODD) if rng.random() < 0.8 else other[other_key]
        container[key] = copy.deepcopy(odd)


def nearly(parts: Parts, rng: random.Random) -> None:
    """Change a number a little: offsets, shapes, frames, the rate."""
    trees = [tree for tree in (parts.header, parts.request) if isinstance(tree, dict | list)]
    found = [place for tree in trees for place in places(tree)]
    numbers = [(tree, key) for tree, key in found if type(tree[key]) in (int, float)]
    if numbers:
        tree, key = rng.choice(numbers)
        tree[key] = rng.choice((tree[key] + 1, tree[key] - 1, tree[key] * 2, -tree[key]))


def frames_named(parts: Parts, rng: random.Random) -> None:
    """Name frames, most of which are not there."""
    if isinstance(parts.request, dict):
        at = sorted(rng.sample(range(12), rng.randint(1, 5)))
        entry = rng.choice((None, {"of": rng.choice((3, 9, 12, 256)), "at": at}))
        parts.request["frames"] = [entry] * rng.randint(1, 3)


def other_pixels(parts: Parts, rng: random.Random) -> None:
    """Cut, lengthen or change the pixels."""
    end = rng.randrange(len(parts.data) + 1)
    choice = rng.randrange(3)
    if choice == 0:
        del parts.data[end:]
    elif choice == 1:
        parts.data += rng.randbytes(rng.randint(1, 64))
    else:
        parts.data[:end] = rng.randbytes(end)


def bytes_of(body: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double, insert or move bytes anywhere."""
    changed = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        if rng.random() < 0.5:  # in the header, which is what is parsed
            start = min(start, rng.randrange(8, 300))
        piece = changed[start : start + rng.randint(1, 16)]
        match rng.randrange(5):
            case 0:
                changed[start : start + 1] = rng.randbytes(1)
            case 1:
                del changed[start : start + len(piece)]
            case 2:
                changed[start:start] = piece
            case 3:
                changed[start:start] = rng.choice((b'"', b"}", b"\\ud800", b"\xff", b"1e9", b",,"))
            case _:
                changed[:8] = struct.pack("<Q", rng.getrandbits(rng.choice((8, 16, 32, 64))))
    return bytes(changed)


TREES: tuple[Callable[[Parts, random.Random], None], ...] = (
    another_value,
    nearly,
    frames_named,
    other_pixels,
)


def mutated(rng: random.Random) -> bytes:
    """A good request with one to three mutations."""
    parts = good(rng)
    for _ in range(rng.randint(1, 3)):
        rng.choice(TREES)(parts, rng)
    body = parts.body()
    return bytes_of(body, rng) if rng.random() < 0.4 else body


@dataclass
class Result:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    worst: list[bytes] = field(default_factory=list)  # bodies that got a 5xx
    seconds: list[float] = field(default_factory=list)  # of good requests
    over: threading.Event = field(default_factory=threading.Event)


def send(address: str, bodies: int, until: float, rng: random.Random, result: Result) -> None:
    """Send mutated bodies, one after the other, on a connection that is kept while that goes."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60.0)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": wire.CONTENT_TYPE}
    for _ in range(bodies):
        if time.monotonic() > until:
            return
        body = mutated(rng)
        try:
            connection.request("POST", "/v1/score", body, headers)
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, http.client.HTTPException):  # after a 5xx the server ends the connection
            connection.close()
            status = DROPPED
        result.statuses[status] += 1
        if status >= 500:
            result.worst.append(body)


def drawn() -> tuple[torch.Tensor, list[str]]:
    """Clips of the tiny world, uint8 [4, 9, 32, 32, 3], and their captions."""
    meanings = shapes.meanings()[0][:4]
    clips = torch.from_numpy(np.stack([shapes.draw(meaning) for meaning in meanings]))
    return clips, [shapes.caption(meaning, 0) for meaning in meanings]


def score_on(client: RewardClient, result: Result) -> None:
    """Send good requests until it is over."""
    clips, captions = drawn()
    while not result.over.is_set():
        start = time.monotonic()
        client.score(clips, captions, 8.0)
        result.seconds.append(time.monotonic() - start)
        time.sleep(0.02)


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """`fastgrpo serve-rewards` as a person starts it: its url and process."""
    with tempfile.TemporaryDirectory() as name:
        ready, token = Path(name, "ready.json"), Path(name, "token.txt")
        token.write_text(TOKEN)
        token.chmod(0o600)
        options = ["--port", "0", "--token-file", str(token), "--ready-file", str(ready)]
        command = [sys.executable, "-m", "fastgrpo.cli", "serve-rewards", *NAMES, *options]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
            try:
                while not ready.exists():
                    if child.poll() is not None:
                        sys.exit("the server did not start")
                    time.sleep(0.1)
                yield json.loads(ready.read_text())["url"], child.pid
            finally:
                child.terminate()


def run(url: str, bodies: int, seconds: float, seed: int) -> Result:
    """Two senders of mutated bodies beside one of good requests."""
    result, until = Result(), time.monotonic() + seconds
    senders = [
        threading.Thread(
            target=send, args=(url, bodies // 2, until, random.Random(seed * 2 + n), result)
        )
        for n in range(2)
    ]
    with RewardClient([url], TOKEN, NAMES) as client:
        friend = threading.Thread(target=score_on, args=(client, result))
        for thread in (friend, *senders):
            thread.start()
        for thread in senders:
            thread.join()
        result.over.set()
        friend.join()
    return result


def main() -> int:
    """Print one block.  returns the exit code"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after as many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    clips, captions = drawn()
    with server() as (url, pid), RewardClient([url], TOKEN, NAMES) as client:
        before, resident = client.score(clips, captions, 8.0), peak_memory(pid)
        start = time.monotonic()
        result = run(url, arguments.bodies, arguments.seconds, arguments.seed)
        wall = time.monotonic() - start
        after, peak = client.score(clips, captions, 8.0), peak_memory(pid)
    equal = all(
        torch.equal(before[name].values[part], after[name].values[part])
        for name in NAMES
        for part in before[name].values
    )
    p50, p99 = np.percentile(result.seconds, [50, 99])
    statuses = ", ".join(f"{status}: {n}" for status, n in sorted(result.statuses.items()))
    print(f"{result.statuses.total()} mutated bodies in {wall:.0f} s: {statuses}")
    print(f"peak memory: {resident:.0f} MiB before, {peak:.0f} MiB after")
    print(
        f"{len(result.seconds)} good requests meanwhile: p50 {p50:.3f} s, p99 {p99:.3f} s; "
        f"scores afterwards {'equal' if equal else 'NOT equal'}"
    )
    for body in result.worst[:5]:
        print(f"5xx: {body[:400]!r}")
    return 0 if equal and not result.worst and not result.statuses[DROPPED] else 1


if __name__ == "__main__":
    sys.exit(main())
