"""Which rank is slow, dead or hung, where, and what memory each phase took."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import Peaks
from fastgrpo.core.processes import OneRankError
from fastgrpo.run import heartbeat
from fastgrpo.run.heartbeat import FOLDER, Heartbeat, HeartbeatWriter, encoded
from fastgrpo.run.rank_times import RankLog, Spread, hosts_of, spread, table
from fastgrpo.run.stopwatch import Phase, Stopwatch
from fastgrpo.run.terminal import PHASES
from fastgrpo.tools import status as verdicts
from fastgrpo.tools.report.ending import failed_alone
from fastgrpo.tools.report.run_data import failure_of
from fastgrpo.tools.status import lines, verdict
from tests import ROOT
from tests.harness import runs
from tests.harness.workers.observability import MEMORY_MIB, PIECES, SLOW_S, WORK_S

NODE = heartbeat.node()
SLOW = PIECES * SLOW_S
LIMIT_S = 4


def status(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastgrpo.cli", "status", str(folder), *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@dataclass
class Stalled:
    """Two ranks of which the second has stopped itself."""

    folder: Path
    out: str
    told: subprocess.CompletedProcess[str]  # `fastgrpo status` of it
    rows: list[dict[str, Any]]
    pid: int  # of the second rank


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stalled]:
    folder = tmp_path_factory.mktemp("stalled") / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
    ]
    with (folder.parent / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "tests.harness.workers.observability", str(folder)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    pid = 0
    try:
        deadline = time.monotonic() + 100
        while not pid and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            beats = heartbeat.read(folder)
            if (
                len(beats) == 2
                and (beats[1].iteration, beats[1].phase) == (2, "decode")
                and time.time() - beats[1].time > LIMIT_S
            ):
                pid = beats[1].pid
        told = (folder.parent / "out").read_text()
        assert pid, told
        yield Stalled(
            folder,
            out=told,
            told=status(folder, "--limit", str(LIMIT_S)),
            rows=runs.metrics(folder),
            pid=pid,
        )
    finally:
        # the ranks die with torchrun, but one that is stopped does not hear SIGTERM
        for number in (
            pid,
            process.pid,
        ):
            with suppress(ProcessLookupError):
                os.kill(number or process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_slowest_rank_and_its_phase_are_named(stalled: Stalled) -> None:
    calm, slow = stalled.rows
    assert (slow["slowest/rollout"], slow["slowest/rank"]) == (1.0, 1.0)
    fastest, middle, longest = (
        slow[f"seconds_{kind}/rollout"] for kind in ("min", "median", "max")
    )
    assert PIECES * WORK_S <= fastest < SLOW <= longest
    assert middle == pytest.approx((fastest + longest) / 2)
    assert slow["seconds/rollout"] == fastest  # rank 0's
    # it waited for the other
    assert slow["seconds_max/wait"] == slow["seconds/wait"] >= 0.5 * (longest - fastest)
    assert slow["seconds/total"] >= SLOW
    assert slow["seconds_min/update"] >= 3 * WORK_S <= calm["seconds_min/update"]
    assert calm["seconds_max/rollout"] < SLOW


@pytest.mark.slow
def test_one_line_per_iteration_says_who_was_slow(stalled: Stalled) -> None:
    first, second = [line for line in stalled.out.splitlines() if line.startswith("iteration ")]
    assert first.startswith("iteration 1/3  reward 1.000")
    assert f"slow: rank 1 (node {NODE}) took " in second and "x the median in rollout" in second


@pytest.mark.slow
def test_a_stopped_rank_is_named_with_its_phase(stalled: Stalled) -> None:
    assert stalled.told.returncode == 1
    head, first, second, said = stalled.told.stdout.splitlines()
    assert head.split()[:4] == ["rank", "node", "pid", "iteration"]
    assert first.split()[:5] == ["1", NODE, str(stalled.pid), "3", "decode"]
    # what is ours: the worker runs as __main__
    assert "tests.harness.workers.observability" not in first
    assert "__main__" in first and "iterate" in first
    assert (
        second.split()[0] == "0"
        and second.split()[3:5] == ["3", "wait"]
        and "fastgrpo.run.stopping:" in second
    )
    assert said.startswith(f"rank 1 (node {NODE}, pid {stalled.pid}) seems dead: silent for ")
    assert "last in decode, iteration 3" in said


@pytest.mark.slow
def test_each_rank_has_a_log_of_its_own(stalled: Stalled) -> None:
    for rank in (0, 1):
        rows = [
            json.loads(line) for line in (stalled.folder / "logs" / f"rank-{rank}.jsonl").open()
        ]
        assert [row["iteration"] for row in rows] == [0, 1]
        for row, logged in zip(rows, stalled.rows, strict=True):
            assert (row["rank"], row["host"]) == (rank, NODE)
            device = f"cuda:{rank} " if torch.cuda.is_available() else "cpu"
            assert row["device"].startswith(device)
            assert (
                set(row["seconds"])
                == set(row["cpu_seconds"])
                == set(row["resident_gib"])
                == set(PHASES)
            )
            for phase, seconds in row["seconds"].items():
                assert (
                    logged[f"seconds_min/{phase}"] - 1e-3
                    <= seconds
                    <= logged[f"seconds_max/{phase}"] + 1e-3
                )
        assert rows[1]["cpu_seconds"]["rollout"] < 0.5 * SLOW  # asleep


@pytest.mark.slow
def test_memory_has_its_peak_in_the_phase_that_took_it(stalled: Stalled) -> None:
    calm, slow = stalled.rows
    extra = 0.9 * MEMORY_MIB / 1024
    assert 0.05 < calm["resident_gib/decode"] < 8
    if Peaks().field == "VmHWM:":  # the kernel lets the peak be set back
        for other in set(PHASES) - {"decode"}:
            assert slow["resident_gib/decode"] > slow[f"resident_gib/{other}"] + extra, other
    assert not any("allocated_gib" in name for name in slow) or torch.cuda.is_available()


def test_peaks_of_the_gpu_are_read_before_they_are_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU at hand: an allocator of three numbers in its place."""
    now, peak = 1 * 2**30, {"allocated": 3 * 2**30, "reserved": 4 * 2**30}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: peak["allocated"])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: peak["reserved"])
    monkeypatch.setattr(
        "torch.cuda.reset_peak_memory_stats", lambda: peak.update(allocated=now, reserved=2 * now)
    )
    peaks = Peaks()
    assert peaks.read()[:2] == (1.0, 2.0)  # what came before does not count
    peak |= {"allocated": 5 * 2**30, "reserved": 6 * 2**30}
    assert peaks.read()[:2] == (5.0, 6.0)
    assert peaks.read()[:2] == (1.0, 2.0)


def test_a_real_run_has_every_phase_of_every_rank(two_rank_run: Path) -> None:
    rows = runs.metrics(two_rank_run)
    for row in rows:
        for phase in PHASES:
            assert (
                0
                <= row[f"seconds_min/{phase}"]
                <= row[f"seconds_median/{phase}"]
                <= row[f"seconds_max/{phase}"]
            )
            assert 0.1 < row[f"resident_gib/{phase}"] < 8
        assert min(row[f"seconds_min/{phase}"] for phase in ("rollout", "decode", "update")) > 0
        assert row["seconds/total"] == pytest.approx(
            sum(row[f"seconds/{phase}"] for phase in PHASES)
        )
        assert row["slowest/rank"] in (0, 1)
    assert "How far apart the ranks are" in (two_rank_run / "report.html").read_text()
    assert [(beat.rank, beat.end, beat.iteration) for beat in heartbeat.read(two_rank_run)] == [
        (0, "done", len(rows) - 1),
        (1, "done", len(rows) - 1),
    ]
    told = status(two_rank_run)
    assert told.returncode == 0 and told.stdout.endswith(
        "the run has ended in good order, 2 ranks\n"
    )


class Clock:
    """A clock that only goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 4

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_laps_go_to_the_phase_that_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("fastgrpo.run.stopwatch.time", clock)

    def agreed() -> Iterator[int]:
        for piece in (0, 1):
            clock.passes(100)  # until the other ranks are there
            yield piece
        clock.passes(1000)

    watch = Stopwatch(last=0.0, last_cpu=0.0)
    clock.passes(1)  # before the first piece: of their phase
    for _ in watch.pieces(agreed(), "rollout", then="reward"):
        clock.passes(2)
        watch.lap("rollout", then="decode")
        clock.passes(4)
        watch.lap("decode")
        clock.passes(8)  # without a lap: of the pieces' phase
    clock.passes(16)
    watch.lap("reward", then="update")
    expected = {"rollout": 1 + 2 * 2 + 2 * 8, "wait": 2 * 100 + 1000, "decode": 2 * 4, "reward": 16}
    metrics = watch.metrics()
    assert metrics == {f"seconds/{phase}": value for phase, value in expected.items()} | {
        "seconds/total": sum(expected.values())
    }
    assert {name: phase.cpu for name, phase in watch.phases.items()} == {
        n: v / 4 for n, v in expected.items()
    }


def watched(**seconds: float) -> Stopwatch:
    phases = {
        name: Phase(value, 0.0, (value, 2 * value, 3 * value)) for name, value in seconds.items()
    }
    return Stopwatch(phases=phases)


def gathered(*watches: Stopwatch) -> Spread:
    return spread(
        [f"n{rank // 2}" for rank in range(len(watches))],
        torch.stack([table(watch) for watch in watches]),
    )


def test_the_spread_is_that_of_the_ranks() -> None:
    found = gathered(
        watched(rollout=1.0, update=5.0, wait=3.0),
        watched(rollout=1.2, update=5.0, wait=2.8),
        watched(update=5.2, wait=3.8),
        watched(rollout=4.0, update=5.0, wait=0.0),
    )
    metrics = found.metrics()
    assert [metrics[f"seconds_{kind}/rollout"] for kind in ("min", "median", "max")] == [
        0.0,
        1.1,
        4.0,
    ]
    assert [metrics[f"slowest/{name}"] for name in ("rollout", "update", "rank")] == [3.0, 2.0, 3.0]
    assert [metrics[f"{kind}_gib/rollout"] for kind in ("allocated", "reserved", "resident")] == [
        4.0,
        8.0,
        12.0,
    ]
    assert "slowest/wait" not in metrics and "seconds_max/decode" not in metrics
    assert found.note() == "slow: rank 3 (node n1) took 3.6x the median in rollout"
    alone = gathered(watched(rollout=1.0)).metrics()
    assert alone == {
        "allocated_gib/rollout": 1.0,
        "reserved_gib/rollout": 2.0,
        "resident_gib/rollout": 3.0,
    }


def test_small_differences_are_not_worth_a_word() -> None:
    assert gathered(watched(rollout=1.0), watched(rollout=1.2), watched(rollout=1.4)).note() == ""
    assert (
        gathered(watched(rollout=0.01), watched(rollout=0.01), watched(rollout=0.15)).note() == ""
    )
    tiny = (
        watched(decode=0.1, update=50.0),
        watched(decode=0.1, update=50.0),
        watched(decode=0.9, update=50.0),
    )
    assert gathered(*tiny).note() == ""


BEAT = Heartbeat(
    rank=0,
    ranks=4,
    host="n1",
    pid=11,
    iteration=6,
    phase="wait",
    laps=9,
    phase_s=100.0,
    longest_s=0.3,
    time=1000.0,
    at="f:1 g",
)
LONE = replace(BEAT, rank=2, phase="rollout", laps=4, phase_s=100.0, longest_s=20.0)
CROWD = [replace(BEAT, rank=0), replace(BEAT, rank=1), replace(BEAT, rank=3)]


def judged(beats: list[Heartbeat], now: float = 1001.0) -> list[str]:
    return verdict(beats, now, 60.0)


def test_the_rank_that_all_others_wait_for_is_hung() -> None:
    (said,) = judged([*CROWD, LONE])
    name, trouble = said.split(" seems hung in ")
    assert name == "rank 2 (node n1, pid 11)"
    assert (
        trouble == "rollout, iteration 7 (for 2 min, longest before 20 s); the others are in wait"
    )
    assert lines([*CROWD, LONE], 1001.0, 60.0)[1].split()[0] == "2"
    # three times as long is not out of the ordinary
    assert judged([*CROWD, replace(LONE, longest_s=40.0)]) == []
    # nobody knows how long its first takes
    assert judged([*CROWD, replace(LONE, longest_s=0.0)]) == []
    assert judged([*CROWD, replace(LONE, longest_s=0.0, phase_s=2000.0)]) != []


def test_ranks_that_hang_together_or_are_gone_are_told_apart() -> None:
    together = [replace(beat, phase="update", laps=12, longest_s=20.0) for beat in (*CROWD, LONE)]
    assert judged(together)[0].startswith(
        "all 4 ranks seem hung in update, iteration 7 (for 2 min, longest before 20"
    )
    assert judged([*CROWD, LONE], now=1100.0)[0].startswith(
        "all 4 ranks are silent, for 2 min at least"
    )
    (said,) = judged([*CROWD, replace(LONE, time=900.0)])
    assert said.startswith(
        "rank 2 (node n1, pid 11) seems dead: silent for 2 min, last in rollout, iteration 7"
    )
    assert judged(CROWD)[0] == "no heartbeat of rank 2: not started yet, or its node is lost"
    failed = judged([*CROWD, replace(LONE, end="ValueError: no")])
    assert failed[0] == "rank 2 (node n1, pid 11) ended in rollout, iteration 7: ValueError: no"
    assert judged([replace(beat, end="done", time=0.0) for beat in (*CROWD, LONE)]) == []


def test_the_cause_of_an_end_is_the_failure_that_came_first(tmp_path: Path) -> None:
    """Others follow, as their collectives with that rank do."""
    ended = [
        replace(BEAT, rank=0, ranks=4, time=5.0, end="RuntimeError: connection closed by peer"),
        replace(BEAT, rank=1, ranks=4, time=1.0, end="done"),
        replace(BEAT, rank=2, ranks=4, time=2.0),
        replace(BEAT, rank=3, ranks=4, time=4.0, end="RuntimeError: planted"),
    ]
    (tmp_path / FOLDER).mkdir()
    for beat in ended:
        (tmp_path / FOLDER / f"rank-{beat.rank}").write_bytes(encoded(beat))
    assert failure_of(tmp_path) == "RuntimeError: planted"
    alone = [failed_alone(tmp_path, rank, RuntimeError()) for rank in range(4)]
    assert not any(alone), "no iteration was finished there"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    alone = [failed_alone(tmp_path, rank, RuntimeError()) for rank in range(4)]
    assert alone == [False, False, False, True]
    assert failed_alone(tmp_path, 3, OneRankError()) and not failed_alone(tmp_path, 3, UserError())


def test_a_heartbeat_tells_phase_place_and_end(tmp_path: Path) -> None:
    def busy(heart: HeartbeatWriter) -> Heartbeat:
        heart.enter("rollout", 3)
        heart.enter("decode")
        time.sleep(0.5)
        return heartbeat.read(tmp_path)[0]

    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank-7").write_text("of an attempt with more ranks")
    with pytest.raises(RuntimeError), HeartbeatWriter(tmp_path, 0, 2, interval_s=0.05) as heart:
        told = busy(heart)
        assert (told.iteration, told.phase, told.laps, told.end) == (3, "decode", 1, "")
        assert f"{__name__}:" in told.at and "busy" in told.at and told.phase_s > 0.1
        assert 3 <= heart.written <= 14  # on entering, then every 0.05 s
        raise RuntimeError("long " * 1000)
    (left,) = heartbeat.read(tmp_path)
    assert left.end.startswith("RuntimeError: long long") and (left.phase, left.ranks) == (
        "decode",
        2,
    )
    assert (tmp_path / "heartbeats" / "rank-0").stat().st_size == heartbeat.SIZE


def test_no_disk_no_folder_no_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no folder").touch()
    (tmp_path / "logs" / "rank-0.jsonl").mkdir(parents=True)
    with HeartbeatWriter(tmp_path / "no folder", 0, 1, interval_s=0.02) as heart:
        time.sleep(0.1)
        heart.enter("update")
    assert heart.written == 0
    log = RankLog(tmp_path, 0)
    log.append({"iteration": 0})
    log.append({"iteration": 1})
    assert capsys.readouterr().err.count("Is a directory; training goes on without that log") == 1


@pytest.mark.parametrize("in_the_way", ["a file", "a link to a file", "a link to nothing"])
def test_nothing_that_lies_in_the_way_is_written_through(in_the_way: str, tmp_path: Path) -> None:
    """Heartbeats take the place of it; the log of a rank goes without."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    for place in (run / "heartbeats" / "rank-0", run / "logs" / "rank-0.jsonl"):
        place.parent.mkdir(parents=True)
        if in_the_way == "a file":
            place.touch()
        else:
            place.symlink_to(outside)
    if in_the_way == "a link to a file":
        outside.write_text("kept")
    with HeartbeatWriter(run, 0, 1, interval_s=0.02) as heart:
        RankLog(run, 0).append({"rank": 0, "host": "n1"})
    assert heart.written and [beat.rank for beat in heartbeat.read(run)] == [0]
    assert hosts_of(run) == ({0: "n1"} if in_the_way == "a file" else {})
    assert outside.exists() == (in_the_way == "a link to a file")
    assert not outside.exists() or outside.read_text() == "kept"


def test_a_log_cut_off_by_a_kill_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 3)
    log.append({"rank": 3, "host": "n1"})
    with log.file.open("a") as file:
        file.write('{"rank": 3, "ho')
    assert hosts_of(tmp_path) == {}
    RankLog(tmp_path, 3).append({"rank": 3, "host": "n2"})
    assert log.file.read_text().splitlines() == [
        '{"rank": 3, "host": "n1"}',
        '{"rank": 3, "ho',
        '{"rank": 3, "host": "n2"}',
    ]
    assert hosts_of(tmp_path) == {3: "n2"}


def test_status_needs_no_torch_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    code = (
        "import sys; from fastgrpo.cli import main as cli; n = cli.main(sys.argv[1:]); "
        "print(sorted(sys.modules)); "
        "sys.exit(n)"
    )
    command = [sys.executable, "-c", code, "status", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"fastgrpo: {tmp_path / 'heartbeats'}: no heartbeats; give the run.dir of a run that has "
        "begun training.\n"
    )
    assert not {"'torch'", "'numpy'", "'rich'"} & set(done.stdout.strip("[]\n").split(", "))


@pytest.mark.parametrize(
    ("behind_s", "beats", "well"), [(120.0, True, True), (-1200.0, False, False)]
)
def test_another_machines_clock_is_not_believed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behind_s: float,
    beats: bool,
    well: bool,
) -> None:
    """A living rank whose clock is behind, and a dead one whose clock is ahead."""
    monkeypatch.setattr(verdicts, "WATCH_S", 1.0)
    (tmp_path / FOLDER).mkdir()
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            now = Heartbeat(rank=0, ranks=1, host="far", pid=1, time=time.time() - behind_s)
            (tmp_path / FOLDER / "rank-0").write_bytes(encoded(now))
            over.wait(0.3 if beats else 1e3)

    thread = threading.Thread(target=beat)
    thread.start()
    while not (tmp_path / FOLDER / "rank-0").exists():
        time.sleep(0.01)
    try:
        assert verdicts.status(tmp_path, silent_s=2.0) == well
    finally:
        over.set()
        thread.join()
