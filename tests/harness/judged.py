"""A run that nobody trained: a base model spoilt by noise, and a checkpoint without the noise."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastgrpo.checkpoint.checkpoints import Checkpoints, Progress
from fastgrpo.core import config
from fastgrpo.core.config import Checkpoint
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import open_world
from fastgrpo.training.trainer import Trainer
from tests.harness import runs
from tests.harness.tiny import FOLDER


def write(folder: Path) -> Path:
    """folder/base, the shipped tiny model with noise on its weights, and folder/run, whose
    checkpoint of step 7 has undone that.  returns the run's folder
    """
    base = folder / "base"
    shutil.copytree(FOLDER, base)
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            weights[name] = tensor + 0.5 * tensor.std() * noise
    file.chmod(0o644)
    save_file(weights, file, {"format": "pt"})
    recipe = config.load(
        runs.RECIPE, [f"model.path={base}", f"run.dir={folder / 'run'}", "rewards.0.where=process"]
    )
    recipe.run.dir.mkdir()
    (recipe.run.dir / "recipe.toml").write_text(recipe.to_toml())
    with open_world() as world:
        policy = policies.load(
            recipe.model.model_copy(update={"path": str(FOLDER)}), torch.device("cpu"), recipe.lora
        )
        sharding.shard(policy, world, torch.float32)
        trainer = Trainer.create(
            policy, recipe.optimizer.model_copy(update={"ema_decay": 0.0}), None
        )
        checkpoints = Checkpoints(recipe.run.dir / "checkpoints", Checkpoint(), world)
        checkpoints.save(trainer, Progress(iteration=7))
        checkpoints.finish()
    return recipe.run.dir
