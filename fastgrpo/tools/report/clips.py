"""Clips of held-out prompts inside the report's page, before training beside after it."""

import base64
from html import escape

from av.error import FFmpegError

from fastgrpo.core.errors import UserError
from fastgrpo.data import video_reader
from fastgrpo.data.video_reader import VideoError
from fastgrpo.tools.report.run_data import Evaluation, Run

SMALL = 256  # pixels: the short side up to which a clip is shown with hard pixel edges


def clips(run: Run) -> str:
    """Clips of held-out prompts, before beside after, playing."""
    if not run.evaluations or not run.evaluations[0].clips:
        return ""
    first, last = run.evaluations[0], run.evaluations[-1]
    shown = [first] if last.iteration == first.iteration else [first, last]
    cards = []
    for n, prompt in enumerate(dict.fromkeys(first.prompts)):
        if any(n >= len(one.clips) or not one.clips[n].is_file() for one in shown):
            break
        try:
            figures = "".join(clip_figure(one, n, prompt) for one in shown)
        except (UserError, FFmpegError, OSError, ValueError, IndexError):
            # a damaged clip: the page goes without it
            continue
        scores = score_line(first, last, n)
        cards.append(
            f'<div class="card"><h3>{escape(prompt)}</h3><div class="pair">{figures}</div>'
            f"{scores}</div>"
        )
    if not cards:
        return ""
    note = (
        "Held-out prompts, each with the same seed before and after training, so that only the "
        "weights differ."
        if len(shown) > 1
        else "Held-out prompts before training; clips after it appear here once they are evaluated."
    )
    button = '<button type="button" id="playing" hidden>Pause all clips</button>'
    grid = f'<div class="clips">{"".join(cards)}</div>'
    head = f'<h2>What changed on screen</h2><p class="note">{note}</p>'
    return f"<section>{head}{button}{grid}</section>"


def clip_figure(evaluation: Evaluation, index: int, prompt: str) -> str:
    """A clip (of one frame, for models of pictures) inside the page.

    Small clips keep their hard pixel edges.
    """
    path = evaluation.clips[index]
    try:
        height, width = video_reader.read(path, [0]).pixels.shape[1:3]
    except (OSError, VideoError) as error:
        problem = escape(f"{path.name} cannot be read ({error})")
        return f"<figure><figcaption>{when(evaluation)}: {problem}</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    label = escape(f"{when(evaluation)}: {prompt}")
    style = ' class="pixelated"' if min(height, width) <= SMALL else ""
    shown = (
        f'<video{style} width="{width}" height="{height}" autoplay loop muted playsinline '
        f'aria-label="{label}" src="data:video/mp4;base64,{data}"></video>'
    )
    return f"<figure>{shown}<figcaption>{when(evaluation)}</figcaption></figure>"


def when(evaluation: Evaluation) -> str:
    """The time of an evaluation, in words."""
    return (
        "before training"
        if evaluation.iteration == 0
        else f"after {evaluation.iteration} iterations"
    )


def score_line(first: Evaluation, last: Evaluation, index: int) -> str:
    """`sum 1.20 → 2.31`, and the parts, of one clip."""
    texts = []
    for part in first.scores:
        before = first.scores[part][first.first_of(index)]
        after = last.scores[part][last.first_of(index)]
        change = f"{before:.2f}" if first is last else f"{before:.2f}&nbsp;→&nbsp;{after:.2f}"
        texts.append(f"<span>{escape(part)} {change}</span>")
    return f'<p class="legend">{" ".join(texts)}</p>'
