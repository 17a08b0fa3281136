"""AdamW on the CPU, as `distributed.offload` steps it: which implementation is fastest, and whether
all agree.

    python -m benchmarks.speed.cpu_adam [--parameters 100] [--rounds 7] [--threads 1 2]

Every round takes one step of each in turn, so that a machine's noise falls on all of them alike.
Prints the medians of the seconds on the clock and of the CPU's, which others on the machine disturb
less, and the largest difference of a weight from torch's plain loop over the tensors. DeepSpeed's
CPUAdam is measured where `deepspeed` is installed (the extra of that name); its first use compiles
it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import nn

WIDTH = 3072  # HunyuanVideo's: its layers are multiples of this
SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
PLAIN = "torch, loop"


def choices() -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    """Name to a function that makes the optimizer of some parameters."""
    found: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        PLAIN: lambda parameters: torch.optim.AdamW(parameters, foreach=False, **SETTINGS),
        "torch, foreach": lambda parameters: torch.optim.AdamW(
            parameters, foreach=True, **SETTINGS
        ),
        "torch, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True, **SETTINGS),
    }
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return found
    return found | {
        "DeepSpeed CPUAdam": lambda parameters: DeepSpeedCPUAdam(
            parameters, adamw_mode=True, **SETTINGS
        )
    }


def weights(millions: int) -> list[nn.Parameter]:
    """Matrices and vectors of about this many million float32 elements, always the same."""
    draws = torch.Generator().manual_seed(0)
    shapes = [
        shape
        for _ in range(round(millions * 1e6 / WIDTH**2))
        for shape in ((WIDTH, WIDTH), (WIDTH,))
    ]
    return [nn.Parameter(0.02 * torch.randn(shape, generator=draws)) for shape in shapes]


def measure(millions: int, rounds: int) -> dict[str, Any]:
    """Seconds (clock, CPU) of each round and the largest difference at the end, by name."""
    held = {name: weights(millions) for name in choices()}
    optimizers = {name: make(held[name]) for name, make in choices().items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in held}
    draws = torch.Generator().manual_seed(1)
    for number in range(rounds + 1):
        for column in zip(*held.values(), strict=True):
            column[0].grad = 1e-3 * torch.randn(column[0].shape, generator=draws)
            for parameter in column[1:]:
                parameter.grad = column[0].grad
        for name, optimizer in optimizers.items():
            start, cpu = time.perf_counter(), time.process_time()
            optimizer.step()
            if number:  # the first step allocates the state
                seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    differences = {
        name: max((p - q).abs().max().item() for p, q in zip(parameters, held[PLAIN], strict=True))
        for name, parameters in held.items()
    }
    return {
        "elements": sum(p.numel() for p in held[PLAIN]),
        "seconds": seconds,
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=100, help="millions of float32 elements")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.parameters, arguments.rounds)))
        return
    print(
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    )
    for threads in arguments.threads:
        command = [sys.executable, "-m", "benchmarks.speed.cpu_adam", "--measure"]
        command += ["--parameters", str(arguments.parameters), "--rounds", str(arguments.rounds)]
        # two OpenMP runtimes: both read this one
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        output = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        found = json.loads(output.splitlines()[-1])  # DeepSpeed's compilation prints before
        millions = found["elements"] / 1e6
        print(
            f"{millions:.1f} million parameters, {threads} threads, median of {arguments.rounds} "
            "rounds"
        )
        for name, rounds in found["seconds"].items():
            clock, cpu = zip(*rounds, strict=True)
            median = statistics.median(clock)
            spread, speed = (
                f"({min(clock):.3f} to {max(clock):.3f})",
                f"{millions / median:5.0f} million/s",
            )
            difference = f"largest difference {found['differences'][name]:.1e}"
            print(
                f"  {name:<18} {median:6.3f} s {spread}, {speed}; {statistics.median(cpu):.3f} CPU "
                f"s; {difference}"
            )


if __name__ == "__main__":
    main()
