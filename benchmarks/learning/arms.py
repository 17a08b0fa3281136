"""The recipes that learning curves compare: the demo's, with switches. Read ARMS first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.learning.campaign import Variant

COMMON = (
    "run.preflight=false",
    "checkpoint.keep_best=false",
    "evaluate.seeds=4",
    "evaluate.clips=0",
)
WINDOW = ("rollout.window=2", "rollout.window_every=19", "rollout.tail_steps=2")
HALF = (*WINDOW, "rollout.window_every=17", "optimizer.lr=3.2e-4")
"""The window, with a larger rate, for 0.87 of the iterations: half of the full recipe's
H800-hours."""
NFT = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")
AWM = (
    "objective.kind=awm",
    "rollout.shared_noise=false",
    "optimizer.ema_decay=0.9",
    "objective.clip_range=1e-5",
)
PER_PROMPT = (
    "rollout.window=1",
    "rollout.window_schedule=per_prompt",
    "rollout.sampler=linear",
    "rollout.eta=1.0",
    "objective.step_weights=gradient",
)
"""With length=1.42, just below half of the full recipe's H800-hours."""
BRANCHES = (
    *PER_PROMPT,
    "rollout.eta=2.0",
    "rollout.seeds_per_prompt=4",
    "objective.advantage_group=seed",
    "optimizer.lr=3e-4",
)
FAST = (*NFT, "objective.nft_kl=0")
"""DiffusionNFT without its initial policy, for 0.41 of the iterations: just below half of the full
recipe's H800-hours."""
SCOUTS = (
    *NFT,
    "rollout.scouts=24",
    "rollout.scout_steps=3",
    "rollout.samples_per_prompt=8",
    "objective.best_of_n=none",
)


@dataclass(frozen=True)
class Arm:
    """A recipe of the comparison."""

    variant: Variant
    length: float = 1.0  # its iterations, as a share of the others'

    @property
    def name(self) -> str:
        return self.variant.name

    def iterations(self, usual: int) -> int:
        return max(1, round(self.length * usual))

    def of_length(self, usual: int) -> Variant:
        """The variant with its iterations, over which the rate decays.  usual: of a length of 1"""
        length = self.iterations(usual)
        ends = (f"run.iterations={length}", f"optimizer.decay_updates={length}")
        return replace(self.variant, overrides=(*ends, *self.variant.overrides))

    def with_overrides(self, overrides: Sequence[str]) -> "Arm":
        return replace(self, variant=replace(self.variant, overrides=tuple(overrides)))


def arm(name: str, label: str, overrides: Sequence[str] = (), length: float = 1.0) -> Arm:
    """An arm by its name and switches."""
    return Arm(Variant(name, label, tuple(overrides)), length)


ARMS = (
    arm("full", "every step noisy"),
    arm("fast", "DiffusionNFT, short", FAST, length=0.41),
    arm("half", "a window of noisy steps, tuned", HALF, length=0.87),
    arm("window", "a window of noisy steps", WINDOW),
    arm("nft", "DiffusionNFT", NFT),
    *(
        arm(
            f"nft-clip-{clip}",
            f"DiffusionNFT, advantages within {clip}",
            (*NFT, f"objective.advantage_clip={clip}"),
        )
        for clip in (1, 2)  # beside the 5 that is the default
    ),
    arm("awm", "AWM", AWM),
    arm("prompt-1", "a noisy step per prompt, one noise", PER_PROMPT),
    arm("prompt-1-long", "a noisy step per prompt, one noise, longer", PER_PROMPT, length=1.42),
    *(
        arm(
            f"prompt-{noises}",
            f"a noisy step per prompt, {noises} noises",
            (*PER_PROMPT, f"rollout.seeds_per_prompt={noises}"),
        )
        for noises in (2, 4)
    ),
    arm("branches", "a noisy step per prompt, 4 noises, tuned", BRANCHES),
    arm("scouts", "DiffusionNFT, 8 of 24 scouts", SCOUTS),
)
USUAL = ("full", "window", "nft", "prompt-1-long")
