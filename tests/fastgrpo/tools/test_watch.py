"""A run that is watched: the present state, the page that keeps itself up to date, its token, the
report on the way, and titles on every axis.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path

import httpx
import numpy as np
import pytest

from fastgrpo.cli import main as cli
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.serving.server.process import bound
from fastgrpo.run import heartbeat
from fastgrpo.run.heartbeat import Heartbeat
from fastgrpo.run.tracker import read_metrics
from fastgrpo.tools.report import charts
from fastgrpo.tools.report.live import on_the_way, server
from fastgrpo.tools.report.live.now import now
from fastgrpo.tools.report.live.on_the_way import ReportOnTheWay
from fastgrpo.tools.report.report import write_report
from fastgrpo.tools.report.run_data import read_run
from tests.fastgrpo.tools.test_report import Page, fake_evaluation, fake_run
from tests.harness import forks, runs
from tests.harness.browser import browser, needs_browser

TOKEN = "a token; with=odd characters"
BEAT = Heartbeat(rank=0, ranks=1, host="n0", pid=1, iteration=17, phase="update", phase_s=2.0)


def beat(folder: Path, told: Heartbeat = BEAT) -> None:
    """Write a heartbeat of just now."""
    (folder / heartbeat.FOLDER).mkdir(exist_ok=True)
    content = heartbeat.encoded(replace(told, time=time.time()))
    (folder / heartbeat.FOLDER / f"rank-{told.rank}").write_bytes(content)


def go_on(folder: Path) -> None:
    """Log the next iteration, with the numbers of the last one."""
    row = read_metrics(folder / "metrics.jsonl")[-1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"iteration": row["iteration"] + 1}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = fake_run(tmp_path / "run", iterations=17, finished=False)
    beat(folder)
    return folder


@contextmanager
def watched(run: Path) -> Iterator[str]:
    """The address of a page that is served, without the token."""
    listener = bound("127.0.0.1", 0)
    listener.listen()
    port = listener.getsockname()[1]
    served = server.server(server.make_app(run, TOKEN, port))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        served.should_exit = True
        thread.join()
        listener.close()


def test_the_present_state_has_the_numbers_of_the_files(run: Path) -> None:
    words = Page(now(read_run(run))).words
    rows = read_metrics(run / "metrics.jsonl")
    assert 'max="60" value="17"' in now(read_run(run))
    left = 43 * np.mean([row["seconds/total"] for row in rows[-10:]])
    assert f"{left / 60:.0f} min" in words
    assert "update" in words and "iteration 18 of 60" in words
    assert f"rank {rows[-1]['slowest/rank']:.0f}" in words
    assert "slowest in the last iteration on gpu-node-0" in words
    reserved = max(value for name, value in rows[-1].items() if name.startswith("reserved_gib/"))
    assert f"{reserved:.2f} GiB" in words
    assert "before training" in words and "The one rank is alive." in words


def test_a_rank_that_failed_or_is_silent_is_named(run: Path) -> None:
    beat(run, replace(BEAT, end="RuntimeError: <b>"))
    text = now(read_run(run))
    assert "ended in update, iteration 18: RuntimeError: &lt;b&gt;" in text
    assert "left, at the pace" not in text
    silent = replace(BEAT, time=time.time() - 500)
    (run / heartbeat.FOLDER / "rank-0").write_bytes(heartbeat.encoded(silent))
    text = now(read_run(run))
    assert "seems dead: silent for 8 min" in text
    assert "left, at the pace" not in text and "when last heard, iteration 18 of 60" in text


def test_every_chart_has_a_title_on_both_axes(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    rows = read_metrics(folder / "metrics.jsonl")
    more = {"update/loss": 0.1, "update/kl": 0.01, "rollout/noisy_step": 2.5}
    more |= {"rollout/noisy_step_min": 1.0, "rollout/noisy_step_max": 4.0}
    more |= {"heldout/sum": 2.0, "heldout_change/sum": 0.5}
    lines = [json.dumps(row | more) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    page = write_report(folder).read_text()
    drawings = {
        unescape(re.findall(r'aria-label="([^"]*)"', svg)[0]): re.findall(
            r"<text[^>]*>([^<]+)<", svg
        )
        for svg in re.findall(r"<svg.*?</svg>", page)
        if 'class="interval"' not in svg  # a row's, below the table's own head
    }
    assert len(drawings) >= 18
    for label, texts in drawings.items():
        upright = texts[-3] if "by phase" in label else texts[0]  # there a name beside each bar
        assert re.search("[a-zA-Z]", upright), f"{label}: no title on the vertical axis: {texts}"
        assert re.search("[a-zA-Z]", texts[-1]), f"{label}: none on the horizontal axis: {texts}"
    titles = {label: texts[0] for label, texts in drawings.items()}
    for label, title in (
        ("Learning rate over 60", "learning rate"),
        ("Loss over 60", "loss per transition"),
        ("First noisy step", "step, from 0"),
        ("GPU memory over", "GiB"),
        ("Host memory over", "GiB"),
        ("Seconds of each phase", "seconds"),
        ("KL to the policy", "KL per transition"),
        ("Share of clipped", "share of ratios"),
        ("Held-out sum", "weighted sum"),
        ("Histogram of", "clips"),
    ):
        assert [own for name, own in titles.items() if name.startswith(label)] == [title]


def test_small_numbers_on_an_axis_keep_their_digits() -> None:
    shown = [charts._tick(value) for value in (0.0, 1.75e-4, 1e-4, -2.5e-7, 0.0025, 0.25)]
    assert shown == ["0", "1.75e-4", "1e-4", "-2.5e-7", "0.0025", "0.25"]


def test_memory_over_time_is_the_largest_of_the_phases(run: Path) -> None:
    page = write_report(run).read_text()
    last = read_metrics(run / "metrics.jsonl")[-1]
    peaks = [value for name, value in last.items() if name.startswith("allocated_gib/")]
    assert f"tensors, iteration 17: {max(peaks):.4g}" in page


def test_the_page_wants_its_token(run: Path) -> None:
    with watched(run) as url, httpx.Client(base_url=url) as client:
        assert client.get("/livez").text == "ok\n"
        for path in ("/", "/parts", "/?token=another", "/parts?token=another"):
            answer = client.get(path)
            assert answer.status_code == 401 and "17 of 60" not in answer.text
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert "17 of 60" in client.get("/", headers=bearer).text
        answer = client.get("/", params={"token": TOKEN})
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert TOKEN not in cookie
        page = client.get("/")  # by the cookie
        assert page.status_code == 200 and "17 of 60" in page.text
        assert page.headers["cache-control"] == "no-store"
        assert client.post("/").status_code == 405


def test_only_sections_that_changed_are_sent(run: Path) -> None:
    watched_run = server.Watched(run)
    first = [part.hash for part in watched_run.parts()]
    assert len(set(first)) >= 9
    assert watched_run.news(first) == [None] * len(first), "rendered at most once a second"
    go_on(run)
    watched_run._until = 0.0
    news = watched_run.news(first)
    changed = "".join(part["html"] for part in news if part is not None)
    assert "18 of 60" in changed and "<video" not in changed, "clips are as they were"
    assert news[-1] is None


def test_a_file_that_is_damaged_is_a_banner_until_it_is_whole(run: Path) -> None:
    (run / "environment.json").write_text("{")
    watched_run = server.Watched(run)
    assert "environment.json: not JSON" in watched_run.page()
    (run / "environment.json").write_text("{}")
    watched_run._until = 0.0
    assert "17 of 60" in watched_run.page()


def test_what_is_no_run_or_has_no_token_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTGRPO_TOKEN", raising=False)
    short = tmp_path / "token"
    short.write_text("short\n")
    short.chmod(0o600)
    for options, told in (
        ([], "neither metrics.jsonl nor heartbeats"),
        (["--host", "0.0.0.0"], "--host=0.0.0.0: reachable from other machines; give --token-file"),
        (["--host", "0.0.0.0", "--token-file", str(short)], "at least 16 random characters"),
        (["--token-file", str(tmp_path / "none")], "--token-file="),
    ):
        assert cli.main(["watch", str(tmp_path), *options]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_the_report_on_the_way_is_rare_and_ends_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    told: list[str] = []
    report = ReportOnTheWay(run, told.append)
    assert report.write_if_due() and "17 of 60" in (run / "report.html").read_text()
    go_on(run)
    clock[0] = 59.0
    assert not report.write_if_due() and "17 of 60" in (run / "report.html").read_text()
    clock[0] = 60.0
    assert report.write_if_due() and "18 of 60" in (run / "report.html").read_text()

    def slow(folder: Path) -> Path:
        clock[0] += 3.0
        raise UserError("report: no space left")

    monkeypatch.setattr(on_the_way, "write_report", slow)
    for _ in range(2):
        clock[0] += 400.0
        assert report.write_if_due()
    assert told == ["report.html: report: no space left; the run goes on without it"]
    clock[0] += 299.0
    assert not report.write_if_due(), "three seconds are 1 % of 300"


def patiently(check: Callable[[], bool]) -> None:
    """Wait until a check holds."""
    deadline = time.monotonic() + runs.LIMIT
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_has_a_report(tmp_path: Path) -> None:
    """SIGKILL leaves nobody to write one: it was written on the way."""
    folder = tmp_path / "run"
    quick = [*runs.SMALLER, "run.iterations=1000", "track.tensorboard=true"]
    started = forks.start("fastgrpo.cli", runs.arguments(folder, quick), ranks=0)
    report = folder / "report.html"
    try:
        patiently(lambda: report.is_file() or started.poll() is not None)
    finally:
        started.kill()
    words = Page(report.read_text()).words
    assert "1 of 1000 iterations are done" in words and "under way, or was stopped" in words
    (events,) = (folder / "tensorboard").iterdir()
    assert b"reward/sum" in events.read_bytes()


@needs_browser
def test_a_browser_sees_the_run_go_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without loading the page again, the newest clips too, and that the server has gone."""
    monkeypatch.setattr(server, "REFRESH_S", 0.2)
    with browser(tmp_path) as tab:
        tab.look(1280, 900)
        with watched(run) as url:
            tab.open(f"{url}/?token={TOKEN.replace(' ', '%20').replace(';', '%3B')}")
            assert tab.run("location.href") == f"{url}/", "the token is not left in the address"
            words = "document.body.innerText"
            tab.wait(f"{words}.includes('17 of 60') && {words}.includes('Up to date at')")
            tab.run("window.marked = true")
            clips = "document.querySelectorAll('video').length"
            assert tab.run(clips) == 4
            go_on(run)
            fake_evaluation(run, 18, 0.7, np.random.default_rng(0))
            tab.wait(f"window.marked && {words}.includes('18 of 60') && {clips} == 8")
            tab.wait("[...document.querySelectorAll('video')].every((clip) => !clip.paused)")
            tab.click("#playing")
            tab.wait("[...document.querySelectorAll('video')].every((clip) => clip.paused)")
            assert "after 18 iterations" in tab.run(words)
            for width in (1280, 400):
                tab.look(width, 900)
                assert not tab.run("document.documentElement.scrollWidth > innerWidth")
                number = "document.querySelector('tbody td').getBoundingClientRect().right"
                assert tab.run(f"{number} < innerWidth"), "the first number is seen at once"
        tab.wait(f"{words}.includes('Not up to date: no answer')")
