"""Preflight's checks that ranks agree on weights, noise and shared sequences."""

import hashlib

import torch
from torch import Tensor

from fastgrpo.core.policy import predict, stack
from fastgrpo.parallel import sequence_parallel, sharding
from fastgrpo.tools.preflight.finding import (
    Finding,
    Parts,
    fingerprints,
    gathered,
    largest,
    replicas_differ,
)

SHARED_BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Bound of norm of the difference over norm, of one forward.

Float32 rounds at 6e-8 and a GPU's TF32 convolutions at 5e-4 of a few layers; bfloat16 rounds every
layer's result at 2e-3, and ranks that hold other tokens sum in another order. Tokens at the wrong
positions differ by about 1.
"""


def weights(parts: Parts) -> Finding:
    """Check that the replicas' weights are the same bits."""
    world = parts.world
    other = replicas_differ(dict(parts.policy.network.named_parameters()), world)
    replicas = world.mesh.size(0) if world.mesh.ndim == 2 else 1
    if other:
        remedy = "the ranks loaded other files; compare model.path on the nodes"
        return Finding("weights", False, f"{other} differs between the {replicas} replicas", remedy)
    if replicas == 1:
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        return Finding("weights", True, f"one replica over {ranks}")
    return Finding("weights", True, f"the same bits on {replicas} replicas")


def noise(parts: Parts) -> Finding:
    """Check that a sample's noise is the same on every rank, and unlike other samples'."""
    plan, world = parts.plan, parts.world
    firsts = [prompt * plan.group_size for prompt in range(min(2, len(parts.texts)))]
    slots = [first + sample for first in firsts for sample in range(2)]
    initial = [_digest(row) for row in plan.initial_noise(slots, world.device)]
    injected = []
    for step in dict.fromkeys((plan.noisy.start, plan.noisy.stop - 1)):
        injected += [_digest(row) for row in plan.step_noise(slots, step, world.device)]
    everyone = gathered((initial, injected), world)
    others = [rank for rank, digests in enumerate(everyone) if digests != everyone[0]]
    if others:
        problem = f"rank {others[0]} draws other noise than rank 0 for the same samples"
        remedy = "a sample's key alone may decide: undo changes to fastgrpo/algorithm/noise.py, "
        remedy += "and use GPUs of one model"
        return Finding("noise", False, problem, remedy)
    expected = len(slots) // 2 if plan.shared_noise else len(slots)
    if len(set(initial)) != expected or len(set(injected)) != len(injected):
        remedy = "a sample's key must decide: undo changes to fastgrpo/algorithm/noise.py"
        return Finding("noise", False, "samples that must differ have the same noise", remedy)
    ranks = f"the same on {world.size} ranks" if world.size > 1 else "one rank"
    return Finding("noise", True, f"{ranks}, another for each of {len(slots)} samples")


def _digest(x: Tensor) -> str:
    """A hash of a tensor's bytes.  x: [...]"""
    return hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def sequences(parts: Parts) -> Finding:
    """Check that a forward over shared sequences equals one rank's, and the ranks' bits agree."""
    world, policy, plan = parts.world, parts.policy, parts.plan
    if world.sp is None:
        return Finding("sequences", True, "not shared (distributed.sp = 1)")
    slot = world.share(parts.total).start
    x = plan.initial_noise([slot], world.device)
    t, condition = plan.grid[:1], stack([parts.conditions[slot // plan.group_size]])
    with (
        torch.no_grad(),
        sharding.rollout_weights(policy.network, parts.recipe.distributed, parts.dtype, world),
    ):
        shared = predict(policy, x, t, condition, plan.expert(0))
        with sequence_parallel.alone(policy.network):
            whole = predict(policy, x, t, condition, plan.expert(0))
    difference = largest(((shared - whole).norm() / whole.norm()).item(), world)
    sums = gathered(fingerprints([shared], world).tolist(), world)
    agree = all(bits == sums[rank - rank % world.sp.size] for rank, bits in enumerate(sums))
    bound = SHARED_BOUND[parts.dtype]
    message = f"relative difference from one rank's forward {difference:.1e}, bound {bound:.0e}"
    if difference <= bound and agree:
        message += "; the ranks that share one agree bit for bit"
        return Finding("sequences", True, message)
    message += "" if agree else "; the ranks that share one disagree"
    remedy = "the exchange of tokens or heads is broken: train with distributed.sp=1, and report it"
    return Finding("sequences", False, message, remedy)
