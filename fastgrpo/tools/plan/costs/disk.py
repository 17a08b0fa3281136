"""What a run needs on its disks: the models' files and its checkpoints."""

from fastgrpo.tools.plan.costs.compute import reduced_bytes
from fastgrpo.tools.plan.costs.memory import GRADIENT, MASTER, MOMENTS
from fastgrpo.tools.plan.subject import Subject

FILES = 2  # bytes of a number in published weights: bfloat16
WHILE_WRITING = 2  # checkpoints beside those that are kept: the best, and one that is written


def of_run(subject: Subject) -> dict[str, float]:
    """Bytes by kind.

    weights: network, text encoders and VAE, on every node or on a disk that all share
    checkpoints: on the disk of the run's folder, as many as there are at once
    """
    job, auxiliary = subject.job, subject.auxiliary
    optimizer = job.recipe.optimizer
    trained = sum(reduced_bytes(job, unit) for unit in job.network.all_units) / GRADIENT
    one = (MASTER + MOMENTS + (MASTER if optimizer.ema_decay else 0)) * trained
    models = job.network.parameters + auxiliary.encoders + auxiliary.vae
    return {
        "weights": FILES * models,
        "checkpoints": (job.recipe.checkpoint.keep + WHILE_WRITING) * one,
    }
