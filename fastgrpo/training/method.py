"""The protocol of a training method: how its samples are drawn, and their loss."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.core.config import Objective
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.training.rollout import Drawn, Plan, SharedPrefix, Trajectory
from fastgrpo.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The data of an iteration's update: this rank's samples, all ranks' advantages."""

    plan: Plan
    conditions: Sequence[Condition]  # one per prompt of the iteration
    trajectories: Mapping[int, Trajectory]  # of this rank's selected samples, by slot
    advantages: Tensor  # float32 [N], N = all ranks' samples
    selected: Tensor  # bool [N]: the samples that the update trains
    batch_sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """`Dealing.batch_sizes`; a sample that is missing was drawn in batches of unknown size."""
    judge: "Judge | None" = None  # where the loss differentiates the rewards
    paired: bool = False  # the losses compare pairs of samples, see `Traits.pairs`; set by `update`

    def on(self, device: torch.device) -> "Experience":
        """The same experience with its advantages on the device."""
        return replace(self, advantages=self.advantages.to(device))

    def stacked(self, rows: Sequence[Tensor]) -> Tensor:
        """Stack tensors that waited on the device or the host.

        rows: B tensors [...];  returns [B, ...] on the device
        """
        device = self.plan.grid.device
        return torch.stack([row.to(device, non_blocking=True) for row in rows])


class Judge(Protocol):
    """The rewards of samples with their gradient; see `scoring.differentiable`."""

    def __call__(self, x_0: Tensor, slots: Sequence[int]) -> Tensor:
        """The weighted sum of the rewards.

        x_0: [B, C, F, H, W] float32, the samples of B slots;  returns float32 [B]
        """


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch's B transitions with the networks' predictions."""

    transitions: list[
        tuple[int, int]
    ]  # slot, step; of pairs the better sample's before the other's
    x: Tensor  # [B, C, F, H, W] float32: the states before the steps
    v: Tensor  # [B, C, F, H, W] float32: the trained policy's prediction, with its gradient
    v_reference: Tensor | None  # [B, C, F, H, W] float32: the initial policy's, without gradient
    first: bool = False  # the trained policy is still the one that drew the transitions


@dataclass(frozen=True, kw_only=True)
class Losses:
    """One micro-batch's losses and figures for the metrics, each [B] float32."""

    loss: Tensor
    outside: Tensor  # bool [B]: outside the region that the objective trusts
    kl: Tensor  # distance from the initial policy
    log_ratio: Tensor  # log-probability under the trained policy, less that under the old policy
    drawn_log_ratio: Tensor  # the same, less the rollout's log-probability
    drawn_outside: Tensor  # bool [B]: `outside` by the rollout's values
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's own figures by the names of `Traits.figures`; their means are metrics."""


class LossesOf(Protocol):
    """A function from a micro-batch to its losses, made once per update."""

    def states(self, transitions: Sequence[tuple[int, int]]) -> Tensor:
        """The states at which the policies are evaluated.

        transitions: B pairs of slot and step;  returns [B, C, F, H, W] float32, on the device
        """

    def __call__(self, batch: Batch) -> Losses:
        """The losses of a micro-batch's transitions."""

    def evaluate_old(self, batch: Batch) -> None:
        """Take the batch's predictions for the old policy's, in place of the rollout's.

        Called before the first optimizer step, for micro-batches of later ones.
        """

    def evaluate_average(self, batch: Batch) -> None:
        """Keep the batch's predictions, which are the moving average's.

        Called before the first optimizer step, for every micro-batch, where `Traits.average_key`
        asks for it.
        """


class Method(Protocol):
    """A training method; each file of `training.methods` holds one."""

    def check_policy(self, policy: Policy, device: torch.device) -> None:
        """Raise UserError where the method cannot train the policy.

        Called once per run, since the check may wait for the device.
        """

    def plan(self, plan: Plan, objective: Objective) -> Plan:
        """The iteration's plan as this method draws it."""

    def drawing_weights(self, trainer: Trainer) -> AbstractContextManager[None]:
        """A context inside which the network has the weights of the policy that draws."""

    def sample(
        self,
        policy: Policy,
        plan: Plan,
        conditions: Sequence[Condition],
        slots: list[int],
        prefixes: Mapping[int, SharedPrefix],
    ) -> Drawn:
        """Draw a batch of samples, each with the trajectory that the update needs.

        conditions: one per prompt of the iteration
        prefixes: by prompt, where the plan shares noise
        """

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        objective: Objective,
    ) -> LossesOf:
        """The losses of an update's micro-batches."""

    def zero_advantage_teaches(self, objective: Objective) -> bool:
        """Whether a sample of advantage 0 has a gradient; otherwise the update skips it."""
