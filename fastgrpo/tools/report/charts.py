"""Charts as SVG text for the report: curves, stacked, level and interval bars.

Pure functions, no scripts, no fonts.
Colours are CSS classes (`s-VQ` gives `var(--VQ)`; see report.py), so that one drawing serves light
and dark pages. Each drawing is 440 units wide: two stand side by side on a desk, one fills a
telephone, and text stays legible.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 12, 34
# more are averaged in equal stretches, which keeps a report of 10,000 iterations small
MOST_POINTS = 400
MOST_BARS = 80


@dataclass(frozen=True)
class Series:
    """A curve: y over x, with the CSS colour that it has on the whole page."""

    name: str
    colour: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    _: KW_ONLY
    marks: bool = False
    """Whether the points are large rings joined by a dashed line (evaluations)."""
    bounds: NDArray[np.float64] | None = None
    """[N, 2], the interval of each marked point, drawn through its ring; NaN: none."""


@dataclass(frozen=True)
class Frame:
    """Limits of both axes, and where data lie on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0) * (HEIGHT - TOP - BOTTOM)
        )


def curves(
    label: str,
    series: Sequence[Series],
    smooth: bool = True,
    from_zero: bool = False,
    unit: str = "iteration",
    axis: str = "",
) -> str:
    """Curves over iterations. Dots are the values.

    With smooth, lines are their Gaussian means (see `smoothed`).
    label: what a screen reader says;  from_zero: the vertical axis starts at 0
    unit: of the horizontal axis
    axis: title of the vertical axis, with its unit
    """
    drawn = [_finite(curve) for curve in series]
    drawn = [curve for curve in drawn if len(curve.x)]
    if not drawn:
        return '<p class="note">No values yet.</p>'
    every_y = np.concatenate([values for curve in drawn for values in _extent(curve)])
    low, high = (
        (min(0.0, every_y.min()), every_y.max()) if from_zero else (every_y.min(), every_y.max())
    )
    marks = ticks(float(low), float(high))
    right = max(float(curve.x.max()) for curve in drawn)
    left = min(float(curve.x.min()) for curve in drawn)
    frame = Frame(
        (left, max(right, left + 1)), (min(marks[0], float(low)), max(marks[-1], float(high)))
    )
    body = axes(frame, marks, whole_ticks(*frame.x), unit, axis)
    body += "".join(_dots(curve, frame, faint=smooth) for curve in drawn if not curve.marks)
    for curve in drawn:
        averaged = smooth and not curve.marks
        line = Series(curve.name, curve.colour, curve.x, smoothed(curve.y)) if averaged else curve
        body += _line(
            line, frame, "line" if averaged else "line dashed" if curve.marks else "line thin"
        )
    body += "".join(_rings(curve, frame) for curve in drawn if curve.marks)
    return svg(label, body)


def stacked_bars(
    label: str, names: Sequence[str], colours: Sequence[str], heights: NDArray[np.float64]
) -> str:
    """Bars over iterations, each cut into parts.

    heights: [iterations, parts], at least 0, in seconds
    """
    count = min(len(heights), MOST_BARS)
    stretches = np.array_split(np.arange(len(heights)), count)
    means = np.stack([heights[stretch].mean(0) for stretch in stretches])
    marks = ticks(0.0, float(means.sum(1).max()))
    frame = Frame((0.0, float(len(heights))), (0.0, marks[-1]))
    body = axes(frame, marks, whole_ticks(0, len(heights)), title="seconds")
    for stretch, bar in zip(stretches, means, strict=True):
        left, right = frame.px(stretch[0]), frame.px(stretch[-1] + 1)
        gap = min(1.5, 0.2 * (right - left))
        bottom = 0.0
        first, last = int(stretch[0]) + 1, int(stretch[-1]) + 1
        where = f"iteration {first}" if first == last else f"iterations {first} to {last}, mean"
        for name, colour, value in zip(names, colours, bar, strict=True):
            y = frame.py(bottom + value)
            body += (
                f'<rect class="s-{colour} fill" x="{left:.1f}" y="{y:.1f}" '
                f'width="{max(right - left - gap, 0.5):.1f}" '
                f'height="{frame.py(bottom) - y:.1f}">'
                f"<title>{where}: {escape(name)} {value:.2f} s</title></rect>"
            )
            bottom += float(value)
    return svg(label, body)


def level_bars(
    label: str, names: Sequence[str], colours: Sequence[str], levels: NDArray[np.float64]
) -> str:
    """A bar per name that lies down, with its levels inside each other.

    levels: [names, kinds], ascending, in GiB
    The first level is drawn full, what the next adds faint; the last is written beside the bar.
    """
    height, left, right = 30, 70, 78
    marks = ticks(0.0, float(levels.max()))
    bottom = TOP + height * len(names)

    def px(value: float) -> float:
        return left + value / marks[-1] * (WIDTH - left - right)

    body = ""
    for tick in marks:
        body += (
            f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        body += (
            f'<text x="{px(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(tick)}</text>'
        )
    for row, (name, colour, values) in enumerate(zip(names, colours, levels, strict=True)):
        y = TOP + height * row
        body += f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{escape(name)}</text>'
        start = 0.0
        for style, value in zip(("fill", "fill faint"), values, strict=False):
            body += (
                f'<rect class="s-{colour} {style}" x="{px(start):.1f}" y="{y + 5}" '
                f'width="{max(px(value) - px(start), 0.5):.1f}" height="20">'
                f"<title>{escape(name)}: {value:.2f} GiB</title></rect>"
            )
            start = float(value)
        body += f'<text class="value" x="{px(start) + 6:.1f}" y="{y + 19}">{start:.2f} GiB</text>'
    middle = (left + WIDTH - right) / 2
    body += f'<text class="unit" x="{middle:.0f}" y="{bottom + 33}" text-anchor="middle">GiB</text>'
    return svg(label, body, bottom + 38)


def interval(low: float, mid: float, high: float, limits: tuple[float, float], colour: str) -> str:
    """A small drawing for a table: a point with its interval, and a line at zero.

    colour: up, down or flat
    """
    span = (limits[1] - limits[0]) or 1.0

    def px(value: float) -> float:
        return 8 + (value - limits[0]) / span * 144

    label = f"difference {mid:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return (
        f'<svg class="interval" viewBox="0 0 160 20" role="img" aria-label="{label}">'
        f'<line class="zero" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="1" y2="19"/>'
        f'<line class="s-{colour} stroke" x1="{px(low):.1f}" x2="{px(high):.1f}" '
        'y1="10" y2="10" stroke-width="3"/>'
        f'<circle class="s-{colour} fill" cx="{px(mid):.1f}" cy="10" r="5"/></svg>'
    )


def smoothed(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean over neighbours, normalised at the ends.

    The Gaussian's width is a thirtieth of the run, at least 1.  y: float64 [N]; returns [N]
    """
    position = np.arange(len(y))
    sigma = smoothing_width(len(y))
    weights = np.exp(-0.5 * ((position[:, None] - position[None, :]) / sigma) ** 2)
    return np.asarray(weights @ y / weights.sum(1), dtype=np.float64)


def smoothing_width(count: int) -> float:
    """Standard deviation of the Gaussian mean, in points of the curve."""
    return max(1.0, count / 30)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that span low..high."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def whole_ticks(low: float, high: float) -> list[float]:
    """Round whole numbers within low..high."""
    return [
        tick for tick in ticks(low, max(high, low + 4)) if low <= tick <= high and tick == int(tick)
    ]


def _finite(series: Series) -> Series:
    """The series without NaN, averaged in stretches when it is long."""
    finite = np.isfinite(series.y)
    x, y = series.x[finite], series.y[finite]
    if len(x) > MOST_POINTS:
        x = np.array([part.mean() for part in np.array_split(x, MOST_POINTS)])
        y = np.array([part.mean() for part in np.array_split(y, MOST_POINTS)])
    bounds = None if series.bounds is None else series.bounds[finite]
    bounds = bounds if bounds is not None and len(bounds) == len(x) else None  # else averaged
    return Series(series.name, series.colour, x, y, marks=series.marks, bounds=bounds)


def _extent(series: Series) -> list[NDArray[np.float64]]:
    """What a curve reaches: its values, and the bounds that are known."""
    if series.bounds is None:
        return [series.y]
    return [series.y, series.bounds[np.isfinite(series.bounds)]]


def axes(
    frame: Frame,
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    unit: str = "iteration",
    title: str = "",
) -> str:
    """Lines and numbers of both axes.

    unit: of the horizontal one;  title: of the vertical one, with its unit
    """
    centre = (TOP + HEIGHT - BOTTOM) / 2
    body = (
        f'<text class="unit" transform="rotate(-90 12 {centre:.0f})" x="12" y="{centre:.0f}" '
        f'text-anchor="middle">{escape(title)}</text>'
    )
    for tick in y_ticks:
        y = frame.py(tick)
        body += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
    for tick in x_ticks:
        x = frame.px(tick)
        body += f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_tick(tick)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        body + f'<text class="unit" x="{middle:.0f}" y="{HEIGHT - 2}" '
        f'text-anchor="middle">{escape(unit)}</text>'
    )


def _tick(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{round(value, 10):g}"


def _dots(series: Series, frame: Frame, faint: bool) -> str:
    style = "faint" if faint else "solid"
    dots = ""
    for x, y in zip(series.x, series.y, strict=True):
        note = f"{escape(series.name)}, iteration {x:.0f}: {y:.4g}"
        dots += f'<circle cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.2">'
        dots += f"<title>{note}</title></circle>"
    return f'<g class="s-{series.colour} fill {style}">{dots}</g>'


def _line(series: Series, frame: Frame, style: str) -> str:
    points = " ".join(
        f"{frame.px(x):.1f},{frame.py(y):.1f}" for x, y in zip(series.x, series.y, strict=True)
    )
    return f'<polyline class="s-{series.colour} stroke {style}" points="{points}"/>'


def _rings(series: Series, frame: Frame) -> str:
    rings = ""
    known = np.full((len(series.x), 2), np.nan) if series.bounds is None else series.bounds
    for x, (low, high) in zip(series.x, known, strict=True):
        if math.isfinite(low + high):
            rings += f'<line class="thin" x1="{frame.px(x):.1f}" x2="{frame.px(x):.1f}" '
            rings += f'y1="{frame.py(low):.1f}" y2="{frame.py(high):.1f}"/>'
    for x, y in zip(series.x, series.y, strict=True):
        note = f"{escape(series.name)}, after {x:.0f} iterations: {y:.4g}"
        rings += f'<circle cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="5.5">'
        rings += f"<title>{note}</title></circle>"
    return f'<g class="s-{series.colour} stroke ring">{rings}</g>'


def svg(label: str, body: str, height: float = HEIGHT) -> str:
    """A drawing with its label for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
