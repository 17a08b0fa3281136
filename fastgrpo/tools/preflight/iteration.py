"""A short iteration for preflight: the run's own rollout, decoding, scoring and update, without its optimizer step.

The batches are the first ones of the run, at its batch sizes. What is short is the time grid: the first and the last
noisy step, each as wide as in the run, since rounding weighs most where a step's noise is least, and a leap between.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.algorithm import samplers
from fastgrpo.core.config import Objective
from fastgrpo.core.memory import Peaks
from fastgrpo.core.processes import fail_alone
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.tools.preflight.finding import Finding, Parts, gathered, largest, replicas_differ
from fastgrpo.training import methods, rollout
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import MicroBatch, update

LOG_PROB_BOUND = 1e-5
"""Of a log-probability's difference from its value in float64, times its size where that is above 1. Float32 gives 1e-6
at most; bfloat16 has steps of 8e-3 at 1 to 2."""
RATIO_BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-4}
"""Of |log ratio| before any step; in bfloat16 the clip range itself, where the objective clips the ratio.

A float32 log-probability of 1 to 4 has steps of 1.2e-7 to 2.4e-7. A bfloat16 network's result differs between batches
of other shapes, where kernels sum in another order; the mean over a clip's dimensions leaves the less of it, the larger
the clip. From the clip range on (1e-4 in the paper) rounding alone decides what is clipped."""


@dataclass
class Probe(Trainer):
    """A trainer whose step looks at the gradients and changes nothing."""

    world: World | None = None
    norms: list[float] = field(default_factory=list)
    missing: str = ""  # a trained parameter that has no gradient on some rank
    differing: str = ""  # a parameter whose gradient is not the same on all replicas

    @classmethod
    def of(cls, trainer: Trainer, world: World) -> "Probe":
        """The same weights, one update per iteration, and an AdamW of its own that has no state yet."""
        trained = [p for p in trainer.policy.network.parameters() if p.requires_grad]
        settings = trainer.settings.model_copy(update={"updates_per_iteration": 1})
        same = {one.name: getattr(trainer, one.name) for one in fields(Trainer)}
        return cls(**same | {"settings": settings, "optimizer": torch.optim.AdamW(trained), "world": world})

    def step(self) -> Tensor:
        assert self.world is not None
        trained = {name: p for name, p in self.policy.network.named_parameters() if p.requires_grad}
        grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
        lacking = next((name for name in trained if name not in grads), "")
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

    world: World
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # GiB, of the GPU's tensors; without one of the process
    memory: Peaks = field(default_factory=Peaks)

    @contextmanager
    def phase(self, name: str, remedy: str) -> Iterator[None]:
        """Measure what is done inside. Raises OneRankError, with the remedy, where this GPU has no room for it."""
        self.memory.read()
        start = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError:
            fail_alone(f"{remedy}: the GPU has no room for the {name}.")
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start
        allocated, _, resident = self.memory.read()
        self.peaks[name] = allocated if self.world.device.type == "cuda" else resident


@dataclass(frozen=True)
class Iteration:
    """What a short iteration gave on this rank."""

    plan: Plan
    drawn: Drawn
    pixels: Tensor  # uint8 [B, F, H, W, 3] of this rank's part, possibly none
    finite: bool  # the latents of all of `drawn`
    scored: int  # samples of all ranks
    valid: int  # of these, with a score
    probe: Probe
    metrics: dict[str, float]
    micro_batches: list[float]  # seconds of each


def short(plan: Plan) -> Plan:
    """The plan with its first and last noisy step alone, as wide as they are, and the deterministic last step."""
    noisy, last = plan.noisy, plan.steps
    kept = sorted({0, noisy.start, noisy.stop - 1, noisy.stop, last})
    first = kept.index(noisy.start)
    return replace(plan, grid=plan.grid[kept], window=range(first, kept.index(noisy.stop)), trained=None)


def noisy_plan(parts: Parts) -> Plan:
    """The run's plan; for an objective without noisy steps with noise in all but the last, the deterministic one."""
    plan = parts.plan
    if methods.traits(parts.recipe).noisy_steps:
        return plan
    trained = min(parts.recipe.steps_trained, plan.steps - 1)
    return replace(plan, window=range(plan.steps - 1), trained=trained, eta=plan.eta or 0.3)  # its recipe may say 0


def run(parts: Parts, plan: Plan, probe: Probe, clips: int | None, meter: Meter) -> Iteration:
    """The first batch of every group of ranks: drawn, decoded, scored, and its gradient.

    clips: at most so many of this rank's are decoded and scored; none = all
    """
    recipe, world, policy = parts.recipe, parts.world, parts.policy
    size = recipe.rollout.at_once
    batches = [next(_batches(parts, group)) for group in range(world.groups)]
    batch = batches[world.group]
    memory = f"rollout.batch_size={size}: lower it, or set distributed.rollout_weights=sharded"
    with sharding.rollout_weights(policy.network, recipe.distributed, parts.dtype, world):
        with meter.phase("rollout", memory):
            prefixes: dict[int, SharedPrefix] = {}
            if plan.shared_noise:
                prompts = sorted({slot // plan.group_size for slot in batch})
                prefixes = rollout.shared_prefixes(policy, plan, parts.conditions, prompts)
            drawn = rollout.sample(policy, plan, parts.conditions, batch, prefixes)
        own = list(world.part(len(batch)))[:clips]
        with meter.phase("decode", f"model.decode_batch={recipe.model.decode_batch or 'none'}: set it to 1"):
            pixels = policy.decode(drawn.final[own]) if own else torch.empty(0, dtype=torch.uint8)
    with meter.phase("reward", "rewards: give them a device of their own, or a server"):
        scored, valid = _score(parts, [batch[row] for row in own], drawn.final[own], pixels)
    selected = torch.zeros(parts.total, dtype=torch.bool)
    selected[[slot for members in batches for slot in members]] = True
    seconds: list[float] = []
    memory = f"optimizer.batch_size={recipe.optimizer.batch_size}: lower it, or set model.gradient_checkpointing=true"
    with meter.phase("update", memory):
        experience = Experience(
            plan=plan,
            conditions=parts.conditions,
            trajectories=drawn.trajectories,
            advantages=_advantages(parts.total),
            selected=selected,
        )
        metrics = update(probe, _comparable(parts), experience, world, lambda work: _timed(work, seconds, world))
    finite = bool(torch.isfinite(drawn.final).all())
    return Iteration(plan, drawn, pixels, finite, scored, valid, probe, metrics, seconds)


def _batches(parts: Parts, group: int) -> Iterator[list[int]]:
    share = parts.world.share(parts.total, group)
    return rollout.batches(share, parts.conditions, parts.plan.group_size, parts.recipe.rollout.at_once)


def _score(parts: Parts, slots: list[int], latents: Tensor, pixels: Tensor) -> tuple[int, int]:
    """(clips that were scored, those with a valid score), of all ranks."""
    if slots:
        texts = [parts.texts[slot // parts.plan.group_size] for slot in slots]
        parts.scorer.submit(slots, latents, pixels, texts)
    scored = parts.scorer.collect(parts.total)
    everyone = [slot for rank in gathered(slots, parts.world) for slot in rank]
    return len(everyone), int(scored.valid[everyone].sum())


def _comparable(parts: Parts) -> Objective:
    """The recipe's objective; for one without a ratio GRPO's: rollout and update must agree all the same."""
    objective = parts.recipe.objective
    if methods.traits(parts.recipe).noisy_steps:
        return objective
    return objective.model_copy(update={"kind": "grpo"})


def _advantages(total: int) -> Tensor:
    """Made up: 1 and -1 in turn.  returns float32 [total]"""
    return 1.0 - 2.0 * (torch.arange(total) % 2)


def _timed(work: Iterable[MicroBatch], seconds: list[float], world: World) -> Iterator[MicroBatch]:
    for piece in work:
        start = time.perf_counter()
        yield piece
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)


def decoding(parts: Parts, done: Iteration) -> Finding:
    """Finite latents, pixels of the recipe's size that are not one colour."""
    video, world = parts.recipe.video, parts.world
    expected = (video.frames, video.height, video.width, 3)
    rows = done.pixels.flatten(1) if len(done.pixels) else torch.zeros(0, 1)
    flat = int((rows.amax(1) == rows.amin(1)).sum()) if len(rows) else 0
    form = (str(done.pixels.dtype), tuple(done.pixels.shape[1:])) if len(rows) else ("torch.uint8", expected)
    found = gathered((form, flat, done.finite), world)
    forms = [form for form, _, _ in found if form != ("torch.uint8", expected)]
    clips = sum(gathered(len(rows), world))
    remedy = "compare model.path's vae and scheduler with the published ones, and model.dtype"
    if not all(finite for _, _, finite in found):
        return Finding("decode", False, "the rollout's latents are not finite", remedy)
    if forms:
        kind, shape = forms[0]
        return Finding("decode", False, f"clips are {kind} {list(shape)} instead of uint8 {list(expected)}", remedy)
    if any(flat for _, flat, _ in found):
        return Finding("decode", False, f"{sum(flat for _, flat, _ in found)} of {clips} clips are one colour", remedy)
    return Finding("decode", True, f"{clips} clip{'s' * (clips > 1)} of {list(expected)}, finite, none of one colour")


def scoring(parts: Parts, done: Iteration) -> Finding:
    """Drawn clips get scores."""
    invalid, limit = 1.0 - done.valid / done.scored, parts.recipe.server.max_invalid
    told = f"{done.valid} of {done.scored} drawn clips have a score"
    remedy = "see the rewards' log (reward_server.log in the run's folder) for why it refuses clips of this form"
    return Finding("scoring", invalid <= limit or (done.valid > 0 and done.scored < 8), told, remedy)


def log_probabilities(parts: Parts, done: Iteration) -> Finding:
    """The rollout's log-probabilities are float32 and those of the noise that was injected, computed in float64."""
    plan, world = done.plan, parts.world
    sampler = samplers.of(parts.policy, plan.sampler)
    worst, kinds = 0.0, set()
    for slot, trajectory in done.drawn.trajectories.items():
        for step, log_prob in trajectory.log_probs.items():
            exact = _exact(parts, plan, sampler, slot, step)
            worst = max(worst, abs(log_prob.item() - exact) / max(1.0, abs(exact)))
            kinds |= {log_prob.dtype, trajectory.states[step].dtype, trajectory.states[step + 1].dtype}
    worst = largest(worst, world)
    others = [str(kind) for found in gathered(kinds, world) for kind in found if kind != torch.float32]
    told = f"off from float64 by {worst:.1e}, bound {LOG_PROB_BOUND:.0e}"
    remedy = "log-probabilities and states must be float32 around a network of any precision: undo what rounds them"
    if others:
        return Finding("log-probabilities", False, f"kept as {others[0]}, {told}", remedy)
    return Finding("log-probabilities", worst <= LOG_PROB_BOUND, told, remedy)


def _exact(parts: Parts, plan: Plan, sampler: samplers.Sampler, slot: int, step: int) -> float:
    """log p of the noise that the plan injects: the states cancel, and only the step's std is needed."""
    injected = plan.step_noise([slot], step, parts.world.device).double()
    nothing = torch.zeros(1, 1, device=parts.world.device)
    _, std = sampler.transition(nothing, nothing, plan.grid[step], plan.grid[step + 1], plan.eta)
    square, deviation = injected.square().mean().item(), std.double().item()
    if sampler.log_prob is samplers.squared_distance:
        return -square * deviation**2
    return -0.5 * square - math.log(deviation) - 0.5 * math.log(2 * math.pi)


def ratio(parts: Parts, done: Iteration) -> Finding:
    """Before any optimizer step the update gives the rollout's log-probabilities."""
    objective, bound = parts.recipe.objective, RATIO_BOUND[parts.dtype]
    found = done.metrics["update/max_log_ratio_first"]
    if parts.dtype == torch.bfloat16 and methods.traits(parts.recipe).clips_ratio:
        bound = objective.clip_range
    name = str(parts.dtype).removeprefix("torch.")
    told = f"max |log ratio| {found:.1e} before the first step, bound {bound:.0e} ({name}, clip range "
    told += f"{objective.clip_range:.0e}), {done.metrics['update/transitions']:.0f} transitions"
    remedy = "rollout and update must compute the same function"
    if parts.dtype == torch.bfloat16:
        remedy += ": set optimizer.batch_size to rollout.batch_size, model.attention=none, or model.dtype=float32"
    return Finding("ratio", found <= bound, told, remedy)


def gradients(parts: Parts, done: Iteration) -> Finding:
    """One backward gives every trained parameter a gradient: finite, not all zero, the same bits on all replicas."""
    probe, world = done.probe, parts.world
    norm = probe.norms[-1] if probe.norms else math.nan
    replicas = world.mesh.size(0) if world.mesh.ndim == 2 else 1
    remedy = "look for the layer that overflows in model.dtype, or for another model.attention"
    if not math.isfinite(norm) or norm == 0.0:
        return Finding("gradients", False, f"their norm is {norm:.3g}", remedy)
    if probe.missing:
        remedy = f"leave it out of lora.targets, or freeze it in models/{parts.recipe.model.family}.py"
        return Finding("gradients", False, f"none for {probe.missing}, which the loss does not depend on", remedy)
    if probe.differing:
        remedy = "the replicas would drift apart: see that nothing changes their reduction (distributed.shard, NCCL)"
        return Finding("gradients", False, f"of {probe.differing} differ between the {replicas} replicas", remedy)
    same = f", the same bits on {replicas} replicas" if replicas > 1 else ""
    return Finding("gradients", True, f"finite, norm {norm:.3g}{same}")
