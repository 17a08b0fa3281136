"""Masters and moments on a disk: the bits of AdamW in memory, nothing left behind, one line for each
mistake.
"""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.core.config import Optimizer
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import OneRankError
from fastgrpo.parallel.nvme import folder, transfers
from fastgrpo.parallel.nvme.adamw import OffloadedAdamW, States
from fastgrpo.parallel.nvme.state_file import LINE, PAGE, STAMP, LocalShard, StateFile, layout
from fastgrpo.parallel.nvme.transfers import DeepSpeedAio, Mapped, Transfers

SETTINGS = Optimizer(lr=1e-2, weight_decay=0.3, betas=(0.8, 0.95))
RECORD = 1024  # bytes: several records for the small network below


class Handle:
    """DeepSpeed's handle by a thread, as its source describes it: results are not looked at."""

    def __init__(self, log: list[tuple[str, int]], lost: set[int]) -> None:
        self.log, self.lost, self.begun = log, lost, []  # type: ignore[var-annotated]

    def new_cpu_locked_tensor(self, count: int, _: Tensor) -> Tensor:
        return torch.empty(count)

    def async_pread(self, buffer: Tensor, path: str, start: int) -> int:
        return self._begin("read", buffer, path, start)

    def async_pwrite(self, buffer: Tensor, path: str, start: int) -> int:
        return self._begin("write", buffer, path, start)

    def wait(self) -> int:
        assert self.begun, "DeepSpeed ends the process where nothing is under way"
        for thread in self.begun:
            thread.join()
        self.log.append(("wait", len(self.begun)))
        self.begun = []
        return 1

    def _begin(self, what: str, buffer: Tensor, path: str, start: int) -> int:
        assert buffer.nbytes % 512 == start % 512 == 0, "direct I/O"
        thread = threading.Thread(target=self._move, args=(what, buffer.numpy(), path, start))
        self.log.append((what, start))
        self.begun.append(thread)
        thread.start()
        return 0

    def _move(self, what: str, buffer: Any, path: str, start: int) -> None:
        with open(path, "r+b", buffering=0) as file:
            file.seek(start)
            if what == "read":
                file.readinto(buffer)
            elif start not in self.lost:
                file.write(buffer)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder which no test leaves a file in."""
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    assert not any(place.iterdir())


def network() -> nn.Module:
    """Shards of several sizes: one above a record's, one that has no gradient, one empty."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(31, 65), nn.Linear(65, 3), nn.Linear(3, 3))
    made.register_parameter("none", nn.Parameter(torch.empty(0, 4)))
    made.add_module("idle", nn.Linear(7, 5))
    return made


def gradients(made: nn.Module, step: int) -> None:
    draws = torch.Generator().manual_seed(step)
    for name, parameter in made.named_parameters():
        parameter.grad = None
        if "idle" not in name:
            parameter.grad = torch.randn(parameter.shape, generator=draws)


class Offloaded:
    """A network whose masters and moments lie in a folder."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
        self.log: list[tuple[str, int]] = []
        self.lost: set[int] = set()
        library = SimpleNamespace(aio_handle=lambda *_: Handle(self.log, self.lost))
        monkeypatch.setattr(transfers, "_library", lambda: library)
        self.network = network()
        self.file = StateFile.of_network(self.network, place, RECORD)
        memory = self.file.memory_of(self.network, torch.clone)
        with torch.no_grad():
            self.network._apply(lambda one: memory(one).copy_(one))
        self.transfers: Transfers = Mapped(self.file)
        if way == "DeepSpeed":
            self.transfers = DeepSpeedAio(self.file, pinned=False)
        self.states = States(self.file, self.transfers, way)
        trained = dict(self.network.named_parameters())
        self.optimizer = OffloadedAdamW(trained, self.states, SETTINGS)

    def step(self, number: int) -> None:
        gradients(self.network, number)
        self.optimizer.step()


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    made = network()
    values: dict[str, Any] = SETTINGS.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    return made, torch.optim.AdamW(made.parameters(), fused=True, **values)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


WAYS = ("mapped", "DeepSpeed")


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_adamw_in_memory(
    disk: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, weights and moments, over records of one shard and of several."""
    ours, (theirs, adamw) = Offloaded(disk, monkeypatch, way), plain()
    assert len(ours.file.records) >= 3 and same(ours.network, theirs)
    for number in range(5):
        ours.step(number)
        gradients(theirs, number)
        adamw.step()
        assert same(ours.network, theirs)
    for parameter, other in zip(ours.network.parameters(), theirs.parameters(), strict=True):
        state, expected = ours.optimizer.state[parameter], adamw.state.get(other)
        if expected is None:  # no gradient
            assert not state["step"] and not state["exp_avg"].any()
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], expected[key]), key


@pytest.mark.parametrize("way", WAYS)
def test_a_state_goes_from_memory_to_the_disk_and_back(
    disk: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps here, two there, two here: the bits of six in memory."""
    ours, (theirs, adamw), (whole, unbroken) = Offloaded(disk, monkeypatch, way), plain(), plain()
    for number in range(6):
        gradients(whole, number)
        unbroken.step()
    for number in range(2):
        gradients(theirs, number)
        adamw.step()
    ours.network.load_state_dict(theirs.state_dict())
    ours.optimizer.load_state_dict(adamw.state_dict())
    ours.step(2)
    ours.step(3)
    # of what is in the file, not of what a checkpoint brought
    mapped = ours.file.moments("0.weight")[0]
    state = ours.optimizer.state[dict(ours.network.named_parameters())["0.weight"]]
    assert state["exp_avg"].data_ptr() == mapped.data_ptr()
    theirs.load_state_dict(ours.network.state_dict())
    adamw.load_state_dict(ours.optimizer.state_dict())
    for number in (4, 5):
        gradients(theirs, number)
        adamw.step()
    assert same(theirs, whole)


def test_the_next_record_is_read_and_the_last_written_while_one_is_stepped(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Offloaded(disk, monkeypatch, "DeepSpeed")
    starts = [record.moments.start for record in ours.file.records]
    del ours.log[:]
    stepped = ours.optimizer._step_record

    def noted(record: Any, moments: Tensor) -> None:
        ours.log.append(("step", record.moments.start))
        stepped(record, moments)

    monkeypatch.setattr(ours.optimizer, "_step_record", noted)
    ours.step(0)
    told = [entry for entry in ours.log if entry[0] != "wait"]
    expected = [("read", starts[0])]
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        expected += [("read", following)] if following is not None else []
        expected += [("step", start), ("write", start)]
    assert told == expected
    middle = ours.log.index(("step", starts[1]))
    waited = ours.log[ours.log.index(("write", starts[0])) : middle]
    assert waited.count(("wait", 1)) == 1, "for the read alone"


def test_a_write_that_the_disk_lost_is_one_line(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed does not tell: without the stamp the moments of a step before would go on."""
    ours = Offloaded(disk, monkeypatch, "DeepSpeed")
    ours.step(0)
    ours.lost = ours.transfers._writer.lost = {ours.file.records[1].moments.start}  # type: ignore[attr-defined]
    ours.step(1)
    with pytest.raises(OneRankError):
        ours.step(2)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"distributed.offload_path={disk}: record 1 is not what was written" in line
    assert "resumes from its newest checkpoint" in line


def test_places_in_the_file_are_apart_and_aligned() -> None:
    sizes = [(5,), (3, 7), (1000, 3), (0,), (64, 64), (1,)]
    shards = {str(n): LocalShard(torch.Size(s), mapped=n != 1) for n, s in enumerate(sizes)}
    for largest in (1, 4096, 10**6):
        taken: list[range] = []
        for record in layout(shards, largest):
            assert record.masters.start % PAGE == record.moments.start % PAGE == 0
            assert len(record.moments) % PAGE == 0 and record.masters.stop == record.moments.start
            for slot in record.slots:
                size = 4 * slot.shape.numel()
                assert (slot.master is None) == (slot.name == "1")
                places = [slot.exp_avg, slot.exp_avg_sq]
                assert max(places) + size + STAMP <= record.moments.stop
                if slot.master is not None:
                    assert record.masters.start <= slot.master
                    assert slot.master + size <= record.masters.stop
                    places.append(slot.master)
                assert all(place % LINE == 0 for place in places)
                taken += [range(place, place + size) for place in places if size]
            inside = sum(2 * 4 * slot.shape.numel() for slot in record.slots)
            assert len(record.slots) == 1 or inside <= largest
        ordered = sorted(taken, key=lambda part: part.start)
        assert all(a.stop <= b.start for a, b in pairwise(ordered))


def test_a_killed_run_leaves_nothing_in_the_folder(disk: Path) -> None:
    """Nor a name in the folder while it runs."""
    told, telling = os.pipe()
    child = os.fork()
    if not child:
        file = StateFile(disk, {"w": LocalShard(torch.Size([1 << 20]), mapped=True)})
        file.moments("w")[0].fill_(1)
        found = [*os.listdir(disk), str(os.stat(file.path).st_nlink)]
        os.write(telling, " ".join(found).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(telling)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.read(told, 1000) == b"0"
    os.close(told)


def test_a_disk_without_room_is_one_line(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**8))
    with pytest.raises(UserError) as raised:
        folder.open_file(disk, 12 * 10**9)
    assert str(raised.value) == (
        f"distributed.offload_path={disk}: no room: a rank's masters and moments take 12.000 GB, "
        "and 0.500 GB are free; free some, name another disk, or use more GPUs."
    )


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match=r"offload_path=.*: no folder on this machine; make it"):
            folder.open_file(place, 4096)
    assert not (tmp_path / "none").exists()


def test_the_way_is_told_with_what_is_missing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise transfers.Unusable(f"DeepSpeed is not installed: {transfers.EXTRA}")

    monkeypatch.setattr(transfers, "_library", missing)
    states = States.of_network(network(), disk, pinned=False)
    assert isinstance(states.transfers, Mapped)
    assert str(states).endswith(
        f"of masters and moments per rank in {disk} by memory-mapped files (DeepSpeed is not "
        'installed: pip install "fastgrpo[deepspeed]")'
    )
    monkeypatch.undo()
    monkeypatch.setattr(transfers, "_library", lambda: SimpleNamespace(aio_handle=refusing))
    assert "O_DIRECT" in str(States.of_network(network(), disk, pinned=False))


def refusing(*_: object) -> Handle:
    """A handle on a file system that reads through its cache alone."""
    handle = Handle([], set())
    handle.async_pread = lambda *_: -1  # type: ignore[method-assign]
    return handle


def test_deepspeeds_own_library_gives_the_same_bits(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    library = transfers._library()
    ours, (theirs, adamw) = Offloaded(disk, monkeypatch, "mapped"), plain()
    monkeypatch.setattr(transfers, "_library", lambda: library)
    states = States(ours.file, DeepSpeedAio(ours.file, pinned=False), "DeepSpeed")
    ours.optimizer = OffloadedAdamW(dict(ours.network.named_parameters()), states, SETTINGS)
    for number in range(4):
        ours.step(number)
        gradients(theirs, number)
        adamw.step()
    assert same(ours.network, theirs)
