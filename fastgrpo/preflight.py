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

from fastgrpo import preflight_folder, preflight_iteration, preflight_machine
from fastgrpo.core.errors import UserError
from fastgrpo.preflight_iteration import Iteration, Meter, Probe, noisy_plan, short
from fastgrpo.preflight_parts import Finding, Parts
from fastgrpo.preflight_phases import Phase, measured
from fastgrpo.preflight_rewards import rewards
from fastgrpo.training.rollout import Plan

QUICK_CLIPS = 2  # decoded and scored per rank


def quick(parts: Parts, say: Callable[[str], None]) -> None:
    """Says one line where all is green, else the red ones. Raises UserError, on every rank, where a check is red.

    A bfloat16 ratio is only told: what a GPU's kernels do with batches of other shapes is not known beforehand, and the
    run's metrics show it in every iteration.
    """
    start = time.perf_counter()
    with preflight_folder.scratch(parts.recipe.run.dir, parts.world) as folder:
        findings = [preflight_folder.space(parts, folder)]
    findings += common(parts)
    probe = Probe.of(parts.trainer, parts.world)
    plan = short(noisy_plan(parts))
    findings += judged(parts, preflight_iteration.run(parts, plan, probe, QUICK_CLIPS, Meter(parts.world)))
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
    note(preflight_folder.space(parts, folder))
    note(*common(parts))
    probe = Probe.of(parts.trainer, world)
    preflight_folder.fill_moments(probe.optimizer, 0.0)  # so that memory is that of a run under way
    note(*judged(parts, preflight_iteration.run(parts, short(noisy_plan(parts)), probe, None, meter)))
    done = preflight_iteration.run(parts, some_trained(parts), probe, None, meter)
    note(replace(preflight_iteration.ratio(parts, done), check="ratio of other steps"))
    saved = preflight_folder.save_and_load(parts, probe, folder)
    note(saved.finding)
    if saved.bytes:
        note(replace(preflight_folder.space(parts, folder, saved.bytes), check="folder, by that checkpoint"))
    return all(finding.green for finding in findings), measured(parts, done, meter, saved.seconds)


def some_trained(parts: Parts) -> Plan:
    """The run's own plan, with as few trained steps per sample as make two micro-batches."""
    recipe = parts.recipe
    wanted = math.ceil(2 * recipe.optimizer.batch_size / recipe.rollout.at_once)
    plan = noisy_plan(parts)
    return replace(plan, trained=max(1, min(wanted, recipe.steps_trained, len(plan.noisy))))


def common(parts: Parts) -> list[Finding]:
    """What ranks must have in common, and the rewards."""
    checks = (preflight_machine.weights, preflight_machine.noise, preflight_machine.sequences)
    return [check(parts) for check in checks] + rewards(parts)


def judged(parts: Parts, done: Iteration) -> list[Finding]:
    """What a short iteration tells."""
    checks = (
        preflight_iteration.log_probabilities, preflight_iteration.ratio, preflight_iteration.gradients,
        preflight_iteration.decoding, preflight_iteration.scoring,
    )  # fmt: skip
    return [check(parts, done) for check in checks]
