"""What a plan knows of GPUs: a table of published figures, and what share of them a run is assumed
to achieve.

Peaks are dense, bfloat16 with float32 accumulation. Bandwidths are one GPU's, in one direction:
NVLink's 900 GB/s of an H100 count both. Where a card has no NVLink, or one that joins two cards
alone, its GPUs exchange over PCIe; an MI300X has seven links of 64 GB/s, one to each other of a
node.
The network is what such nodes are usually sold with, a card per GPU; yours may differ: every number
can be overridden.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node.

    Sources: NVIDIA's data sheets of H100, H200, A100, L40S, L4 and HGX B200; its white papers of
    GA102 (3090, A6000), Ada (4090) and RTX Blackwell (5090, RTX PRO 6000); AWS' page of g5 for
    A10G; AMD's data sheet of MI300X. Memory is as nvidia-smi shows it.
    """

    name: str
    tflops: float  # bfloat16, dense
    memory_gib: float
    memory_gbs: float  # bandwidth of its own memory, 10^9 bytes per second
    link_gbs: float  # to the other GPUs of the node
    network_gbs: float  # to other nodes
    host_gbs: float  # to the host's memory, PCIe


@dataclass(frozen=True)
class Achieved:
    """Shares of the table's figures.

    Assumed: no GPU was at hand; measure yours and override them.
    """

    rollout: float = 0.50
    """Share of the peak FLOP/s in forwards without gradients."""
    update: float = 0.45
    """Share of the peak FLOP/s in forward and backward, where recomputation counts as work."""
    decode: float = 0.30
    """Share of the peak FLOP/s in a VAE's convolutions."""
    reward: float = 0.30
    """Share of the peak FLOP/s in a reward's network."""
    link: float = 0.80
    """Share of the bandwidth to the node's other GPUs."""
    network: float = 0.85
    """Share of the bandwidth to other nodes."""
    memory: float = 0.75
    """Share of the memory's bandwidth in the optimizer's step."""
    disk_gbs: float = 2.0
    """What a node reads and writes of weights and checkpoints, 10^9 bytes per second; no share."""
    reserve_gib: float = 2.5
    """CUDA context, NCCL's and cuBLAS' buffers; no share."""
    fragmentation: float = 0.05
    """Share of the memory in use that the allocator holds and cannot give."""


_TABLE = (
    # name, dense bfloat16 TFLOP/s, memory GiB and GB/s, GB/s to GPUs of the node, other nodes, host
    ("h800", 989, 79.6, 3350, 200, 50, 55),
    ("h100", 989, 79.6, 3350, 450, 50, 55),
    ("h200", 989, 140.4, 4800, 450, 50, 55),
    ("b200", 2250, 179.0, 8000, 900, 50, 55),
    ("mi300x", 1307, 191.9, 5300, 448, 50, 55),
    ("a100-80", 312, 79.2, 2039, 300, 25, 25),
    ("a100-40", 312, 39.4, 1555, 300, 25, 25),
    ("rtx-pro-6000", 504, 95.6, 1792, 50, 12.5, 50),
    ("l40s", 362, 44.4, 864, 25, 12.5, 25),
    ("a6000", 155, 47.5, 768, 25, 12.5, 25),
    ("5090", 209, 31.8, 1792, 50, 12.5, 50),
    ("4090", 165, 23.5, 1008, 25, 12.5, 25),
    ("3090", 71, 23.5, 936, 25, 12.5, 25),
    ("l4", 121, 22.5, 300, 25, 12.5, 25),
    ("a10g", 70, 22.2, 600, 25, 12.5, 25),
)
GPUS = tuple(Gpu(*row) for row in _TABLE)


def gpu(name: str) -> Gpu:
    """The GPU of this name. Raises UserError where the table has none."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    for maker in ("nvidia-", "amd-", "instinct-", "geforce-", "rtx-"):
        wanted = wanted.removeprefix(maker)
    for known in GPUS:
        own = known.name.removeprefix("rtx-")
        if wanted in (own, own.replace("-", "")):
            return known
    raise UserError(
        f"--gpu={name}: not in the table; use one of {', '.join(known.name for known in GPUS)}."
    )


def changed(card: Gpu, achieved: Achieved, settings: dict[str, float]) -> tuple[Gpu, Achieved]:
    """Both with numbers replaced: `tflops` ... of the card, `rollout` ... of what is achieved.

    Raises UserError for a name that neither has, and for a value that cannot be.
    """
    of_card, of_achieved = ({f.name for f in fields(kind)} - {"name"} for kind in (Gpu, Achieved))
    for name, value in settings.items():
        if name not in of_card | of_achieved:
            known = ", ".join(sorted(of_card | of_achieved))
            raise UserError(f"--set={name}: no such number; use one of {known}.")
        share = name in of_achieved and not name.endswith(("_gbs", "_gib"))
        positive = value > 0 or (value == 0 and name in ("reserve_gib", "fragmentation"))
        if not (positive and value < math.inf) or (share and value > 1):
            needed = "a share from 0 to 1" if share else "above 0"
            raise UserError(f"--set={name}={value:g}: must be {needed}.")
    own = {name: value for name, value in settings.items() if name in of_card}
    card = Gpu(card.name, **{name: own.get(name, getattr(card, name)) for name in of_card})
    return card, replace(
        achieved, **{name: value for name, value in settings.items() if name in of_achieved}
    )


def calibrated(card: Gpu, achieved: Achieved, file: Path) -> tuple[Gpu, Achieved]:
    """Both with the numbers of a calibration file: a JSON object whose "numbers" are as in --set.

    `python -m benchmarks.gpu` writes one.  Raises UserError for a file that is none.
    """
    remedy = "write it anew with python -m benchmarks.gpu"
    numbers = read_json(file, "--calibration", remedy).get("numbers")
    if not isinstance(numbers, dict) or not numbers:
        raise UserError(f"--calibration={file}: has no object 'numbers' with figures; {remedy}.")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--calibration={file}: {name} is no number; correct it, or {remedy}.")
    try:
        return changed(card, achieved, numbers)
    except UserError as error:
        problem = str(error).removeprefix("--set=")
        raise UserError(f"--calibration={file}: {problem}") from None
