"""`fastgrpo plan`. Heavy imports wait until `--simulate` or `--picture`."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastgrpo.cli.options import add_recipe, check_target, path, positive, rate, recipe_of
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB

if TYPE_CHECKING:
    from fastgrpo.tools.plan.costs.compute import Job
    from fastgrpo.tools.plan.planner import Plan
    from fastgrpo.tools.plan.simulation.rank import Simulated

QUICK_S = 180  # of an iteration
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")  # has a dot in its name, unlike what follows --set


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo plan`."""
    command = commands.add_parser(
        "plan",
        help="does a recipe fit on so many GPUs, how long will it take",
        description="On any machine, without a GPU: peak memory, FLOPs, bytes on the wire and "
        "seconds of each phase, GPU-hours of the run and on other numbers of GPUs; where it does "
        "not fit, or with --tune, the quickest recipe near it that does; with --advise what to "
        "give up where it is slow. Nothing is downloaded. "
        "The exit code is 1 where it does not fit. See docs/guides/planning.md.",
    )
    command.set_defaults(action=_run_plan)
    add_recipe(command)
    _add_machine(command)
    _add_answers(command)


def _add_machine(command: argparse.ArgumentParser) -> None:
    """What the recipe runs on."""
    add = command.add_argument
    add("--gpus", type=positive, required=True, metavar="N", help="how many GPUs")
    add(
        "--gpu",
        required=True,
        metavar="NAME",
        help="h800, h100, h200, b200, mi300x, a100-80, a100-40, rtx-pro-6000, l40s, a6000, 5090, "
        "4090, 3090, l4 or a10g",
    )
    add(
        "--ranks-per-node",
        type=positive,
        default=8,
        metavar="N",
        help="GPUs of a node (default: %(default)s)",
    )
    add(
        "--ram-gib",
        type=positive,
        metavar="N",
        help="memory of a node, which offloaded states and waiting trajectories must fit into "
        "(default: as much as they need)",
    )
    add(
        "--disk-gbs",
        type=rate,
        default=3.0,
        metavar="N",
        help="GB/s that a node's NVMe reads or writes, for distributed.offload=nvme (default: "
        "%(default)s, assumed)",
    )
    add(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="of the longest prompt (default: the family's limit)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a number of the GPU or an achieved share, such as update=0.5, network_gbs=6.25; may "
        "be repeated",
    )
    add(
        "--calibration",
        type=path("--calibration"),
        metavar="FILE",
        help="numbers and shares that python -m benchmarks.gpu measured; --set overrides them",
    )


def _add_answers(command: argparse.ArgumentParser) -> None:
    """What is asked beside the plan, and where the answers go."""
    add = command.add_argument
    add(
        "--tune",
        action="store_true",
        help="search the keys that change speed and memory alone for the quickest plan with 5 %% "
        "of the memory left, and say what each override wins",
    )
    add(
        "--lora",
        type=positive,
        metavar="RANK",
        help="with --tune: also tune with adapters of this rank, which is another algorithm",
    )
    add(
        "--advise",
        type=positive,
        nargs="?",
        const=QUICK_S,
        metavar="SECONDS",
        help="what to give up, the least first, until the recipe fits and an iteration takes at "
        "most so many seconds (default: %(const)s)",
    )
    add(
        "--simulate",
        action="store_true",
        help="also run one rank with the full-size network, minutes, no memory",
    )
    add("--json", action="store_true", help="print JSON in place of the tables")
    add(
        "--picture",
        type=path("--picture"),
        metavar="FILE",
        help="write memory and seconds by phase as .png, .svg or .pdf",
    )


def overrides_first(argv: Sequence[str]) -> list[str]:
    """The command line with a plan's overrides right behind its recipe, as argparse wants them."""
    if len(argv) < 2 or argv[0] != "plan" or argv[1].startswith("-"):
        return list(argv)
    moved = [argument for argument in argv[2:] if OVERRIDE.match(argument)]
    return [*argv[:2], *moved, *(argument for argument in argv[2:] if not OVERRIDE.match(argument))]


def _run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan.  returns 0 where the recipe fits, else 1"""
    from fastgrpo.tools.plan import planner, tables
    from fastgrpo.tools.plan.gpus import Achieved, calibrated, changed, gpu
    from fastgrpo.tools.plan.phases import Machine
    from fastgrpo.tools.plan.tuning import advice_table
    from fastgrpo.tools.plan.tuning.advice import advise
    from fastgrpo.tools.plan.tuning.answer import answer_of

    if arguments.picture and arguments.picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(
            f"--picture={arguments.picture}: no format of that name; use .png, .svg or .pdf."
        )
    check_target("--picture", arguments.picture)
    if arguments.lora and not arguments.tune:
        raise UserError(f"--lora={arguments.lora}: has no effect without --tune; add it.")
    recipe = recipe_of(arguments)
    card, achieved = gpu(arguments.gpu), Achieved()
    if arguments.calibration:
        card, achieved = calibrated(card, achieved, arguments.calibration)
    card, achieved = changed(card, achieved, _numbers(arguments.set))
    machine = Machine(card, achieved, arguments.ram_gib, arguments.disk_gbs)
    text = arguments.text_tokens
    result = planner.plan(
        recipe, arguments.gpus, machine, ranks_per_node=arguments.ranks_per_node, text=text
    )
    wanted = arguments.tune or not (result.fits or arguments.advise)
    answer = answer_of(result, arguments.lora, text) if wanted else None
    advice = advise(result, arguments.advise, text) if arguments.advise else []
    plans = planner.curve(recipe, machine, arguments.ranks_per_node, text)
    simulated = _simulate(result) if arguments.simulate else None
    if arguments.picture:
        tables.picture(result, arguments.picture)
    if arguments.json:
        told = tables.as_json(result, plans, answer, simulated)
        print(json.dumps(told | {"advice": advice_table.as_json(advice)}, indent=1))
    else:
        tables.show(result, plans, answer, simulated)
        if advice:
            advice_table.show(advice, arguments.advise)
    return 0 if result.fits else 1


def _numbers(settings: list[str]) -> dict[str, float]:
    """The values of --set."""
    numbers = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--set={setting}: not of the form NAME=NUMBER, e.g. update=0.5.")
    return numbers


def _simulate(plan: "Plan") -> dict[str, Any]:
    """One rank simulated, beside the closed form for the same micro-batch and forward."""
    import warnings

    job, left_out = _alone(plan.subject.job)
    if job.lora:
        raise UserError(
            "--simulate: peft cannot make adapters of tensors without contents; leave --simulate "
            "out."
        )
    if job.recipe.distributed.offload:
        raise UserError(
            "--simulate: a rank without a GPU has no other memory to offload to; leave --simulate "
            "out, or set distributed.offload=false."
        )
    # none is changed
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    from fastgrpo.tools.plan import phases
    from fastgrpo.tools.plan.simulation.rank import Ranks, Sizes, simulate
    from fastgrpo.tools.plan.subject import network_config

    recipe, network = job.recipe, network_config(job.recipe)[0]
    whole = phases.holds_whole(plan.subject, plan.machine)
    exact = simulate(
        recipe,
        network,
        Sizes(job.latent, job.text),
        Ranks(job.gpus, job.ranks_per_node, whole),
    )
    return {
        "compared": _compared(job, exact, whole),
        "left_out": left_out,
        "seconds": exact.seconds,
        **exact.as_dict(),
    }


def _compared(job: "Job", exact: "Simulated", whole: bool) -> dict[str, tuple[float, float]]:
    """Simulated and closed form, by quantity.  whole: whether the rollout holds whole weights"""
    from fastgrpo.tools.plan.costs import compute, memory

    recipe = job.recipe
    batch, drawn = recipe.optimizer.batch_size, recipe.rollout.at_once
    sent = compute.micro_batch(job, batch)
    return {
        "update: peak GiB": (
            exact.update_peak / GIB,
            sum(memory.update(job, batch, False).values()) / GIB,
        ),
        "update: forward TFLOP": (
            exact.forward_flops / 1e12,
            compute.forward(job, batch).total / 1e12,
        ),
        "update: all TFLOP": (exact.update_flops / 1e12, compute.update(job, batch).total / 1e12),
        "update: gathered GiB": (exact.update_sent.get("all-gather", 0) / GIB, sent.gather / GIB),
        "update: scattered GiB": (
            exact.update_sent.get("reduce-scatter", 0) / GIB,
            sent.scatter / GIB,
        ),
        "update: exchanged GiB": (
            exact.update_sent.get("all-to-all", 0) / GIB,
            sent.exchange / GIB,
        ),
        "rollout: peak GiB": (
            exact.rollout_peak / GIB,
            sum(memory.rollout(job, drawn, whole).values()) / GIB,
        ),
        "rollout: forward TFLOP": (
            exact.rollout_flops / 1e12,
            compute.forward(job, drawn).total / 1e12,
        ),
    }


def _alone(job: "Job") -> "tuple[Job, list[str]]":
    """The job as a simulated rank has it, and the kinds of memory that are left out.

    A simulated rank has one copy of the weights.
    """
    from fastgrpo.training import methods

    recipe = job.recipe
    left_out = ["average"] if recipe.optimizer.ema_decay else []
    if methods.traits(recipe).average_draws:
        left_out.append("raw weights")
    if job.second_network:
        left_out.append("initial policy")
    reference = methods.traits(recipe).reference_key
    changed = {
        "optimizer": recipe.optimizer.model_copy(update={"ema_decay": 0.0}),
        "objective": recipe.objective.model_copy(update={reference: 0.0}),
    }
    return replace(job, recipe=recipe.model_copy(update=changed)), left_out
