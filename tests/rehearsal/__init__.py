"""The GPU's path walked without a GPU: a CUDA made of the host's memory, and what is run on it.

`cuda/` is the device: `build.py` compiles rehearsal.cpp, the others put it into torch. `jobs.py`,
`drive.py`, `compare.py` and `plants.py` run jobs on it. Read docs/guides/gpu/rehearsal.md first.
"""


def install() -> None:
    """Put the device into torch, which is imported with the library of `cuda/core.py` loaded."""
    from tests.rehearsal.cuda import device, memory, nccl, waits

    waits.install()
    device.install()
    memory.install()
    nccl.install()
