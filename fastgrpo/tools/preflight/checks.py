"""Is this run correct on this machine, before GPUs are burnt on it? One green or red line per check, with the remedy.

`quick` is what `train` does by default before its first iteration: the checks that cost a few forwards. `thorough` is
`fastgrpo preflight`: all checks, and the measured seconds and memory of each phase. Both leave weights, optimizer,
random numbers and the run's folder as they were: all noise is keyed, the update's optimizer step is left out, and a
folder of their own is removed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastgrpo.core.errors import UserError
from fastgrpo.tools.preflight import iteration, ranks, run_folder
from fastgrpo.tools.preflight.finding import Finding, Parts
from fastgrpo.tools.preflight.iteration import Iteration, Meter, Probe, noisy_plan, short
from fastgrpo.tools.preflight.phases import Phase, measured
from fastgrpo.tools.preflight.rewards import rewards
from fastgrpo.training.rollout import Plan

QUICK_CLIPS = 2  # decoded and scored per rank


def quick(parts: Parts, say: Callable[[str], None]) -> None:
    """Says one line where all is green, else the red ones. Raises UserError, on every rank, where a check is red.

    A bfloat16 ratio is only told: what a GPU's kernels do with batches of other shapes is not known beforehand, and the
    run's metrics show it in every iteration.
    """
    start = time.perf_counter()
    with run_folder.scratch(parts.recipe.run.dir, parts.world) as folder:
        findings = [run_folder.space(parts, folder)]
    findings += common(parts)
    probe = Probe.of(parts.trainer, parts.world)
    plan = short(noisy_plan(parts))
    findings += judged(parts, iteration.run(parts, plan, probe, QUICK_CLIPS, Meter(parts.world)))
    for finding in findings:
        if not finding.green:
            say(f"preflight: {finding.line}")
    rounds = parts.dtype == torch.bfloat16
    red = [finding for finding in findings if not finding.green and not (rounds and finding.check == "ratio")]
    if red:
        names = ", ".join(finding.check for finding in red)
        raise UserError(
            f"run.preflight=true: red before training: {names} ({red[0].measured}); {red[0].remedy}; "
            "run.preflight=false trains all the same."
        )
    names = ", ".join(finding.check for finding in findings if finding.green)
    say(f"preflight: green in {time.perf_counter() - start:.1f} s: {names}")


def thorough(parts: Parts, folder: Path, tell: Callable[[Finding], None]) -> tuple[bool, list[Phase]]:
    """All checks, each told as soon as it is done.  returns whether all are green, and what each phase took

    folder: a scratch one right in the run's folder, on every rank
    """
    findings: list[Finding] = []

    def note(*found: Finding) -> None:
        for one in found:
            findings.append(one)
            tell(one)

    world, meter = parts.world, Meter(parts.world)
    note(run_folder.space(parts, folder))
    note(*common(parts))
    probe = Probe.of(parts.trainer, world)
    run_folder.fill_moments(probe.optimizer, 0.0)  # so that memory is that of a run under way
    note(*judged(parts, iteration.run(parts, short(noisy_plan(parts)), probe, None, meter)))
    done = iteration.run(parts, some_trained(parts), probe, None, meter)
    note(replace(iteration.ratio(parts, done), check="ratio of other steps"))
    saved = run_folder.save_and_load(parts, probe, folder)
    note(saved.finding)
    if saved.bytes:
        note(replace(run_folder.space(parts, folder, saved.bytes), check="folder, by that checkpoint"))
    return all(finding.green for finding in findings), measured(parts, done, meter, saved.seconds)


def some_trained(parts: Parts) -> Plan:
    """The run's own plan, with as few trained steps per sample as make two micro-batches."""
    recipe = parts.recipe
    wanted = math.ceil(2 * recipe.optimizer.batch_size / recipe.rollout.at_once)
    plan = noisy_plan(parts)
    return replace(plan, trained=max(1, min(wanted, recipe.steps_trained, len(plan.noisy))))


def common(parts: Parts) -> list[Finding]:
    """What ranks must have in common, and the rewards."""
    checks = (ranks.weights, ranks.noise, ranks.sequences)
    return [check(parts) for check in checks] + rewards(parts)


def judged(parts: Parts, done: Iteration) -> list[Finding]:
    """What a short iteration tells."""
    checks = (
        iteration.log_probabilities,
        iteration.ratio,
        iteration.gradients,
        iteration.decoding,
        iteration.scoring,
    )
    return [check(parts, done) for check in checks]
