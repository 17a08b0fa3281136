"""A run as one HTML page, made only of the files in its folder: gain, course and cost.

Reads metrics.jsonl, recipe.toml, environment.json, summary.json, evaluation/step-N.json, their
clips and alarms.json; all but the first may be missing, as in a run that is still under way. The
page needs no network: clips and drawings are inside.
"""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.run.failures import alarms
from fastgrpo.run.output import printable
from fastgrpo.run.terminal import duration
from fastgrpo.tools.report.charts import Series, curves, interval, smoothing_width, stacked_bars
from fastgrpo.tools.report.clips import clips, when
from fastgrpo.tools.report.figures import alarms as alarm_lines
from fastgrpo.tools.report.figures import course, distributions, strips
from fastgrpo.tools.report.html import chart, legend, page, table
from fastgrpo.tools.report.live.updates import axis_of, updates
from fastgrpo.tools.report.ranks import memory, phase_colour, ranks
from fastgrpo.tools.report.run_data import Run, read_run

HEALTH = (
    (
        "update/max_log_ratio_first",
        "Largest |log ratio| before the first step",
        "Rollout and update must agree: this is 0 but for rounding.",
    ),
    (
        "update/clip_fraction",
        "Share of clipped ratios",
        "Near 1, the step is too large for the clip range.",
    ),
    (
        "update/grad_norm",
        "Norm of the gradient",
        "Before clipping; the mean over the iteration's optimizer steps.",
    ),
    (
        "reward/invalid",
        "Samples without a valid score",
        "They are left out of the statistics and of the loss.",
    ),
    (
        "update/groups_without_spread",
        "Prompts without a spread",
        "Their samples' rewards are equal, so that they teach nothing.",
    ),
    (
        "update/skipped",
        "Optimizer steps skipped",
        "Steps whose gradient was not finite, since the start.",
    ),
    ("update/kl", "KL to the policy before training", "The recipe's KL term keeps it small."),
)


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html.  returns its path

    UserError: the folder has no metrics yet, or one of its files cannot be read.
    """
    run = read_run(run_dir)
    path, title = run_dir / "report.html", f"{run_dir.resolve().name}: fastgrpo report"
    try:
        replace_text(path, printable(page(title, "\n".join(sections(run)))))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); correct that.") from None
    return path


def sections(run: Run) -> tuple[str, ...]:
    """The page's sections as HTML, in order; those that the run has nothing for are empty."""
    return (
        headline(run, run.folder.resolve().name),
        held_out_table(run),
        clips(run),
        strips(run),
        course(run),
        distributions(run),
        reward_curves(run),
        updates(run),
        timings(run),
        memory(run),
        ranks(run),
        health(run),
        settings(run),
        "<footer>Written by fastgrpo from the files of the run folder alone. Point at a dot or a "
        "bar to read its value.</footer>",
    )


def headline(run: Run, name: str) -> str:
    """The result in one sentence, and the run in four numbers."""
    done, total = len(run.rows), run.total
    of = f" of {total}" if total and total != done else ""
    seconds = sum(row.get("seconds/total", 0.0) for row in run.rows)
    tiles = [(f"{done}{of}", "iterations"), (duration(seconds), "training time")]
    if run.evaluations:
        tiles.append((str(len(run.evaluations[-1].prompts)), "held-out clips scored"))
    if "device" in run.environment:
        ranks = run.environment.get("ranks", 1)
        tiles.append(
            (
                escape(str(run.environment["device"])),
                f"hardware, {escape(str(ranks))} rank{'' if ranks == 1 else 's'}",
            )
        )
    items = "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in tiles)
    title = f"<h1>fastgrpo run {escape(name)}</h1>"
    sentence = f'<p class="result">{result(run, done, of)}</p>'
    return f'<header>{title}{sentence}{progress(run)}<ul class="tiles">{items}</ul></header>'


def result(run: Run, done: int, of: str) -> str:
    """One sentence: what the run did to the held-out reward, or that this is not known yet."""
    comparison = run.comparison
    if comparison is None:
        return f"{done}{of} iterations are done; the held-out result is not in yet."
    verdict = comparison.verdict("sum")
    before, after = number(comparison.before["sum"]), number(comparison.after["sum"])
    low, high = comparison.ci95["sum"]
    if not math.isfinite(low):
        told = (
            f"{run.compared_iterations} iterations: held-out reward {before} before, {after} after"
        )
        return f"{told}. Fewer than two prompts have scores on both sides, which give no interval."
    what = {
        "up": f"raised the held-out reward from {before} to {after}",
        "down": f"lowered the held-out reward from {before} to {after}",
        "flat": f"did not measurably change the held-out reward ({before} before, {after} after)",
    }[verdict]
    change = f'<span class="gain s-{verdict}">{signed(comparison.difference["sum"])}</span>'
    interval_text = f"95&nbsp;% interval {signed(low)} to {signed(high)}"
    return f"{run.compared_iterations} iterations {what}: {change} ({interval_text})."


def progress(run: Run) -> str:
    """Banners where the run is not at its end, and for what it did not learn from."""
    if run.failure:
        kind, _, reason = run.failure.partition(": ")
        cause = (
            reason if kind in ("UserError", "OneRankError", "NoScores", "Exploded") else run.failure
        )
        text = f"The newest attempt ended by an error: {cause}"
    elif run.comparison is None:
        begun = "This run is under way, or was stopped" if run.rows else "This run has just begun"
        here = "the evaluation before training" if run.evaluations else "no evaluation"
        known = f"{here} is here" + ("" if run.evaluations else " yet")
        text = f"{begun}: {known}, the one after training is not."
    elif run.compared_iterations < len(run.rows):
        text = (
            "This run has gone on since its last evaluation; the result above is the earlier one."
        )
    else:
        text = ""
    lines = (text, *alarm_lines(run), *alarms.shortfalls(alarms.of_run(run.rows), len(run.rows)))
    return "".join(f'<p class="banner">{escape(line)}</p>' for line in lines if line)


def held_out_table(run: Run) -> str:
    """Held-out means before and after, by part, with the paired difference and its interval."""
    comparison = run.comparison
    if comparison is None:
        return held_out_so_far(run)
    bounds = [bound for pair in comparison.ci95.values() for bound in pair if math.isfinite(bound)]
    limits = (min([0.0, *bounds]), max([0.0, *bounds]))
    rows = []
    for part, difference in comparison.difference.items():
        low, high = comparison.ci95[part]
        verdict = run.verdict(part)
        gain = f'<span class="gain s-{verdict}">{signed(difference)}</span>'
        spread = f"{signed(low)} to {signed(high)}" if math.isfinite(low) else "-"
        drawing = (
            interval(low, difference, high, limits=limits, colour=verdict)
            if math.isfinite(low + difference + high)
            else ""
        )
        values = number(comparison.before[part]), number(comparison.after[part])
        rows.append([labelled(run, part), *values, gain, spread, drawing])
    heads = ["reward", "before", "after", "difference", "95 % interval", "dashed: no difference"]
    body = table(heads, rows, "Held-out rewards before and after training")
    note = "The same prompts and seeds before and after; none of the prompts was trained on."
    if run.monitors:
        note += " A monitor has weight 0: it was not trained on, and its rise is no gain."
    card = f'<p class="note">{note}</p><div class="card">{body}</div>'
    return f"<section><h2>Held-out rewards</h2>{card}</section>"


def labelled(run: Run, part: str) -> str:
    """A part's name as HTML, with what it is where it was not trained on."""
    if part not in run.monitors:
        return escape(part)
    return f"{escape(part)} (monitor{': more is worse' if run.monitors[part] else ''})"


def held_out_so_far(run: Run) -> str:
    """Held-out means of a run without a summary: before training, and the newest ones."""
    if not run.evaluations:
        return ""
    shown = list({one.iteration: one for one in (run.evaluations[0], run.evaluations[-1])}.values())
    rows = [
        [labelled(run, part), *(number(one.means().get(part, math.nan)) for one in shown)]
        for part in shown[0].scores
    ]
    body = table(["reward", *(when(one) for one in shown)], rows, "Held-out rewards so far")
    return f'<section><h2>Held-out rewards</h2><div class="card">{body}</div></section>'


def reward_curves(run: Run) -> str:
    """The training reward and each part over iterations, with the held-out means."""
    if not run.rows:
        return ""
    cards = []
    for part in ("sum", *run.parts):
        training = run.curve(f"reward/{part}", "training", run.colour(part))
        means = [
            (float(one.iteration), one.means()[part])
            for one in run.evaluations
            if part in one.means()
        ]
        x, y = np.array(means, dtype=np.float64).reshape(-1, 2).T
        held_out = Series("held-out", "before", x, y, marks=True)
        label = f"Reward {part} over {len(training.x)} iterations{_ends(training)}"
        entries = [(run.colour(part), "training"), ("before", "held-out")]
        title = "Sum of the rewards" if part == "sum" else labelled(run, part)
        cards.append(
            chart(
                title,
                curves(label, [training, held_out], axis="weighted sum" if part == "sum" else part),
                legend(entries, open_=("held-out",)),
            )
        )
    width = smoothing_width(len(run.rows))
    note = (
        "Dots: the mean over one iteration's clips. Lines: their Gaussian mean over neighbours "
        f"({width:.1f} iterations wide). Rings: held-out prompts. Training draws with noise and "
        "held-out clips without, so the two levels differ."
    )
    grid = f'<div class="charts">{"".join(cards)}</div>'
    return f'<section><h2>Reward during training</h2><p class="note">{note}</p>{grid}</section>'


def timings(run: Run) -> str:
    """The section on seconds per phase of an iteration."""
    names, seconds = run.seconds()
    if not len(seconds):
        return ""
    colours = [phase_colour(name) for name in names]
    label = f"Seconds of each phase over {len(seconds)} iterations; totals are in the table"
    bars = chart(
        "Seconds per iteration",
        stacked_bars(label, names, colours, seconds),
        legend([*zip(colours, names, strict=True)]),
    )
    spent, every = seconds.sum(0), float(seconds.sum())
    rows = [
        [
            f'<span class="s-{colour}"><i class="swatch"></i>{name}</span>',
            duration(float(total)),
            f"{total / max(every, 1e-9):.0%}",
            f"{total / len(seconds):.2f} s",
        ]
        for name, colour, total in zip(names, colours, spent, strict=True)
    ]
    rows.append(["all", duration(every), "100%", f"{every / len(seconds):.2f} s"])
    totals = table(["phase", "total", "share", "per iteration"], rows, "Total time of each phase")
    grid = f'<div class="charts">{bars}<div class="card"><h3>Totals</h3>{totals}</div></div>'
    return f"<section><h2>Where the time goes</h2>{grid}</section>"


def health(run: Run) -> str:
    """Curves that show whether the updates were sound."""
    cards = []
    for name, title, note in HEALTH:
        curve = run.curve(name, title, "sum")
        if len(curve.x):
            label, axis = f"{title}{_ends(curve)}", axis_of(name)
            drawing = curves(label, [curve], smooth=False, from_zero=True, axis=axis)
            cards.append(chart(title, drawing, note))
    trained = [part for part in run.parts if part not in run.monitors]
    spreads = [run.curve(f"group_std/{part}", part, run.colour(part)) for part in trained]
    spreads = [curve for curve in spreads if len(curve.x)]
    if spreads:
        entries = [(curve.colour, curve.name) for curve in spreads]
        label = "Spread of each reward within a prompt's group"
        drawing = curves(label, spreads, from_zero=True, axis="standard deviation")
        cards.append(
            chart(
                "Spread within a prompt's group",
                drawing,
                legend(entries) + "Without spread, GRPO has no signal.",
            )
        )
    if not cards:
        return ""
    charts = f'<div class="charts">{"".join(cards)}</div>'
    return f"<section><h2>Health of the training</h2>{charts}</section>"


def settings(run: Run) -> str:
    """The recipe as it was resolved, and what the run ran on."""
    missing = '<p class="note">The run folder has no {}.</p>'
    recipe, facts = missing.format("recipe.toml"), missing.format("environment.json")
    if run.recipe:
        recipe = (
            f'<pre tabindex="0" role="region" aria-label="recipe.toml">{escape(run.recipe)}</pre>'
        )
    if run.environment:
        rows = [[escape(key), escape(value)] for key, value in flat(run.environment)]
        facts = f'<div class="card">{table([], rows, "Environment", "facts")}</div>'
    return (
        f"<section><h2>Recipe</h2>{recipe}</section><section><h2>Environment</h2>{facts}</section>"
    )


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) in order."""
    settings = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            settings += flat(value, f"{prefix}{key}.")
        else:
            settings.append(
                (
                    f"{prefix}{key}",
                    ", ".join(map(str, value)) if isinstance(value, list) else str(value),
                )
            )
    return settings


def number(value: float) -> str:
    """Three decimals, with a true minus sign."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "n/a"


def signed(value: float) -> str:
    """Three decimals with their sign."""
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else "n/a"


def _ends(curve: Series) -> str:
    finite = [float(y) for y in curve.y if math.isfinite(y)]
    return f", from {finite[0]:.4g} to {finite[-1]:.4g}" if finite else ""
