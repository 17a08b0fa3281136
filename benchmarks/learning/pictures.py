"""Pictures of runs for the documentation: small PNG files that read on light and dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from benchmarks.learning.campaign import Trained
from benchmarks.learning.intervals import Array
from fastgrpo.tools.report.charts import smoothed

# Okabe and Ito's, and four more
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#444444",
    "#f0e442",
    "#999933",
    "#882255",
    "#000000",
    "#661100",
    "#117733",
    "#88ccee",
)
DPI = 80


def compare(trained: Sequence[Trained], parts: Sequence[str], file: Path, by_seconds: bool) -> None:
    """The variants' training reward over iterations, over seconds where wanted, and what the
    held-out prompts gained.

    Curves are Gaussian means, see `charts.smoothed`; bars are 95 % intervals of the paired
    difference.
    """
    panels = 2 + by_seconds
    figure = Figure(figsize=(3.4 * panels + 1.0, 2.9), layout="constrained")
    axes = figure.subplots(1, panels)
    for colour, one in zip(COLOURS, trained, strict=False):
        curve = smoothed(one.curve(parts))
        axes[0].plot(np.arange(1, len(curve) + 1), curve, color=colour, label=one.variant.label)
        if by_seconds:
            axes[1].plot(one.seconds(), curve, color=colour)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    label(axes[0], "iteration", f"training reward, {' + '.join(parts)}")
    if by_seconds:
        label(axes[1], "seconds of training", "")
    gains(axes[-1], trained, parts)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, file)


def gains(axis: Axes, trained: Sequence[Trained], parts: Sequence[str]) -> None:
    """One horizontal interval per variant, the first on top."""
    for row, (colour, one) in enumerate(zip(COLOURS, trained, strict=False)):
        gain = one.gain(parts)
        if gain is None:
            axis.text(0.0, -row, "ended early", color=colour, fontsize=8, va="center")
            continue
        axis.plot(
            [gain.low, gain.high], [-row, -row], color=colour, linewidth=3, solid_capstyle="butt"
        )
        axis.plot([gain.difference], [-row], "o", color=colour)
    axis.axvline(0.0, color="0.6", linewidth=1)
    axis.set_ylim(0.6 - len(trained), 0.6)
    axis.set_yticks([])
    label(axis, "held-out, after − before", "")


def over_costs(
    trained: Sequence[Trained],
    parts: Sequence[str],
    costs: Mapping[str, Sequence[Array]],
    file: Path,
) -> None:
    """Held-out reward against what it cost, a panel for each cost; the first one's end is dashed.

    costs: by name, of each of `trained` what was spent up to each evaluation, [evaluations]
    """
    figure = Figure(figsize=(3.4 * len(costs) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True)
    rewards = [one.heldout_curve(parts).mean() for one in trained]
    for axis, (name, spent) in zip(np.atleast_1d(panels), costs.items(), strict=True):
        axis.axhline(rewards[0][-1], color="0.6", linewidth=1, linestyle="--")
        for colour, one, x, y in zip(COLOURS, trained, spent, rewards, strict=False):
            title = one.variant.label if axis is np.atleast_1d(panels)[0] else None
            axis.plot(x, y, "o-", color=colour, markersize=3, label=title)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        label(
            axis,
            name,
            f"held-out reward, {' + '.join(parts)}"
            if not axis.get_subplotspec().colspan.start
            else "",
        )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, file)


def label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, file: Path) -> None:
    """With a white ground, so that black text stays readable on a dark page, and without a date
    inside.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, facecolor="white", metadata={"Software": None})
