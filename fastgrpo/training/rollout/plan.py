"""The plan of an iteration's samples: their noise by keys, their noisy steps, what they share.

A sample's slot is prompt * G + sample within its iteration. All of a sample's noise is keyed by
(seed, iteration, prompt, sample, step), so how slots are dealt over ranks and batches changes
nothing but the speed.

K samples of a group share their initial noise (all of them, or those of one of its noises) and are
equal until the first noisy step; what they have in common until there is their prefix, number
slot // K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.algorithm import noise, selection


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The samples of an iteration and how they are drawn, the same on every rank."""

    seed: int
    iteration: int
    group_size: int
    grid: Tensor  # [T + 1] float32, from 1 to 0
    eta: float
    shared_noise: bool
    latent_shape: tuple[int, ...]  # (C, F, H, W)
    experts: tuple[int, ...] = ()  # by step, see `policy.experts_of`; empty: one network for all
    noises: int = 1  # of a group that shares them, each by as many samples
    window: range | None = None  # the noisy steps; None: all but the last
    candidates: tuple[tuple[int, ...], ...] = ()
    """By prompt the numbers of its noises; empty: those of the first samples that share them."""
    own_steps: tuple[int, ...] = ()
    """By prompt its one noisy step, of those in the window; empty: the whole window is noisy."""
    trained: int | None = None  # transitions trained per sample; None: all noisy ones
    choice: str = "random"  # which transitions, see selection.choose_timesteps
    sampler: str = "dance"  # the noisy steps' transition, see samplers
    store: str = "device"  # or host: the memory in which the chosen transitions wait
    lockstep: bool = False
    """Every forward is a collective, since the weights are sharded: all ranks run as many."""

    @property
    def steps(self) -> int:
        """T, the number of the grid's steps."""
        return len(self.grid) - 1

    def expert(self, step: int) -> int:
        """The number of the network that predicts at a step."""
        return self.experts[step] if self.experts else 0

    def experts_at(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The experts of the steps of a grid of some times.  numbers: increasing, T the last"""
        return tuple(self.experts[step] for step in numbers[:-1]) if self.experts else ()

    @property
    def noisy(self) -> range:
        """The steps that draw noise, each for some prompt."""
        return range(self.steps - 1) if self.window is None else self.window

    def noisy_of(self, prompt: int) -> range:
        """The steps in which a prompt's samples draw noise."""
        if not self.own_steps:
            return self.noisy
        return range(self.own_steps[prompt], self.own_steps[prompt] + 1)

    @property
    def sharing(self) -> int:
        """K: the samples that share an initial noise, and so a prefix."""
        return self.group_size // self.noises if self.shared_noise else 1

    @property
    def prefixes_per_prompt(self) -> int:
        """Different initial noises of a group."""
        return self.group_size // self.sharing

    def first_of(self, prompt: int) -> int:
        """The step in which samples that share their noise part; they are equal before it."""
        return self.noisy_of(prompt).start if self.shared_noise else 0

    @property
    def firsts(self) -> range:
        """From the least to the largest `first_of` of an iteration's prompts."""
        if not self.own_steps or not self.shared_noise:
            return range(self.first_of(0), self.first_of(0) + 1)
        return range(min(self.own_steps), max(self.own_steps) + 1)

    def is_shared(self, slot: int, step: int) -> bool:
        """Whether the state before a step is that of every sample with the slot's noise."""
        return self.shared_noise and step <= self.first_of(slot // self.group_size)

    def chosen(self, slot: int) -> list[int]:
        """The steps of a sample that the update trains, in increasing order."""
        noisy = self.noisy_of(slot // self.group_size)
        count = len(noisy) if self.trained is None else self.trained
        key = ("timesteps", self.seed, self.iteration, *divmod(slot, self.group_size))
        return selection.choose_timesteps(noisy, count, self.choice, key)

    def initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """The states x at t = 1.  returns float32 [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = []
        for slot in slots:
            prompt, sample = divmod(slot, self.group_size)
            number = sample - sample % self.sharing  # the first of those with this noise
            if self.candidates:
                number = self.candidates[prompt][sample // self.sharing]
            keys.append(("initial", self.seed, self.iteration, prompt, number))
        return noise.normal(keys, self.latent_shape, device)

    def step_noise(self, slots: Sequence[int], step: int, device: torch.device) -> Tensor:
        """The noise that a step injects.  returns float32 [len(slots), C, F, H, W]"""
        keys: list[noise.Key] = []
        for slot in slots:
            prompt, sample = divmod(slot, self.group_size)
            keys.append(("step", self.seed, self.iteration, prompt, sample, step))
        return noise.normal(keys, self.latent_shape, device)
