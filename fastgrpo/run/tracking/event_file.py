"""Scalars for TensorBoard, in its own format, without TensorBoard: it is needed only to look.

An event file is a sequence of records, each with its length and checksums (TFRecord: CRC-32C,
masked), and each record is a protocol buffer `Event`. Fields by number, from TensorFlow's
event.proto and summary.proto: Event.wall_time 1 (double), step 2 (int64), file_version 3 (string),
summary 5, session_log 7; Summary.value 1; Value.tag 1, simple_value 2 (float); SessionLog.status 1.
"""

import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fastgrpo.core.files import no_link
from fastgrpo.run.heartbeat import node

START = 1  # SessionLog.SessionStatus: what is there of this step and later ones is void
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types


class EventFile:
    """A new event file of this attempt in a folder, or nothing once the disk has refused.

    first_step: of this attempt; TensorBoard drops what an earlier one wrote from there on
    tell: shows a line
    """

    def __init__(self, folder: Path, first_step: int, tell: Callable[[str], None]) -> None:
        now = time.time()
        # TensorBoard reads a folder's files by name, so that the attempts' order is their dates'
        name = f"events.out.tfevents.{now:.0f}.{node()}.{os.getpid()}"
        self._path: Path | None = folder / name
        self._tell = tell
        self._append(record(event(now, 0, field(3, LENGTH, b"brain.Event:2"))))
        self.start(first_step)

    def start(self, step: int) -> None:
        """Void what is there of this step and later ones."""
        log = field(7, LENGTH, field(1, VARINT, START))
        self._append(record(event(time.time(), step, log)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append an iteration's numbers. Those that are not finite stay so."""
        summary = b"".join(
            field(1, LENGTH, field(1, LENGTH, name.encode()) + field(2, FOUR_BYTES, value))
            for name, value in values.items()
        )
        self._append(record(event(time.time(), step, field(5, LENGTH, summary))))

    def _append(self, content: bytes) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab", opener=no_link) as file:
                file.write(content)
        except OSError as error:
            self._path = None
            self._tell(f"tensorboard: {error.strerror}; the run goes on without it")


def event(wall_time: float, step: int, what: bytes) -> bytes:
    """An Event. what: one of its fields, encoded"""
    return field(1, EIGHT_BYTES, wall_time) + field(2, VARINT, step) + what


def field(number: int, wire_type: int, value: float | bytes) -> bytes:
    """A field of a protocol buffer.  value: bytes for LENGTH, else a number"""
    key = varint(number << 3 | wire_type)
    if isinstance(value, bytes):
        return key + varint(len(value)) + value
    if wire_type == VARINT:
        return key + varint(int(value))
    return key + (struct.pack("<d", value) if wire_type == EIGHT_BYTES else _float32(value))


def _float32(value: float) -> bytes:
    """Four bytes; what is too large for them is infinite."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def varint(value: int) -> bytes:
    """A number >= 0 in groups of seven bits, the lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def record(content: bytes) -> bytes:
    """A TFRecord: length, its checksum, content, its checksum."""
    length = struct.pack("<Q", len(content))
    checksums = [struct.pack("<I", masked(crc32c(part))) for part in (length, content)]
    return length + checksums[0] + content + checksums[1]


def masked(checksum: int) -> int:
    """A checksum as TFRecord stores it, so that one over stored ones stays sound."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    """The remainders of all bytes by the Castagnoli polynomial, bits reversed."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli), 32 bits."""
    value = 0xFFFFFFFF
    for byte in content:
        value = value >> 8 ^ TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
