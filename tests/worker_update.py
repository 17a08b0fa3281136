"""One rank of tests/test_update.py: writes trajectories and gradients.  argv: file, rollout batch, update batch"""

import sys

import torch

from fastgrpo.distributed import open_world
from tests import tiny

if __name__ == "__main__":
    torch.set_num_threads(1)
    file, rollout_batch, update_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open_world() as world:
        policy = tiny.load_policy()
        conditions = policy.encode(tiny.PROMPTS)
        from fastgrpo.distributed import shard

        shard(policy, world, torch.float32)
        plan = tiny.plan(policy)
        trajectories = tiny.draw(policy, plan, conditions, world, rollout_batch)
        trainer = tiny.Recorder.create(policy, tiny.settings(update_batch, updates=2), None)
        metrics = tiny.run_update(trainer, plan, trajectories, conditions, world)
        total = len(tiny.PROMPTS) * tiny.GROUP
        share = world.share(total)
        result = {
            "states": world.combine(trajectories.states, share, total),
            "final": world.combine(trajectories.final, share, total),
            "log_probs": world.combine(trajectories.log_probs, share, total),
            "gradients": trainer.gradients,  # type: ignore[attr-defined]
            "metrics": metrics,
        }
        if world.main:
            torch.save(result, file)
