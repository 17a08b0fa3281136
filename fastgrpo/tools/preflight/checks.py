"""Checks before a large run that it is correct on this machine: a green or red line for each.

A red line names the remedy. `quick` has the checks that cost a few forwards; `train` runs it by
default before the first iteration. `thorough` is `fastgrpo preflight`: all checks, and the measured
seconds and memory of each phase. Both leave weights, optimizer, random numbers and the run's folder
unchanged: all noise is keyed, the update's optimizer step is left out, and the checks' own folder
is removed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.tools.preflight import iteration, model, ranks, run_folder
from fastgrpo.tools.preflight.finding import Finding, Parts
from fastgrpo.tools.preflight.iteration import Iteration, Meter, Probe, noisy_plan, short
from fastgrpo.tools.preflight.phases import Phase, measured
from fastgrpo.tools.preflight.rewards import rewards, scoring, spread
from fastgrpo.training.rollout import Plan

QUICK_CLIPS = 2  # decoded and scored per rank


def quick(parts: Parts, say: Callable[[str], None]) -> None:
    """Print one line where all checks are green, else the red ones.

    Raises UserError, on every rank, for a red check.
    """
    start = time.perf_counter()
    with run_folder.scratch(parts.recipe.run.dir, parts.world) as folder:
        findings = [run_folder.space(parts, folder)]
    findings += common(parts)
    probe = Probe.of(parts.trainer, parts.world)
    plan = short(noisy_plan(parts))
    meter = Meter(parts.recipe, parts.world)
    done = iteration.run(parts, plan=plan, probe=probe, clips=QUICK_CLIPS, meter=meter)
    findings += judged(parts, done)
    for finding in findings:
        if not finding.green or finding.yellow:
            say(f"preflight: {finding.line}")
    red = [finding for finding in findings if not finding.green]
    if red:
        names, first = ", ".join(finding.check for finding in red), red[0]
        raise UserError(
            f"run.preflight=true: red before training: {names} ({first.measured}); {first.remedy}; "
            "run.preflight=false trains all the same."
        )
    names = ", ".join(finding.check for finding in findings if not finding.yellow)
    say(f"preflight: green in {time.perf_counter() - start:.1f} s: {names}")


def thorough(
    parts: Parts,
    folder: Path,
    tell: Callable[[Finding], None],
) -> tuple[bool, list[Phase]]:
    """Run all checks.  returns whether all are green, and the phases' seconds and memory

    folder: a scratch folder directly in the run's folder, on every rank
    tell: called with each finding as soon as its check is done
    """
    findings: list[Finding] = []

    def note(*new: Finding) -> None:
        for finding in new:
            findings.append(finding)
            tell(finding)

    world, meter = parts.world, Meter(parts.recipe, parts.world)
    note(run_folder.space(parts, folder))
    note(*common(parts))
    probe = Probe.of(parts.trainer, world)
    run_folder.fill_moments(probe.optimizer, 0.0)  # so that memory is that of a run under way
    plan = short(noisy_plan(parts))
    done = iteration.run(parts, plan=plan, probe=probe, clips=None, meter=meter)
    note(*judged(parts, done), *model.tiles(parts, done))
    plan = some_trained(parts)
    done = iteration.run(parts, plan=plan, probe=probe, clips=None, meter=meter)
    note(replace(iteration.ratio(parts, done), check="ratio of other steps"))
    saved = run_folder.save_and_load(parts, probe, folder)
    note(saved.finding)
    if saved.bytes:
        finding = run_folder.space(parts, folder, saved.bytes)
        note(replace(finding, check="folder, by that checkpoint"))
    return all(finding.green for finding in findings), measured(parts, done, meter, saved.seconds)


def some_trained(parts: Parts) -> Plan:
    """The run's plan with the fewest trained steps per sample that make two micro-batches."""
    recipe = parts.recipe
    wanted = math.ceil(2 * recipe.optimizer.batch_size / recipe.rollout.at_once)
    plan = noisy_plan(parts)
    return replace(plan, trained=max(1, min(wanted, recipe.steps_trained, len(plan.noisy))))


def common(parts: Parts) -> list[Finding]:
    """Findings of the values that ranks must have in common, and of the rewards."""
    checks = (ranks.weights, ranks.noise, ranks.sequences)
    return [check(parts) for check in checks] + rewards(parts)


def judged(parts: Parts, done: Iteration) -> list[Finding]:
    """Findings of a short iteration."""
    checks = (
        iteration.log_probabilities,
        iteration.ratio,
        iteration.gradients,
        model.decoding,
        scoring,
        spread,
    )
    return [*model.guidance(parts, done), *(check(parts, done) for check in checks)]
