"""How much of the way from the base model to perfectly drawn clips a tiny-world run went.

    python -m benchmarks.learning.headroom runs/t2v_tiny

Draws a clip of each held-out caption of the run, scores it with the run's reward, and sets the
held-out reward before and after training against that.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards import load, plain
from fastgrpo.training.evaluation import Evaluation


def drawn(evaluation: Evaluation) -> dict[str, float]:
    """Mean scores of perfectly drawn clips of the evaluation's captions, each part and the weighted
    sum.
    """
    captions = list(dict.fromkeys(evaluation.prompts))
    meanings = [shapes.parse(caption) for caption in captions]
    clips = np.stack([shapes.draw(meaning) for meaning in meanings if meaning is not None])
    values = load(plain("tiny_world"))(torch.from_numpy(clips), captions, shapes.FPS).values
    parts = {part: scores.mean().item() for part, scores in values.items()}
    return {"sum": sum(evaluation.weights[part] * score for part, score in parts.items()), **parts}


def main() -> None:
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "summary.json").read_text())
    perfect = drawn(Evaluation.read(folder / "evaluation" / "step-0.json"))
    print(f"{'part':<6}{'before':>8}{'after':>8}{'drawn':>8}{'gap closed':>12}")
    for part, score in perfect.items():
        before, after = summary["before"][part], summary["after"][part]
        print(
            f"{part:<6}{before:>8.3f}{after:>8.3f}{score:>8.3f}{(after - before) / (score - before):>12.1%}"
        )


if __name__ == "__main__":
    main()
