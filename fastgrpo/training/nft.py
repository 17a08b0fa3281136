"""DiffusionNFT: samples are noised again, and the update learns from how well the two policies undo it.

Zheng et al., arXiv 2509.16117. There are no noisy steps, log-probabilities or trajectories: the old policy draws with
the ODE, each sample from noise of its own, and of a sample x_0 is kept, and at the chosen times a noised x_t with the
old policy's velocity there. The update then needs one evaluation of the trained policy for each. The old policy is the
moving average of the trained one's weights. Departures from the paper: the average moves with every optimizer step by a
fixed decay, where the paper's decay rises over the run; the times are those of the grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgrpo.algorithm import noise, objectives
from fastgrpo.algorithm.objectives import Noised
from fastgrpo.algorithm.samplers import is_flow
from fastgrpo.core.config import Objective
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.training.rollout import Drawn, Plan, Trajectory, sample_ode, stored


def check(policy: Policy, device: torch.device) -> None:
    """Raise UserError where the policy is no rectified flow. Once per run: it waits for the device."""
    if not is_flow(policy, device):
        raise UserError("objective.kind=nft: is made for rectified flows, which this model is not; use grpo.")


def of_any_step(plan: Plan) -> Plan:
    """The plan with every step for the choice of what is trained, the last one too, since none is noisy."""
    return replace(plan, window=range(plan.steps))


@torch.no_grad()
def sample(policy: Policy, plan: Plan, conditions: Sequence[Condition], slots: list[int]) -> Drawn:
    """Draw a batch with the weights as they are, which must be the old policy's.

    conditions: one per prompt of the iteration
    returns trajectories with x_0 as the state after the last step, and a noised state and its velocity for each chosen
    step
    """
    condition = stack([conditions[slot // plan.group_size] for slot in slots])
    final = sample_ode(policy, plan.initial_noise(slots, plan.grid.device), plan.grid, condition)
    kept = {slot: Trajectory({plan.steps: stored(x_0, plan)}) for slot, x_0 in zip(slots, final, strict=True)}
    for steps in zip(*(plan.chosen(slot) for slot in slots), strict=True):  # as many for each sample
        x, t = noised(plan, slots, steps, final)
        v = policy.velocity(x, t, condition)
        for row, (slot, step) in enumerate(zip(slots, steps, strict=True)):
            kept[slot].states[step] = stored(x[row], plan)
            kept[slot].velocities[step] = stored(v[row], plan)
    return Drawn(slots, final, kept)


def noised(plan: Plan, slots: Sequence[int], steps: Sequence[int], x_0: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - t) x_0 + t e, each sample at the time before its step, with keyed noise.

    x_0: [B, C, F, H, W];  returns x like it, and t [B]
    """
    keys: list[noise.Key] = [
        ("noised", plan.seed, plan.iteration, *divmod(slot, plan.group_size), step)
        for slot, step in zip(slots, steps, strict=True)
    ]
    t = torch.stack([plan.grid[step] for step in steps])
    column = t.reshape(-1, 1, 1, 1, 1)
    return (1 - column) * x_0 + column * noise.normal(keys, plan.latent_shape, x_0.device), t


def losses(
    parted: Sequence[tuple[int, int]],
    x: Tensor,
    v: Tensor,
    v_reference: Tensor | None,
    objective: Objective,
    plan: Plan,
    trajectories: Mapping[int, Trajectory],
    advantages: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss and the mean squared difference from the initial policy's velocity, which is part of it.  each [B]

    parted: slot and step of each row;  x: the noised states [B, C, F, H, W];  v, v_reference: likewise, predicted there
    advantages: [N]
    """
    x_0 = torch.stack([trajectories[slot].states[plan.steps].to(x.device, non_blocking=True) for slot, _ in parted])
    v_old = torch.stack([trajectories[slot].velocities[step].to(x.device, non_blocking=True) for slot, step in parted])
    t = torch.stack([plan.grid[step] for _, step in parted])
    advantage = torch.stack([advantages[slot] for slot, _ in parted])
    loss = objectives.nft(Noised(x, x_0, t, v, v_old, advantage), objective)
    distance = torch.zeros_like(loss)
    if v_reference is not None:
        distance = (v - v_reference).square().flatten(1).mean(1)
    return loss + objective.nft_kl * distance, distance
