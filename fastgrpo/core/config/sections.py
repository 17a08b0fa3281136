"""A recipe: one TOML file plus `section.key=value` overrides, as frozen, typed models.

Every field says its unit and what it does. An unknown key is an error that names the nearest key; a
combination that cannot work is an error that names the remedy. `Recipe.to_toml` prints what a run
really used.

Paths: in the file, a path that starts with `./` or `../` is relative to the file, so that a recipe
works from any folder; in an override it is relative to where the command is typed, as is `run.dir`
always. `~` and `$NAME` stand for what a shell makes of them, `builtin:NAME` for what comes with the
package.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tomli_w
from pydantic import Field

from fastgrpo.core.config.base import Count, Fraction, Positive, Rate, Section
from fastgrpo.core.config.paths import PATH, LocalOrHub, LocalPath, portable
from fastgrpo.core.config.reward_spec import RewardSpec, Server
from fastgrpo.core.config.rollout import Rollout

if TYPE_CHECKING:
    import torch


ROUNDING = 1e-9  # 0.7 x 10 is 7, and a little less in binary


class Run(Section):
    dir: Annotated[Path, PATH]
    """Folder of the run; everything that the run writes lies in it."""
    iterations: Positive
    """Iterations of Algorithm 1; one iteration = one rollout and its optimizer steps."""
    seed: int = 0
    """All randomness is a function of this number."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest intact checkpoint in run.dir; `never` refuses a folder that
    already has one."""
    start_from: Annotated[Path, PATH] | None = None
    """Run folder, or a checkpoint in one, whose weights (their moving average where it kept one) a
    new run begins with; None: those of model.path."""
    max_requeues: Count = 3
    """How often in a row a slurm job is put back into the queue without a new checkpoint in
    between; 0 = never."""
    deterministic: bool = False
    """Use deterministic kernels alone, so that a run on GPUs repeats and resumes bit for bit;
    slower, and no cuDNN attention. Without a GPU runs repeat without it."""
    preflight: bool = True
    """Check rollout, update, noise, rewards and the checkpoint folder for some seconds before
    training."""


class Model(Section):
    family: str
    """A file of models/: flux, hunyuan_video, skyreels_i2v, stable_diffusion, wan."""
    path: LocalOrHub
    """Folder in the diffusers layout, builtin:tiny_hunyuan_video, or a hub id, NAME or
    NAME@REVISION: transformer/ or unet/, vae/, text_encoder/, scheduler/, ..."""
    revision: Annotated[str, Field(pattern=r"^[\w./-]+$")] | None = None
    """Branch, tag or commit of model.path's hub repository, the same as NAME@REVISION; None: its
    newest state."""
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] | None = None
    """Which files of weights are read where a part has several, such as fp16: those with that in
    their names, of the other parts the plain ones; None: the plain ones."""
    network: LocalOrHub | None = None
    """Folder or hub id with the network alone, where it is not in `path` (SkyReels over
    HunyuanVideo's other parts)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision of the network; masters, gradients' reduction, trajectories and log-probs
    are float32."""
    guidance: float | None = None
    """Embedded guidance of a distilled network (plain scale, not times 1000); None: the family's
    usual one."""
    guidance_dtype: Literal["model", "float32"] = "model"
    """HunyuanVideo and SkyReels-V1 take 1000 times the guidance. model: multiplied in model.dtype,
    as everybody samples them (in bfloat16 6.0 is 6016); float32: exactly as named (6000)."""
    cfg: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale, in rollout and update alike, both branches trained; 1 = off,
    half the cost."""
    cfg_2: Annotated[float, Field(ge=1)] | None = None
    """The same of the second network, the one for low noise, where a model has two; None: cfg."""
    negative_prompt: str | None = None
    """The text of the unconditional branch where cfg > 1; None: the empty text."""
    gradient_checkpointing: bool | Positive | Annotated[float, Field(gt=0, lt=1)] = False
    """Recompute blocks in the backward pass: all, every n-th, or a share of them such as 0.8, evenly
    spread (a UNet: all). More time, far less memory."""
    keep: Literal["nothing", "attention", "products"] = "nothing"
    """What recomputed blocks keep of their forward and do not compute again: what attention gave, a
    number per token and channel, or that and what every linear layer gave. The same gradients. Of
    no effect where no block is recomputed."""
    attention: str | None = None
    """Attention kernel by diffusers' name, such as flash or _native_cudnn; None: torch's own
    choice. Kernels without a backward, such as sage, are refused in training."""
    text_encoders: Literal["auto", "whole", "sharded", "streamed"] = "auto"
    """Where a text encoder's weights lie while it encodes, one encoder after the other: whole on
    each GPU, sharded over the ranks, or block by block from host memory; auto = the first of these
    that fits. The same conditions bit for bit."""
    decode_batch: Positive | None = None
    """Clips per VAE decode; None: a rollout batch at once (of images as many as kernels can count:
    7 of 1024 x 1024). Changes speed and memory, and pixels up to rounding."""

    @property
    def source(self) -> str:
        """model.path with its revision."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def recomputes(self, block: int) -> bool:
        """Whether a block is recomputed in the backward.  block: its number in the network"""
        asked = self.gradient_checkpointing
        if isinstance(asked, float):
            return math.floor((block + 1) * asked + ROUNDING) > math.floor(block * asked + ROUNDING)
        return bool(asked) and block % int(asked) == 0

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The compute precision as a torch dtype."""
        import torch

        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class Lora(Section):
    rank: Count = 0
    """Rank of the adapters; 0 = train all weights. With adapters, only they are optimized and
    checkpointed."""
    alpha: Rate | None = None
    """The adapters' output is scaled by alpha / rank; None: rank, a scale of 1."""
    targets: tuple[str, ...] = ()
    """Endings of the names of the linear layers that get one; None: the attention projections."""


class Video(Section):
    frames: Positive
    """Frames of a clip in pixels' time; 1 = image."""
    height: Positive
    """Pixels."""
    width: Positive
    """Pixels."""
    fps: Annotated[float, Field(gt=0, le=1000)] = 8.0
    """Frames per second, as declared to the rewards and written into video files."""


class Prompts(Section):
    train: LocalPath
    """Prompts: a file, folder or pattern of .txt (UTF-8), .json, .jsonl, .csv, .tsv or .parquet;
    builtin:prompts_video, builtin:prompts_image, builtin:prompts_i2v (with pictures) and
    builtin:tiny_world_train come along."""
    heldout: LocalPath | None = None
    """Prompts of the evaluation before and after; no prompt of `train` may occur. None: take
    heldout_share of `train`."""
    heldout_share: Fraction = 0.05
    """Share of `train` held out where `heldout` is none, chosen by each text's hash: new prompts
    move no other."""
    per_iteration: Positive = 32
    """Prompts per iteration (32 in the paper)."""
    column: str = "prompt"
    """Column of the text; "caption.text" for a value inside another."""
    image_column: str | None = None
    """Column of the reference image: a file of a picture or of a video, whose first frame is taken,
    or the picture itself."""
    reward_columns: tuple[str, ...] = ()
    """Columns whose values travel to the rewards beside the text, such as include (GenEval), text
    (OCR) or a reference's file; `row_of(prompt)` has them there."""
    language_column: str | None = None
    """Column of the language, compared with `languages`."""
    languages: tuple[str, ...] = ()
    """Languages to keep; None: all."""
    nsfw_columns: tuple[str, ...] = ()
    """Columns of unwanted content: numbers from 0 to 1, or true / false."""
    max_nsfw: Fraction = 0.5
    """Rows with more than this in one of `nsfw_columns` are left out."""
    min_chars: Count = 1
    """Shorter prompts are left out."""
    max_chars: Positive | None = None
    """Longer prompts are left out."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row without text or with an unreadable image ends the run, or is left out and counted."""
    too_long: Literal["cut", "refuse"] = "cut"
    """A prompt with more tokens than a text encoder sees is cut, counted and listed in cut.json of
    the cache, or is a bad row."""
    limit: Positive | None = None
    """At most this many prompts of `train`: the first ones that are kept."""
    cache: Annotated[Path, PATH] | None = None
    """Folder of the prompts' conditions, which runs may share; None: embeddings/ in the run's
    folder."""


class Objective(Section):
    kind: str = "grpo"
    """The training method, a file of fastgrpo/training/methods/: grpo, guard (GRPO-Guard), dppo
    (Flow-DPPO), ddpo; nft (DiffusionNFT), awm and dpo, which need no trajectories; refl, which
    needs a differentiable reward; see docs/guides/algorithms/algorithms.md."""
    normalise: Literal["group", "batch", "largest_std", "global"] = "group"
    """Advantages: by each group's mean and std (the paper), then over the batch (GDPO), by the
    largest group's std (LongCat), or of the summed rewards over all samples (DDPO)."""
    advantage_group: Literal["prompt", "seed"] = "prompt"
    """Samples whose rewards an advantage compares: a prompt's, or those from one initial noise
    (rollout.seeds_per_prompt)."""
    step_weights: Literal["equal", "gradient", "noise"] = "equal"
    """Weights of the steps' losses: equal, the inverse of the gradient's usual size, or the noise
    level (TempFlow)."""
    max_kl: Rate = 1e-5
    """kind = dppo: a transition whose KL divergence from the old policy is above this is not pushed
    further."""
    nft_beta: Annotated[float, Field(gt=0, le=1)] = 1.0
    """kind = nft: how far the implicit positive and negative policies lie from the old one."""
    nft_kl: Annotated[float, Field(ge=0)] = 1e-4
    """kind = nft: weight of the squared difference from the initial policy's velocity; 0 = none."""
    awm_weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    """kind = awm: the log-probability's form, by the matching error and its time."""
    awm_average: Annotated[float, Field(ge=0)] = 0.1
    """kind = awm: weight of the squared difference from the velocity of the weights' moving average,
    a guard against collapse; 0 = none."""
    awm_kl: Annotated[float, Field(ge=0)] = 0.0
    """kind = awm: weight of the squared difference from the initial policy's velocity; 0 = none."""
    dpo_beta: Rate = 100.0
    """kind = dpo: beta, for squared errors that are means over the latent's dimensions."""
    dpo_weighting: Literal["equal", "noise"] = "equal"
    """kind = dpo: beta at every time alike, or times (1 - t)^2, which is Diffusion-DPO's loss on the
    predicted noise."""
    dpo_pairs: LocalPath | None = None
    """kind = dpo: a file of preferred pairs to train on in place of drawn samples, rows of prompt,
    chosen and rejected (files); None: online, the best and the worst of what is drawn."""
    refl_last: Positive = 10
    """kind = refl: the last steps of the grid, from which a sample's trained steps are drawn."""
    refl_margin: float | None = None
    """kind = refl: a sample whose weighted reward is above this teaches nothing (ReFL: 2, of a
    standardised reward); None: all teach."""
    refl_kl: Annotated[float, Field(ge=0)] = 0.0
    """kind = refl: weight of the squared difference from the initial policy's velocity; 0 = none."""
    clip_range: Rate = 1e-4
    """Clip range of the ratio; small because log-probs are means over the latent's dimensions."""
    advantage_clip: Rate = 5.0
    """Advantages are clamped to +- this. With kind = nft it also sets how much good and bad samples
    contrast: 1, 2 or 5, see docs/guides/algorithms/algorithms.md."""
    min_spread: Rate = 1e-6
    """A group whose rewards' standard deviation is below this teaches nothing: advantage 0."""
    timestep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Tau: share of the steps that is trained, ceil(tau T), at most T - 1 (0.6 in the paper)."""
    timestep_choice: Literal["random", "first", "last"] = "random"
    """Which steps: random per sample, or the first / last ones for every sample (an ablation of the
    paper)."""
    best_of_n: Annotated[int, Field(ge=2)] | None = None
    """Train only on this many samples per prompt: the best half and the worst half of the group."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence of each transition to the initial policy (0 in the paper)."""


class Optimizer(Section):
    lr: Rate = 1e-5
    """AdamW learning rate (1e-5 in the paper)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    warmup_updates: Count = 0
    """The rate rises linearly over this many optimizer steps."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """The rate after the warm-up: constant, or falling to a tenth; None: linear where decay_updates
    is set, else constant."""
    decay_updates: Count = 0
    """Optimizer steps over which the rate falls; 0 = with schedule = linear or cosine all that
    follow the warm-up, else never."""
    updates_per_iteration: Positive = 1
    """K: optimizer steps per iteration (4 in the paper; 1 with CFG in training)."""
    batch_size: Positive = 8
    """States (sample x step) per forward and backward pass and rank. Changes speed and memory, and
    results up to rounding; in bfloat16 best that of rollout.batch_size: docs/guides/preflight.md."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per optimizer step of an exponential moving average of the weights, used in evaluation;
    0 = none."""
    max_skipped: Count = 3
    """Optimizer steps with non-finite gradients are skipped; more than this many in a run ends
    it."""


class Distributed(Section):
    sp: Positive = 1
    """Ranks that share each sequence (Ulysses); must divide the network's heads and the ranks of a
    node."""
    shard: Positive | Literal["all"] | None = None
    """Ranks over which the weights are sharded, a multiple of sp; the other ranks replicate. all:
    every rank, across nodes; None: a node's ranks where there are several nodes (HSDP), else
    all."""
    rollout_weights: Literal["auto", "gathered", "sharded"] = "auto"
    """Hold the whole weights during the rollout, gathered once, or gather each block for each step;
    auto = gathered where the free memory allows."""
    offload: bool | Literal["nvme"] = False
    """true: masters, gradients and optimizer state in host memory; the step runs on the CPU, with
    torch's fused AdamW. nvme: masters and AdamW's moments in offload_path, gradients in host
    memory."""
    offload_path: LocalPath | None = None
    """offload = nvme: a folder on each node's NVMe, which keeps nothing when the run has ended."""
    prefetch: Count = 1
    """Blocks whose weights are asked for ahead of the one that computes; 0 = the engine's way.
    Speed and memory."""


class Checkpoint(Section):
    every: Positive = 10
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: Positive = 2
    """Newest checkpoints kept, and one more until samples of the newest weights are scored."""
    keep_best: bool = True
    """Keep also the checkpoint with the best mean training reward since the one before, or with
    evaluate.every the best held-out reward."""
    background: bool = False
    """Write while training goes on: the state is copied to host memory first, and one save runs at
    a time."""


class Evaluate(Section):
    prompts: Positive = 24
    """Held-out prompts evaluated with the ODE sampler before and after training, and on the way."""
    seeds: Positive = 2
    """Fixed seeds per prompt."""
    steps: Positive | None = None
    """Denoising steps; None: rollout.steps."""
    clips: Count = 8
    """Held-out prompts whose clips are kept for the report."""
    every: Count = 0
    """Iterations between evaluations on the way, which change no weight; 0 = only before and after.
    Evaluations then also measure monitors of reward hacking, and the best checkpoint is the one
    with the best held-out reward."""
    alarm: Literal["off", "warn", "stop", "return"] = "warn"
    """What to do where the held-out reward rises while a monitor gets worse: nothing, say so, end
    the run, or go back to the best checkpoint with a lower learning rate."""
    alarm_after: Positive = 2
    """Evaluations in a row that must show it before the alarm is raised."""
    alarm_lr: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """alarm = return: the learning rate is multiplied by this at each return."""
    alarm_returns: Positive = 3
    """alarm = return: the alarm after so many returns ends the run."""


class Track(Section):
    wandb: bool = False
    """Log to Weights & Biases as well; offline where no key is at hand."""
    swanlab: bool = False
    """Log to SwanLab as well; offline where no key is at hand. The extra swanlab has its client."""
    project: str = "fastgrpo"
    entity: str | None = None
    """wandb's entity, SwanLab's workspace."""
    tensorboard: bool = False
    """Write every number for TensorBoard as well, into run.dir/tensorboard; no package is needed,
    but to look: tensorboard --logdir RUNS."""


class Recipe(Section):
    """All settings of a run; see each section."""

    run: Run
    model: Model
    lora: Lora = Lora()
    video: Video
    prompts: Prompts
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    distributed: Distributed = Distributed()
    rewards: Annotated[tuple[RewardSpec, ...], Field(min_length=1)]
    server: Server = Server()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    track: Track = Track()

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward part, over all rewards."""
        return {part: weight for spec in self.rewards for part, weight in spec.weights.items()}

    @property
    def samples_trained(self) -> int:
        """Samples of a group that the update uses."""
        return self.objective.best_of_n or self.rollout.samples_per_prompt

    @property
    def advantage_size(self) -> int:
        """Samples of a group whose rewards are compared."""
        of_prompt = self.rollout.samples_per_prompt
        per_seed = self.objective.advantage_group == "seed"
        return of_prompt // self.rollout.seeds_per_prompt if per_seed else of_prompt

    @property
    def steps_trained(self) -> int:
        """Transitions trained per sample: ceil(tau T), of noisy steps alone."""
        exact = self.objective.timestep_fraction * self.rollout.steps
        noisy = self.rollout.window or self.rollout.steps - 1
        return min(math.ceil(exact - 1e-9), noisy)  # 0.28 * 25 is 7, and a little more in binary

    def to_toml(self) -> str:
        """The resolved recipe as TOML; unset optional fields are left out."""
        return tomli_w.dumps(portable(self.model_dump(mode="json", exclude_none=True)))
