"""Held-out clips as distributions, as SVG text: a histogram, prompts before against after, Best-of-N.

Pure functions beside `charts.py`, whose frame, axes and colours they have.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fastgrpo.tools.report.charts import LEFT, RIGHT, WIDTH, Frame, axes, svg, ticks

BINS = 16
Values = NDArray[np.float64]


def histogram(label: str, unit: str, kinds: Sequence[tuple[str, str, Values]]) -> str:
    """How many values lie where, one kind over the other.

    kinds: (name, CSS colour, [N]), all in BINS equal bins from the least to the largest value
    """
    finite = [(name, colour, values[np.isfinite(values)]) for name, colour, values in kinds]
    if not sum(len(values) for _, _, values in finite):
        return '<p class="note">No values yet.</p>'
    every = np.concatenate([values for _, _, values in finite])
    marks = ticks(float(every.min()), float(every.max()))
    edges = np.linspace(marks[0], marks[-1], BINS + 1)
    counts = [np.histogram(values, edges)[0] for _, _, values in finite]
    heights = ticks(0.0, float(max(1, *(count.max() for count in counts))))
    frame = Frame((float(edges[0]), float(edges[-1])), (0.0, heights[-1]))
    body = axes(frame, [tick for tick in heights if tick == int(tick)], marks, unit, "clips")
    for (name, colour, _), count in zip(finite, counts, strict=True):
        bars = ""
        for left, right, number in zip(edges[:-1], edges[1:], count, strict=True):
            if number:
                x, y = frame.px(left), frame.py(number)
                bars += f'<rect x="{x:.1f}" y="{y:.1f}" width="{frame.px(right) - x - 1:.1f}" '
                bars += (
                    f'height="{frame.py(0) - y:.1f}"><title>{escape(name)}: {number} clips from '
                )
                bars += f"{left:.3g} to {right:.3g}</title></rect>"
        body += f'<g class="s-{colour} fill half">{bars}</g>'
    return svg(label, body)


def scatter(label: str, unit: str, names: Sequence[str], before: Values, after: Values) -> str:
    """A dot per name, its value before to the right and after upwards, and the line of no change.

    before, after: [N];  unit: of both
    """
    usable = np.isfinite(before) & np.isfinite(after)
    if not usable.any():
        return '<p class="note">No values yet.</p>'
    both = np.concatenate([before[usable], after[usable]])
    marks = ticks(float(both.min()), float(both.max()))
    frame = Frame((marks[0], marks[-1]), (marks[0], marks[-1]))
    body = axes(frame, marks, marks, f"{unit} before training", f"{unit} after")
    body += f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
    body += f'y1="{frame.py(marks[0]):.1f}" y2="{frame.py(marks[-1]):.1f}"/>'
    dots = ""
    for name, first, last, known in zip(names, before, after, usable, strict=True):
        if known:
            dots += f'<circle cx="{frame.px(first):.1f}" cy="{frame.py(last):.1f}" r="4">'
            dots += f"<title>{escape(name)}: {first:.3g} before, {last:.3g} after</title></circle>"
    return svg(label, body + f'<g class="s-sum fill half">{dots}</g>')


def by_prompt(prompts: Sequence[str], values: Values) -> dict[str, Values]:
    """The finite values of each prompt's clips, in the prompts' order; a prompt without any is out.

    prompts: one per clip;  values: [clips]
    """
    found: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        if math.isfinite(value):
            found.setdefault(prompt, []).append(float(value))
    return {prompt: np.array(own) for prompt, own in found.items()}


def best_of_n(values: Values) -> Values:
    """Expected best of n of K values, drawn without putting back, for n = 1 to K.

    The k-th smallest value is the best of n where the other n - 1 are of the k - 1 below it: with
    probability C(k - 1, n - 1) / C(K, n).

    values: [K];  returns [K]
    """
    ordered, count = np.sort(values), len(values)
    return np.array(
        [
            sum(math.comb(k, n - 1) * value for k, value in enumerate(ordered))
            / math.comb(count, n)
            for n in range(1, count + 1)
        ]
    )


def mean_best_of_n(prompts: Sequence[str], values: Values) -> Values:
    """`best_of_n` of each prompt's clips, mean over the prompts, as far as every prompt has clips."""
    own = [best_of_n(of) for of in by_prompt(prompts, values).values()]
    if not own:
        return np.zeros(0)
    least = min(map(len, own))
    return np.asarray(np.mean([curve[:least] for curve in own], axis=0))
