"""Curves of the updates over iterations: learning rate, loss, noisy steps and memory."""

import math

import numpy as np

from fastgrpo.run.terminal import PHASES
from fastgrpo.tools.report.charts import Series, curves
from fastgrpo.tools.report.html import chart, legend
from fastgrpo.tools.report.run_data import Run

AXES = {
    "lr": "learning rate",
    "update/loss": "loss per transition",
    "update/max_log_ratio_first": "|log ratio|",
    "update/clip_fraction": "share of ratios",
    "update/grad_norm": "norm",
    "reward/invalid": "samples",
    "update/groups_without_spread": "groups",
    "update/skipped": "steps",
    "update/kl": "KL per transition",
}
"""The title of a metric's axis, with its unit where it has one."""

SINGLE = (
    ("lr", "Learning rate", "At the end of each iteration."),
    ("update/loss", "Loss", "It need not fall: advantages have mean 0 in every group."),
)
STEPS = {
    "rollout/noisy_step_min": ("p4", "lowest"),
    "rollout/noisy_step": ("sum", "mean"),
    "rollout/noisy_step_max": ("p3", "highest"),
}
"""The first noisy step of an iteration's prompts: colour and name of the curve."""


def axis_of(metric: str) -> str:
    """The title of a metric's vertical axis."""
    return AXES.get(metric, metric.rpartition("/")[2].replace("_", " "))


def updates(run: Run) -> str:
    """The section on the course of the updates; empty where the run has no such numbers."""
    cards = ""
    for metric, title, note in SINGLE:
        curve = run.curve(metric, title, "sum")
        if len(curve.x):
            drawing = curves(
                f"{title} over {len(curve.x)} iterations",
                [curve],
                smooth=metric != "lr",
                from_zero=metric == "lr",
                axis=axis_of(metric),
            )
            cards += chart(title, drawing, note)
    cards += noisy_steps(run)
    cards += memory_over_time(run, {"allocated": "tensors", "reserved": "held by PyTorch"}, "GPU")
    cards += memory_over_time(run, {"resident": "resident"}, "Host")
    if not cards:
        return ""
    grid = f'<div class="charts">{cards}</div>'
    return f"<section><h2>Course of the updates</h2>{grid}</section>"


def noisy_steps(run: Run) -> str:
    """A card with the steps that were drawn with noise, from which the updates choose."""
    series = [run.curve(metric, name, colour) for metric, (colour, name) in STEPS.items()]
    series = [curve for curve in series if len(curve.x)]
    if not any(curve.y.any() for curve in series):  # none, or noise from the first step on
        return ""
    drawing = curves("First noisy step over iterations", series, smooth=False, axis="step, from 0")
    note = "Over the iteration's prompts; the updates choose transitions from there on."
    entries = [(curve.colour, curve.name) for curve in series]
    return chart("First noisy step", drawing, legend(entries) + note)


def memory_over_time(run: Run, kinds: dict[str, str], where: str) -> str:
    """A card with an iteration's largest memory peak over phases and ranks, in GiB."""
    series = []
    for (kind, name), colour in zip(kinds.items(), ("sum", "before"), strict=False):
        names = [f"{kind}_gib/{phase}" for phase in PHASES]
        peaks = np.array([max((r[n] for n in names if n in r), default=math.nan) for r in run.rows])
        x = np.array([row["iteration"] + 1.0 for row in run.rows])
        if np.isfinite(peaks).any():
            series.append(Series(name, colour, x, peaks))
    if not series:
        return ""
    drawing = curves(
        f"{where} memory over iterations", series, smooth=False, from_zero=True, axis="GiB"
    )
    entries = [(curve.colour, curve.name) for curve in series]
    note = "The largest peak of any rank in any phase; steady growth is a leak."
    return chart(f"{where} memory over iterations", drawing, legend(entries) + note)
