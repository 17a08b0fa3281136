"""The GPU's path walked without a GPU: a CUDA made of the host's memory, and what is run on it.

`build.py` compiles rehearsal.cpp; `core.py`, `waits.py`, `device.py`, `memory.py` and `nccl.py` put
the device in; `jobs.py`, `drive.py`, `compare.py` and `plants.py` run jobs on it. Read
docs/guides/gpu/rehearsal.md first.
"""


def install() -> None:
    """Put the device into torch, which is imported with the library of `core.py` loaded."""
    from tests.rehearsal import device, memory, nccl, waits

    waits.install()
    device.install()
    memory.install()
    nccl.install()
