"""The state of a run beside weights and optimizer state: its course, and a collapse of the policy.

A checkpoint holds weights that no sample has been drawn with yet. So the best one is only taken for
the best once the next iteration has drawn with it, and never while the policy is collapsed. Where
held-out prompts are evaluated on the way, the best is the checkpoint with the best evaluation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Self

HISTORY = 20  # iterations
LEAST = 5  # iterations by which a usual change is known
DROP = 5.0
"""A collapse is a fall of the mean reward by so many of the largest recent changes. Changes between
batches of prompts give no such factor; a policy that is lost does."""


@dataclass(kw_only=True)
class Progress:
    """The state of a run beside weights and optimizer state."""

    iteration: int = 0  # iterations done
    best_reward: float | None = None  # the highest mean training reward between two checkpoints
    best: str | None = None  # the checkpoint that ended that span
    by_heldout: bool = False  # the best one is by the held-out reward instead
    rewards: tuple[float, ...] = ()  # of the iterations since the last checkpoint
    seconds: float = 0.0  # of training, over all attempts
    rollout_batch: int = 0  # rollout.batch_size where it was "auto"; 0 = the recipe has a number
    history: tuple[float, ...] = ()  # mean rewards of the last iterations
    counts: dict[str, float] = field(default_factory=dict)  # over the run, for its summary
    best_before: tuple[float | None, str | None] | None = None
    """`best_reward` and `best` without the newest checkpoint, while no sample is drawn with it."""
    suspect: bool = False  # the last update moved the policy beyond all bounds
    fallen: float | None = None  # after a collapse: the mean reward that would end it
    last_good: str | None = None  # the newest checkpoint of before a collapse, which is kept

    @classmethod
    def read(cls, numbers: Mapping[str, Any]) -> Self:
        """The progress that a checkpoint stores, also of an earlier version."""
        names = {own.name for own in fields(cls)}
        known = {name: value for name, value in numbers.items() if name in names}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known | lists)

    @property
    def alarmed(self) -> bool:
        """Whether the present weights may be lost, so that they are no best ones."""
        return self.suspect or self.fallen is not None

    def kept(self, keep_best: bool) -> set[str]:
        """The checkpoints that are kept for what they are, whatever their age."""
        older = self.best_before[1] if self.best_before is not None else None
        best = (self.best, older) if keep_best else ()
        return {name for name in (*best, self.last_good) if name is not None}

    def count(self, numbers: Mapping[str, float]) -> None:
        """Add an iteration's numbers to the run's."""
        for name, number in numbers.items():
            self.counts[name] = self.counts.get(name, 0.0) + number

    def note(self, reward: float, spread: bool) -> bool:
        """Count an iteration by the mean reward of its samples.  returns whether the policy has
        collapsed since the iteration before

        spread: whether any group's rewards differ
        """
        collapsed = self.fallen is None and self._collapsed(reward, spread)
        if collapsed:
            self.fallen = (self.history[-1] + reward) / 2
        elif self.fallen is not None and reward >= self.fallen:
            self.fallen = None
        self.suspect = False
        if self.best_before is not None and self.fallen is not None:
            self.best_reward, self.best = self.best_before
        self.best_before = None
        if self.fallen is None:
            self.last_good = None
        self.rewards = (*self.rewards, reward)
        if math.isfinite(reward):
            self.history = (*self.history, reward)[-HISTORY:]
        return collapsed

    def _collapsed(self, reward: float, spread: bool) -> bool:
        """Whether the reward has fallen as no change of prompts makes it fall."""
        past = self.history
        if not past or not math.isfinite(reward) or reward >= min(past):
            return False
        if self.suspect or not spread:
            return True
        changes = [abs(b - a) for a, b in pairwise(past)]
        usual = max([*changes, 1e-3 * abs(past[-1])])
        return len(past) >= LEAST and past[-1] - reward > DROP * usual

    def judge_by(self, heldout: bool) -> None:
        """Say what the best checkpoint is chosen by; another choice begins anew."""
        if heldout != self.by_heldout:
            self.best_reward = self.best = self.best_before = None
        self.by_heldout = heldout

    def note_heldout(self, reward: float, checkpoint: str) -> None:
        """Note a checkpoint that is about to be saved as the best where its held-out mean is."""
        if self.best_reward is None or reward > self.best_reward:
            self.best_before = (self.best_reward, self.best)
            self.best_reward, self.best = reward, checkpoint

    def best_without(self, checkpoint: str) -> tuple[float | None, str | None]:
        """`best_reward` and `best` should this checkpoint, whose samples are scored, not be saved."""
        if self.by_heldout and self.best == checkpoint and self.best_before is not None:
            return self.best_before
        return self.best_reward, self.best

    def close_span(self, checkpoint: str) -> None:
        """Note a checkpoint as the best where the mean reward since the last one is the highest."""
        if self.by_heldout:
            self.best_before, self.rewards = None, ()
            return
        rewards = [reward for reward in self.rewards if math.isfinite(reward)]
        self.best_before = None
        if rewards and not self.alarmed:
            mean = sum(rewards) / len(rewards)
            if self.best_reward is None or mean > self.best_reward:
                self.best_before = (self.best_reward, self.best)
                self.best_reward, self.best = mean, checkpoint
        self.rewards = ()
