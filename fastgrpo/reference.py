"""The initial policy, which the KL term measures against: a second, frozen network, or the adapters' base."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastgrpo.models import Condition, Policy
from fastgrpo.models.lora import at_rest


class Reference(Protocol):
    """What the KL term needs of it; every `fastgrpo.models.Policy` has that."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def transition(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Unadapted:
    """A policy with its adapters at rest, which is the initial one, without a second network in memory."""

    policy: Policy

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with at_rest(self.policy.network):
            return self.policy.velocity(x, t, condition)

    def transition(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        return self.policy.transition(x, v, t, t_next, eta)
