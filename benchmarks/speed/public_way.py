"""The public DanceGRPO trainer's way of working, the baseline of benchmarks.speed.iteration;
nothing else uses it.

Written for that purpose from a description of the public trainer, on our models and as plainly as
possible. Its ways:

  rollout   one sample at a time; every step is drawn from the SDE, and every state and log-prob is
  kept; the weights
            are resharded after each forward, so that each forward gathers them again, in float32
  decode    one sample at a time
  reward    each clip is written to an MP4 file, read back and scored alone, before the next sample
  is drawn update    one sample x one step per micro-batch, each followed by an all-reduce of its
  loss and `.item()`; gradients
            are reduced in each micro-batch

What it does as our trainer does, so that both run one algorithm and their rewards can be compared:
keyed noise, prompts and steps; ceil(tau T) trained steps; times that are not rounded; minibatches
balanced over prompts (the public trainer takes samples as they come); advantages summed over a
reward's parts before they are clamped (it sums losses).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgrpo import rewards
from fastgrpo.algorithm import noise, selection, transitions
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, move, stack
from fastgrpo.core.reward import Reward
from fastgrpo.data import video_reader
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.run.stopwatch import Stopwatch


def mean_and_std(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, float]:
    """The public trainer's SDE step.

    x, v: [1, C, F, H, W] float32;  returns mean [1, C, F, H, W] and std
    """
    delta = sigma_next - sigma
    clean = x - sigma * v
    score = -(x - (1 - sigma) * clean) / sigma**2
    return x + delta * v - 0.5 * eta**2 * score * delta, eta * math.sqrt(-delta.item())


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Mean over all dimensions of log N(x_next; mean, std^2).  returns 0-dim"""
    return (
        -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    ).mean()


def advantages(scores: Tensor, weights: Sequence[float], limit: float) -> Tensor:
    """Weighted sum of (r - mean) / (std + 1e-8) over parts.

    scores: [G, parts] of one prompt;  returns [G]
    """
    normalised = (scores - scores.mean(0)) / (scores.std(0) + 1e-8)
    return (normalised @ torch.tensor(weights)).clamp(-limit, limit)


def clipped(ratio: Tensor, advantage: float, limit: float) -> Tensor:
    """The loss of one transition.  ratio: 0-dim;  returns 0-dim"""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - limit, 1 + limit))


@dataclass
class Sample:
    """All that the public trainer keeps of one sample."""

    slot: int
    states: Tensor  # [T + 1, C, F, H, W] float32
    log_probs: Tensor  # [T] float32
    pixels: Tensor  # uint8 [F, H, W, 3] on the CPU: for comparisons, the file is what was scored
    scores: Tensor  # float32 [parts], of the file


@dataclass
class Public:
    """One rank of the public way of working."""

    recipe: Recipe
    world: World
    folder: Path  # of the MP4 files
    policy: Policy
    optimizer: torch.optim.Optimizer
    rewards: list[Reward]
    grid: Tensor
    shape: tuple[int, ...]

    @classmethod
    def open(
        cls, recipe: Recipe, world: World, folder: Path, negative: Condition | None
    ) -> "Public":
        """Load and shard the model.

        negative: the unconditional branch's condition, where model.cfg > 1

        Raises UserError for a recipe that the public trainer has no way of running.
        """
        refuse(recipe, world)
        policy = policies.load(recipe.model, world.device, recipe.lora)
        if policy.transition is not transitions.sde_transition:
            raise UserError(
                f"model.family={recipe.model.family}: the public way is written for flow models "
                "only."
            )
        policy.negative = None if negative is None else move(negative, world.device)
        shape = policy.latent_shape(recipe.video)
        sharding.shard(policy, world, torch.float32)
        policy.network.set_reshard_after_forward(True)  # type: ignore[operator]  # the root as well
        trainable = [p for p in policy.network.parameters() if p.requires_grad]
        chosen = recipe.optimizer
        optimizer = torch.optim.AdamW(
            trainable, chosen.lr, chosen.betas, chosen.eps, chosen.weight_decay
        )
        grid = policy.time_grid(recipe.rollout.steps, recipe.rollout.shift, shape)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(
            recipe,
            world,
            folder,
            policy,
            optimizer,
            [rewards.load(s) for s in recipe.rewards],
            grid.to(world.device),
            shape,
        )

    def iterate(
        self, iteration: int, texts: Sequence[str], conditions: Sequence[Condition]
    ) -> tuple[list[Sample], dict[str, float]]:
        """One iteration.

        texts, conditions: of all ranks' prompts;  returns this rank's samples, seconds by phase
        """
        watch = Stopwatch()
        group = self.recipe.rollout.samples_per_prompt
        samples = []
        for slot in self.world.share(len(texts) * group):
            prompt = slot // group
            states, log_probs, final = self.draw(iteration, slot, conditions[prompt])
            watch.lap("rollout")
            pixels = self.policy.decode(final, stack([conditions[prompt]])).pixels[0].cpu()
            watch.lap("decode")
            scores = self.score_file(pixels, slot, texts[prompt])
            watch.lap("reward")
            samples.append(
                Sample(slot, states=states, log_probs=log_probs, pixels=pixels, scores=scores)
            )
        self.update(iteration, samples, conditions)
        watch.lap("update")
        return samples, {
            name.removeprefix("seconds/"): value for name, value in watch.metrics().items()
        }

    @torch.no_grad()
    def draw(
        self, iteration: int, slot: int, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One sample.

        returns states [T + 1, ...], log-probs [T], and x_0 [1, ...]: the last step's estimate
        """
        prompt, sample = divmod(slot, self.recipe.rollout.samples_per_prompt)
        seed, device = self.recipe.run.seed, self.world.device
        start = 0 if self.recipe.rollout.shared_noise else sample
        x = noise.normal([("initial", seed, iteration, prompt, start)], self.shape, device)
        states, log_probs, clean = [x[0]], [], x
        for step in range(self.recipe.rollout.steps):
            sigma, sigma_next = self.grid[step], self.grid[step + 1]
            v = self.velocity(x, sigma, condition)
            clean = x - sigma * v
            mean, std = mean_and_std(
                x, v=v, sigma=sigma, sigma_next=sigma_next, eta=self.recipe.rollout.eta
            )
            x = mean + std * noise.normal(
                [("step", seed, iteration, prompt, sample, step)], self.shape, device
            )
            states.append(x[0])
            log_probs.append(log_prob(x, mean, std))
        return torch.stack(states), torch.stack(log_probs), clean

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The network's prediction for one sample: float32 weights, under autocast where the recipe
        says bfloat16.
        """
        half = self.recipe.model.dtype == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=half):
            return self.policy.velocity(x, sigma[None], stack([condition]))

    def score_file(self, pixels: Tensor, slot: int, text: str) -> Tensor:
        """Write the clip, read it back, score it.  returns float32 [parts]"""
        file = self.folder / f"{self.world.rank}_{slot}.mp4"
        write_plain_mp4(file, pixels, self.recipe.video.fps)
        return self.score(video_reader.read(file).pixels, text)

    def score(self, pixels: Tensor, text: str) -> Tensor:
        """The weighted parts of one clip, in the order of `recipe.weights`.

        returns float32 [parts]
        """
        found: dict[str, Tensor] = {}
        for reward in self.rewards:
            scores = reward(pixels[None], [text], self.recipe.video.fps)
            assert scores.valid.all(), "a benchmark's clips can all be scored"
            found |= scores.values
        return torch.stack([found[part][0].float().cpu() for part in self.recipe.weights])

    def update(
        self, iteration: int, samples: list[Sample], conditions: Sequence[Condition]
    ) -> None:
        """Optimizer steps, each after its minibatch's samples x steps, one by one."""
        recipe, group = self.recipe, self.recipe.rollout.samples_per_prompt
        of_slot = {sample.slot: sample for sample in samples}
        table = torch.stack([sample.scores for sample in samples])
        weights = list(recipe.weights.values())
        own = torch.cat(
            [
                advantages(part, weights, recipe.objective.advantage_clip)
                for part in table.split(group)
            ]
        )
        everyone = self.world.combine(own, list(of_slot), len(conditions) * group)
        kept = torch.ones(len(everyone), dtype=torch.bool)
        if recipe.objective.best_of_n:
            kept = selection.best_of_n(everyone, kept, group, recipe.objective.best_of_n)
        key = ("minibatches", recipe.run.seed, iteration)
        for members in selection.minibatches(
            kept, group, recipe.optimizer.updates_per_iteration, key
        ):
            mine = [of_slot[slot] for slot in members if slot in of_slot]
            for sample in mine:
                condition = conditions[sample.slot // group]
                self.learn(
                    sample,
                    steps=self.steps(iteration, sample.slot),
                    condition=condition,
                    advantage=float(everyone[sample.slot]),
                    count=len(mine),
                )
            nn.utils.clip_grad_norm_(
                self.policy.network.parameters(), recipe.optimizer.max_grad_norm
            )
            self.optimizer.step()
            self.optimizer.zero_grad()

    def steps(self, iteration: int, slot: int) -> list[int]:
        """The trained steps of a sample: a permutation of its own of all but the last, cut off."""
        key = (
            "timesteps",
            self.recipe.run.seed,
            iteration,
            *divmod(slot, self.recipe.rollout.samples_per_prompt),
        )
        return noise.permutation(self.recipe.rollout.steps - 1, key)[: self.recipe.steps_trained]

    def learn(
        self, sample: Sample, steps: list[int], condition: Condition, advantage: float, count: int
    ) -> None:
        """Forward and backward of one sample's steps, one by one.

        count: samples of this optimizer step
        """
        for step in steps:
            x, x_next = sample.states[step][None], sample.states[step + 1][None]
            sigma, sigma_next = self.grid[step], self.grid[step + 1]
            v = self.velocity(x, sigma, condition)
            mean, std = mean_and_std(
                x, v=v, sigma=sigma, sigma_next=sigma_next, eta=self.recipe.rollout.eta
            )
            ratio = torch.exp(log_prob(x_next, mean, std) - sample.log_probs[step])
            loss = clipped(ratio, advantage, self.recipe.objective.clip_range) / (
                count * len(steps)
            )
            loss.backward()
            shown = loss.detach().clone()
            dist.all_reduce(shown)
            shown.item()
        dist.barrier()


def refuse(recipe: Recipe, world: World) -> None:
    """Raise UserError for what the public trainer does not have."""
    rollout, objective = recipe.rollout, recipe.objective
    for key, value, only in (
        ("rollout.sampler", rollout.sampler, "dance"),
        ("rollout.window", rollout.window, None),
        ("objective.kind", objective.kind, "grpo"),
        ("objective.normalise", objective.normalise, "group"),
        ("objective.step_weights", objective.step_weights, "equal"),
        ("objective.timestep_choice", objective.timestep_choice, "random"),
        ("objective.kl_weight", objective.kl_weight, 0.0),
    ):
        if value != only:
            raise UserError(
                f"{key}={value}: the public way has no such thing; leave it out of the recipe."
            )
    if recipe.distributed.sp > 1 or recipe.prompts.per_iteration % world.size:
        raise UserError(
            f"prompts.per_iteration={recipe.prompts.per_iteration}: the public way gives each rank "
            "whole prompts, "
            f"equally many, and shares no sequence; use a multiple of the {world.size} ranks, and "
            "sp = 1."
        )


def write_plain_mp4(file: Path, pixels: Tensor, fps: float) -> None:
    """A clip, uint8 [F, H, W, 3] of even sides, as H.264 in its own size and the encoder's usual
    settings.
    """
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
