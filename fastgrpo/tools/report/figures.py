"""Sections of the report on the held-out clips: on the way, by prompt, and as distributions.

The strips and the curves on the way need `evaluate.every`; what is before and after every run has.
"""

import base64
import io
import math
from html import escape

import numpy as np
from av.error import FFmpegError
from PIL import Image

from fastgrpo.core.errors import UserError
from fastgrpo.data import video_reader
from fastgrpo.data.video_reader import VideoError
from fastgrpo.tools.report.charts import Series, curves
from fastgrpo.tools.report.clips import SMALL, when
from fastgrpo.tools.report.distributions import (
    by_prompt,
    histogram,
    mean_best_of_n,
    scatter,
)
from fastgrpo.tools.report.html import chart, legend
from fastgrpo.tools.report.run_data import Evaluation, Run
from fastgrpo.training.evaluation.course import Alarm, read_alarms
from fastgrpo.training.evaluation.monitors import CLIP_DISTANCE, DISTANCE

MOST_STILLS = 10  # of a prompt's strip, spread over the evaluations
STILL = 160  # pixels: the height to which a still is scaled down
DISTANCES = {
    DISTANCE: "root mean square difference of the seeds' thumbnails, 0 to 1",
    CLIP_DISTANCE: "1 - cosine of the seeds' CLIP vectors",
}


def alarms(run: Run) -> list[str]:
    """A sentence for each alarm of the run; of several that only warned, one for all."""
    found = read_alarms(run.folder)
    warned = [one for one in found if one.action == "warn"]
    lines = [alarm_line(one) for one in found if one not in warned[1:]]
    if len(warned) > 1:
        lines.append(
            f"It warned {len(warned)} times, last after {warned[-1].iteration} iterations."
        )
    return lines


def alarm_line(alarm: Alarm) -> str:
    """What was alarmed about, and what the run did."""
    monitors = " and ".join(alarm.monitors)
    ended = {"warn": "the run warned and went on"}.get(alarm.action, "the run was ended")
    back = f"the run went back to {alarm.back_to} iterations, with {alarm.lr_factor:g} of the rate"
    did = ended if alarm.back_to is None else back
    return (
        f"Alarm after {alarm.iteration} iterations: {monitors} got worse while the held-out reward "
        f"rose, so the reward may be hacked; {did}."
    )


def course(run: Run) -> str:
    """The held-out reward and every monitor at each evaluation, with its interval."""
    points = [row for row in run.rows if "heldout/sum" in row]
    if not points or not run.evaluations:
        return ""
    first, cards = run.evaluations[0].means(), []
    x = np.array([0.0, *(row["iteration"] + 1 for row in points)])
    for part in ("sum", *(name for name in run.monitors if f"heldout/{name}" in points[-1])):
        means = [row.get(f"heldout/{part}", math.nan) for row in points]
        change = [row.get(f"heldout_change/{part}", math.nan) for row in points]
        ends = [
            [row.get(f"heldout_{end}/{part}", math.nan) for end in ("low", "high")]
            for row in points
        ]
        base = np.array(means)[:, None] - np.array(change)[:, None]
        bounds = np.concatenate([[[math.nan, math.nan]], base + np.array(ends)])
        y = np.array([first.get(part, math.nan), *means])
        colour = "sum" if part == "sum" else "before"
        worse = (
            "" if part == "sum" else ": more is worse" if run.monitors[part] else ": less is worse"
        )
        title = "Sum of the rewards" if part == "sum" else f"{escape(part)} (monitor{worse})"
        label = f"Held-out {part} at {len(x)} evaluations, from {y[0]:.3g} to {y[-1]:.3g}"
        own = Series("held-out", colour, x, y, marks=True, bounds=bounds)
        axis = "weighted sum" if part == "sum" else part
        cards.append(chart(title, curves(label, [own], smooth=False, axis=axis)))
    note = (
        "Bars: the 95&nbsp;% interval of the change since before training. An alarm is raised where "
        "the reward rises and a monitor, which nothing is trained on, gets worse beyond its interval."
    )
    grid = f'<div class="charts">{"".join(cards)}</div>'
    return f'<section><h2>Held out on the way</h2><p class="note">{note}</p>{grid}</section>'


def strips(run: Run) -> str:
    """A still of each prompt's clip at every evaluation, in a row."""
    shown = spread(run.evaluations)
    if len(shown) < 3:
        return ""
    rows = []
    for n, prompt in enumerate(dict.fromkeys(shown[0].prompts)):
        stills = [still(one, n, prompt) for one in shown]
        if not any(stills):
            break
        label = f"{prompt}: one still of each evaluation"
        rows.append(
            f'<div class="card"><h3>{escape(prompt)}</h3><div class="scroll strip" role="region" '
            f'tabindex="0" aria-label="{escape(label)}">{"".join(stills)}</div></div>'
        )
    if not rows:
        return ""
    note = "The middle frame of the clip of each prompt's first seed; the noise is the same."
    return (
        f'<section><h2>Each prompt over the iterations</h2><p class="note">{note}</p>'
        f'<div class="strips">{"".join(rows)}</div></section>'
    )


def spread(evaluations: list[Evaluation]) -> list[Evaluation]:
    """At most MOST_STILLS of the evaluations, evenly spread, the first and the last among them."""
    count = min(len(evaluations), MOST_STILLS)
    places = np.linspace(0, len(evaluations) - 1, count).round().astype(int)
    return [evaluations[place] for place in places]


def still(evaluation: Evaluation, index: int, prompt: str) -> str:
    """The middle frame of a clip as a figure; empty where there is no clip that can be read."""
    if index >= len(evaluation.clips) or not evaluation.clips[index].is_file():
        return ""
    path = evaluation.clips[index]
    try:
        pixels = video_reader.read(path).pixels
        frame = Image.fromarray(pixels[len(pixels) // 2].numpy())
    except (UserError, VideoError, FFmpegError, OSError, ValueError, IndexError):
        return ""
    small = min(frame.size) <= SMALL
    frame.thumbnail((4 * STILL, STILL))
    file = io.BytesIO()
    frame.save(file, format="PNG" if small else "JPEG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    kind, style = ("png", ' class="pixelated"') if small else ("jpeg", "")
    text = escape(f"{when(evaluation)}: {prompt}")
    return (
        f'<figure><img{style} alt="{text}" width="{frame.width}" height="{frame.height}" '
        f'src="data:image/{kind};base64,{data}"><figcaption>{evaluation.iteration}</figcaption>'
        "</figure>"
    )


def distributions(run: Run) -> str:
    """The held-out clips before and after: rewards, the best of several, and how much they differ."""
    if not run.evaluations:
        return ""
    shown = list({one.iteration: one for one in (run.evaluations[0], run.evaluations[-1])}.values())
    kinds = [
        (when(one), colour, one) for one, colour in zip(shown, ("before", "sum"), strict=False)
    ]
    entries = [(colour, name) for name, colour, _ in kinds]
    drawing = histogram(
        f"Histogram of the held-out reward of {len(shown[0].prompts)} clips",
        "sum of the rewards",
        [(name, colour, one.scores["sum"]) for name, colour, one in kinds],
    )
    cards = [chart("Held-out reward of each clip", drawing, legend(entries)), best_of(shown)]
    cards += [diversity(run, part) for part in DISTANCES if part in shown[0].scores]
    grid = f'<div class="charts">{"".join(cards)}</div>'
    return f"<section><h2>Held-out clips, one by one</h2>{grid}</section>"


def best_of(shown: list[Evaluation]) -> str:
    """What the best of n seeds of a prompt scores, before and after."""
    series, entries = [], []
    for one, colour in zip(shown, ("before", "sum"), strict=False):
        y = mean_best_of_n(one.prompts, one.scores["sum"])
        if len(y) > 1:
            series.append(Series(when(one), colour, np.arange(1.0, len(y) + 1), y, marks=True))
            entries.append((colour, when(one)))
    if not series:
        return ""
    label = f"Expected best held-out reward of 1 to {len(series[0].x)} clips of a prompt"
    drawing = curves(
        label,
        series,
        smooth=False,
        unit="clips of a prompt, of which the best counts",
        axis="weighted sum",
    )
    note = "Where training only sharpens, the curve before training catches up with more clips."
    return chart("Best of n", drawing, legend(entries) + note)


def diversity(run: Run, part: str) -> str:
    """How far apart the seeds of each prompt are, before against after."""
    first, last = run.evaluations[0], run.evaluations[-1]
    if part not in last.scores or first is last:
        return ""
    before, after = (by_prompt(one.prompts, one.scores[part]) for one in (first, last))
    names = [prompt for prompt in before if prompt in after]
    x, y = (np.array([of[name].mean() for name in names]) for of in (before, after))
    if not len(x):
        return ""
    change = f"{x.mean():.3g} before, {y.mean():.3g} after"
    label = f"Mean distance between the seeds of {len(names)} prompts, {part}: {change}"
    note = f"A dot per prompt; below the line its seeds became more alike. Mean {change}"
    title = "Distance between seeds" + (" by CLIP" if part == CLIP_DISTANCE else "")
    return chart(title, scatter(label, "distance", names, x, y), f"{note}: {DISTANCES[part]}.")
