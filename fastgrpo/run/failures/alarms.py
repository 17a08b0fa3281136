"""What an iteration's figures say of a run that learns nothing, or whose policy is lost."""

from collections.abc import Mapping, Sequence

import numpy as np

GROUPS = "update/groups_without_spread"
RATIO = 1.0
"""|log ratio|, a mean over the latent's dimensions, above which an update is no small step: the
clip ranges in use are 1e-5 to 1e-2, and rounding is below 0.1."""
EMPTY = "update/without_spread"
"""1 where no group of the iteration has a spread, else 0."""
MONITORS = "scoring/monitors_without_score"
"""Scores of parts of weight 0 that valid samples lack."""
COUNTED = {
    "iterations_without_spread": EMPTY,
    "groups_without_spread": GROUPS,
    "samples_without_score": "reward/invalid",
    "latents_not_finite": "not_finite/latents",
    "pixels_not_finite": "not_finite/pixels",
    "monitors_without_score": MONITORS,
}
"""Counts of the whole run in summary.json, and the metrics that they sum."""
Numbers = Mapping[str, float]


def counted(metrics: Numbers) -> dict[str, float]:
    """An iteration's part of the run's counts."""
    return {name: metrics[metric] for name, metric in COUNTED.items()}


def notes(
    metrics: Numbers, before: Numbers, weights: Numbers, samples: int, hint: str
) -> list[str]:
    """What to say of an iteration's scores, whole where it is the first of its kind.

    before: the run's counts until then;  samples: of each prompt;  hint: why scores are missing
    """
    lines = []
    if metrics[EMPTY]:
        again = before.get("iterations_without_spread")
        why = without_spread(metrics, weights, samples)
        lines.append("nothing to learn from, again" if again else why)
    if metrics[MONITORS] and not before.get("monitors_without_score"):
        own = [part for part, weight in weights.items() if not weight]
        missing = [f"{part} {metrics[f'invalid/{part}']:.0f}" for part in own]
        lines.append(
            f"parts of weight 0 lack scores ({', '.join(missing)}): their samples are trained on all "
            f"the same; {hint}"
        )
    return lines


def without_spread(metrics: Numbers, weights: Numbers, samples: int) -> str:
    """Why an iteration in which no group's rewards differ teaches nothing.

    weights: by part;  samples: of each prompt
    """
    means = {part: metrics[f"reward/{part}"] for part, weight in weights.items() if weight}
    told = ", ".join(f"{part} {mean:.4g}" for part, mean in means.items())
    text = (
        f"nothing to learn from: the rewards of each prompt's {samples} samples are equal ({told})"
    )
    for part, mean in means.items():
        step = float(np.spacing(np.float32(abs(mean))))
        if step > 1e-3:
            return f"{text}; near {mean:.3g} a float32 has steps of {step:.3g}: shift {part} to 0"
    return f"{text}; look at the rewards' options and clips, or raise rollout.eta"


def ratio_exploded(metrics: Numbers, lr: float, clip_range: float) -> str | None:
    """What to say of an update that moved the policy beyond all bounds; None: it did not.

    Not a number is beyond them, too.
    """
    ratio = metrics["update/max_log_ratio"]
    if ratio <= RATIO:
        return None
    return (
        f"an optimizer step moved the policy beyond all bounds: max |log ratio| {ratio:.1e}, with a "
        f"clip range of {clip_range:.0e}; lower optimizer.lr={lr:g}"
    )


def shortfalls(counts: Numbers, iterations: int) -> list[str]:
    """What a run did not learn from, a sentence each.

    counts: of summary.json;  iterations: of the run
    """
    empty = counts.get("iterations_without_spread", 0.0)
    lines = []
    if empty:
        whole = ": the run learned nothing" if empty >= iterations else ""
        lines.append(
            f"In {empty:.0f} of {iterations} iterations the rewards of no prompt's samples differed, "
            f"so that there was nothing to learn from{whole}."
        )
    lost = counts.get("latents_not_finite", 0.0) + counts.get("pixels_not_finite", 0.0)
    if invalid := counts.get("samples_without_score", 0.0):
        more = f", {lost:.0f} of them since their latents or pixels were not finite" if lost else ""
        lines.append(f"{invalid:.0f} samples had no valid score and were left out{more}.")
    if monitors := counts.get("monitors_without_score", 0.0):
        lines.append(
            f"{monitors:.0f} scores of parts of weight 0 are missing; their samples were trained on."
        )
    if skipped := counts.get("steps_skipped", 0.0):
        lines.append(
            f"{skipped:.0f} optimizer steps were skipped: their gradients were not finite."
        )
    return lines


def of_run(rows: Sequence[Numbers]) -> dict[str, float]:
    """The counts of a run by its rows of metrics, as summary.json has them."""
    counts = {
        name: float(sum(row.get(metric, 0.0) for row in rows)) for name, metric in COUNTED.items()
    }
    return counts | {"steps_skipped": rows[-1].get("update/skipped", 0.0) if rows else 0.0}
