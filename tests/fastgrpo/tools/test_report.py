"""The report: well-formed, complete, self-contained, right numbers, and playing clips in a real
browser.
"""

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrpo.core.errors import UserError
from fastgrpo.data import video
from fastgrpo.data.tiny_world import shapes
from fastgrpo.run import heartbeat
from fastgrpo.tools.report import charts, ending
from fastgrpo.tools.report.report import write_report
from fastgrpo.tools.report.run_data import read_evaluation

PARTS = ("VQ", "MQ", "TA")
VOID = {"meta", "br", "img", "link", "input", "hr"}
CLIPS = 4
RECIPE = '[run]\ndir = "runs/t2v_tiny"\niterations = 60\n\n[model]\npath = "<b>&amp;</b>"  # must be escaped\n'
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def fake_run(folder: Path, iterations: int = 60, finished: bool = True) -> Path:
    """A run folder as train.py leaves it: noisy curves that rise, drawn clips, and a summary when
    finished.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for i in range(iterations):
        level = 0.45 + 0.3 * (1 - math.exp(-i / 20))
        values = {part: level + 0.04 * k + 0.03 * rng.normal() for k, part in enumerate(PARTS)}
        phases = dict(
            zip(
                ("rollout", "decode", "reward", "update"),
                rng.normal((2, 0.6, 0.2, 4), 0.1),
                strict=True,
            )
        )
        rows.append(
            {"iteration": i, "time": 1.7e9 + 7 * i, "reward/sum": sum(values.values())}
            | {f"reward/{part}": value for part, value in values.items()}
            | {f"group_std/{part}": 0.2 * math.exp(-i / 60) + 0.01 * rng.random() for part in PARTS}
            | {f"seconds/{name}": float(value) for name, value in phases.items()}
            | {"seconds/total": float(sum(phases.values())) + 0.3, "reward/invalid": float(i == 7)}
            | fake_ranks({**phases, "wait": 0.4}, i)
            | {
                "update/max_log_ratio_first": 1e-6 * rng.random(),
                "update/clip_fraction": 0.1 * rng.random(),
            }
            | {"update/grad_norm": 0.5 + 0.2 * rng.random(), "lr": 1e-4}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "logs").mkdir()
    for rank in range(8):
        row = {"iteration": 0, "rank": rank, "host": f"gpu-node-{rank // 4}"}
        (folder / "logs" / f"rank-{rank}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.13.0", "device": "x86_64", "ranks": 2})
    )
    before = fake_evaluation(folder, 0, 0.5, rng)
    if finished:
        after = fake_evaluation(folder, iterations, 0.75, rng)
        change = {part: after[part] - before[part] for part in after}
        bounds = {part: [value - 0.1, value + 0.1] for part, value in change.items()}
        summary = {"before": before, "after": after, "difference": change, "ci95": bounds}
        (folder / "summary.json").write_text(
            json.dumps(summary | {"iterations": iterations, "wall_seconds": 421.0})
        )
    return folder


def fake_ranks(phases: dict[str, float], iteration: int) -> dict[str, float]:
    """What an iteration says of eight ranks: three times in four the sixth is slow in its
    rollout.
    """
    slow = iteration % 4 > 0
    row: dict[str, float] = {}
    for n, (phase, seconds) in enumerate(phases.items()):
        longest = seconds + (1.5 if slow and phase == "rollout" else 0.1)
        row |= {f"seconds_min/{phase}": seconds - 0.1, f"seconds_median/{phase}": seconds}
        row |= {f"seconds_max/{phase}": longest, f"resident_gib/{phase}": 4.0 + n}
        row |= {
            f"allocated_gib/{phase}": 30.0 + n,
            f"reserved_gib/{phase}": 40.5 + n + iteration / 100,
        }
        if phase != "wait":
            row[f"slowest/{phase}"] = 5.0 if slow else 2.0
    return row | {"slowest/rank": 5.0 if slow else 2.0}


def fake_evaluation(
    folder: Path, iteration: int, level: float, rng: np.random.Generator
) -> dict[str, float]:
    meanings = shapes.meanings()[1][::3][:CLIPS]
    prompts = [shapes.caption(meaning, n) for n, meaning in enumerate(meanings) for _ in range(2)]
    scores = {part: [level + 0.1 * rng.normal() for _ in prompts] for part in PARTS}
    for n, meaning in enumerate(meanings):
        clip = shapes.draw(meaning)
        if iteration == 0:  # an untrained policy's clip, as noise
            clip = (0.5 * clip + rng.uniform(0, 120, clip.shape)).astype(np.uint8)
        video.write_mp4(
            folder / "evaluation" / f"step-{iteration}" / f"{n:03d}.mp4", clip, shapes.FPS
        )
    content = {
        "iteration": iteration,
        "prompts": prompts,
        "seeds": [0, 1] * CLIPS,
        "scores": scores,
        "weights": dict.fromkeys(PARTS, 1.0),
        "clips": [f"step-{iteration}/{n:03d}.mp4" for n in range(CLIPS)],
    }
    (folder / "evaluation" / f"step-{iteration}.json").write_text(json.dumps(content))
    means = {part: float(np.mean(values)) for part, values in scores.items()}
    return {"sum": sum(means.values()), **means}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(fake_run(tmp_path_factory.mktemp("runs") / "t2v_tiny"))


def test_a_finished_run_shows_its_numbers(finished: Path) -> None:
    page = Page(finished.read_text())
    summary = json.loads((finished.parent / "summary.json").read_text())
    for part in ("sum", *PARTS):
        assert f"{summary['before'][part]:.3f}" in page.words
        assert f"{summary['after'][part]:.3f}" in page.words
        low, high = summary["ci95"][part]
        assert f"{low:+.3f} to {high:+.3f}" in page.words
    assert "60 iterations raised the held-out reward" in page.words
    assert RECIPE in page.words  # shown as text, character by character
    assert "2.13.0" in page.words
    seconds = [
        json.loads(line)["seconds/total"] for line in (finished.parent / "metrics.jsonl").open()
    ]
    assert f"{np.mean(seconds):.2f} s" in page.words


def test_the_page_needs_nothing_from_elsewhere(finished: Path) -> None:
    text = finished.read_text()
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    )
    for _, attributes in Page(text).tags:
        for name in ("src", "href", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_pictures_and_clips_have_names_and_clips_play(finished: Path) -> None:
    page = Page(finished.read_text())
    videos = page.all("video")
    assert len(videos) == 2 * CLIPS
    assert all({"autoplay", "loop", "muted", "playsinline"} <= video.keys() for video in videos)
    labels = [video["aria-label"] or "" for video in videos]
    assert labels[0] == "before training: a red circle moves left slowly"
    assert labels[1] == "after 60 iterations: a red circle moves left slowly"
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert page.all("html") == [{"lang": "en"}]


def test_ranks_and_memory_are_shown_by_phase(finished: Path) -> None:
    page = Page(finished.read_text())
    rows = [json.loads(line) for line in (finished.parent / "metrics.jsonl").open()]
    cells = [
        " ".join(words.split())
        for words in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", finished.read_text())
    ]
    start = next(
        n
        for n, cell in enumerate(cells)
        if cell.endswith("rollout</span>") and "rank 5" in cells[n + 4]
    )
    means = [
        f"{np.mean([row[f'seconds_{kind}/rollout'] for row in rows]):.2f} s"
        for kind in ("min", "median", "max")
    ]
    assert cells[start + 1 : start + 5] == [*means, "rank 5 (gpu-node-1), 75%"]
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    gpu = next(label for label in labels if label.startswith("GPU memory by phase: "))
    assert "rollout 41.09 GiB" in gpu and "update 44.09 GiB" in gpu  # the largest of all iterations
    assert any(
        label.startswith("Host memory by phase: rollout 4.00 GiB, decode 5.00 GiB")
        for label in labels
    )
    assert "41.09 GiB" in page.words


def test_a_run_of_one_rank_has_no_spread(tmp_path: Path) -> None:
    row = {
        "iteration": 0,
        "time": 1.0,
        "reward/sum": 1.0,
        "seconds/rollout": 1.0,
        "resident_gib/rollout": 0.5,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    words = Page(write_report(tmp_path).read_text()).words
    assert "How far apart" not in words and "Host memory" in words and "GPU memory" not in words


def test_a_run_under_way_says_so(tmp_path: Path) -> None:
    page = Page(write_report(fake_run(tmp_path / "run", iterations=17, finished=False)).read_text())
    assert "17 of 60 iterations are done; the held-out result is not in yet." in page.words
    assert "under way" in page.words
    assert len(page.all("video")) == CLIPS


def test_a_run_that_has_only_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "just begun" in Page(write_report(tmp_path).read_text()).words
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "time": 1.0, "reward/sum": null, "reward/VQ": 0.5}\n'
    )
    assert "No values yet" in Page(write_report(tmp_path).read_text()).words


def test_no_metrics_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_result_within_its_interval_is_not_called_a_gain(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["ci95"]["sum"] = [-0.01, 0.5]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "did not measurably change" in Page(write_report(run).read_text()).words


def test_a_monitor_is_marked_and_its_rise_is_no_gain(tmp_path: Path) -> None:
    """Here all parts have risen by more than their intervals."""
    run = fake_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for name in ("before", "after", "difference", "ci95"):
        values = summary[name]
        summary[name] = {"sum": values["sum"], "VQ": values["VQ"]}
        summary[name] |= {"grid": values["MQ"], "jpeg": values["TA"]}
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "recipe.toml").open("a") as file:
        file.write('[[rewards]]\nname = "a"\nweights = { VQ = 1.0 }\n')
        file.write('[[rewards]]\nname = "video_stats"\nweights = { grid = 0.0, jpeg = 0.0 }\n')
    page = write_report(run).read_text()
    for name, verdict in (
        ("VQ", "up"),
        ("grid (monitor: more is worse)", "down"),
        ("jpeg (monitor)", "flat"),
    ):
        row = page.partition(f">{name}</th>")[2].partition("</tr>")[0]
        assert f"gain s-{verdict}" in row and f's-{verdict} stroke"' in row, name
    assert "weight 0: it was not trained on" in page


def test_a_monitor_has_no_colour_of_a_gain_and_no_spread(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    with (run / "recipe.toml").open("a") as file:
        file.write('[[rewards]]\nname = "a"\nweights = { VQ = 1.0, MQ = 0.0, TA = 1.0 }\n')
    page = write_report(run).read_text()
    lines = {
        part: set(re.findall(r"s-(\w+) stroke line", card))
        for part in PARTS
        for card in re.findall(rf'aria-label="Reward {part} over.*?</svg>', page)
    }
    assert lines == {"VQ": {"p1", "before"}, "MQ": {"flat", "before"}, "TA": {"p3", "before"}}
    spread = (
        page.partition("Spread within a prompt&#x27;s group")[2]
        or page.partition("Spread within a prompt's group")[2]
    )
    assert "VQ" in spread[:20_000] and ">MQ<" not in spread.partition("</figure>")[0]


def test_a_result_of_one_prompt_has_no_interval(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["ci95"] = {part: [None, None] for part in summary["ci95"]}
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(run).read_text()
    assert "which give no interval" in page and "gain s-down" not in page
    assert "<td>-</td>" in page and "nan" not in Page(page).words


def test_the_held_out_sum_is_weighted(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "iteration": 0,
        "prompts": ["a", "a", "b"],
        "seeds": [0, 1, 0],
        "clips": ["x.mp4", "y.mp4"],
    }
    content |= {
        "weights": {"VQ": 2.0, "TA": 0.5},
        "scores": {"VQ": [1.0, 2.0, 3.0], "TA": [4.0, None, 6.0]},
    }
    (tmp_path / "step-0.json").write_text(json.dumps(content))
    evaluation = read_evaluation(tmp_path / "step-0.json")
    assert evaluation.means() == {"sum": pytest.approx(6.5), "VQ": 2.0, "TA": 5.0}
    assert evaluation.first_of(1) == 2


def test_smoothing_keeps_constants_and_lines_in_the_middle() -> None:
    assert charts.smoothed(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    line = np.arange(90, dtype=np.float64)
    assert charts.smoothed(line)[30:60] == pytest.approx(line[30:60], abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.44, 0.61), (-3.0, 250.0), (1e-7, 9e-7), (2.0, 2.0)]
)
def test_ticks_are_few_even_and_span_the_data(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert marks[0] <= low + 1e-12
    assert marks[-1] >= high - 1e-12
    assert np.diff(marks) == pytest.approx(np.full(len(marks) - 1, marks[1] - marks[0]))


PROBE = """<script>
setTimeout(() => {
  const seen = [...document.querySelectorAll("video")].map((clip) => {
    const canvas = document.createElement("canvas");
    canvas.width = clip.videoWidth; canvas.height = clip.videoHeight;
    const pen = canvas.getContext("2d");
    pen.drawImage(clip, 0, 0);
    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
    const corner = [...data.slice(0, 3)];
    const counts = {};
    for (let i = 0; i < data.length; i += 4) {
      const colour = [...data.slice(i, i + 3)];
      const distance = colour.reduce((sum, value, k) => sum + Math.abs(value - corner[k]), 0);
      if (distance > 100) counts[colour] = (counts[colour] || 0) + 1;
    }
    const shape = Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0].split(",").map(Number);
    return { ready: clip.readyState, seconds: clip.duration, width: clip.videoWidth, corner, shape };
  });
  const wide = document.documentElement.scrollWidth > innerWidth;
  const result = document.createElement("pre");
  result.id = "probe"; result.textContent = JSON.stringify({ seen, wide });
  document.body.append(result);
}, 2500);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome binary on PATH")
def test_a_browser_plays_the_clips_in_their_colours(finished: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    probed.write_text(finished.read_text().replace("</body>", PROBE + "</body>"))
    quiet = ["quic", "background-networking", "component-update", "sync"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command += [*(f"--disable-{name}" for name in quiet), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--window-size=600,900",
        "--virtual-time-budget=6000",
        "--dump-dom",
        probed.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', run.stdout)
    assert found is not None
    result = json.loads(html.unescape(found.group(1)))
    assert not result["wide"]  # nothing makes the page scroll sideways
    assert len(result["seen"]) == 2 * CLIPS
    for clip in result["seen"]:
        assert clip["ready"] >= 2
        assert clip["seconds"] == pytest.approx(shapes.FRAMES / shapes.FPS, abs=0.01)
        assert clip["width"] == 192
    meanings = shapes.meanings()[1][::3]
    # after training: drawn clips
    for clip, meaning in zip(result["seen"][1::2], meanings, strict=False):
        assert clip["corner"] == pytest.approx(shapes.BACKGROUND, abs=4)
        assert clip["shape"] == pytest.approx(shapes.COLOURS[meaning.colour], abs=10)


def test_what_ended_a_run_stands_on_top(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", iterations=6, finished=False)
    (folder / heartbeat.FOLDER).mkdir()
    for end, told in (
        ("NoScores: server.max_invalid=0.1: 30% <b>", "error: server.max_invalid=0.1: 30% <b>"),
        ("RuntimeError: of the code", "error: RuntimeError: of the code"),
        ("Ctrl-C", "error: Ctrl-C"),
    ):
        beat = heartbeat.Heartbeat(rank=0, ranks=1, host="n0", pid=1, iteration=6, end=end)
        (folder / heartbeat.FOLDER / "rank-0").write_bytes(heartbeat.encoded(beat))
        page = write_report(folder).read_text()
        (banner,) = re.findall(r'<p class="banner">(.*?)</p>', page)
        assert html.unescape(banner) == f"The newest attempt ended by an {told}"


@pytest.mark.parametrize("evaluated", [True, False])
def test_an_error_in_the_first_iteration_leaves_its_reason(evaluated: bool, tmp_path: Path) -> None:
    """Where something was drawn before it; else the folder goes."""
    folder = fake_run(tmp_path / "run", iterations=0, finished=False)
    (folder / heartbeat.FOLDER).mkdir()
    if not evaluated:
        shutil.rmtree(folder / "evaluation")
        shutil.rmtree(folder / "logs")
    with pytest.raises(UserError), ending.told(folder, own=0, found=False):
        beat = heartbeat.Heartbeat(rank=0, ranks=1, host="n0", pid=1, end="UserError: no scores")
        (folder / heartbeat.FOLDER / "rank-0").write_bytes(heartbeat.encoded(beat))
        raise UserError("no scores")
    if evaluated:
        assert "ended by an error: no scores" in (folder / "report.html").read_text()
    else:
        assert not folder.exists()


def test_nothing_from_a_file_is_markup_or_a_control_character(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", iterations=6, finished=False)
    planted = "<script>1</script>\x1b[2J"
    values = dict.fromkeys(("device", "ranks", "commit", planted), planted)
    (folder / "environment.json").write_text(json.dumps(values | {"cores": [planted]}))
    page = write_report(folder).read_text()
    assert "<script>1" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;1") == 8  # two tiles, five values, a key
