"""A short iteration for preflight: the run's own functions, without an optimizer step.

The batches are the run's first ones, at its batch sizes. The time grid is short: the first and the
last noisy step, each as wide as in the run, and a leap between. Rounding weighs most in the last
noisy step, which has the least noise.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.algorithm import samplers
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.memory import Peaks
from fastgrpo.core.policy import Decoded, networks_of, stack
from fastgrpo.parallel import sharding
from fastgrpo.parallel.nvme.adamw import OffloadedAdamW
from fastgrpo.parallel.world import World
from fastgrpo.run.failures import out_of_memory
from fastgrpo.tools.preflight.finding import Finding, Parts, gathered, largest, replicas_differ
from fastgrpo.training import methods, rollout
from fastgrpo.training.method import Experience
from fastgrpo.training.micro_batches import MicroBatch
from fastgrpo.training.rollout import Dealing, Drawn, Plan, SharedPrefix
from fastgrpo.training.scoring.scorer import Scored
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update

LOG_PROB_BOUND = 1e-5
"""Bound of a log-probability's difference from its value in float64, relative to values above 1.

Float32 gives 1e-6 at most; bfloat16 has steps of 8e-3 at 1 to 2.
"""
RATIO_BOUND = 2e-6
"""Bound of |log ratio| before any step in float32, where a value of 1 to 4 has steps of 2.4e-7."""
SHARE_BOUND, ROUNDING_BOUND = 0.05, 0.1
"""Bounds in bfloat16, whose kernels round batches of other sizes otherwise.

SHARE_BOUND: of the transitions whose old log-probability the update takes from the rollout, the
share that the objective would clip before any step. ROUNDING_BOUND: of |log ratio|. Rounding gave
0.013 at most, with guidance 5 (benchmarks/speed/ratio_bias.py); above it, the two compute different
functions.
"""


@dataclass(kw_only=True)
class Probe(Trainer):
    """A trainer whose step inspects the gradients and leaves the weights unchanged."""

    world: World | None = None
    norms: list[float] = field(default_factory=list)
    missing: str = ""  # a parameter without gradient on some rank, in a network with any
    differing: str = ""  # a parameter whose gradient is not the same on all replicas

    @classmethod
    def of(cls, trainer: Trainer, world: World) -> "Probe":
        """A probe of a trainer's weights: one update per iteration, an own AdamW without state, or
        one that shares moments which lie on a disk.
        """
        trained = [p for p in trainer.policy.network.parameters() if p.requires_grad]
        own = trainer.optimizer
        same = {field.name: getattr(trainer, field.name) for field in fields(Trainer)}
        changed = {
            "settings": trainer.settings.model_copy(update={"updates_per_iteration": 1}),
            "optimizer": own.twin()
            if isinstance(own, OffloadedAdamW)
            else torch.optim.AdamW(trained),
            "world": world,
        }
        return cls(**same | changed)

    def step(self) -> Tensor:
        """Note the gradients' problems.  returns their norm, a float32 scalar"""
        assert self.world is not None
        trained = {name: p for name, p in self.policy.network.named_parameters() if p.requires_grad}
        grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
        networks = networks_of(self.policy.network)
        reached = tuple(p for p in networks if any(name.startswith(p) for name in grads))
        due = (name for name in trained if name.startswith(reached or tuple(networks)))
        lacking = next((name for name in due if name not in grads), "")
        self.missing = self.missing or next(filter(None, gathered(lacking, self.world)), "")
        norm = nn.utils.get_total_norm(list(grads.values()))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.norms.append(norm.item())
        if not self.missing:  # else ranks may have different ones to compare
            self.differing = self.differing or replicas_differ(grads, self.world)
        self.optimizer.zero_grad(set_to_none=True)
        return norm


@dataclass
class Meter:
    """Seconds and peak memory of phases, on this rank."""

    recipe: Recipe
    world: World
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    """GiB of the GPU's tensors; without a GPU of the process."""
    memory: Peaks = field(default_factory=Peaks)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the phase inside.

        Raises OneRankError, with the remedy, where this GPU has no room for the phase.
        """
        self.memory.read()
        start = time.perf_counter()
        with out_of_memory.one_line(self.recipe, lambda: name):
            yield
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start
        allocated, _, resident = self.memory.read()
        self.peaks[name] = allocated if self.world.device.type == "cuda" else resident


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """The results of a short iteration on this rank."""

    plan: Plan
    drawn: Drawn
    guidance: float | None  # what the network was told of embedded guidance; None: nothing
    decoded: Decoded  # of this rank's part, which may be empty
    finite: bool  # whether the latents of all of `drawn` are
    slots: list[int]  # of all ranks' samples that were scored
    scores: Scored
    probe: Probe
    metrics: dict[str, float]
    micro_batches: list[float]  # seconds of each


def short(plan: Plan) -> Plan:
    """The plan with its first and last noisy step, of unchanged width, and the last step alone."""
    noisy, last = plan.noisy, plan.steps
    times = sorted({0, noisy.start, noisy.stop - 1, noisy.stop, last})
    window = range(times.index(noisy.start), times.index(noisy.stop))
    # the last one for the first prompt, which may be the only one that is drawn
    own_steps = tuple(window[-1 - number % len(window)] for number in range(len(plan.own_steps)))
    plan = replace(plan, grid=plan.grid[times], experts=plan.experts_at(times))
    return replace(plan, window=window, own_steps=own_steps, trained=None)


def noisy_plan(parts: Parts) -> Plan:
    """The run's plan; for an objective without noisy steps, noise in all steps but the last."""
    plan = parts.plan
    if methods.traits(parts.recipe).noisy_steps:
        return plan
    trained = min(parts.recipe.steps_trained, plan.steps - 1)
    eta = plan.eta or 0.3  # the recipe may say 0
    return replace(plan, window=range(plan.steps - 1), trained=trained, eta=eta)


def run(parts: Parts, plan: Plan, probe: Probe, clips: int | None, meter: Meter) -> Iteration:
    """Draw, decode and score the first batch of every group of ranks, and take its gradient.

    Memory is that of training: where rewards share the device, a second batch is drawn and decoded
    beside the scoring of the first, with their weights there.

    clips: the most of this rank's samples that are decoded and scored; None: all
    """
    recipe, world, policy = parts.recipe, parts.world, parts.policy
    dealing = _dealing(parts, plan)
    batches = [dealing.samples_of(group)[0] for group in range(world.groups)]
    batch = batches[world.group]
    own = list(world.part(len(batch)))[:clips]
    settings, arriving = recipe.distributed, parts.scorer.arriving
    told: list[Tensor] = []
    hook = policy.network.register_forward_pre_hook(_noting_guidance(told), with_kwargs=True)
    with sharding.rollout_weights(policy.network, settings, parts.dtype, world, arriving) as whole:
        plan = replace(plan, lockstep=not whole)
        drawn, decoded = _draw_and_decode(parts, plan, batch, own, meter)
        _submit(parts, [drawn.slots[row] for row in own], drawn.final[own], decoded)
        if any(source.shares_device for source in parts.scorer.sources):
            _draw_and_decode(parts, plan, batch, own, meter)
    hook.remove()
    with meter.phase("reward"):
        scores = parts.scorer.collect(parts.total)
    of_ranks = gathered([drawn.slots[row] for row in own], world)
    slots = [slot for of_rank in of_ranks for slot in of_rank]
    selected = torch.zeros(parts.total, dtype=torch.bool)
    selected[[slot for members in batches for slot in members]] = True
    seconds: list[float] = []
    with meter.phase("update"):
        experience = Experience(
            plan=plan,
            conditions=parts.conditions,
            trajectories=drawn.trajectories,
            advantages=_advantages(parts.total),
            selected=selected,
            batch_sizes=dealing.batch_sizes(),
        )
        metrics = update(
            probe,
            objective=_comparable(parts),
            experience=experience,
            world=world,
            poll_before=lambda work: _timed(work, seconds, world),
        )
    return Iteration(
        plan=plan,
        drawn=drawn,
        guidance=told[0].flatten()[0].item() if told else None,
        decoded=decoded,
        finite=bool(torch.isfinite(drawn.final).all()),
        slots=slots,
        scores=scores,
        probe=probe,
        metrics=metrics,
        micro_batches=seconds,
    )


def _noting_guidance(told: list[Tensor]) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
    """A hook before a network's forwards, which adds the embedded guidance, [B], to `told`."""

    def note(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        told.extend(filter(torch.is_tensor, [given.get("guidance")]))

    return note


def _dealing(parts: Parts, plan: Plan) -> Dealing:
    """The run's first iteration as it is dealt."""
    return Dealing(
        conditions=parts.conditions,
        plan=plan,
        batch_size=parts.recipe.rollout.at_once,
        world=parts.world,
    )


def _draw_and_decode(
    parts: Parts, plan: Plan, batch: list[int], own: list[int], meter: Meter
) -> tuple[Drawn, Decoded]:
    """A batch, and this rank's rows `own` of it as pixels."""
    with meter.phase("rollout"):
        drawn = _draw(parts, plan, batch)
    with meter.phase("decode"):
        if not own:
            return drawn, Decoded(torch.empty(0, dtype=torch.uint8), torch.ones(0) > 0)
        numbers = [drawn.slots[row] // plan.group_size for row in own]
        about = stack([parts.conditions[number] for number in numbers])
        return drawn, parts.policy.decode(drawn.final[own], about)


def _draw(parts: Parts, plan: Plan, slots: list[int]) -> Drawn:
    """Draw one batch on noisy trajectories."""
    policy, conditions = parts.policy, parts.conditions
    prefixes: dict[int, SharedPrefix] = {}
    if plan.shared_noise:  # the run's own batch of them, which has those of the samples
        batch = _dealing(parts, plan).prefixes_of(parts.world.group)[0]
        prefixes = rollout.shared_prefixes(policy, plan, conditions, batch)
    return rollout.sample(policy, plan=plan, conditions=conditions, slots=slots, prefixes=prefixes)


def _submit(parts: Parts, slots: list[int], latents: Tensor, decoded: Decoded) -> None:
    """Begin to score this rank's clips.

    latents: [B, C, F, H, W], of which `decoded` was made
    """
    if slots:
        texts = [parts.texts[slot // parts.plan.group_size] for slot in slots]
        parts.scorer.submit(slots, latents, decoded, texts)


def _comparable(parts: Parts) -> Objective:
    """The recipe's objective, or GRPO's where it has no ratio by which to compare the update."""
    objective = parts.recipe.objective
    if methods.traits(parts.recipe).noisy_steps:
        return objective
    return objective.model_copy(update={"kind": "grpo"})


def _advantages(total: int) -> Tensor:
    """Advantages for the check, 1 and -1 in turn.  returns float32 [total]"""
    return 1.0 - 2.0 * (torch.arange(total) % 2)


def _timed(work: Iterable[MicroBatch], seconds: list[float], world: World) -> Iterator[MicroBatch]:
    """Give the micro-batches, and append the seconds of each."""
    for piece in work:
        start = time.perf_counter()
        yield piece
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)


def log_probabilities(parts: Parts, done: Iteration) -> Finding:
    """Check that the rollout's log-probabilities are float32 and near those in float64.

    The float64 values are of the noise that the plan injects.
    """
    plan, world = done.plan, parts.world
    sampler = samplers.of(parts.policy, plan.sampler)
    worst, kinds = 0.0, set()
    for slot, trajectory in done.drawn.trajectories.items():
        for step, log_prob in trajectory.log_probs.items():
            exact = _exact(plan, sampler, slot, step)
            worst = max(worst, abs(log_prob.item() - exact) / max(1.0, abs(exact)))
            states = (trajectory.states[step], trajectory.states[step + 1])
            kinds |= {log_prob.dtype, *(state.dtype for state in states)}
    worst, kinds_of_ranks = largest(worst, world), gathered(kinds, world)
    others = [str(kind) for own in kinds_of_ranks for kind in own if kind != torch.float32]
    message = f"off from float64 by {worst:.1e}, bound {LOG_PROB_BOUND:.0e}"
    remedy = "log-probabilities and states must be float32 around a network of any precision"
    remedy += ": undo what rounds them"
    if others:
        return Finding("log-probabilities", False, f"kept as {others[0]}, {message}", remedy)
    return Finding("log-probabilities", worst <= LOG_PROB_BOUND, message, remedy)


def _exact(plan: Plan, sampler: samplers.Sampler, slot: int, step: int) -> float:
    """log p of the noise that the plan injects, in float64.

    The states cancel, so only the step's std is needed.
    """
    device, t, t_next = plan.grid.device, plan.grid[step], plan.grid[step + 1]
    injected = plan.step_noise([slot], step, device).double()
    zeros = torch.zeros(1, 1, device=device)
    _, std = sampler.transition(zeros, zeros, t=t, t_next=t_next, eta=plan.eta)
    square, deviation = injected.square().mean().item(), std.double().item()
    if sampler.log_prob is samplers.squared_distance:
        return -square * deviation**2
    return -0.5 * square - math.log(deviation) - 0.5 * math.log(2 * math.pi)


def ratio(parts: Parts, done: Iteration) -> Finding:
    """Check that the update gives the rollout's log-probabilities before any optimizer step."""
    largest_ratio = done.metrics["update/max_log_ratio_first"]
    transitions = f"{done.metrics['update/transitions']:.0f} transitions"
    message = f"max |log ratio| {largest_ratio:.1e} before the first step, {transitions}"
    remedy = "rollout and update must compute the same function"
    if parts.dtype == torch.float32:
        message += f", bound {RATIO_BOUND:.0e} (float32)"
        return Finding("ratio", largest_ratio <= RATIO_BOUND, message, remedy)
    if not largest_ratio <= ROUNDING_BOUND:
        message += f", bound {ROUNDING_BOUND:.0e} (bfloat16)"
        return Finding("ratio", False, message, remedy)
    share, clip_range = done.metrics.get("update/outside_first"), parts.recipe.objective.clip_range
    if share is None or parts.recipe.optimizer.updates_per_iteration == 1:
        message += "; the update takes no old log-probability from the rollout"
        return Finding("ratio", True, message)
    message += f"; {share:.0%} outside the clip range {clip_range:.0e}, bound {SHARE_BOUND:.0%}"
    remedy = (
        "equal batches of rollout and update round otherwise: set model.attention to one kernel"
    )
    remedy += ", optimizer.updates_per_iteration=1, or model.dtype=float32"
    return Finding("ratio", share <= SHARE_BOUND, message, remedy)


def gradients(parts: Parts, done: Iteration) -> Finding:
    """Check that one backward gives every trained parameter a gradient.

    The gradients must be finite, not all zero, and the same bits on all replicas.
    """
    probe, world = done.probe, parts.world
    norm = probe.norms[-1] if probe.norms else math.nan
    replicas = world.mesh.size(0) if world.mesh.ndim == 2 else 1
    remedy = "look for the layer that overflows in model.dtype, or for another model.attention"
    if not math.isfinite(norm) or norm == 0.0:
        return Finding("gradients", False, f"their norm is {norm:.3g}", remedy)
    if probe.missing:
        file = f"models/{parts.recipe.model.family}.py"
        remedy = f"leave it out of lora.targets, or freeze it in {file}"
        problem = f"none for {probe.missing}, which the loss does not depend on"
        return Finding("gradients", False, problem, remedy)
    if probe.differing:
        remedy = "the replicas would drift apart: see that nothing changes their reduction "
        remedy += "(distributed.shard, NCCL)"
        problem = f"of {probe.differing} differ between the {replicas} replicas"
        return Finding("gradients", False, problem, remedy)
    same = f", the same bits on {replicas} replicas" if replicas > 1 else ""
    return Finding("gradients", True, f"finite, norm {norm:.3g}{same}")
