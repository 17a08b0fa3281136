"""The times that a folder's scheduler sets by itself, for families whose pipeline gives it none."""

from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from fastgrpo.core.errors import UserError

PLAIN = {"use_dynamic_shifting": False}  # the pipelines do not say by what to shift
EULER = FlowMatchEulerDiscreteScheduler.__name__
UNIPC = UniPCMultistepScheduler.__name__
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    EULER: (FlowMatchEulerDiscreteScheduler, "shift", PLAIN | {"invert_sigmas": False}),
    UNIPC: (
        UniPCMultistepScheduler,
        "flow_shift",
        # of a flow model; without them UniPC's sigmas are not times
        PLAIN
        | {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "final_sigmas_type": "zero",
        },
    ),
}
"""By its name, a scheduler's class, its key of the shift, and the settings that it must have."""


class Schedule:
    """The sigmas of a folder's scheduler after set_timesteps(steps), which are a flow's times."""

    def __init__(self, config: Mapping[str, Any], kinds: tuple[str, ...], model: str) -> None:
        """Raise UserError for another scheduler than `kinds`, or one whose sigmas are no times.

        config: of the scheduler;  kinds: some of EULER and UNIPC;  model: for messages
        """
        where = "model.path: scheduler/scheduler_config.json"
        name = config.get("_class_name")
        if name not in kinds:
            raise UserError(
                f"{where} is a {name}, not one of {', '.join(kinds)}; correct model.family."
            )
        self.kind, self.shift_key, settings = KINDS[name]
        known = self.kind.from_config(config).config
        for key, value in settings.items():
            if known[key] != value:
                raise UserError(
                    f"{where} has {key}={known[key]}; {model} wants {value}, set it there."
                )
        self.config = dict(config)
        self.timesteps: int = known.num_train_timesteps  # the network's time at t = 1

    def grid(self, steps: int, shift: float | None) -> Tensor:
        """returns float32 [steps + 1], falling to 0.  shift: in place of the folder's"""
        scheduler = self.kind.from_config(
            self.config if shift is None else self.config | {self.shift_key: shift}
        )
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.sigmas
        return times
