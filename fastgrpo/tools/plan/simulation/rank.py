"""One rank of N with the full-size network, on a machine without a GPU: memory, FLOPs and bytes as
they would be.

Nothing is computed and nothing is allocated: tensors have shapes and no contents (FakeTensorMode),
and the other ranks do not exist (the `fake` process group). All else is what a run does: the
family's classes, `distributed.shard`, our sequence parallelism, recomputation, AdamW. What is not
in it: the CUDA context, NCCL's and cuBLAS' buffers, the allocator's fragmentation, kernels that
keep other tensors than PyTorch's CPU ones, and weights that stay in float32 beside bfloat16 ones.

Memory, and FLOPs with bytes, are two passes: with both trackers at once each keeps the other's
tensors alive.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastgrpo import models
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, predict
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import add_adapters
from fastgrpo.parallel import sharding
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.parallel.world import Group, World
from fastgrpo.tools.plan.simulation.counters import Sent, counting_flops
from fastgrpo.tools.plan.subject import family_plan

CPU = torch.device("cpu")
PASSES = ("update memory", "update work", "rollout memory", "rollout work")
HELD = "held memory"  # one more pass, which reproduces what FSDPMemTracker reports by itself


@dataclass(frozen=True)
class Sizes:
    """What a forward takes: one sample's latent, and its text."""

    latent: tuple[int, int, int, int]  # (C, F, H, W)
    text: int  # tokens of the longest text


@dataclass(frozen=True)
class Ranks:
    """The ranks of which the first is simulated, and how they hold the weights."""

    gpus: int
    ranks_per_node: int
    whole: bool = True  # the rollout's forward has the whole weights, gathered before it
    units: tuple[str, ...] = ()
    """Modules outside the family's blocks to shard on their own as well, by their names."""


@dataclass
class Simulated:
    """One rank.

    Memory in bytes; bytes on the wire are those that one rank sends in a ring, per forward or step.
    """

    update_peak: int = 0  # forward, backward and AdamW's step of one micro-batch
    # of that peak, by FSDPMemTracker's kinds
    update_parts: dict[str, int] = field(default_factory=dict)
    held_peak: int = 0  # the same with the tracker's own holding of gradients, see _tracker
    rollout_peak: int = 0  # a forward of a rollout's batch
    rollout_parts: dict[str, int] = field(default_factory=dict)
    rollout_flops: int = 0
    rollout_sent: dict[str, int] = field(default_factory=dict)
    forward_flops: int = 0  # of the update's micro-batch
    update_flops: int = 0  # forward, recomputation and backward of it
    update_sent: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # collectives of the update's micro-batch
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Pass = Callable[[Recipe, Policy, Sizes, Simulated], None]


def simulate(
    recipe: Recipe,
    config: Mapping[str, Any],
    sizes: Sizes,
    ranks: Ranks,
    passes: Sequence[str] = PASSES,
) -> Simulated:
    """Simulate one forward of the rollout, one micro-batch and one optimizer step of the update.

    config: of the network's class;  passes: some of PASSES, minutes each for a network of 60 blocks
    Raises UserError where sp and shard do not divide the ranks, or sp the network's heads.
    """
    start, found = time.perf_counter(), Simulated()
    whole = ranks.whole
    rollout = (partial(_rollout_memory, whole=whole), partial(_rollout_work, whole=whole))
    does: tuple[Pass, ...] = (_update_memory, _update_work, *rollout, _held_memory)
    actions = dict(zip((*PASSES, HELD), does, strict=True))
    for name in passes:
        with _rank(recipe, config, ranks) as policy:
            actions[name](recipe, policy, sizes, found)
    found.seconds = time.perf_counter() - start
    return found


@contextmanager
def _rank(recipe: Recipe, config: Mapping[str, Any], ranks: Ranks) -> Iterator[Policy]:
    """The sharded policy of rank 0, made of fake tensors, in a world of its own."""
    settings, gpus = recipe.distributed, ranks.gpus
    replicas, shards = mesh_shape(settings, gpus, min(ranks.ranks_per_node, gpus))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        if replicas == 1:
            mesh = init_device_mesh("cpu", (gpus,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(
                "cpu", (replicas, shards), mesh_dim_names=("replicate", "shard")
            )
        sp = None
        if settings.sp > 1:
            own, _ = dist.new_subgroups(group_size=settings.sp)
            sp = Group(own, 0, settings.sp)
        world = World(rank=0, size=gpus, device=CPU, mesh=mesh, sp=sp)
        with FakeTensorMode(), CPU:
            policy = outline(recipe, config)
            more = [policy.network.get_submodule(unit) for unit in ranks.units]
            policy.blocks = [*more, *policy.blocks]  # type: ignore[misc]
            sharding.shard(policy, world, recipe.model.torch_dtype)
            sharding.prefetch(policy, recipe.distributed.prefetch)
            yield policy
    finally:
        dist.destroy_process_group()


def outline(recipe: Recipe, config: Mapping[str, Any]) -> Policy:
    """The family's policy around a network without weights and without a VAE, which the passes here
    do not need.
    """
    settings = recipe.model
    offering = models.with_function("simulated")
    if settings.family not in offering:
        raise UserError(
            f"model.family='{settings.family}': no rank of it can be simulated; leave --simulate "
            "out. Those that can: "
            f"{', '.join(offering)}."
        )
    simulated: Callable[..., Policy] = vars(models.family(settings.family))["simulated"]
    policy = simulated(
        {key: value for key, value in config.items() if not key.startswith("_")}, settings
    )
    policies.configure(policy, settings.model_copy(update={"attention": None}))
    # FSDPMemTracker knows one group of parameters per module: all in compute precision
    policy.network._keep_in_fp32_modules = ()  # type: ignore[assignment]
    if recipe.lora.rank:
        add_adapters(policy.network, recipe.lora, settings.torch_dtype)
    return policy


def inputs(
    recipe: Recipe, policy: Policy, sizes: Sizes, batch: int
) -> tuple[Tensor, Tensor, Condition]:
    """Make a batch as `Policy.velocity` takes it, and set the unconditional branch's condition.

    returns x [B, C, F, H, W], t [B] and the conditions, zeros all
    """
    config: Any = policy.network.config
    planned = family_plan(recipe.model.family, config)
    shapes = planned.condition(sizes.text, sizes.latent)
    channels, frames, *space = sizes.latent
    condition = {name: torch.zeros(shape) for name, shape in shapes.items()}
    policy.negative = condition
    stacked = {name: torch.stack([tensor] * batch) for name, tensor in condition.items()}
    x = torch.zeros(batch, channels, frames - planned.given_frames, *space)
    return x, torch.full((batch,), 0.5), stacked


def _optimizer(recipe: Recipe, policy: Policy) -> torch.optim.Optimizer:
    """AdamW after a first step, which leaves its state, and DTensor's caches filled: a later step
    allocates less.
    """
    trainable = [p for p in policy.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.optimizer.lr)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def loss(policy: Policy, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A mean over the velocity: what else the update computes is small, a few latents.

    x: [B, C, F, H, W];  t: [B];  returns a scalar
    """
    return predict(policy, x, t, condition, 0).square().mean()


def _update_memory(recipe: Recipe, policy: Policy, sizes: Sizes, found: Simulated) -> None:
    x, t, condition = inputs(recipe, policy, sizes, recipe.optimizer.batch_size)
    optimizer = _optimizer(recipe, policy)
    tracker = _tracker(policy, optimizer)
    tracker.track_inputs((x, t, condition))
    with tracker:
        loss(policy, x, t, condition).backward()
        optimizer.step()
    found.update_peak, found.update_parts = _peak(tracker)


def _held_memory(recipe: Recipe, policy: Policy, sizes: Sizes, found: Simulated) -> None:
    """The update's peak as FSDPMemTracker reports it untouched, for comparison with figures taken
    so.
    """
    x, t, condition = inputs(recipe, policy, sizes, recipe.optimizer.batch_size)
    optimizer = _optimizer(recipe, policy)
    tracker = FSDPMemTracker(policy.network, optimizer)
    tracker.track_inputs((x, t, condition))
    with tracker:
        loss(policy, x, t, condition).backward()
        optimizer.step()
    found.held_peak, _ = _peak(tracker)


def _rollout_memory(
    recipe: Recipe, policy: Policy, sizes: Sizes, found: Simulated, whole: bool
) -> None:
    x, t, condition = inputs(recipe, policy, sizes, recipe.rollout.at_once)
    tracker = _tracker(policy, _optimizer(recipe, policy))
    tracker.track_inputs((x, t, condition))
    with sharding.gathered(policy.network) if whole else nullcontext():
        if whole:
            _track_gathered(policy.network, tracker)
        with tracker, torch.no_grad():
            predict(policy, x, t, condition, 0)
    found.rollout_peak, found.rollout_parts = _peak(tracker)


def _track_gathered(network: nn.Module, tracker: FSDPMemTracker) -> None:
    """Tell the tracker of the whole weights, which it would otherwise meet one by one as the
    forward goes on.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            group: Any = module._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params:
                tracker._update_and_maybe_create_winfos(
                    parameter.unsharded_param, _FSDPRefType.UNSHARDED_PARAM
                )


def _tracker(policy: Policy, optimizer: torch.optim.Optimizer) -> FSDPMemTracker:
    """FSDPMemTracker without its hook on the gradients of a module's inputs.

    That hook holds them until all are there, and the time embedding's, which every block has among
    its inputs, comes last of all: so the tracker itself keeps the gradient of every block's tokens
    until the backward ends, 4.3 GiB for HunyuanVideo at 12,600 tokens, which no run without the
    tracker does.
    """
    tracker = FSDPMemTracker(policy.network, optimizer)
    modules: Any = tracker._mod_tracker

    def enter(module: nn.Module, inputs: object) -> None:
        modules._get_append_fn(weakref.ref(module), modules._get_mod_name(module), False)()

    modules._fw_pre_hook = enter
    return tracker


def _peak(tracker: FSDPMemTracker) -> tuple[int, dict[str, int]]:
    """The peak in bytes, and what it was made of, by FSDPMemTracker's kinds."""
    (parts,) = tracker.get_tracker_snapshot("peak").values()
    named = {str(getattr(kind, "value", kind)): int(count) for kind, count in parts.items()}
    return named.pop("Total"), named


def _update_work(recipe: Recipe, policy: Policy, sizes: Sizes, found: Simulated) -> None:
    x, t, condition = inputs(recipe, policy, sizes, recipe.optimizer.batch_size)
    sent, flops = Sent(_branches(recipe) * len(x)), counting_flops()
    with sent, flops:
        mean = loss(policy, x, t, condition)
        found.forward_flops = flops.get_total_flops()
        mean.backward()
        found.update_flops = flops.get_total_flops()
    found.update_sent, found.calls = dict(sent.sent), dict(sent.calls)


def _rollout_work(
    recipe: Recipe, policy: Policy, sizes: Sizes, found: Simulated, whole: bool
) -> None:
    x, t, condition = inputs(recipe, policy, sizes, recipe.rollout.at_once)
    sent, flops = Sent(_branches(recipe) * len(x)), counting_flops()
    with (
        sharding.gathered(policy.network) if whole else nullcontext(),
        sent,
        flops,
        torch.no_grad(),
    ):
        predict(policy, x, t, condition, 0)
    found.rollout_flops, found.rollout_sent = flops.get_total_flops(), dict(sent.sent)


def _branches(recipe: Recipe) -> int:
    """Forwards that classifier-free guidance makes of one, in one batch."""
    return 2 if recipe.model.cfg > 1 else 1
