"""An export in a process of its own, whose memory nothing else has touched.  argv: run, folder

Prints the bytes by which resident memory was higher at most.
"""

import ctypes
import gc
import sys
from pathlib import Path

from fastgrpo.core.processes import leave
from fastgrpo.tools.export.export import Export, export


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run, folder = map(Path, sys.argv[1:])
    gc.collect()
    # what was freed would else be used again and count as no growth
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    export(Export(run, folder, max_shard_bytes=10**9))
    print(resident("VmHWM") - before)
    leave(0)
