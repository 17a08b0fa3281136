"""Trajectories and advantages to optimizer steps.

The unit of work is a state, see `micro_batches.py`: where a group's samples are still equal, one
forward and backward serves all their transitions. An optimizer step's states are dealt evenly to
the groups of ranks (`algorithm.dealing`), whoever drew them: what their losses need travels in one
exchange before the first step. Samples of advantage 0, such
as those of a group with equal rewards, count in the objective's mean and are not evaluated.
Micro-batches mix samples and steps but not text lengths. Every rank runs the same number of
micro-batches, the missing ones with a loss of zero, so that collectives stay in step.

The ratio compares a log-probability with that of the policy that drew the sample. bfloat16 kernels
round batches of other sizes otherwise, which biases log r by -mean(z^2) / 2 where z is the
difference of the means over the step's std: the average over a clip does not remove it, and beyond
the clip range nothing is learned from a negative advantage (benchmarks/speed/ratio_bias.py). So:

- in the first optimizer step, where the policies are the same, the old log-probability is the
  update's own: the ratio is 1 exactly. The difference from the rollout's is a metric;
- for the later steps it is the rollout's, where the network saw as many rows at once. In bfloat16
  the other micro-batches are evaluated before the first step, as they will be in the update.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.core.config import Objective
from fastgrpo.core.method import Traits
from fastgrpo.core.policy import predict, stack
from fastgrpo.parallel.exchange import between_groups
from fastgrpo.parallel.world import World
from fastgrpo.training import methods
from fastgrpo.training.method import Batch, Experience, Losses, LossesOf
from fastgrpo.training.micro_batches import (
    MicroBatch,
    OptimizerStep,
    State,
    by_group,
    ends_an_expert,
    in_step,
    is_empty,
    optimizer_steps,
    rows,
)
from fastgrpo.training.rollout import Plan, Trajectory, stored
from fastgrpo.training.trainer import Trainer, averaged_weights

Value = tuple[int, str, int]  # slot, the field of its trajectory, and the step in it
Evaluation = tuple[AbstractContextManager[None], list[list[MicroBatch]], Callable[[Batch], None]]
"""Whose weights the network has inside; by group of ranks, what is evaluated; who keeps it."""


@dataclass
class Totals:
    """Sums over transitions, kept on the device so that micro-batches do not wait for it."""

    values: Tensor  # float64 [4]: loss, clipped transitions, transitions, KL
    drawn: Tensor  # float64 [2], of the first optimizer step: see `add_drawn`
    max_log_ratio: Tensor  # scalar
    max_log_ratio_first: Tensor  # scalar, of the first step's policy and the rollout's: about 0
    figures: dict[str, Tensor]  # float64 scalars: the method's own, see Traits.figures

    @classmethod
    def zeros(cls, device: torch.device, figures: Sequence[str] = ()) -> "Totals":
        """The sums of no transitions."""
        zero = torch.zeros((), device=device)
        values, drawn = (torch.zeros(n, dtype=torch.float64, device=device) for n in (4, 2))
        own = {name: zero.double() for name in figures}
        return cls(values, drawn, zero, zero, own)

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Count a micro-batch's transitions."""
        count = torch.ones_like(losses.loss)
        sums = [value.sum() for value in (losses.loss, losses.outside, count, losses.kl)]
        self.values += torch.stack([value.double() for value in sums])
        self.figures = {
            name: total + losses.figures[name].double().sum()
            for name, total in self.figures.items()
        }
        self.max_log_ratio = torch.maximum(self.max_log_ratio, losses.log_ratio.abs().max())

    @torch.no_grad()
    def add_drawn(self, losses: Losses, alike: Sequence[bool]) -> None:
        """Count the transitions of the first optimizer step as the rollout's log-probability would.

        Shares are of transitions that were drawn in batches of this size, as those are whose old
        log-probability in a later step is the rollout's.

        alike: [B], whether the network saw as many rows at once when it drew the transition
        """
        rows = [row for row, same in enumerate(alike) if same]
        outside = sum(
            (losses.drawn_outside[row].double() for row in rows), self.drawn.new_zeros(())
        )
        self.drawn += torch.stack([outside, torch.full_like(outside, len(rows))])
        largest = losses.drawn_log_ratio.abs().max()
        self.max_log_ratio_first = torch.maximum(self.max_log_ratio_first, largest)


def update(
    trainer: Trainer,
    objective: Objective,
    experience: Experience,
    world: World,
    poll_before: Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]] = iter,
) -> dict[str, float]:
    """Take K optimizer steps over the selected samples of all ranks.

    poll_before: gives the micro-batches before the first optimizer step one by one, and may raise
      in place of one
    returns metrics, equal on every rank
    """
    method, traits = methods.of(objective.kind), methods.traits_of(objective.kind)
    network, norms = trainer.policy.network, list[Tensor]()
    totals = Totals.zeros(world.device, traits.figures)
    experience = replace(experience, paired=traits.pairs)
    skipped = [False] * len(experience.advantages)
    if not method.zero_advantage_teaches(objective):
        skipped = (experience.advantages == 0).tolist()
    steps = optimizer_steps(experience, trainer.settings, skipped, world)
    experience = _with_dealt(experience.on(world.device), steps, objective, world)
    losses_of, evaluated = method.losses(trainer.policy, experience, objective), 0
    for weights, groups, keep in _before(trainer, objective, experience, losses_of, steps):
        with weights, torch.no_grad():
            for batch in poll_before(in_step(groups, world.group, experience.plan)):
                if is_empty(batch):
                    _dummy_loss(trainer, experience, world, batch[0][0])
                else:
                    keep(_predict(trainer, experience, losses_of, batch))
        evaluated += sum(len(batch) for own in groups for batch in own if not is_empty(batch))
    for step in steps:
        batches = step.batches[world.group]
        for number, batch in enumerate(batches if norms else poll_before(batches)):
            if world.mesh.ndim == 2:  # replicas need to agree before the step only
                last = ends_an_expert(batches, number, experience.plan)
                network.set_requires_all_reduce(last)  # type: ignore[operator]
            if not is_empty(batch):
                losses = losses_of(_predict(trainer, experience, losses_of, batch, not norms))
                totals.add(losses)
                if not norms:
                    totals.add_drawn(losses, _alike(experience, batch))
                loss = losses.loss.sum()
            else:
                loss = _dummy_loss(trainer, experience, world, batch[0][0])
            # FSDP averages over groups of ranks, and the objective is the mean over all groups'
            # transitions
            (loss * (world.groups / step.transitions)).backward()
        norms.append(trainer.step())
    return _metrics(totals, norms, trainer, world) | {
        "update/evaluations": float(_rows(steps, traits.pairs)),
        "update/evaluated_again": float(evaluated),
    }


def _rows(steps: Sequence[OptimizerStep], paired: bool) -> int:
    """The rows that the network sees in the optimizer steps, of all ranks."""
    return sum(len(rows(state, paired)) for step in steps for _, state in step.states())


def _alike(experience: Experience, batch: MicroBatch) -> list[bool]:
    """Whether the network saw as many rows at once when it drew them, for each transition."""
    plan, drawn = experience.plan, experience.batch_sizes
    alike = []
    for step, slots in batch:
        sizes = [drawn.get(slot, (0, 0)) for slot in slots]
        column = 0 if plan.is_shared(slots[0], step) else 1
        alike += [size[column] == len(batch) for size in sizes]
    return alike


def _before(
    trainer: Trainer,
    objective: Objective,
    experience: Experience,
    losses_of: LossesOf,
    steps: Sequence[OptimizerStep],
) -> Iterator[Evaluation]:
    """What is evaluated before the first optimizer step, for its losses and those of later ones."""
    traits, later = methods.traits_of(objective.kind), steps[1:]
    if traits.has_ratio:
        noisy = traits.noisy_steps  # else the rollout has no log-probabilities
        groups = _drawn_otherwise(trainer, experience, later) if noisy else by_group(later)
        yield nullcontext(), groups, losses_of.evaluate_old
    if steps and methods.evaluates_average(objective):
        yield averaged_weights(trainer), by_group(steps), losses_of.evaluate_average


def _drawn_otherwise(
    trainer: Trainer, experience: Experience, steps: Sequence[OptimizerStep]
) -> list[list[MicroBatch]]:
    """By group of ranks, the micro-batches whose old log-probability is not the rollout's."""
    groups: list[list[MicroBatch]] = []
    for step in steps if trainer.rounds_by_batch else ():
        groups = groups or [[] for _ in step.batches]
        for group, batches in zip(groups, step.batches, strict=True):
            group += [batch for batch in batches if not all(_alike(experience, batch))]
    return groups


def _with_dealt(
    experience: Experience, steps: Sequence[OptimizerStep], objective: Objective, world: World
) -> Experience:
    """The experience, with what this group needs of states that other groups drew."""
    plan, traits = experience.plan, methods.traits_of(objective.kind)
    total, numel = len(experience.conditions) * plan.group_size, math.prod(plan.latent_shape)
    drew = {slot: group for group in range(world.groups) for slot in world.share(total, group)}
    # (from, to) -> values, each once and in one order everywhere
    moves: dict[tuple[int, int], dict[Value, None]] = {}
    for step in steps:
        for group, state in step.states():
            for value in _values(state, plan, traits):
                if (owner := drew[value[0]]) != group:
                    moves.setdefault((owner, group), {})[value] = None
    if not moves:
        return experience
    outgoing, wanted = list[Tensor](), list[list[Value]]()
    for group in range(world.groups):
        values = list(moves.get((world.group, group), {}))
        parts = [_value(experience, value).reshape(-1) for value in values]
        outgoing.append(torch.cat([torch.empty(0, device=world.device), *parts]))
        wanted.append(list(moves.get((group, world.group), {})))
    lengths = [[1 if kind == "log_probs" else numel for _, kind, _ in v] for v in wanted]
    received = between_groups(outgoing, [sum(of_group) for of_group in lengths], world)
    trajectories = dict(experience.trajectories)
    for values, of_group, row in zip(wanted, lengths, received, strict=True):
        for (slot, kind, at), part in zip(values, row.split(of_group), strict=True):
            shape = () if kind == "log_probs" else plan.latent_shape
            trajectory = trajectories.setdefault(slot, Trajectory())
            getattr(trajectory, kind)[at] = stored(part.reshape(shape), plan)
    return replace(experience, trajectories=trajectories)


def _value(experience: Experience, value: Value) -> Tensor:
    """A value of this rank's trajectories, [C, F, H, W] or a scalar, on the device."""
    slot, kind, step = value
    own: dict[int, Tensor] = getattr(experience.trajectories[slot], kind)
    return own[step].to(experience.plan.grid.device, non_blocking=True)


def _values(state: State, plan: Plan, traits: Traits) -> list[Value]:
    """What the losses of a state's transitions need of trajectories."""
    step, slots = state
    if not traits.noisy_steps:
        return [(slot, "states", step if traits.keeps_states else plan.steps) for slot in slots]
    of_each = [("states", step + 1), ("log_probs", step)]
    values = [(slot, kind, at) for slot in slots for kind, at in of_each]
    return [(slots[0], "states", step), *values]


def _predict(
    trainer: Trainer,
    experience: Experience,
    losses_of: LossesOf,
    states: MicroBatch,
    first: bool = False,
) -> Batch:
    """Evaluate each state once, a pair's two samples beside each other; a row for each transition.

    first: no optimizer step was taken since the samples were drawn
    """
    plan = experience.plan
    seen = [row for state in states for row in rows(state, experience.paired)]
    x = losses_of.states(seen)
    t = torch.stack([plan.grid[step] for _, step in seen])
    condition = stack([experience.conditions[slot // plan.group_size] for slot, _ in seen])
    expert = plan.expert(states[0][0])
    v, v_reference = predict(trainer.policy, x, t, condition, expert), None
    if trainer.reference is not None and torch.is_grad_enabled():
        with torch.no_grad():
            v_reference = predict(trainer.reference, x, t, condition, expert)
    transitions = [(slot, step) for step, slots in states for slot in slots]
    if len(transitions) > len(seen):  # several samples are still in one state
        of_state = [row for row, (_, slots) in enumerate(states) for _ in slots]
        x, v = (torch.stack([states_of.unbind()[row] for row in of_state]) for states_of in (x, v))
        if v_reference is not None:
            v_reference = torch.stack([v_reference[row] for row in of_state])
    return Batch(transitions=transitions, x=x, v=v, v_reference=v_reference, first=first)


def _dummy_loss(trainer: Trainer, experience: Experience, world: World, step: int) -> Tensor:
    """A loss of zero with the forwards and backward of one, which are collectives.

    Without gradients it stands for a micro-batch that is evaluated before the first step.

    step: of the expert that other ranks evaluate;  returns a scalar
    """
    plan, conditions = experience.plan, experience.conditions
    total = len(conditions) * plan.group_size
    condition = stack([conditions[min(world.share(total).start, total - 1) // plan.group_size]])
    x, t = torch.zeros(1, *plan.latent_shape, device=plan.grid.device), plan.grid[step][None]
    v = predict(trainer.policy, x, t, condition, plan.expert(step))
    if trainer.reference is not None and torch.is_grad_enabled():
        with torch.no_grad():
            predict(trainer.reference, x, t, condition, plan.expert(step))
    return 0.0 * v.sum()


def _metrics(
    totals: Totals,
    norms: list[Tensor],
    trainer: Trainer,
    world: World,
) -> dict[str, float]:
    """All groups' totals as numbers.  norms: scalars, one per optimizer step"""
    sums = torch.cat([totals.values, totals.drawn, *(one[None] for one in totals.figures.values())])
    dist.all_reduce(sums)
    sums /= world.size // world.groups  # the ranks of a group count the same transitions
    extremes = torch.stack([totals.max_log_ratio_first, totals.max_log_ratio])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    loss, clipped, count, kl, drawn_outside, drawn, *figures = sums.tolist()
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
    for name, total in zip(totals.figures, figures, strict=True):
        metrics[f"update/{name}"] = total / max(count, 1.0)
    if drawn:
        metrics["update/outside_first"] = drawn_outside / drawn
    return metrics | ({"update/kl": kl / max(count, 1.0)} if trainer.reference is not None else {})
