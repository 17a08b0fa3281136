"""Streams, events and the current device of torch.cuda, on the library's device.

The device lags: a copy to pinned memory is carried out when its stream is waited for, a moment
later, and what a thread reads without having waited is poisoned.
"""

import os
import threading
import time
from types import TracebackType
from typing import Any, Self, Union

import torch

from tests.rehearsal.cuda import core, waits

DeviceLike = Union[torch.device, int, str, None]  # noqa: UP007  # evaluated
LAG_S = float(os.environ.get("REHEARSAL_LAG_S", "0.02"))
KEPT_WAITS = 32
"""Waits for other streams that a stream remembers."""

_default: dict[int, "Stream"] = {}
_local = threading.local()


def index_of(device: DeviceLike = None) -> int:
    """The number of a device; the calling thread's where none is named."""
    index = device if isinstance(device, int) else None
    if device is not None and not isinstance(device, int):
        index = torch.device(device).index
    return core.device() if index is None or index < 0 else index


class Stream:
    """A queue of a device: a number, and the other queues that it waits for."""

    device_type = "cuda"
    _next = 1

    def __init__(
        self,
        device: DeviceLike = None,
        priority: int = 0,
        stream_id: int | None = None,
        **_: Any,
    ) -> None:
        self.device = torch.device("cuda", index_of(device))
        if stream_id is None:
            with waits.lock:
                stream_id, Stream._next = Stream._next, Stream._next + 1
        self.stream_id = stream_id
        self.awaited: list[tuple[Stream, int]] = []
        self._entered: list[StreamContext] = []

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, torch.device]:
        return self.stream_id, self.device

    def synchronize(self) -> None:
        if self.device.index != core.home():
            waits.count("foreign", f"wait for {self.device} by local rank {core.home()}")
        waits.count("sync", "stream.synchronize")
        carry_out(self, core.LAST)

    def query(self) -> bool:
        return core.pending() == 0

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:
            self._await(event.stream, event.sequence)

    def wait_stream(self, other: "Stream") -> None:
        if other != self:
            self._await(other, core.sequence())

    def _await(self, other: "Stream", sequence: int) -> None:
        self.awaited.append((other, sequence))
        del self.awaited[:-KEPT_WAITS]

    def record_event(self, event: "Event | None" = None) -> "Event":
        return (event or Event()).record(self)

    def __enter__(self) -> Self:
        self._entered.append(StreamContext(self))
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class Event:
    """A moment of a stream: the number of the last copy before it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream: Stream | None = None
        self.sequence = 0

    def record(self, stream: Stream | None = None) -> Self:
        self.stream, self.sequence = stream or current_stream(), core.sequence()
        return self

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits.count("sync", "event.synchronize")
        waits.touch("event")
        if self.stream is not None:
            carry_out(self.stream, self.sequence)

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


def carry_out(stream: Stream, until: int) -> None:
    """Write what a stream has put off up to a number, and what it had waited for in others."""
    if core.pending():
        time.sleep(LAG_S)
    seen, todo = set[tuple[Stream, int]](), [(stream, until)]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            core.flush(one[0].stream_id, one[1])
            todo += one[0].awaited


def default_stream(device: DeviceLike = None) -> Stream:
    """A device's first stream."""
    index = index_of(device)
    with waits.lock:
        if index not in _default:
            _default[index] = Stream(index, stream_id=0)
    return _default[index]


def current_stream(device: DeviceLike = None) -> Stream:
    """The calling thread's stream of a device."""
    index = index_of(device)
    streams: dict[int, Stream] = getattr(_local, "streams", {})
    return streams.get(index) or default_stream(index)


def set_stream(stream: Stream) -> None:
    """Make a stream, and its device, the calling thread's."""
    if not hasattr(_local, "streams"):
        _local.streams = {}
    _local.streams[stream.device.index] = stream
    core.set_device(stream.device.index)
    core.set_stream(stream.stream_id)


class StreamContext:
    """torch.cuda.stream: a stream inside, what was before it after."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.device = core.device()
            self.before = current_stream(self.stream.device)
            set_stream(self.stream)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.stream is not None:
            set_stream(self.before)
            set_device(self.device)


class DeviceContext:
    """torch.cuda.device: a device inside."""

    def __init__(self, device: DeviceLike) -> None:
        self.index = index_of(device)

    def __enter__(self) -> None:
        self.before = core.device()
        core.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        core.set_device(self.before)


def set_device(device: DeviceLike) -> None:
    """Change the calling thread's device."""
    index = index_of(device)
    if index >= core.GPUS:
        raise RuntimeError("CUDA error: invalid device ordinal")
    core.set_device(index)
    core.set_stream(current_stream(index).stream_id)


def synchronize(device: DeviceLike = None) -> None:
    """Wait for all that is queued."""
    waits.count("sync", "cuda.synchronize")
    core.flush(core.ANY, core.LAST)


def install() -> None:
    """Put streams, events and devices into torch.cuda."""
    import torch.cuda.streams

    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "device": DeviceContext,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_device": set_device,
        "synchronize": synchronize,
        "current_device": core.device,
        "is_current_stream_capturing": lambda: False,
    }.items():
        setattr(torch.cuda, name, value)
    for name, value in {"Stream": Stream, "Event": Event}.items():
        setattr(torch.cuda.streams, name, value)
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
