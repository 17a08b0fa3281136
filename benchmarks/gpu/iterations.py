"""A few iterations of a recipe, with noise drawn on the CPU: a GPU then draws the CPU's clips.

    python -m benchmarks.gpu.iterations RECIPE COUNT [section.key=value ...]

Prints one JSON line: the metrics of each iteration. A process of its own for each run of stage (b).
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastgrpo import train
from fastgrpo.algorithm import noise
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.processes import leave
from fastgrpo.parallel.world import open_world
from fastgrpo.run.tracker import read_metrics
from fastgrpo.session import claim, open_session

drawn = noise.normal


def on_host(
    keys: list[noise.Key], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """The CPU's noise, float32 [len(keys), *shape], on the device."""
    return drawn(keys, shape).to(device)


def main(argv: Sequence[str]) -> None:
    """Run the iterations and print their metrics."""
    recipe = config.load(Path(argv[0]), argv[2:])
    cli.quiet_libraries()
    with redirect_stdout(io.StringIO()), ExitStack() as stack:
        stack.enter_context(mock.patch.object(noise, "normal", on_host))
        world = stack.enter_context(open_world(recipe.distributed))
        session = open_session(recipe, world, stack, *claim(recipe, world, stack))
        for _ in range(int(argv[1])):
            train.iterate(session)
        metrics = read_metrics(recipe.run.dir / "metrics.jsonl")
    print(json.dumps(metrics), flush=True)
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
