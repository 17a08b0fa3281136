"""How many processes a command should run as on this node, and starting them in this one's place."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from fastgrpo.core.errors import UserError

SETTLED = "FASTGRPO_SETTLED"
"""In the environment once the recipe is checked and the number of processes settled, by Python or launch/_run.sh."""


def processes_to_start(environment: Mapping[str, str]) -> int:
    """How many processes should take this one's place on this node; 1: it goes on as it is.

    More than 1 only for a lone process (WORLD_SIZE 1 or unset).
    Raises UserError where FASTGRPO_PROCESSES is not a positive number.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        return 1
    wanted = environment.get("FASTGRPO_PROCESSES")
    if wanted is None:
        import torch

        return max(1, torch.cuda.device_count())
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"FASTGRPO_PROCESSES={wanted}: not a number of processes; use 1 or more, such as 8.")
    return int(wanted)


def torchrun_environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """`environment` without what an outer torchrun put there, for a new torchrun of `processes` processes."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    inner = {name: value for name, value in environment.items() if not name.startswith(outer)}
    threads = max(1, min(8, (os.cpu_count() or 1) // processes))
    inner.setdefault("OMP_NUM_THREADS", str(threads))
    return inner | {SETTLED: "1"}


def replace_by_torchrun(program: Sequence[str], processes: int) -> NoReturn:
    """Run a file, or `-m` and a module, with its arguments under a torchrun that takes this process's place."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [*torchrun, *program], torchrun_environment(os.environ, processes))
