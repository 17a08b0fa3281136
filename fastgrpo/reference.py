"""The initial policy, which the KL term measures against: a second, frozen network, or the adapters' base."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastgrpo.core.policy import Condition, Policy
from fastgrpo.models.loading.lora import at_rest


class Reference(Protocol):
    """What the KL term needs of it; every `fastgrpo.core.policy.Policy` has that."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


@dataclass(frozen=True)
class Unadapted:
    """A policy with its adapters at rest, which is the initial one, without a second network in memory."""

    policy: Policy

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with at_rest(self.policy.network):
            return self.policy.velocity(x, t, condition)
