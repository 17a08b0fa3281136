"""Trajectories and advantages to optimizer steps.

A transition (sample x chosen step) is the unit of work. Micro-batches mix samples and steps and never text lengths;
every rank runs the same number of them, the missing ones with weight 0, so that collectives stay in step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo import grpo
from fastgrpo.config import Objective, Optimizer
from fastgrpo.distributed import World
from fastgrpo.errors import UserError
from fastgrpo.flow import gaussian_kl, gaussian_log_prob
from fastgrpo.models import Condition, Policy, shape_key, stack
from fastgrpo.reference import Reference
from fastgrpo.rollout import Plan, Trajectories

Transition = tuple[int, int]  # (slot, step)
MicroBatch = tuple[list[Transition], float]  # and its weight


@dataclass
class Trainer:
    """What an optimizer step changes: the trainable weights, AdamW's state, the moving average, the counters."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    settings: Optimizer
    reference: Reference | None = None  # the initial policy, for the KL term
    ema: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0  # optimizer steps taken
    skipped: int = 0  # optimizer steps left out for non-finite gradients

    @classmethod
    def create(cls, policy: Policy, settings: Optimizer, reference: Reference | None) -> "Trainer":
        """For a sharded policy, so that the optimizer holds this rank's shards only; of adapters where it has them."""
        trainable = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            trainable.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        ema = {}
        if settings.ema_decay:
            ema = {name: p.detach().clone() for name, p in trainable.items()}
        return cls(policy, optimizer, settings, reference, ema)

    @property
    def lr(self) -> float:
        """The rate of the next optimizer step: a linear warm-up, then the decay that the recipe asks for."""
        warmup, decay = self.settings.warmup_updates, self.settings.decay_updates
        if self.updates < warmup or not decay:
            return self.settings.lr * min(1.0, (self.updates + 1) / (warmup + 1))
        return self.settings.lr * max(0.1, 1.0 - 0.9 * (self.updates - warmup) / decay)

    def step(self) -> Tensor:
        """Clip, step, move the average.  returns the gradient's norm; a non-finite one skips the step on every rank."""
        parameters = [p for p in self.policy.network.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            self.optimizer.step()
            self.updates += 1
            self._move_average()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped > self.settings.max_skipped:
            raise UserError(
                f"optimizer.max_skipped={self.settings.max_skipped}: {self.skipped} optimizer steps had non-finite "
                "gradients; lower optimizer.lr or look for the reward or sample that is not finite. "
                "The newest checkpoint is intact."
            )
        return norm

    @torch.no_grad()
    def _move_average(self) -> None:
        for name, parameter in self.policy.network.named_parameters():
            if name in self.ema:
                self.ema[name].lerp_(parameter, 1 - self.settings.ema_decay)


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


def update(
    trainer: Trainer,
    objective: Objective,
    plan: Plan,
    trajectories: Trajectories,
    conditions: Sequence[Condition],
    advantages: Tensor,
    kept: Tensor,
    chosen_steps: int,
    world: World,
    between: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> dict[str, float]:
    """K optimizer steps over the kept samples of all ranks.  returns metrics, equal on every rank

    conditions: one per prompt of the iteration;  advantages: float32 [N];  kept: bool [N], N = all ranks' samples
    between: gives the micro-batches before the first optimizer step one by one, and may raise in place of one
    """
    totals = Totals.zeros(world.device)
    advantages = advantages.to(world.device)
    norms: list[Tensor] = []
    key = ("minibatches", plan.seed, plan.iteration)
    for members in grpo.minibatches(kept, plan.group_size, trainer.settings.updates_per_iteration, key):
        transitions = [(slot, step) for slot in members for step in _steps(plan, objective, chosen_steps, slot)]
        if not transitions:
            continue
        batches = list(_micro_batches(transitions, conditions, plan, trainer.settings.batch_size, world))
        for number, (batch, weight) in enumerate(batches if norms else between(batches), 1):
            if world.mesh.ndim == 2:  # replicas need to agree before the step only
                trainer.policy.network.set_requires_all_reduce(number == len(batches))  # type: ignore[operator]
            loss = _loss(trainer, objective, plan, trajectories, conditions, advantages, batch, weight, totals)
            # FSDP averages over groups of ranks, and the objective is the mean over all groups' transitions
            (loss * (world.groups / len(transitions))).backward()
        if not norms:
            totals.max_log_ratio_first = totals.max_log_ratio
        norms.append(trainer.step())
    return _metrics(totals, norms, trainer, world)


def _steps(plan: Plan, objective: Objective, count: int, slot: int) -> list[int]:
    prompt, sample = divmod(slot, plan.group_size)
    key = ("timesteps", plan.seed, plan.iteration, prompt, sample)
    return grpo.choose_timesteps(plan.steps, count, objective.timestep_choice, key)


def _micro_batches(
    transitions: Sequence[Transition], conditions: Sequence[Condition], plan: Plan, size: int, world: World
) -> Iterator[MicroBatch]:
    """This group's transitions in batches of one text length, each with its weight: 1, or 0 to keep step."""
    shares = []
    total = len(conditions) * plan.group_size
    for group in range(world.groups):
        mine = world.share(total, group)
        by_shape: dict[object, list[Transition]] = {}
        for slot, step in transitions:
            if slot in mine:
                by_shape.setdefault(shape_key(conditions[slot // plan.group_size]), []).append((slot, step))
        shares.append([m[i : i + size] for m in by_shape.values() for i in range(0, len(m), size)])
    own = shares[world.group]
    yield from ((batch, 1.0) for batch in own)
    filler = [own[0][0]] if own else [(world.share(total).start, 0)]
    yield from ((filler, 0.0) for _ in range(max(map(len, shares)) - len(own)))


def _loss(
    trainer: Trainer,
    objective: Objective,
    plan: Plan,
    trajectories: Trajectories,
    conditions: Sequence[Condition],
    advantages: Tensor,
    batch: list[Transition],
    weight: float,
    totals: Totals,
) -> Tensor:
    """The objective summed over a micro-batch of transitions, and their part of the totals."""
    device = plan.grid.device
    start = trajectories.slots[0]  # a rank's slots are contiguous
    row = torch.tensor([slot - start for slot, _ in batch], device=device)
    step = torch.tensor([step for _, step in batch], device=device)
    x, x_next = trajectories.states[row, step], trajectories.states[row, step + 1]
    if weight == 0:  # a filler may be an invalid sample, and 0 x NaN is NaN
        x, x_next = x.nan_to_num(), x_next.nan_to_num()
    t, t_next = plan.grid[step], plan.grid[step + 1]
    condition = stack([conditions[slot // plan.group_size] for slot, _ in batch])
    advantage = advantages[row + start]

    v = trainer.policy.velocity(x, t, condition)
    mean, std = trainer.policy.transition(x, v, t, t_next, plan.eta)
    log_prob = gaussian_log_prob(x_next, mean, std)
    old_log_prob = trajectories.log_probs[row, step]
    loss = grpo.clipped_objective(log_prob, old_log_prob, advantage, objective.clip_range)
    kl = torch.zeros_like(loss)
    if trainer.reference is not None:
        with torch.no_grad():
            v_reference = trainer.reference.velocity(x, t, condition)
            reference_mean, _ = trainer.reference.transition(x, v_reference, t, t_next, plan.eta)
        kl = gaussian_kl(mean, reference_mean, std)
        loss = loss + objective.kl_weight * kl

    with torch.no_grad():
        log_ratio = log_prob - old_log_prob
        clipped = (log_ratio.exp() - 1).abs() > objective.clip_range
        sums = [loss.sum(), clipped.sum(), torch.ones_like(loss).sum(), kl.sum()]
        totals.values += weight * torch.stack([value.double() for value in sums])
        totals.max_log_ratio = torch.maximum(totals.max_log_ratio, weight * log_ratio.abs().max())
    return weight * loss.sum()


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
