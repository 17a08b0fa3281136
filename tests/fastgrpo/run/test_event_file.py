"""Event files for TensorBoard, read again by protobuf's own decoder and the format's checksums."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrpo.run.tracker import Tracker, read_metrics
from fastgrpo.run.tracking.event_file import EventFile, crc32c, field, masked, varint

descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
descriptor_pool = pytest.importorskip("google.protobuf.descriptor_pool")
message_factory = pytest.importorskip("google.protobuf.message_factory")

KINDS = {"double": 1, "float": 2, "int64": 3, "string": 9, "message": 11, "enum": 14}
MESSAGES = {
    "Event": {
        "wall_time": (1, "double"),
        "step": (2, "int64"),
        "file_version": (3, "string"),
        "summary": (5, "Summary"),
        "session_log": (7, "SessionLog"),
    },
    "Summary": {"value": (1, "Value")},
    "Value": {"tag": (1, "string"), "simple_value": (2, "float")},
    "SessionLog": {"status": (1, "int64")},
}
"""The part of TensorFlow's event.proto and summary.proto that is written."""


def event_class() -> Any:
    """Protobuf's class of an Event, made from the table above."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    for name, members in MESSAGES.items():
        message = file.message_type.add(name=name)
        for member, (number, kind) in members.items():
            own = message.field.add(name=member, number=number)
            own.label = 3 if member == "value" else 1  # repeated, optional
            own.type = KINDS.get(kind, KINDS["message"])
            if kind in MESSAGES:
                own.type_name = f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def events(folder: Path) -> list[Any]:
    """The events of a folder's files, by name, checked record by record."""
    kind, found = event_class(), []
    for file in sorted(folder.iterdir()):
        rest = file.read_bytes()
        while rest:
            length, check = struct.unpack("<QI", rest[:12])
            assert check == masked(crc32c(rest[:8]))
            content, stored = rest[12 : 12 + length], rest[12 + length : 16 + length]
            assert struct.unpack("<I", stored) == (masked(crc32c(content)),)
            found.append(kind.FromString(content))
            rest = rest[16 + length :]
    return found


def test_the_checksum_has_its_published_values() -> None:
    """Of RFC 3720, B.4, and the check value of CRC-32C."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_numbers_are_encoded_as_the_format_says() -> None:
    """The examples of protobuf's description of its encoding."""
    assert varint(1) == b"\x01" and varint(150) == b"\x96\x01" and varint(0) == b"\x00"
    assert field(1, 0, 150) == b"\x08\x96\x01"
    assert field(2, 2, b"testing") == b"\x12\x07testing"


def test_a_runs_numbers_are_read_again(tmp_path: Path) -> None:
    with Tracker(tmp_path, True, 10) as tracker:
        tracker.write_events()
        tracker.log(0, {"reward/sum": 1.25, "update/kl": math.nan})
        tracker.log(300, {"lr": 1e-5, "a name \u00e9": 1e300})
    version, start, first, second = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2" and version.wall_time > 1.7e9
    assert start.session_log.status == 1 and start.step == 0
    reward = first.summary.value[0]
    assert (reward.tag, reward.simple_value) == ("reward/sum", 1.25)
    assert math.isnan(first.summary.value[1].simple_value)
    assert second.step == 300
    assert second.summary.value[0].simple_value == pytest.approx(1e-5, rel=1e-7)
    assert (second.summary.value[1].tag, second.summary.value[1].simple_value) == (
        "a name \u00e9",
        math.inf,
    )


def test_event_files_have_what_metrics_jsonl_has(tmp_path: Path) -> None:
    """Every number of every line, as float32, at its iteration: of a run that goes back to its
    second iteration, is killed after its fourth, and goes on from the third.
    """
    drawn = iter(np.random.default_rng(0).normal(0, 1e3, (99, 2)))

    def log(tracker: Tracker, begin: int, end: int) -> None:
        for iteration in range(begin, end):
            reward, lr = next(drawn)
            row = {"reward/sum": reward, "lr": lr / 1e9}
            tracker.log(iteration, row | ({"update/kl": math.nan} if iteration % 2 else {}))

    with Tracker(tmp_path, True, 6) as tracker:
        tracker.write_events()
        log(tracker, 0, 3)
        tracker.rewind(1)
        log(tracker, 1, 4)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1.a.1"))
    with Tracker(tmp_path, True, 6, start_iteration=2) as tracker:
        tracker.write_events()
        log(tracker, 2, 6)
    shown: dict[int, dict[str, float]] = {}
    for event in events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):
            shown = {step: values for step, values in shown.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag not in shown.setdefault(event.step, {}), "shown twice"
            shown[event.step][value.tag] = value.simple_value
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == sorted(shown) == list(range(6))
    for row in rows:
        del row["time"]
        np.testing.assert_equal(
            {name: np.float32(value) for name, value in shown[int(row.pop("iteration"))].items()},
            {name: np.float32(value) for name, value in row.items()},
        )


def test_a_resumed_attempt_voids_what_an_earlier_one_wrote_beyond_it(tmp_path: Path) -> None:
    """As TensorBoard reads it: a START drops all that came before of its step and later ones."""
    file = EventFile(tmp_path / "t", 0, print)
    for step in range(4):
        file.write(step, {"x": float(step)})
    (first,) = (tmp_path / "t").iterdir()
    first.rename(first.with_name("events.out.tfevents.1.a.1"))
    file = EventFile(tmp_path / "t", 2, print)
    file.write(2, {"x": 20.0})
    shown: dict[int, float] = {}
    for one in events(tmp_path / "t"):
        if one.HasField("session_log"):
            shown = {step: value for step, value in shown.items() if step < one.step}
        elif one.HasField("summary"):
            shown[one.step] = one.summary.value[0].simple_value
    assert shown == {0: 0.0, 1: 1.0, 2: 20.0}


def test_a_disk_that_refuses_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("")
    told: list[str] = []
    file = EventFile(tmp_path / "t", 0, told.append)
    file.write(0, {"x": 1.0})
    file.write(1, {"x": 1.0})
    assert len(told) == 1 and told[0].startswith("tensorboard: ")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, False, 10)
    tracker.write_events()
    tracker.log(0, {"x": 1.0})
    assert not [*tmp_path.iterdir()]
