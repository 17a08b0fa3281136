"""The state of training: trainable weights, AdamW's moments, the moving average, the counters."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo.core.config import Optimizer, Recipe
from fastgrpo.core.errors import Exploded
from fastgrpo.core.policy import Policy
from fastgrpo.parallel.nvme.adamw import OffloadedAdamW, States
from fastgrpo.parallel.world import World
from fastgrpo.training.policies import Reference

LEAST = 0.1  # share of the rate that a schedule ends with


def schedule_of(recipe: Recipe) -> Optimizer:
    """[optimizer] with the steps over which the rate falls, where the recipe leaves them open."""
    settings = recipe.optimizer
    if settings.schedule not in ("linear", "cosine") or settings.decay_updates:
        return settings
    every = recipe.run.iterations * settings.updates_per_iteration
    return settings.model_copy(update={"decay_updates": max(1, every - settings.warmup_updates)})


def rate(settings: Optimizer, updates: int) -> float:
    """The learning rate of an optimizer step: a linear warm-up, then the schedule down to LEAST.

    settings: those of `schedule_of`;  updates: steps taken before
    """
    warmup, decay = settings.warmup_updates, settings.decay_updates
    if updates < warmup or not decay:
        return settings.lr * min(1.0, (updates + 1) / (warmup + 1))
    fallen = (1 - LEAST) * (updates - warmup) / decay
    if settings.schedule == "cosine":
        turn = math.pi * min(1.0, (updates - warmup) / decay)
        fallen = (1 - LEAST) * (1 - math.cos(turn)) / 2
    return settings.lr * max(LEAST, 1.0 - fallen)


@dataclass(kw_only=True)
class Trainer:
    """The state that an optimizer step changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    settings: Optimizer
    reference: Reference | None = None  # the initial policy, for the KL term
    rounds_by_batch: bool = False  # bfloat16: kernels round batches of other sizes otherwise
    ema: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0  # optimizer steps taken
    skipped: int = 0  # optimizer steps left out for non-finite gradients
    lr_factor: float = 1.0  # of the recipe's rate, below 1 once the run went back

    @classmethod
    def create(
        cls,
        policy: Policy,
        settings: Optimizer,
        reference: Reference | None,
        offload: bool = False,
        states: States | None = None,
    ) -> "Trainer":
        """A trainer of this rank's shards of a sharded policy's trainable weights.

        offload: the shards lie in host memory;  states: they and the moments lie on an NVMe
        """
        trainable = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
        optimizer = _adamw(trainable, settings, offload, states)
        ema = {}
        if settings.ema_decay:
            ema = {name: p.detach().clone() for name, p in trainable.items()}
        return cls(
            policy=policy,
            optimizer=optimizer,
            settings=settings,
            reference=reference,
            ema=ema,
        )

    @property
    def lr(self) -> float:
        """The rate of the next optimizer step."""
        return rate(self.settings, self.updates) * self.lr_factor

    def step(self) -> Tensor:
        """Clip the gradient, take a step, move the average.  returns the norm, a float32 scalar

        A norm that is not finite skips the step on every rank.
        """
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
            raise Exploded(
                f"optimizer.max_skipped={self.settings.max_skipped}: {self.skipped} optimizer "
                f"steps had non-finite gradients; lower optimizer.lr={self.settings.lr:g} or look "
                "for the layer that overflows in model.dtype.",
                drawn=False,
            )
        return norm

    @torch.no_grad()
    def complete_moments(self) -> None:
        """Give AdamW's state to weights that have none yet, as they had no gradient so far.

        A checkpoint then has the same tensors whichever of them were trained.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    on = parameter.device if group["fused"] else torch.device("cpu")
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=on),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    @torch.no_grad()
    def all_finite(self, world: World) -> bool:
        """Whether every rank's trained weights and their average are finite."""
        trained = [p for p in self.policy.network.parameters() if p.requires_grad]
        own = [
            t.to_local() if isinstance(t, DTensor) else t for t in (*trained, *self.ema.values())
        ]
        every = [torch.isfinite(part).all() for part in own if part.numel()]
        finite = torch.stack(every).all() if every else torch.tensor(True)
        result = finite.float().to(world.device)
        dist.all_reduce(result, dist.ReduceOp.MIN)
        return bool(result)

    @torch.no_grad()
    def _move_average(self) -> None:
        for name, parameter in self.policy.network.named_parameters():
            if name in self.ema:
                self.ema[name].lerp_(parameter, 1 - self.settings.ema_decay)


def _adamw(
    trainable: Mapping[str, nn.Parameter],
    settings: Optimizer,
    offload: bool,
    states: States | None,
) -> torch.optim.Optimizer:
    """AdamW of this rank's shards; arguments as of `Trainer.create`."""
    # fused AdamW is faster, and rounds otherwise
    fused = offload or next(iter(trainable.values())).device.type == "cuda"
    optimizer: torch.optim.Optimizer
    if states is not None:
        fused, optimizer = True, OffloadedAdamW(trainable, states, settings)
    else:
        optimizer = torch.optim.AdamW(
            trainable.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )

    def keep_fused(optimizer: torch.optim.Optimizer) -> None:
        """Undo a checkpoint's choice, which is that of the run that wrote it."""
        for group in optimizer.param_groups:
            group["fused"] = fused

    optimizer.register_load_state_dict_post_hook(keep_fused)
    return optimizer


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """Put the moving average in place of the policy's weights inside, where the recipe has one."""
    network = trainer.policy.network
    _reshard(network)
    parameters = dict(network.named_parameters())
    raw = {name: parameters[name].detach().clone() for name in trainer.ema}
    _copy(trainer.ema, parameters)
    try:
        yield
    finally:
        _reshard(network)
        _copy(raw, parameters)


def _reshard(network: nn.Module) -> None:
    """Give up the whole weights that FSDP2 keeps of the root after a forward.

    They would not see the shards change.
    """
    if isinstance(network, FSDPModule):
        network.reshard()


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of their names, each pair of one shape [...]."""
    for name, value in values.items():
        parameters[name].copy_(value)
