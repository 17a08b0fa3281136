"""Write docs/guides/gpu/hardware.md: what every recipe of launch/ needs on the machine that its head
names, by `fastgrpo plan`.

    python -m benchmarks.plan.hardware            writes the page
    python -m benchmarks.plan.hardware --check    exit code 1 where the page is not what this writes
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import ROOT
from fastgrpo.core import config
from fastgrpo.core.units import GIB
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.costs import disk
from fastgrpo.tools.plan.gpus import Achieved, gpu
from fastgrpo.tools.plan.phases import Machine

LAUNCH, PAGE = ROOT / "launch", ROOT / "docs" / "guides" / "gpu" / "hardware.md"
MACHINE = re.compile(r"^# Plan: (\d+) x ([\w-]+):", re.MULTILINE)
HEAD = """\
# What each recipe needs

Written by `python -m benchmarks.plan.hardware` from `fastgrpo plan`; a test keeps the page true.
**Computed, never compared with a GPU**: take seconds as ratios between recipes. The same for your
machine: `fastgrpo plan RECIPE --gpus N --gpu NAME`. Which one to take: [recipes.md](../../recipes.md).

- **peak GiB** of the busiest GPU, of what is usable of it, in the busiest phase;
- **host GiB** of a node's own memory, where weights, states or trajectories wait there;
- **hours** of the whole run, as many iterations as the recipe has;
- **weights GB** of the model on the disk, 2 bytes a parameter; rewards' weights are not among them;
- **checkpoints GB** that are there at once in the run's folder: those kept, the best, and one that
  is being written.

| recipe | GPUs | peak GiB | host GiB | s per iteration | hours | weights GB | checkpoints GB |
|---|---|---|---|---|---|---|---|
"""


def recipes() -> list[Path]:
    """The recipes whose head names a machine, those for one card first."""
    found = [file for file in LAUNCH.rglob("*.toml") if MACHINE.search(file.read_text("utf-8"))]
    return sorted(found, key=lambda file: (_gpus(file)[0], file.relative_to(LAUNCH).as_posix()))


def _gpus(file: Path) -> tuple[int, str]:
    """Number and name of the GPUs that a recipe's head names."""
    told = MACHINE.search(file.read_text("utf-8"))
    assert told is not None
    return int(told[1]), told[2]


def row(file: Path) -> str:
    """A recipe's line of the table. Raises AssertionError where it does not fit on its machine."""
    count, name = _gpus(file)
    found = planner.plan(config.load(file), count, Machine(gpu(name), Achieved()))
    assert found.fits, f"{file}: does not fit on {count} x {name}"
    held, needed = sum(found.host.values()) / GIB, disk.of_run(found.subject)
    cells = (
        f"`{file.relative_to(LAUNCH).with_suffix('')}`",
        f"{count} x {name}",
        f"{found.worst.peak / GIB:.1f} of {found.machine.usable() / GIB:.1f}",
        f"{held:,.0f}",
        f"{found.seconds:,.0f}",
        f"{found.gpu_hours / count:,.1f}",
        f"{needed['weights'] / 1e9:,.1f}",
        f"{needed['checkpoints'] / 1e9:,.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> int:
    """Write the page, or compare it.  returns the exit code"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    checking = parser.parse_args().check
    page = HEAD + "".join(map(row, recipes()))
    if not checking:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE}: not what the plan says; python -m benchmarks.plan.hardware", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
