"""Wan 2.2 A14B, text-to-video: two networks of Wan 2.1's form, one for high noise and one for low
(Wan Team 2025, arXiv 2503.20314, and the release of Wan 2.2).

`transformer` predicts at times t >= the folder's boundary_ratio, `transformer_2` below it. A step
belongs to the network of the time that it begins at, which is known on the host: an update's
micro-batch has steps of one network alone, and all ranks are at the same. Which network an update
trains is therefore a matter of the steps that have noise: a window among the steps of one leaves
the other as it is. Both have adapters, optimizer state and a moving average of their own, under
names that begin with the folder's part. Guidance has a scale for each: model.cfg and model.cfg_2.

The folder's scheduler has a shift of 3, the authors sample with 12 (from an image 5), and the
share of the steps that belongs to either network depends on it: a recipe sets rollout.shift.

All but this is `wan.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgrpo import models
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Experts, networks_of
from fastgrpo.models import wan
from fastgrpo.models.loading import diffusers_folder, wan_folder
from fastgrpo.models.loading.wan_folder import Form
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.sizes.units import SAMPLE
from fastgrpo.models.text_encoders.umt5 import TextEncoder
from fastgrpo.models.wan import Wan
from fastgrpo.parallel.sequence_parallel import Layout

NETWORKS = ("transformer", "transformer_2")  # of high noise, of low noise
NETWORK = NETWORKS[0]
PARTS: tuple[str, ...] = (*models.declared("wan", "PARTS"), *NETWORKS)
MAX_TEXT_TOKENS: int = models.declared("wan", "MAX_TEXT_TOKENS")
PIPELINES: tuple[str, ...] = models.declared("wan", "PIPELINES")
PUBLISHED = (("", models.declared("wan", "LARGE")),)
BOUNDARY = 0.875  # of the published folder, for a simulated rank


class WanExperts(Wan):
    """The `fastgrpo.core.policy.Policy` of this family."""

    form: ClassVar[Form] = Form(
        models="Wan 2.2 T2V-A14B, or model.family=wan_a14b_i2v for I2V-A14B", experts=True
    )

    def __init__(self, network: nn.Module, **parts: Any) -> None:
        super().__init__(network, **parts)
        settings: Model = parts["settings"]
        self.scales = (settings.cfg, settings.cfg if settings.cfg_2 is None else settings.cfg_2)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`, of rows of any times, which it waits for.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        assert isinstance(self.network, Experts)
        experts = [self.network.expert_at(time) for time in t.tolist()]
        rows = [
            self.velocity_of(
                expert,
                x[n : n + 1],
                t[n : n + 1],
                {k: of[n : n + 1] for k, of in condition.items()},
            )
            for n, expert in enumerate(experts)
        ]
        return torch.cat(rows)

    def velocity_of(self, expert: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict by one network, see `Routed`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        scale = self.scales[expert] if self.cfg > 1 else 1.0
        return self._guided(x, t, condition, scale, partial(self._ask, expert))

    def _ask(self, expert: int, **inputs: Any) -> tuple[Tensor]:
        """A network's answer [B, C, F, H, W], through the module that holds both, since FSDP2 does
        its work around that.
        """
        answer: tuple[Tensor] = self.network(expert, inputs)
        return answer

    @classmethod
    def outline(cls, where: Path, vae: Any, settings: Model, device: torch.device) -> Experts:
        """Both networks without weights.  vae: the VAE's config

        Raises UserError for networks of another form, or of different forms.
        """
        if settings.network is not None:
            raise UserError(
                f"model.network={settings.network}: this family trains two networks, which "
                "model.path has; leave it out."
            )
        index = diffusers_folder.read_json(where / "model_index.json")
        outlined = {
            part: wan_folder.outline(
                where / part, where, vae=vae, settings=settings, device=device, form=cls.form
            )
            for part in NETWORKS
        }
        return Experts(outlined, float(index["boundary_ratio"]))

    @classmethod
    def simulated_network(cls, config: Mapping[str, Any]) -> Experts:
        """Two networks of a config, with weights of any values."""
        one = super().simulated_network
        return Experts({part: one(config) for part in NETWORKS}, BOUNDARY)


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    with wan.encoder(settings, video, device) as texts:
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """Both transformers' blocks."""
    return [block for one in networks_of(network).values() for block in wan.blocks(one)]


def load(settings: Model, device: torch.device) -> WanExperts:
    """The policy of Wan 2.2 T2V-A14B's folder, or of its hub id; its networks have no weights yet."""
    return wan.load_as(WanExperts, settings, device)


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""
    for one in networks_of(network).values():
        wan.share_sequence(one, layout)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with two networks of this config."""
    kept = models.declared("wan", "KEPT")
    sizes: FamilyPlan = models.declared("wan", "sizes")(config, kept, times=SAMPLE, parts=NETWORKS)
    return sizes


def simulated(config: Mapping[str, Any], settings: Model) -> WanExperts:
    """The policy around two networks of this config, without VAE and times."""
    return wan.simulated_as(WanExperts, config, settings)
