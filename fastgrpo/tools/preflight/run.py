"""`fastgrpo preflight`: a recipe's own session in a folder that is removed, and all checks on it.

Started on every rank like training. Alone on a machine with several GPUs it starts itself on all of
them.
"""

import io
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import IO

import torch
from rich.text import Text

from fastgrpo.checkpoint.resume import check_folder
from fastgrpo.core.config import Recipe, Track
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import local_world_size
from fastgrpo.core.units import GIB
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.parallel.world import World, open_world
from fastgrpo.run.stopping import Signals, Stop
from fastgrpo.run.terminal import open_console
from fastgrpo.session import open_session
from fastgrpo.tools.check.check import refuse
from fastgrpo.tools.plan import planner
from fastgrpo.tools.plan.gpus import GPUS, Achieved, Gpu
from fastgrpo.tools.plan.phases import Machine
from fastgrpo.tools.preflight import checks, largest_batch
from fastgrpo.tools.preflight.finding import Finding, Parts
from fastgrpo.tools.preflight.phases import Planned, table
from fastgrpo.tools.preflight.run_folder import scratch
from fastgrpo.training.conditions import encode


def run(recipe: Recipe) -> bool:
    """Print a line per check and the phases' table, on the main rank.

    returns whether all checks are green
    """
    console = open_console()
    with open_world(recipe.distributed, recipe.run.deterministic) as world, ExitStack() as stack:
        world.on_main(lambda: refuse(recipe))
        split = first_prompts(recipe, encode.read_prompts(recipe, world))
        world.on_main(lambda: check_folder(recipe, world))
        folder = stack.enter_context(scratch(recipe.run.dir, world))
        stop = Stop(folder, stack.enter_context(Signals()), world)

        def tell(finding: Finding) -> None:
            if world.main:
                style = "yellow" if finding.yellow else "green" if finding.green else "bold red"
                text = Text(finding.line, style=style)
                console.print(text, soft_wrap=True)

        # without a terminal, since a live display of a run would be empty
        with redirect_stdout(NoTerminal(console.file)):
            session = open_session(
                elsewhere(recipe, folder),
                world=world,
                stack=stack,
                split=split,
                stop=stop,
            )
            largest_batch.choose(session)
            session.tracker.close()
        green, phases = checks.thorough(Parts.of(session), folder, tell)
        if world.main:
            console.print(table(phases, planned(recipe, world)), highlight=False)
            verdict = "all green" if green else "red: do not train before it is green"
            console.print(f"preflight: {verdict}", highlight=False)
        world.barrier()  # torchrun ends the others as soon as one leaves with code 1
        return green


def elsewhere(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as a run in that folder, without any tracker."""
    changed = {
        "run": recipe.run.model_copy(update={"dir": folder}),
        "prompts": recipe.prompts.model_copy(update={"cache": None}),
        "track": Track(),
    }
    return recipe.model_copy(update=changed)


def first_prompts(recipe: Recipe, split: Split) -> Split:
    """The prompts of the first iteration, in the order of the file, and one held-out prompt.

    Only these are encoded.
    """
    drawn = prompts.draw(len(split.train), recipe.prompts.per_iteration, 0, recipe.run.seed)
    return Split([split.train[index] for index in sorted(drawn)], split.heldout[:1], split.summary)


def planned(recipe: Recipe, world: World) -> dict[str, Planned]:
    """The planner's figures by phase; empty without a GPU, or for a GPU or model unknown to it."""
    if world.device.type != "cuda":
        return {}
    card = card_of(torch.cuda.get_device_name(world.device))
    if card is None:
        return {}
    per_node = local_world_size(world.size)
    try:
        plan = planner.plan(recipe, world.size, Machine(card, Achieved()), per_node)
    except UserError:  # of a family or a config that plans do not know: the run itself took it
        return {}
    times = {"save": 1 / recipe.checkpoint.every}
    return {
        phase.name: Planned(
            seconds=phase.seconds * times.get(phase.name, 1.0),
            peak_gib=phase.peak / GIB,
        )
        for phase in plan.phases
    }


def card_of(device: str) -> Gpu | None:
    """The planner's GPU of a device's name, such as "NVIDIA A100-SXM4-80GB".

    None where the planner's table has no such GPU.
    """
    for card in GPUS:
        if all(part in device.lower() for part in card.name.split("-")):
            return card
    return None


class NoTerminal(io.TextIOBase):
    """A stream that passes text on and is no terminal."""

    def __init__(self, out: IO[str]) -> None:
        self.out = out

    def write(self, text: str) -> int:
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()
