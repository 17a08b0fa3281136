"""Samples drawn in batches, each batch decoded and scored while the next is drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from fastgrpo.core.config import Recipe
from fastgrpo.core.policy import Policy, stack
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.training import methods, rollout
from fastgrpo.training.method import Method
from fastgrpo.training.rollout import Dealing, Drawn, Plan, Round, SharedPrefix, Trajectory
from fastgrpo.training.scoring.offline import OfflinePairs
from fastgrpo.training.scoring.scorer import Scored, Scorer
from fastgrpo.training.trainer import Trainer

Sample = Callable[[Plan, list[int], Mapping[int, SharedPrefix]], Drawn]
"""(plan, slots of a batch, shared prefixes by number) -> the batch's samples."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What an iteration's samples are drawn, decoded and scored with, on one rank."""

    recipe: Recipe
    trainer: Trainer
    scorer: Scorer
    texts: Sequence[str]  # of the iteration's prompts
    watch: Stopwatch
    pairs: OfflinePairs | None = None  # samples of a file, in place of drawn ones
    poll_before: Callable[[Iterable[Round]], Iterable[Round]] = iter
    """Gives the batches one by one, and may raise in place of one."""

    @property
    def policy(self) -> Policy:
        """The policy that draws."""
        return self.trainer.policy

    @property
    def world(self) -> World:
        """The ranks among which samples are dealt."""
        return self.scorer.world

    def draw(self, dealing: Dealing) -> tuple[dict[int, Trajectory], Scored]:
        """Draw what the update needs, as the recipe's method does.

        returns this rank's trajectories by slot, and all ranks' scores
        """
        conditions = dealing.conditions

        def sample(plan: Plan, slots: list[int], prefixes: Mapping[int, SharedPrefix]) -> Drawn:
            if self.pairs is not None:
                return self.pairs.draw(self.policy, plan, self.texts, slots)
            return self._method.sample(
                self.policy, plan=plan, conditions=conditions, slots=slots, prefixes=prefixes
            )

        return self.score(dealing, sample, then="update")

    def score(
        self, dealing: Dealing, sample: Sample, then: str
    ) -> tuple[dict[int, Trajectory], Scored]:
        """Draw each batch by `sample`, and score it.

        then: the phase that follows
        returns this rank's trajectories by slot, and all ranks' scores
        """
        watch, conditions = self.watch, dealing.conditions
        trajectories: dict[int, Trajectory] = {}
        with self._method.drawing_weights(self.trainer), self._weights() as whole:
            plan = replace(dealing.plan, lockstep=not whole)
            dealing = replace(dealing, plan=plan)
            prefixes: dict[int, SharedPrefix] = {}
            rounds = self.poll_before(dealing.prefix_rounds() if plan.shared_noise else ())
            for batch, _ in watch.pieces(rounds, "rollout", then="rollout"):
                prefixes |= rollout.shared_prefixes(self.policy, plan, conditions, batch)
            rounds = self.poll_before(dealing.rounds())
            for batch, counts in watch.pieces(rounds, "rollout", then="reward"):
                drawn = sample(plan, batch, prefixes)
                watch.lap("rollout", then="decode")
                if not counts:
                    continue
                trajectories |= drawn.trajectories
                self._submit(dealing, drawn)
                watch.lap("decode")
        scored = self.scorer.collect(dealing.total, lambda: watch.lap("reward", then="wait"))
        watch.lap("wait", then=then)
        return trajectories, scored

    @property
    def _method(self) -> Method:
        return methods.of(self.recipe.objective.kind)

    def _weights(self) -> AbstractContextManager[bool]:
        """A context inside which the weights are held for drawing; gives whether whole."""
        return sharding.rollout_weights(
            self.policy.network,
            self.recipe.distributed,
            dtype=self.recipe.model.torch_dtype,
            world=self.world,
            arriving=self.scorer.arriving,
        )

    def _submit(self, dealing: Dealing, drawn: Drawn) -> None:
        """Decode this rank's part of a batch and begin to score it."""
        own = self.world.part(len(drawn.slots))  # ranks that share sequences divide this work
        if own:
            rows = slice(own.start, own.stop)
            final, slots = drawn.final[rows], drawn.slots[rows]
            prompts = [slot // dealing.plan.group_size for slot in slots]
            condition = stack([dealing.conditions[number] for number in prompts])
            texts = [self.texts[number] for number in prompts]
            self.scorer.submit(slots, final, self.policy.decode(final, condition), texts)
