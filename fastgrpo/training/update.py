"""Trajectories and advantages to optimizer steps.

The unit of work is a state: a sample at a chosen step, or a whole group where its samples have not parted yet, so that
one forward and backward serves all their transitions. Samples of advantage 0, such as a group's whose rewards are all
equal, count in the objective's mean and cost nothing. Micro-batches mix samples and steps and never text lengths; every
rank runs the same number of them, and where it has none left a loss of zero, so that collectives stay in step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.algorithm import objectives, samplers, selection
from fastgrpo.algorithm.objectives import Terms
from fastgrpo.algorithm.transitions import gaussian_kl
from fastgrpo.core.config import Objective
from fastgrpo.core.policy import Condition, shape_key, stack
from fastgrpo.parallel.world import World
from fastgrpo.training import nft
from fastgrpo.training.rollout import Plan, Trajectory
from fastgrpo.training.trainer import Trainer

State = tuple[int, tuple[int, ...]]  # a step, and the slots whose sample is in this state before it


MicroBatch = list[State]  # an empty one keeps step with other ranks


@dataclass
class Totals:
    """Sums over transitions, on the device and read once per iteration: micro-batches do not wait for them."""

    values: Tensor  # [4]: loss, clipped transitions, transitions, KL
    max_log_ratio: Tensor
    max_log_ratio_first: Tensor  # before the first optimizer step: the policy has not changed, so it must be ~0

    @classmethod
    def zeros(cls, device: torch.device) -> "Totals":
        zero = torch.zeros((), device=device)
        return cls(torch.zeros(4, dtype=torch.float64, device=device), zero, zero)

    @torch.no_grad()
    def add(self, loss: Tensor, outside: Tensor, kl: Tensor, log_ratio: Tensor) -> None:
        """B transitions.  all [B]"""
        sums = [loss.sum(), outside.sum(), torch.ones_like(loss).sum(), kl.sum()]
        self.values += torch.stack([value.double() for value in sums])
        self.max_log_ratio = torch.maximum(self.max_log_ratio, log_ratio.abs().max())


def update(
    trainer: Trainer,
    objective: Objective,
    plan: Plan,
    trajectories: Mapping[int, Trajectory],
    conditions: Sequence[Condition],
    advantages: Tensor,
    kept: Tensor,
    world: World,
    between: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> dict[str, float]:
    """K optimizer steps over the kept samples of all ranks.  returns metrics, equal on every rank

    trajectories: of this rank's kept samples, by slot;  conditions: one per prompt of the iteration
    advantages: float32 [N];  kept: bool [N], N = all ranks' samples
    between: gives the micro-batches before the first optimizer step one by one, and may raise in place of one
    """
    totals = Totals.zeros(world.device)
    idle = (advantages == 0).tolist() if _advantage_is_all(objective) else [False] * len(advantages)
    advantages = advantages.to(world.device)
    sampler = samplers.of(trainer.policy, plan.sampler)
    step_weights = objectives.step_weights(objective.step_weights, plan.grid, plan.noisy, plan.eta, sampler)
    norms: list[Tensor] = []
    key = ("minibatches", plan.seed, plan.iteration)
    for members in selection.minibatches(kept, plan.group_size, trainer.settings.updates_per_iteration, key):
        transitions = sum(len(plan.chosen(slot)) for slot in members)
        if not transitions:
            continue
        teaching = [slot for slot in members if not idle[slot]]
        batches = _micro_batches(teaching, conditions, plan, trainer.settings.batch_size, world) or [[]]
        for number, batch in enumerate(batches if norms else between(batches), 1):
            if world.mesh.ndim == 2:  # replicas need to agree before the step only
                trainer.policy.network.set_requires_all_reduce(number == len(batches))  # type: ignore[operator]
            if batch:
                predicted = _predict(trainer, plan, trajectories, conditions, batch)
                loss = _loss(predicted, trainer, objective, plan, trajectories, advantages, step_weights, totals)
            else:
                loss = _nothing(trainer, plan, conditions, world)
            # FSDP averages over groups of ranks, and the objective is the mean over all groups' transitions
            (loss * (world.groups / transitions)).backward()
        if not norms:
            totals.max_log_ratio_first = totals.max_log_ratio
        norms.append(trainer.step())
    return _metrics(totals, norms, trainer, world)


def _advantage_is_all(objective: Objective) -> bool:
    """Whether a sample of advantage 0 has no gradient: its forwards and backwards can be left out."""
    return objective.kind != "nft" and not objective.kl_weight


def _micro_batches(
    members: Sequence[int], conditions: Sequence[Condition], plan: Plan, size: int, world: World
) -> list[MicroBatch]:
    """This group of ranks' states in batches of one text length, as many as of the group with the most."""
    shares: list[list[MicroBatch]] = []
    total = len(conditions) * plan.group_size
    for group in range(world.groups):
        mine = world.share(total, group)
        by_shape: dict[object, list[State]] = {}
        for state in _states([slot for slot in members if slot in mine], plan):
            prompt = state[1][0] // plan.group_size
            by_shape.setdefault(shape_key(conditions[prompt]), []).append(state)
        shares.append([m[i : i + size] for m in by_shape.values() for i in range(0, len(m), size)])
    own = shares[world.group]
    return own + [[] for _ in range(max(map(len, shares)) - len(own))]


def _states(slots: Sequence[int], plan: Plan) -> list[State]:
    """The distinct states before the slots' chosen steps."""
    found: dict[tuple[int, int, int | None], list[int]] = {}
    for slot in slots:
        for step in plan.chosen(slot):
            equal = plan.shared_noise and step == plan.first
            found.setdefault((step, slot // plan.group_size, None if equal else slot), []).append(slot)
    return [(step, tuple(members)) for (step, _, _), members in found.items()]


@dataclass(frozen=True)
class Batch:
    """A micro-batch's B transitions, with the network's predictions."""

    parted: list[tuple[int, int]]  # slot, step
    x: Tensor  # [B, C, F, H, W] float32
    v: Tensor  # likewise, of the trained policy
    v_reference: Tensor | None  # of the initial policy, without gradient


def _predict(
    trainer: Trainer,
    plan: Plan,
    trajectories: Mapping[int, Trajectory],
    conditions: Sequence[Condition],
    states: MicroBatch,
) -> Batch:
    """One evaluation for each state, then a row for each of the transitions that it serves."""
    x = _stacked((trajectories[slots[0]].states[step] for step, slots in states), plan)
    t = torch.stack([plan.grid[step] for step, _ in states])
    condition = stack([conditions[slots[0] // plan.group_size] for _, slots in states])
    v, v_reference = trainer.policy.velocity(x, t, condition), None
    if trainer.reference is not None:
        with torch.no_grad():
            v_reference = trainer.reference.velocity(x, t, condition)
    parted = [(slot, step) for step, slots in states for slot in slots]
    if len(parted) > len(states):
        rows = [row for row, (_, slots) in enumerate(states) for _ in slots]
        x, v = (torch.stack([of.unbind()[row] for row in rows]) for of in (x, v))
        v_reference = None if v_reference is None else torch.stack([v_reference[row] for row in rows])
    return Batch(parted, x, v, v_reference)


def _stacked(rows: Iterable[Tensor], plan: Plan) -> Tensor:
    return torch.stack([row.to(plan.grid.device, non_blocking=True) for row in rows])


def _loss(
    batch: Batch,
    trainer: Trainer,
    objective: Objective,
    plan: Plan,
    trajectories: Mapping[int, Trajectory],
    advantages: Tensor,
    step_weights: Tensor,
    totals: Totals,
) -> Tensor:
    """The objective summed over a micro-batch's transitions, and their part of the totals.

    advantages: [N];  step_weights: [T]
    """
    if objective.kind == "nft":
        loss, distance = nft.losses(
            batch.parted, batch.x, batch.v, batch.v_reference, objective, plan, trajectories, advantages
        )
        totals.add(loss, torch.zeros_like(loss), distance, torch.zeros_like(loss))
        return loss.sum()
    parted, sampler = batch.parted, samplers.of(trainer.policy, plan.sampler)
    t, t_next = (torch.stack([plan.grid[step + later] for _, step in parted]) for later in (0, 1))
    x_next = _stacked((trajectories[slot].states[step + 1] for slot, step in parted), plan)
    mean, std = sampler.transition(batch.x, batch.v, t, t_next, plan.eta)
    old_mean = mean.detach()
    if objective.kind in objectives.NEED_OLD_MEAN:  # what was drawn, less the noise, which is keyed
        injected = [plan.step_noise([slot], step, plan.grid.device) for slot, step in parted]
        old_mean = x_next - std.detach() * torch.cat(injected)
    terms = Terms(
        log_prob=sampler.log_prob(x_next, mean, std),
        old_log_prob=_stacked((trajectories[slot].log_probs[step] for slot, step in parted), plan),
        mean=mean,
        old_mean=old_mean,
        std=std,
        advantage=torch.stack([advantages[slot] for slot, _ in parted]),
        dt=t - t_next,
    )
    weights = torch.stack([step_weights[step] for _, step in parted])
    loss = weights * objectives.known[objective.kind](terms, objective)
    kl = torch.zeros_like(loss)
    if batch.v_reference is not None:
        reference_mean, _ = sampler.transition(batch.x, batch.v_reference, t, t_next, plan.eta)
        kl = gaussian_kl(mean, reference_mean, std)
        loss = loss + objective.kl_weight * kl

    totals.add(loss, objectives.outside(terms, objective), kl, terms.log_prob - terms.old_log_prob)
    return loss.sum()


def _nothing(trainer: Trainer, plan: Plan, conditions: Sequence[Condition], world: World) -> Tensor:
    """A loss of zero that runs what `_loss` runs: with sharded weights every forward and backward is a collective."""
    total = len(conditions) * plan.group_size
    condition = stack([conditions[min(world.share(total).start, total - 1) // plan.group_size]])
    x, t = torch.zeros(1, *plan.latent_shape, device=plan.grid.device), plan.grid[:1]
    v = trainer.policy.velocity(x, t, condition)
    if trainer.reference is not None:
        with torch.no_grad():
            trainer.reference.velocity(x, t, condition)
    return 0.0 * v.sum()


def _metrics(totals: Totals, norms: list[Tensor], trainer: Trainer, world: World) -> dict[str, float]:
    """All groups' totals as numbers."""
    dist.all_reduce(totals.values)
    totals.values /= world.size // world.groups  # the ranks of a group count the same transitions
    extremes = torch.stack([totals.max_log_ratio_first, totals.max_log_ratio])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    loss, clipped, count, kl = totals.values.tolist()
    first, largest = extremes.tolist()
    finite = [norm for norm in torch.stack(norms).tolist() if math.isfinite(norm)] if norms else []
    metrics = {
        "update/loss": loss / max(count, 1.0),
        "update/clip_fraction": clipped / max(count, 1.0),
        "update/transitions": count,
        "update/max_log_ratio_first": first,
        "update/max_log_ratio": largest,
        "update/grad_norm": sum(finite) / max(len(finite), 1),
        "update/skipped": float(trainer.skipped),
        "lr": trainer.lr,
    }
    return metrics | ({"update/kl": kl / max(count, 1.0)} if trainer.reference is not None else {})
