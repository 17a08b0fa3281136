"""The parts of a run, put together once: what `train` and `preflight` work with."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastgrpo.algorithm import samplers, window
from fastgrpo.checkpoint import provenance
from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress
from fastgrpo.checkpoint.reader import Weights, load_shards
from fastgrpo.checkpoint.resume import check_groups, claim_folder, holds_run, prepare_folder
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import only_run_in
from fastgrpo.core.policy import Condition, Policy, experts_of, move
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import World
from fastgrpo.run.heartbeat import HeartbeatWriter
from fastgrpo.run.rank_times import Ranks
from fastgrpo.run.stopping import Signals, Stop
from fastgrpo.run.tracker import Tracker
from fastgrpo.run.tracking.swanlab_run import SwanLab
from fastgrpo.run.tracking.wandb_run import Wandb
from fastgrpo.training import methods
from fastgrpo.training.conditions import encode
from fastgrpo.training.conditions.encode import Encoded
from fastgrpo.training.evaluation import HeldOut
from fastgrpo.training.policies import initial_policy, shard_and_read
from fastgrpo.training.rollout import Plan
from fastgrpo.training.scoring.offline import OfflinePairs
from fastgrpo.training.scoring.scorer import Scorer
from fastgrpo.training.scoring.sources import Source, open_rewards
from fastgrpo.training.trainer import Trainer, schedule_of


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The training prompts, and the grid and shape in which clips of them are drawn."""

    texts: Sequence[str]
    conditions: Sequence[Condition]  # one per text, from the cache on demand
    grid: Tensor  # float32 [T + 1] from 1 to 0, on the device
    eta: float  # as the sampler takes it on this grid
    shape: tuple[int, ...]  # (C, F, H, W) of a latent
    scout_grid: Tensor | None = None  # float32 [S + 1]; None: no scouts
    # by step of the two grids, as `Plan.experts`
    experts: tuple[int, ...] = ()
    scout_experts: tuple[int, ...] = ()

    def batch(self, recipe: Recipe, iteration: int) -> tuple[list[str], list[Condition]]:
        """The prompts of an iteration, and their conditions on the device."""
        count = recipe.prompts.per_iteration
        chosen = prompts.draw(len(self.texts), count, iteration, recipe.run.seed)
        conditions = [move(self.conditions[index], self.grid.device) for index in chosen]
        return [self.texts[index] for index in chosen], conditions

    def plan(self, recipe: Recipe, iteration: int) -> Plan:
        """The plan of an iteration's samples."""
        settings, seed = recipe.rollout, recipe.run.seed
        noisy = window.noisy_steps(settings, iteration, seed)
        count = recipe.prompts.per_iteration
        return Plan(
            seed=seed,
            iteration=iteration,
            group_size=settings.samples_per_prompt,
            grid=window.shortened(self.grid, noisy, settings.tail_steps),
            experts=window.shortened_steps(self.experts, noisy, settings.tail_steps),
            eta=self.eta,
            shared_noise=settings.shared_noise,
            latent_shape=self.shape,
            noises=settings.seeds_per_prompt,
            window=noisy,
            own_steps=window.steps_of_prompts(settings, iteration, seed, count),
            trained=recipe.steps_trained,
            choice=recipe.objective.timestep_choice,
            sampler=settings.sampler,
            store=settings.store,
        )


@dataclass(kw_only=True)
class Session:
    """A run's parts on one rank."""

    recipe: Recipe
    world: World
    stop: Stop
    training: TrainingSet
    heldout: HeldOut
    trainer: Trainer
    scorer: Scorer
    tracker: Tracker
    checkpoints: Checkpoints
    progress: Progress
    ranks: Ranks
    pairs: OfflinePairs | None = None  # preferred ones of a file

    @property
    def policy(self) -> Policy:
        """The policy that is trained."""
        return self.trainer.policy


def claim(recipe: Recipe, world: World, stack: ExitStack) -> tuple[Split, Stop]:
    """Read the prompts and take the run's folder, which must hold no other run.

    The folder is taken for as long as `stack` is open.
    """
    methods.check(recipe)
    signals = stack.enter_context(Signals())
    split = encode.read_prompts(recipe, world)
    world.on_main(lambda: check_groups(recipe, world))
    world.on_main(lambda: stack.enter_context(only_run_in(recipe.run.dir)))
    # under the lock: another run may have begun there while this one waited for it
    for notice in world.on_main(lambda: claim_folder(recipe, world)):
        if world.main:
            line = f"run.dir={recipe.run.dir}: {notice}"
            Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return split, Stop(recipe.run.dir, signals, world)


def open_session(
    recipe: Recipe,
    world: World,
    stack: ExitStack,
    split: Split,
    stop: Stop,
) -> Session:
    """Load, shard, resume; start the reward server where the recipe asks for one.

    `stack` closes all of it.
    """
    heart = stack.enter_context(HeartbeatWriter(recipe.run.dir, world.rank, world.size))
    ranks = Ranks(recipe.run.dir, world, heart)
    sources = open_rewards(recipe, world, stack)
    notices = _check_rewards(recipe, world, sources)
    policy = world.run_on_all_ranks(
        lambda: policies.outline(recipe.model, world.device, recipe.lora),
    )
    shape = policy.latent_shape(recipe.video)
    times = policy.time_grid(recipe.rollout.steps, recipe.rollout.shift, shape)
    steps = recipe.evaluate.steps or recipe.rollout.steps
    heldout_times = policy.time_grid(steps, recipe.rollout.shift, shape)
    grid, heldout_grid = times.to(world.device), heldout_times.to(world.device)
    _check_policy(policy, recipe, grid)
    # not before the recipe has proved itself
    notices += world.on_main(lambda: prepare_folder(recipe, world))
    encoded = encode.encode(recipe, world, split)
    texts = [prompt.text for prompt in encoded.train]
    pairs = world.run_on_all_ranks(lambda: OfflinePairs.of(recipe, texts))
    trainer = _open_trainer(policy, recipe, world, encoded)
    checkpoints = Checkpoints(recipe.run.dir / "checkpoints", recipe.checkpoint, world)
    progress = checkpoints.load(trainer)
    scorer = Scorer(sources, recipe.rewards, recipe.video.fps, world)
    stack.callback(scorer.close)
    tracker = _open_tracker(recipe, world, progress.iteration)
    stack.callback(tracker.close)
    for notice in (*notices, *checkpoints.notices):
        tracker.message(notice)
    if progress.iteration:
        tracker.message(f"resumed from checkpoint step-{progress.iteration}")
    return Session(
        recipe=recipe,
        world=world,
        stop=stop,
        training=_training_set(encoded, recipe, policy, times, grid),
        heldout=_heldout(encoded, heldout_grid, shape, experts_of(policy.network, heldout_times)),
        trainer=trainer,
        scorer=scorer,
        tracker=tracker,
        checkpoints=checkpoints,
        progress=progress,
        ranks=ranks,
        pairs=pairs,
    )


def _check_rewards(recipe: Recipe, world: World, sources: Sequence[Source]) -> list[str]:
    """Compare the rewards with those that the run began with.  returns notices for the user"""
    folder = recipe.run.dir
    return world.on_main(
        lambda: provenance.check_rewards(folder, sources) if holds_run(folder) else []
    )


def _check_policy(policy: Policy, recipe: Recipe, grid: Tensor) -> None:
    """Raise UserError where sampler, method or noise level are not made for the policy.

    grid: float32 [T + 1]
    """
    device = grid.device
    samplers.check(policy, recipe.rollout.sampler, device)
    methods.of(recipe.objective.kind).check_policy(policy, device)
    zero = torch.zeros(1, 1, device=device)
    policy.transition(zero, v=zero, t=grid[0], t_next=grid[1], eta=recipe.rollout.eta)


def _open_trainer(policy: Policy, recipe: Recipe, world: World, encoded: Encoded) -> Trainer:
    """Shard the policy and read its weights; open the initial policy where the method needs it."""
    states = shard_and_read(policy, recipe, world)
    start = _start(recipe, world)
    start(policy.network)
    if encoded.conditions.negative is not None:
        policy.negative = move(encoded.conditions.negative, world.device)
    needed = methods.needs_initial_policy(recipe)
    reference = initial_policy(recipe, world, policy, start) if needed else None
    offload = bool(recipe.distributed.offload)
    trainer = Trainer.create(policy, schedule_of(recipe), reference, offload, states)
    trainer.rounds_by_batch = recipe.model.torch_dtype != torch.float32
    return trainer


def _start(recipe: Recipe, world: World) -> Callable[[nn.Module], None]:
    """What puts the weights of run.start_from into a sharded network; without it, nothing."""
    if recipe.run.start_from is None:
        return lambda network: None
    found = world.on_main(lambda: provenance.start_of(recipe))

    def put(network: nn.Module) -> None:
        if found is not None:
            world.run_on_all_ranks(lambda: load_shards(network, Weights(found, raw=False)))

    return put


def _training_set(
    encoded: Encoded, recipe: Recipe, policy: Policy, times: Tensor, grid: Tensor
) -> TrainingSet:
    """The training prompts.  times: [T + 1] on the CPU;  grid: the same on the device"""
    texts, settings = [prompt.for_rewards for prompt in encoded.train], recipe.rollout
    shape = policy.latent_shape(recipe.video)
    scout_times = None
    if settings.scouts is not None:
        scout_times = policy.time_grid(settings.scout_steps, settings.shift, shape)
    return TrainingSet(
        texts=texts,
        conditions=encoded.conditions.part(slice(len(texts))),
        grid=grid,
        eta=samplers.noise_level(settings.sampler, settings.eta, grid),
        shape=shape,
        scout_grid=None if scout_times is None else scout_times.to(grid.device),
        experts=experts_of(policy.network, times),
        scout_experts=() if scout_times is None else experts_of(policy.network, scout_times),
    )


def _heldout(
    encoded: Encoded, grid: Tensor, shape: tuple[int, ...], experts: tuple[int, ...]
) -> HeldOut:
    """The held-out prompts, whose conditions follow the training prompts' in the cache.

    grid: float32 [T + 1], on the rank's device, where offloaded weights are not
    """
    return HeldOut(
        prompts=[prompt.for_rewards for prompt in encoded.heldout],
        conditions=encoded.conditions.part(slice(len(encoded.train), None)),
        grid=grid,
        shape=shape,
        experts=experts,
    )


def _open_tracker(recipe: Recipe, world: World, start: int) -> Tracker:
    """Each rank's tracker. Raises the main rank's UserError on every rank."""
    tracker, mistake = None, None
    try:
        tracker = Tracker(
            recipe.run.dir,
            main=world.main,
            total_iterations=recipe.run.iterations,
            start_iteration=start,
            wandb=Wandb(**_address(recipe)) if recipe.track.wandb else None,
        )
        if recipe.track.swanlab:
            tracker.send_to_swanlab(SwanLab(**_address(recipe)))
        if recipe.track.tensorboard:
            tracker.write_events()
    except UserError as error:
        mistake = error
    world.raise_if_any_failed(mistake)
    assert tracker is not None
    return tracker


def _address(recipe: Recipe) -> dict[str, Any]:
    """The run's place at a tracking service."""
    return {
        "project": recipe.track.project,
        "name": recipe.run.dir.resolve().name,
        "entity": recipe.track.entity,
        "config": recipe.model_dump(mode="json"),
    }
