"""Does the alarm on reward hacking go off where a reward is hacked, and only there?

    python -m benchmarks.learning.alarm                    one hacked run and three honest ones
    python -m benchmarks.learning.alarm --iterations 76 --hacked 3

The tiny world is trained by a reward that can be hacked, the sharpness of `video_stats` alone,
which noise and grids raise as well as a crisp drawing does; and by its own reward. Both have the
monitors of `evaluate.every` and the alarm at its default but for what the options say. A finished
run is not run again. Prints a table: the alarm's iteration and monitors, the held-out reward, and
how each monitor ended. The clips of each evaluation lie in FOLDER/NAME-SEED/evaluation/.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.learning.campaign import Trained, Variant, train_all
from fastgrpo.cli import main as cli
from fastgrpo.data import video_reader
from fastgrpo.tools.report.run_data import Run
from fastgrpo.training.evaluation.course import read_alarms
from fastgrpo.training.evaluation.evaluation import Evaluation, compare

RECIPE = Path("launch/t2v_tiny.toml")
COMMON = (
    "prompts.per_iteration=3",
    "rollout.samples_per_prompt=8",
    "rollout.batch_size=24",
    "objective.best_of_n=none",
    "optimizer.batch_size=24",
    "run.preflight=false",
    "checkpoint.keep=1",
    "evaluate.prompts=8",
    "evaluate.seeds=2",
    "evaluate.clips=4",
    "evaluate.alarm=warn",
)
"""The demo's recipe, a seventh of its size and without a server."""
CELL = 64  # pixels of the picture for a clip's side
HACKED = Variant(
    "hacked",
    "sharpness alone",
    (
        'rewards=[{name="video_stats", where="process", weights={sharpness=1.0}}]',
        "optimizer.lr=5e-4",  # twice the recipe's, to be hacked within the hour
    ),
)
HONEST = Variant("honest", "the tiny world's own", ("rewards.0.where=process",))


def table(trained: Sequence[Trained]) -> str:
    """A row per run, as Markdown."""
    lines = ["| trained on | seed | alarm after | reward, before and after | monitors' change |"]
    lines.append("|---|---|---|---|---|")
    for one in trained:
        for seed, run in enumerate(one.runs):
            files = [
                run.folder / "evaluation" / f"step-{e.iteration}.json" for e in run.evaluations
            ]
            before, after = (Evaluation.read(files[n]) for n in (0, -1))
            alarms = read_alarms(run.folder)
            rung = f"{alarms[0].iteration}: {', '.join(alarms[0].monitors)}" if alarms else "never"
            compared = compare(before, after)
            reward = " → ".join(f"{compared[when]['sum']:.3g}" for when in ("before", "after"))
            moved = [
                f"{part} {compared['before'][part]:.3g} → {compared['after'][part]:.3g}"
                for part, weight in after.weights.items()
                if not weight
            ]
            cells = (one.variant.label, str(seed), rung, reward, ", ".join(moved))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(run: Run, file: Path) -> None:
    """A picture of a run's clips: their middle frames, a row per evaluation, a column per prompt."""
    rows = []
    for one in run.evaluations:
        clips = [video_reader.read(clip).pixels for clip in one.clips]
        rows.append(np.concatenate([clip[len(clip) // 2].numpy() for clip in clips], axis=1))
    picture = Image.fromarray(np.concatenate(rows, axis=0))
    size = CELL * len(run.evaluations[0].clips), CELL * len(rows)
    picture.resize(size, Image.Resampling.BOX).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=32)
    parser.add_argument("--every", type=int, default=4, help="iterations between evaluations")
    parser.add_argument("--hacked", type=int, default=1, help="seeds of the hacked reward")
    parser.add_argument("--honest", type=int, default=3, help="seeds of the honest reward")
    parser.add_argument("--picture", type=Path, help="where to draw the hacked run's clips, a PNG")
    parser.add_argument("--folder", type=Path, default=Path("runs/alarm"), help="of the runs")
    arguments = parser.parse_args()
    cli.quiet_libraries()
    common = (
        *COMMON,
        f"run.iterations={arguments.iterations}",
        f"optimizer.decay_updates={arguments.iterations}",
        f"checkpoint.every={arguments.every}",
    )
    trained: list[Trained] = []
    for variant, seeds in ((HACKED, arguments.hacked), (HONEST, arguments.honest)):
        trained += train_all(
            RECIPE,
            common,
            [variant],
            seeds=seeds,
            folder=arguments.folder,
            every=arguments.every,
        )
    print(table(trained))
    if arguments.picture is not None and arguments.hacked:
        sheet(trained[0].runs[0], arguments.picture)


if __name__ == "__main__":
    main()
