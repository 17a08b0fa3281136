"""Algorithm 1 of DanceGRPO, from a recipe to a trained policy: the loop reads top to bottom in `Session.iterate`.

Departures from the paper: advantages are clamped, invalid samples are left out, the optimizer steps of an iteration see
disjoint minibatches balanced over prompts, and everything random is keyed so that a run resumes exactly.
"""

import json
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgrpo import models
from fastgrpo.algorithm import samplers, selection, window
from fastgrpo.algorithm.advantages import combined_advantages
from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress, number
from fastgrpo.checkpoint.provenance import check_rewards, record_provenance
from fastgrpo.checkpoint.resume import check_folder, holds_run, prepare_folder
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import only_run_in, replace_text
from fastgrpo.core.policy import Condition, Policy, move
from fastgrpo.core.processes import OneRankError, rank
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World, open_world
from fastgrpo.run.heartbeat import HeartbeatWriter
from fastgrpo.run.rank_times import Ranks
from fastgrpo.run.stopping import Signals, Stop, Stopped, answer, answer_mistake
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.run.tracker import Tracker, Wandb
from fastgrpo.tools.preflight import checks, largest_batch
from fastgrpo.tools.preflight.finding import Parts
from fastgrpo.tools.report.report import write_report
from fastgrpo.training import nft, rollout
from fastgrpo.training.conditions import encode
from fastgrpo.training.conditions.cache import Conditions
from fastgrpo.training.evaluation import Evaluation, averaged_weights, compare, evaluate
from fastgrpo.training.policies import Reference, Unadapted, shard_and_read
from fastgrpo.training.rollout import Plan, Trajectory
from fastgrpo.training.scorer import Scored, Scorer
from fastgrpo.training.sources import NoScores, open_rewards
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update


def train(recipe: Recipe) -> dict[str, object] | None:
    """Run a recipe to its end, resuming where an earlier attempt stopped.

    Returns the summary, on every rank; None where the run was asked to stop, and starting it again goes on with it.
    """
    try:
        with open_world(recipe.distributed) as world, ExitStack() as stack:
            found, stop = claim(recipe, world, stack)
            try:
                return Session.open(recipe, world, stack, found, stop).run()
            except OneRankError:  # closing the world may wait for the other ranks, for ever
                answer(recipe.run.dir, requeue=False)
                raise
    except UserError:  # also of the first lines: the job, started again, would end there again
        if rank() == 0:
            answer_mistake(recipe.run.dir)
        raise


def claim(recipe: Recipe, world: World, stack: ExitStack) -> tuple[Split, Stop]:
    """Read the prompts, and take the run's folder, which must hold no other run, for as long as `stack` is open."""
    signals = stack.enter_context(Signals())
    found = encode.read_prompts(recipe, world)
    world.on_main(lambda: check_folder(recipe, world))
    world.on_main(lambda: stack.enter_context(only_run_in(recipe.run.dir)))
    return found, Stop(recipe.run.dir, signals, world)


@dataclass
class Session:
    """The parts of a run, put together once."""

    recipe: Recipe
    world: World
    policy: Policy
    trainer: Trainer
    scorer: Scorer
    tracker: Tracker
    checkpoints: Checkpoints
    progress: Progress
    train_prompts: list[str]
    heldout_prompts: list[str]
    conditions: Conditions  # of the training prompts, then of the held-out ones; read from the cache on demand
    grid: Tensor
    heldout_grid: Tensor
    shape: tuple[int, ...]
    stop: Stop
    ranks: Ranks

    @classmethod
    def open(cls, recipe: Recipe, world: World, stack: ExitStack, found: Split, stop: Stop) -> "Session":
        """Load, shard, resume; start the reward server where the recipe asks for one. `stack` closes what is open."""
        ranks = Ranks(
            recipe.run.dir, world, stack.enter_context(HeartbeatWriter(recipe.run.dir, world.rank, world.size))
        )
        sources = open_rewards(recipe, world, stack)
        notices = world.on_main(lambda: check_rewards(recipe.run.dir, sources) if holds_run(recipe.run.dir) else [])
        policy = world.run_on_all_ranks(lambda: models.outline(recipe.model, world.device, recipe.lora))
        shape = policy.latent_shape(recipe.video)
        grid = policy.time_grid(recipe.rollout.steps, recipe.rollout.shift, shape).to(world.device)
        heldout_steps = recipe.evaluate.steps or recipe.rollout.steps
        heldout_grid = policy.time_grid(heldout_steps, recipe.rollout.shift, shape).to(world.device)
        samplers.check(policy, recipe.rollout.sampler, world.device)
        if recipe.objective.kind == "nft":
            nft.check(policy, world.device)
        nothing = torch.zeros(1, 1, device=world.device)
        policy.transition(nothing, nothing, grid[0], grid[1], recipe.rollout.eta)  # refuses an eta that it cannot take
        world.on_main(lambda: prepare_folder(recipe, world))  # not before the recipe has proved itself
        encoded = encode.encode(recipe, world, found)
        shard_and_read(policy, recipe, world)
        if encoded.conditions.negative is not None:
            policy.negative = move(encoded.conditions.negative, world.device)
        reference = initial_policy(recipe, world, policy) if recipe.needs_initial_policy else None
        trainer = Trainer.create(policy, recipe.optimizer, reference, recipe.distributed.offload)
        checkpoints = Checkpoints(recipe.run.dir / "checkpoints", recipe.checkpoint, world)
        progress = checkpoints.load(trainer)
        scorer = Scorer(sources, recipe.rewards, recipe.video.fps, world)
        stack.callback(scorer.close)
        tracker = open_tracker(recipe, world, progress.iteration)
        stack.callback(tracker.close)
        for notice in (*notices, *checkpoints.notices):
            tracker.message(notice)
        if progress.iteration:
            tracker.message(f"resumed from checkpoint step-{progress.iteration}")
        session = cls(
            recipe, world, policy, trainer, scorer, tracker, checkpoints, progress,
            [prompt.text for prompt in encoded.train], [prompt.text for prompt in encoded.heldout],
            encoded.conditions, grid, heldout_grid, shape, stop, ranks,
        )  # fmt: skip
        if recipe.rollout.batch_size == "auto":
            session.settle_batch()
        return session

    def settle_batch(self) -> None:
        """Put a number in the place of rollout.batch_size = "auto": the checkpoint's, or what the memory allows."""
        if not self.progress.rollout_batch:
            self.progress.rollout_batch, told = largest_batch.rollout_batch(self.preflight_parts())
            self.tracker.message(told)
        settled = self.recipe.rollout.with_batch_size(self.progress.rollout_batch)
        self.recipe = self.recipe.model_copy(update={"rollout": settled})

    def run(self) -> dict[str, object] | None:
        """What `train` returns."""
        try:
            if self.recipe.run.preflight and not self.progress.iteration:
                checks.quick(self.preflight_parts(), self.tracker.message)
            if not self.progress.iteration:
                self.world.on_main(lambda: record_provenance(self.recipe, self.scorer.sources))
            before = self.baseline()
            while self.progress.iteration < self.recipe.run.iterations:
                self.iterate()
                self.maybe_save()
            self.end_saving()
            return self.finish(before)
        except Stopped:
            self.leave_off()
            return None
        except NoScores:  # the weights are those of the last finished iteration
            self.end_saving()
            raise

    def preflight_parts(self) -> Parts:
        """What is checked before the first iteration."""
        return Parts(self.recipe, self.world, self.trainer, self.scorer, self.plan(0), *self.batch(0))

    def batch(self, iteration: int) -> tuple[list[str], list[Condition]]:
        """The prompts of an iteration, and their conditions on the device."""
        recipe = self.recipe
        chosen = prompts.draw(len(self.train_prompts), recipe.prompts.per_iteration, iteration, recipe.run.seed)
        conditions = [move(self.conditions[index], self.world.device) for index in chosen]
        return [self.train_prompts[index] for index in chosen], conditions

    def iterate(self) -> None:
        """One iteration of Algorithm 1."""
        recipe, iteration = self.recipe, self.progress.iteration
        group = recipe.rollout.samples_per_prompt
        watch = self.ranks.watch(iteration)

        # 1. a batch of prompts
        texts, conditions = self.batch(iteration)
        plan = self.plan(iteration)
        if recipe.objective.kind == "nft":
            plan = nft.of_any_step(plan)

        # 2. trajectories of the current policy, and their rewards
        trajectories, scored = self.draw(plan, texts, conditions, watch)
        self.check_validity(scored)

        # 3. advantages within each prompt's group, summed over rewards
        advantages = combined_advantages(
            scored.values, scored.valid, recipe.weights, group, recipe.objective.advantage_clip,
            recipe.objective.min_spread, recipe.objective.normalise,
        )  # fmt: skip
        kept = scored.valid
        if recipe.objective.best_of_n:
            kept = selection.best_of_n(advantages, scored.valid, group, recipe.objective.best_of_n)
        trajectories = {slot: trajectory for slot, trajectory in trajectories.items() if kept[slot]}

        # 4. optimizer steps on a subset of the timesteps
        metrics = update(
            self.trainer, recipe.objective, plan, trajectories, conditions, advantages, kept, self.world,
            self.stop.poll_before,
        )  # fmt: skip
        watch.lap("update")

        spread = self.ranks.gather(iteration, watch)
        metrics |= reward_metrics(scored, recipe, group) | watch.metrics() | spread.metrics()
        self.tracker.log(iteration, metrics, spread.note())
        self.progress.iteration += 1
        self.progress.rewards = (*self.progress.rewards, metrics["reward/sum"])
        self.progress.seconds += metrics["seconds/total"]

    def plan(self, iteration: int) -> Plan:
        """What the recipe wants drawn in an iteration."""
        settings, seed = self.recipe.rollout, self.recipe.run.seed
        noisy = window.noisy_steps(settings, iteration, seed)
        return Plan(
            seed, iteration, settings.samples_per_prompt, window.shortened(self.grid, noisy, settings.tail_steps),
            settings.eta, settings.shared_noise, self.shape, noisy, self.recipe.steps_trained,
            self.recipe.objective.timestep_choice, settings.sampler, settings.store,
        )  # fmt: skip

    def draw(
        self, plan: Plan, texts: list[str], conditions: list[Condition], watch: Stopwatch
    ) -> tuple[dict[int, Trajectory], Scored]:
        """Rollout in batches; each batch is scored while the next is drawn.  returns this rank's samples, all scores"""
        total = len(texts) * plan.group_size
        trajectories: dict[int, Trajectory] = {}
        size, dtype = self.recipe.rollout.at_once, self.recipe.model.torch_dtype
        settings = self.recipe.distributed
        old = self.recipe.objective.kind == "nft"
        with (
            averaged_weights(self.trainer) if old else nullcontext(),
            sharding.rollout_weights(self.policy.network, settings, dtype, self.world) as whole,
        ):
            work = (total, conditions, plan.group_size, size, self.world, not whole)
            started: dict[int, rollout.Start] = {}
            rounds = self.stop.poll_before(rollout.start_rounds(*work) if plan.shared_noise else ())
            for prompts_here, _ in watch.pieces(rounds, "rollout", then="rollout"):
                started |= rollout.starts(self.policy, plan, conditions, prompts_here)
            for batch, counts in watch.pieces(self.stop.poll_before(rollout.rounds(*work)), "rollout", then="reward"):
                if old:
                    drawn = nft.sample(self.policy, plan, conditions, batch)
                else:
                    drawn = rollout.sample(self.policy, plan, conditions, batch, started)
                watch.lap("rollout", then="decode")
                if not counts:
                    continue
                trajectories |= drawn.trajectories
                own = self.world.part(len(batch))  # the ranks that share a sequence divide its decoding and scoring
                if own:
                    final, scored_here = drawn.final[own.start : own.stop], batch[own.start : own.stop]
                    prompts_of = [texts[slot // plan.group_size] for slot in scored_here]
                    self.scorer.submit(scored_here, final, self.policy.decode(final), prompts_of)
                watch.lap("decode")
        scored = self.scorer.collect(total, lambda: watch.lap("reward", then="wait"))
        watch.lap("wait", then="update")
        return trajectories, scored

    def check_validity(self, scored: Scored) -> None:
        """End the run where too many samples have no score."""
        share = 1.0 - scored.valid.float().mean().item()
        limit = self.recipe.server.max_invalid
        if share > limit:
            raise NoScores(
                f"server.max_invalid={limit}: {share:.0%} of the samples of iteration {self.progress.iteration} have "
                "no valid score; look at the rewards' log (reward_server.log in the run folder where a server runs "
                "beside the trainer). The newest checkpoint is intact."
            )

    def maybe_save(self) -> None:
        """A checkpoint where the recipe wants one and after the last iteration; one that fails does not end the run."""
        self.ranks.heart.enter("save")
        done, wanted = self.progress.iteration, self.recipe.checkpoint.every
        problem = self.checkpoints.poll()
        if done % wanted == 0 or done == self.recipe.run.iterations:
            problem = self.checkpoints.save(self.trainer, self.progress) or problem
        if problem is not None:
            self.tracker.message(f"training goes on without it: {problem}")

    def end_saving(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError where the last iteration's is not there."""
        problem = self.checkpoints.finish()
        published = self.world.on_main(self.checkpoints.newest)
        if self.progress.iteration and (published is None or number(published) < self.progress.iteration):
            problem = problem or self.checkpoints.save(self.trainer, self.progress) or self.checkpoints.finish()
            if problem is not None:
                raise UserError(problem)

    def leave_off(self) -> None:
        """Save what the last checkpoint lacks; of the iteration that was dropped nothing has reached the weights."""
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.end_saving()
        self.stop.tell()
        self.tracker.message(f"asked to stop: saved after {self.progress.iteration} iterations; start again to go on")

    def evaluate(self) -> Evaluation:
        """The held-out prompts with the weights as they are now."""
        self.ranks.heart.enter("evaluate")
        count = min(self.recipe.evaluate.prompts, len(self.heldout_prompts))
        first = len(self.train_prompts)
        conditions = [move(c, self.world.device) for c in self.conditions[first : first + count]]
        evaluation = evaluate(
            self.trainer, self.recipe, self.heldout_prompts[:count], conditions,
            self.scorer, self.world, self.progress.iteration, self.heldout_grid, self.shape, self.stop.poll_before,
        )  # fmt: skip
        if not np.isfinite(evaluation.columns()["sum"]).any():
            raise UserError("rewards: no held-out clip has a valid score; look at reward_server.log in the run folder.")
        return evaluation

    def baseline(self) -> Evaluation:
        """The held-out evaluation before training; read back when the run is resumed."""
        file = self.recipe.run.dir / "evaluation" / "step-0.json"
        if self.progress.iteration:
            return Evaluation.read(file)
        self.tracker.message("evaluating the held-out prompts before training")
        return self.evaluate()

    def finish(self, before: Evaluation) -> dict[str, object]:
        """Evaluate again, compare, write summary.json and the report."""
        self.tracker.message("evaluating the held-out prompts after training")
        after = self.evaluate()
        folder = self.recipe.run.dir
        compared = compare(before, after)
        summary: dict[str, object] = {
            **compared,
            "iterations": self.progress.iteration,
            "wall_seconds": self.progress.seconds,
            "ranks": self.world.size,
        }

        def write() -> None:
            replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
            for when in ("before", "after"):
                self.tracker.summary({f"heldout_{when}/{part}": value for part, value in compared[when].items()})
            self.log_clips(after)
            write_report(folder)

        self.world.on_main(write)
        return summary

    def log_clips(self, after: Evaluation) -> None:
        """Held-out clips to the tracker's video panels."""
        if not after.clips or not self.recipe.track.wandb:
            return
        from fastgrpo.data import video

        folder = self.recipe.run.dir / "evaluation"
        clips = torch.stack([video.read_mp4(folder / clip)[0] for clip in after.clips])
        captions = list(dict.fromkeys(after.prompts))[: len(clips)]
        self.tracker.videos(self.progress.iteration - 1, "heldout", clips, captions, self.recipe.video.fps)


def initial_policy(recipe: Recipe, world: World, trained: Policy) -> Reference:
    """The policy before training, which the KL term measures against: frozen, or without its adapters."""
    if recipe.lora.rank:
        return Unadapted(trained)
    policy = world.run_on_all_ranks(lambda: models.outline(recipe.model, world.device))
    for parameter in policy.network.requires_grad_(False).parameters():  # nothing trains it: no masters
        parameter.data = parameter.data.to(recipe.model.torch_dtype)
    policy.negative, policy.vae = trained.negative, trained.vae
    shard_and_read(policy, recipe, world, "weights of the initial policy")
    return policy


def open_tracker(recipe: Recipe, world: World, start: int) -> Tracker:
    """Each rank's tracker; a mistake that the main rank's meets is raised on every rank."""
    tracker, mistake = None, None
    try:
        tracker = Tracker(
            recipe.run.dir, world.main, recipe.run.iterations, start, wandb_settings(recipe),
            recipe.model_dump(mode="json"),
        )  # fmt: skip
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    assert tracker is not None
    return tracker


def wandb_settings(recipe: Recipe) -> Wandb | None:
    if not recipe.track.wandb:
        return None
    return Wandb(project=recipe.track.project, name=recipe.run.dir.name, entity=recipe.track.entity)


def reward_metrics(scored: Scored, recipe: Recipe, group_size: int) -> dict[str, float]:
    """Means of the valid samples, the spread within groups, and how many samples had no score."""
    valid = scored.valid
    metrics = {"reward/sum": scored.weighted_sum(recipe.weights)[valid].mean().item()}
    for part, values in scored.values.items():
        metrics[f"reward/{part}"] = values[valid].nanmean().item()  # a monitor may lack a valid sample
        spread = values.reshape(-1, group_size).std(1)
        metrics[f"group_std/{part}"] = spread.nanmean().item()
    return metrics | {"reward/invalid": float((~valid).sum())} | scored.metrics()
