"""python -m tests.rehearsal [NAME ...]: run jobs on the rehearsed device, and judge them.

`make rehearse` runs all. --update makes what they did their golden lists, --plants runs the faults
of plants.py in their place, --list prints the names. The exit code is 1 where a job is not right.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from tests.rehearsal import compare, drive, jobs, plants
from tests.rehearsal.cuda import build
from tests.rehearsal.jobs import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for.  returns the exit code"""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print(*(job.name for job in jobs.table()), sep="\n")
        return 0
    if (obstacle := build.obstacle()) is not None:
        print(obstacle)
        return 0
    build.build()
    wanted = _wanted(arguments.names, arguments.plants)
    work = arguments.keep or Path(mkdtemp(prefix="rehearsal-"))
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    failed = _run(wanted, work, arguments)
    total = f"{len(wanted)} jobs in {time.monotonic() - begun:.0f} s"
    print(f"{total}: {f'not right: {chr(32).join(failed)}' if failed else 'all right'}")
    if arguments.keep is None and not failed:
        shutil.rmtree(work)
    else:
        print(f"Their files are in {work}")
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="jobs, or plants with --plants (default: all)")
    add("--update", action="store_true", help="make what the jobs did their golden lists")
    add("--plants", action="store_true", help="run the planted faults in place of the jobs")
    add("--list", action="store_true", help="print the names of the jobs")
    add("--keep", type=Path, metavar="FOLDER", help="a new folder for the jobs' files, kept")
    add("--json", type=Path, metavar="FILE", help="write what was found there")
    return parser


def _wanted(names: list[str], with_plants: bool) -> list[Job]:
    if with_plants:
        return jobs.planted(names or plants.PLANTS)
    return jobs.chosen(names)


def _run(wanted: list[Job], work: Path, arguments: argparse.Namespace) -> list[str]:
    """Run and judge, a line for each job.  returns the names of those that are not right"""
    drive.begin()
    drive.write_materials(drive.kinds_of(wanted), work)
    failed, told = [], {}
    print(f"{'job':<27}{'seconds':>8}{'waits':>7}  result")
    for job in wanted:
        outcome = drive.run(job, work)
        if arguments.update and not (job.plant or job.cpu or job.rounds or outcome.code):
            compare.write_golden(job.name, compare.reported(outcome.folder))
        found = compare.judge(outcome, _golden(job, work))
        told[job.name] = {"code": outcome.code, "wrong": found.wrong, "known": found.known}
        right, result = _result(job, found)
        failed += [] if right else [job.name]
        print(f"{job.name:<27}{outcome.seconds:>8.1f}{found.waits:>7}  {result}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(told, indent=1))
    return failed


def _golden(job: Job, work: Path) -> compare.Counts | None:
    """The list of a job; of one with a fault, what the job without it did."""
    if job.plant is None:
        return None if job.cpu else compare.read_golden(job.name)
    return compare.by_function(compare.reported(work / jobs.UNPLANTED))


def _result(job: Job, found: compare.Found) -> tuple[bool, str]:
    """Whether a job is right, and what to print: of one with a fault, whether that was found."""
    if job.plant is not None:
        part = plants.PLANTS[job.plant].found
        lines = [line for line in found.wrong if part in line]
        return bool(lines), f"found: {lines[0]:.200}" if lines else f"not found: {part}"
    lines = [f"{line:.300}" for line in found.wrong]
    known = [f"known fault: {line:.300}" for line in found.known]
    return not lines, "\n    ".join([f"{len(lines)} wrong" if lines else "right", *lines, *known])


if __name__ == "__main__":
    sys.exit(main())
