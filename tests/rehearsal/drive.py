"""Runs jobs, each in processes forked from one that has imported everything."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests import ROOT
from tests.harness import forks
from tests.rehearsal.jobs import Job, place

LIMIT_S = 240.0


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    job: Job
    code: int  # 0: a good end
    seconds: float
    folder: Path  # out, err, run and the reports

    @property
    def last_line(self) -> str:
        """Its line for the user; else the last line of what it said of an error."""
        lines = (self.folder / "err").read_text(errors="replace").splitlines()
        for line in lines:
            if line.startswith("fastgrpo: "):
                return line
        return next((line.strip() for line in reversed(lines) if _tells(line)), "")


def _tells(line: str) -> bool:
    return bool(line.strip()) and "resource_tracker" not in line and "UserWarning" not in line


def begin() -> None:
    """Start the process that forks the jobs: with the rehearsed device, and everything imported."""
    site = Path(__file__).parent / "site"
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    multiprocessing.set_forkserver_preload(["tests.rehearsal.preload"])
    multiprocessing.forkserver.ensure_running()


def prepare(environment: dict[str, str], plant: str | None, rounds: bool, rank: int) -> None:
    """In a forked process, before all else: its environment, its device, its fault."""
    from tests.harness import rounding
    from tests.rehearsal import plants
    from tests.rehearsal.cuda import core, waits

    os.environ.update(environment)
    core.limit_again()
    waits.forget()
    if plant is not None:
        plants.put_in(plant)
    if rounds:
        rounding.install()


def write_materials(kinds: set[str], work: Path) -> None:
    """Write what the jobs read, on the plain CPU path."""
    first = partial(prepare, {"CUDA_VISIBLE_DEVICES": ""}, None, False)
    log = work / "materials.log"
    for kind in sorted(kinds):
        arguments = (kind, str(work / kind))
        started = forks.start("tests.rehearsal.materials", arguments, errors=log, first=first)
        if started.wait(LIMIT_S) != 0:
            raise RuntimeError(f"{kind} could not be written: {log.read_text()[-2000:]}")


def run(job: Job, work: Path) -> Outcome:
    """Run a job to its end, whatever that is."""
    folder = work / job.name
    folder.mkdir(parents=True)
    begun = time.monotonic()
    environment = {
        "REHEARSAL_REPORT": str(folder / "report-{rank}-{pid}.json"),
        "REHEARSAL_GB": str(job.gb),
        "REHEARSAL_HANG_S": "4" if job.plant or job.faults else "30",
    } | ({"CUDA_VISIBLE_DEVICES": ""} if job.cpu else {})
    with _replicas(job, work, environment) as servers:
        started = forks.start(
            job.module,
            [*_arguments(job, work), *servers],
            ranks=job.ranks,
            output=folder / "out",
            errors=folder / "err",
            first=partial(prepare, environment, job.plant, job.rounds),
        )
        try:
            code = started.wait(LIMIT_S)
        except TimeoutError:
            code = -1
    return Outcome(job, code, time.monotonic() - begun, folder)


def _arguments(job: Job, work: Path) -> Iterator[str]:
    for argument in (place(argument, work) for argument in job.arguments):
        if argument.startswith("@"):
            yield from Path(argument[1:]).read_text().splitlines()
        else:
            yield argument


@contextmanager
def _replicas(job: Job, work: Path, environment: dict[str, str]) -> Iterator[list[str]]:
    """Reward servers of the tiny world beside a job.  gives the overrides that name them"""
    ready = [work / job.name / f"ready-{number}.json" for number in range(job.replicas)]
    token = work / "token" / "token"
    common = ("serve-rewards", "tiny_world", "--port", "0", "--token-file", str(token))
    first = partial(prepare, environment, None, False)
    servers = [
        forks.start("fastgrpo.cli", (*common, "--ready-file", str(file)), first=first)
        for file in ready
    ]
    try:
        deadline = time.monotonic() + LIMIT_S
        while not all(file.exists() for file in ready):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{job.name}: a reward server did not start")
            time.sleep(0.05)
        urls = json.dumps([json.loads(file.read_text())["url"] for file in ready])
        yield [f"server.urls={urls}", f"server.token_file={token}"] if ready else []
    finally:
        for server in servers:
            server.kill()


def kinds_of(jobs: list[Job]) -> set[str]:
    """The materials that jobs read."""
    return {kind for job in jobs for kind in job.materials}
