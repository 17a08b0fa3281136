"""One rank: writes trajectories and gradients.

argv: file, rollout batch, update batch, then two objects in JSON: the recipe's [distributed]
section, and what else differs: `kept`, the slots that are trained, `window`, the noisy steps,
`own_steps`, those of each prompt, as lists of one `noises` and `trained` of the plan, and
`objective`, of a method without noisy steps, whose moving average differs from its weights
"""

import json
import sys
from dataclasses import replace

import torch

from fastgrpo.core.config import Distributed, Objective
from fastgrpo.core.processes import leave
from fastgrpo.parallel.sharding import shard
from fastgrpo.parallel.world import open_world
from fastgrpo.training import methods
from tests.harness import tiny

if __name__ == "__main__":
    torch.set_num_threads(1)
    file, rollout_batch, update_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open_world(Distributed(**json.loads(sys.argv[4]))) as world:
        policy = tiny.load_policy()
        conditions = tiny.encode()
        shard(policy, world, torch.float32)
        other = json.loads(sys.argv[5])
        objective = Objective(**{"clip_range": 1e-4} | other.get("objective", {}))
        method, noisy = methods.of(objective.kind), "objective" not in other
        plan = method.plan(tiny.plan(policy, shared_noise=noisy), objective)
        if "window" in other:
            plan = replace(
                plan,
                window=range(*other["window"]),
                own_steps=tuple(other.get("own_steps", ())),
                noises=other.get("noises", [1])[0],
                trained=other.get("trained", [2])[0],
            )
        kept = torch.zeros(len(tiny.PROMPTS) * tiny.GROUP, dtype=torch.bool)
        kept[other.get("kept", slice(None))] = True
        everything = replace(plan, trained=None)
        settings = tiny.settings(update_batch, updates=2, ema_decay=0.0 if noisy else 0.5)
        paired = methods.traits_of(objective.kind).pairs
        reference = tiny.moved_reference(world) if paired else None
        trainer = tiny.Recorder.create(policy, settings, reference)
        tiny.move_average(trainer)
        if noisy:
            drawn = tiny.draw(policy, everything, conditions, world, rollout_batch)
        else:
            share = world.share(len(kept))
            drawn = tiny.draw_by(method, trainer, plan, conditions, share, rollout_batch)
        metrics = tiny.run_update(
            trainer,
            the_plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions,
            world=world,
            kept=kept,
            objective=objective,
        )
        total = len(tiny.PROMPTS) * tiny.GROUP
        # each row from one rank
        share = world.share(total) if world.sp is None or world.sp.rank == 0 else range(0)
        rows = len(share)
        gradients = trainer.gradients  # type: ignore[attr-defined]
        result = {"gradients": gradients, "metrics": metrics}
        if noisy and "window" not in other:
            result |= {
                "states": world.combine(tiny.states(drawn, everything)[:rows], share, total),
                "final": world.combine(drawn.final[:rows], share, total),
                "log_probs": world.combine(tiny.log_probs(drawn, everything)[:rows], share, total),
            }
        if world.main:
            torch.save(result, file)
    leave(0)
