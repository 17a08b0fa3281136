"""Human studies: simulated raters' preference and bias are found again, known values of the
statistics, votes that are wrong, and the page in a real browser.
"""

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.data import video, video_reader
from fastgrpo.data.tiny_world import shapes
from fastgrpo.tools.evaluate.study import analyse, build, page
from fastgrpo.tools.evaluate.study.analyse import Result, Tally, krippendorff, wilson
from fastgrpo.tools.evaluate.study.blinding import (
    AGAINST,
    KEY,
    RUN,
    Key,
    Pair,
    opaque,
    order,
    public_hash,
    read_key,
    shown,
    study_id,
)
from fastgrpo.tools.evaluate.study.votes import read_votes
from fastgrpo.tools.sample.source import Snapshot, Source
from fastgrpo.tools.sample.work import Clip, Job
from tests.harness import forks, runs
from tests.harness.browser import browser, needs_browser

SECRET = "5e" * 32
RATERS = 30
Rater = Callable[[np.random.Generator, str], str]
"""(random numbers, the model on the left) -> choice"""


def key_of(pairs: int) -> Key:
    """The key of a study with two seeds of each prompt."""
    return Key(
        secret=SECRET,
        labels={RUN: "step 7, EMA", AGAINST: "base"},
        question=build.QUESTION,
        settings={"height": 32, "width": 32},
        pairs=[
            Pair(
                pair=opaque(SECRET, "pair", n),
                prompt=shapes.caption(shapes.meanings()[1][n // 2], n // 2),
                seed=n % 2,
                run=opaque(SECRET, "clip", n, RUN) + ".mp4",
                against=opaque(SECRET, "clip", n, AGAINST) + ".mp4",
            )
            for n in range(pairs)
        ],
    )


def written(folder: Path, pairs: int, clips: bool = False) -> tuple[Key, str]:
    """A study's folder.  clips: with small ones, brighter where the run's model made them"""
    key = key_of(pairs)
    target = folder / build.PAGE / build.CLIPS
    target.mkdir(parents=True)
    for n, pair in enumerate(key.pairs if clips else ()):
        pixels = shapes.draw(shapes.meanings()[1][n])
        video.write_mp4(target / pair.run, pixels, shapes.FPS)
        video.write_mp4(target / pair.against, pixels // 2, shapes.FPS)
    build.write(folder, key)
    return read_key(folder)


def line(study: str, rater: str, pair: Pair, choice: str, place: int = 0) -> str:
    """A vote as the page writes it."""
    left, right = shown(study, rater, pair)
    entry: dict[str, object] = {"study": study, "rater": rater, "pair": pair.pair}
    entry |= {
        "left": left,
        "right": right,
        "choice": choice,
        "seconds": 3.2,
        "order": place,
        "time": "2026-11-30T12:00:00.000Z",
    }
    return json.dumps(entry) + "\n"


def vote(folder: Path, rater: Rater, count: int = RATERS, seed: int = 0) -> Result:
    """Have simulated raters vote on all pairs of a study, and read what they say."""
    key, study = read_key(folder)
    for n in range(count):
        name, rng = f"rater-{n:02d}", np.random.default_rng([seed, n])
        text = ""
        for place, pair in enumerate(order(study, name, key.pairs)):
            left = pair.model(shown(study, name, pair)[0])
            text += line(study, name, pair, rater(rng, left), place)
        (folder / build.VOTES / f"votes-{name}.jsonl").write_text(text)
    return analyse.analyse(key, read_votes(folder / build.VOTES, key, study))


def preferring(rate: float, ties: float = 0.2, left: float = 0.5) -> Rater:
    """A rater who ties at times, picks left or right blindly where `left` says so, else prefers
    the run's model with this rate."""

    def choose(rng: np.random.Generator, model: str) -> str:
        if rng.random() < ties:
            return "tie"
        if rng.random() < abs(2 * left - 1):
            return "left" if left > 0.5 else "right"
        return "left" if (rng.random() < rate) == (model == RUN) else "right"

    return choose


@pytest.mark.parametrize("rate", [0.35, 0.5, 0.62])
def test_a_planted_preference_is_found_within_its_interval(tmp_path: Path, rate: float) -> None:
    written(tmp_path, pairs=24)
    result = vote(tmp_path, preferring(rate))
    votes = result.tallies["vote"]
    assert votes.wins + votes.ties + votes.losses == RATERS * 24
    assert votes.rate.low < rate < votes.rate.high < votes.rate.low + 0.1
    assert result.resampled[0] < rate < result.resampled[1]
    assert result.resampled[1] - result.resampled[0] > votes.rate.high - votes.rate.low
    assert result.ties.low < 0.2 < result.ties.high
    assert not result.left.excludes_half and not result.one_sided
    assert "No bias to a side is seen" in "\n".join(result.lines())
    if rate != 0.5:
        assert votes.rate.excludes_half and result.tallies["rater"].rate.excludes_half


def test_a_planted_bias_to_a_side_is_named_and_does_not_move_the_win_rate(tmp_path: Path) -> None:
    written(tmp_path, pairs=24)
    result = vote(tmp_path, preferring(0.5, left=0.62))
    # a share of 0.24 picks left blindly, the others left in half of the pairs
    assert result.left.low < 0.62 < result.left.high
    assert result.left.excludes_half
    assert "BIAS TO A SIDE: left is chosen in " in "\n".join(result.lines())
    assert not result.tallies["vote"].rate.excludes_half
    assert json.loads(result.to_json())["position_bias"] is True


def test_a_rater_who_always_takes_one_side_is_named(tmp_path: Path) -> None:
    written(tmp_path, pairs=24)
    vote(tmp_path, preferring(0.6))
    key, study = read_key(tmp_path)
    text = "".join(line(study, "lazy", pair, "right") for pair in key.pairs)
    (tmp_path / build.VOTES / "votes-lazy.jsonl").write_text(text)
    result = analyse.analyse(key, read_votes(tmp_path / build.VOTES, key, study))
    assert list(result.one_sided) == ["lazy"] and result.one_sided["lazy"].share == 0
    assert result.lines()[-1].endswith("by their share of left: lazy 0%.")


def test_sides_are_even_and_orders_differ() -> None:
    key, study = key_of(24), study_id("a")
    names = [f"rater-{n}" for n in range(200)]
    left = Counter(pair.model(shown(study, name, pair)[0]) for name in names for pair in key.pairs)
    assert abs(left[RUN] / left.total() - 0.5) < 3 * 0.5 / math.sqrt(left.total())
    orders = {tuple(pair.pair for pair in order(study, name, key.pairs)) for name in names}
    assert len(orders) == len(names)
    first = Counter(order(study, name, key.pairs)[0].pair for name in names)
    assert max(first.values()) < 30, "200 first pairs over 24, about 8 each"


def test_the_public_hash_has_the_finalizer_of_murmur_hash() -> None:
    """FNV-1a of "" and of "a" are known; fmix32 of them was computed step by step."""

    def finalized(value: int) -> int:
        value = ((value ^ (value >> 16)) * 0x85EBCA6B) % 2**32
        value = ((value ^ (value >> 13)) * 0xC2B2AE35) % 2**32
        return value ^ (value >> 16)

    assert public_hash("") == finalized(0x811C9DC5)
    assert public_hash("a") == finalized(0xE40C292C)
    assert public_hash("foobar") == finalized(0xBF9CF968)


def test_wilsons_interval_has_its_known_values() -> None:
    """Computed by the formula of Wilson (1927), as in the literature's examples."""
    for part, count, low, high in (
        (100, 200, 0.431, 0.569),
        (120, 200, 0.531, 0.665),
        (130, 200, 0.582, 0.713),
        (120, 240, 0.437, 0.563),
        (0, 10, 0.0, 0.278),
        (10, 10, 0.722, 1.0),
    ):
        assert list(wilson(part, count)) == pytest.approx([low, high], abs=6e-4)
    assert all(math.isnan(bound) for bound in wilson(0, 0))


def test_wilsons_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    bounds = [wilson(int(part), 60) for part in rng.binomial(60, 0.62, size=4000)]
    assert 0.93 < np.mean([low < 0.62 < high for low, high in bounds]) < 0.97


KRIPPENDORFF = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
"""Four observers of twelve units (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011);
nominal alpha 0.743."""
FLEISS = (
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
)
"""Ten units by 14 raters in five categories, a widely printed example; Fleiss' kappa 0.210."""


def test_alpha_has_the_value_of_krippendorffs_example() -> None:
    rows = [row.split() for row in KRIPPENDORFF]
    units = [Counter(value for value in unit if value != ".") for unit in zip(*rows, strict=True)]
    assert krippendorff(units)[1] == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_fleiss_kappa_but_for_the_sample_size() -> None:
    counts = np.array(FLEISS)
    units, raters = len(counts), counts[0].sum()
    agreed = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    kappa = (agreed.mean() - chance) / (1 - chance)
    assert kappa == pytest.approx(0.210, abs=5e-4)
    observed, alpha = krippendorff([dict(zip("abcde", row, strict=True)) for row in FLEISS])
    n = units * raters
    assert observed == pytest.approx(agreed.mean())
    assert 1 - alpha == pytest.approx((1 - kappa) * (n - 1) / n)


def test_raters_who_agree_and_raters_by_chance(tmp_path: Path) -> None:
    written(tmp_path, pairs=24)
    by_chance = vote(tmp_path, preferring(0.5), count=12)
    assert abs(by_chance.alpha) < 0.03
    always = vote(tmp_path, lambda rng, model: "left" if model == RUN else "right", count=12)
    assert always.agreement == 1 and math.isnan(always.alpha), "one answer alone: no chance"
    assert always.tallies == {
        "vote": Tally(288, 0, 0),
        "rater": Tally(12, 0, 0),
        "prompt": Tally(12, 0, 0),
    }


def test_one_vote_has_its_share_and_no_more(tmp_path: Path) -> None:
    key, study = written(tmp_path, pairs=2)
    file = tmp_path / build.VOTES / "votes-ann.jsonl"
    file.write_text(line(study, "ann", key.pairs[0], "tie"))
    result = analyse.analyse(key, read_votes(file.parent, key, study))
    assert result.unseen == 1 and math.isnan(result.alpha) and math.isnan(result.resampled[0])
    text = "\n".join(result.lines())
    assert "1 votes of 1 rater on 2 pairs" in text and "nan" not in text + result.markdown()
    assert json.loads(result.to_json())["alpha"] is None


def test_the_command_prints_table_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, pairs=24)
    result = vote(tmp_path, preferring(0.62), count=8)
    assert cli.main(["study", "--read", str(tmp_path), "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    wins = result.tallies["vote"].wins
    assert str(wins) in printed and "Krippendorff" in printed and "step 7, EMA" in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["tallies"]["vote"]["wins"] == wins
    assert content["tallies"]["vote"]["win_rate"]["low"] == pytest.approx(
        result.tallies["vote"].rate.low
    )
    assert cli.main(["study", "--read", str(tmp_path), "--markdown", "-"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| counted once | wins |") and f"| vote | {wins} |" in table


def test_neither_page_nor_files_tell_the_models_apart(tmp_path: Path) -> None:
    """All that raters get: no secret, no label, no order and no date that goes with a model."""
    key, study = written(tmp_path, pairs=24, clips=False)
    target = tmp_path / build.PAGE / build.CLIPS
    for pair in key.pairs:
        for name in (pair.against, pair.run):  # the base model's first, as they are drawn
            (target / name).write_bytes(b"clip")
    (tmp_path / KEY).unlink()
    (tmp_path / build.VOTES).rmdir()
    build.write(tmp_path, key)
    text = (tmp_path / build.PAGE / "index.html").read_text()
    for word in (SECRET, "EMA", "step 7", '"run"', '"against"', "against"):
        assert word not in text, word
    content = json.loads(text.partition('id="study">')[2].partition("</script>")[0])
    known = {pair.pair: pair for pair in key.pairs}
    first = [entry["names"][0] == known[entry["pair"]].run for entry in content["pairs"]]
    assert 5 <= sum(first) <= 19, "24 throws of a coin"
    assert [entry["pair"] for entry in content["pairs"]] == sorted(known)
    assert content["id"] == study == study_id((tmp_path / KEY).read_text())
    files = [*(tmp_path / build.PAGE).rglob("*")]
    assert {file.stat().st_mtime for file in files} == {build.WRITTEN} and len(files) == 2 + 48
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600
    other = opaque("00" * 32, "clip", 0, RUN)
    assert other != opaque(SECRET, "clip", 0, RUN), "without the secret the names are not drawn"


def test_a_prompt_is_text_in_the_page() -> None:
    key = key_of(2)
    planted = replace(key.pairs[0], prompt="</script><b>x")
    text = page.html(replace(key, pairs=[planted], question="a <b> & c"), "0" * 64, "clips")
    assert "</script><b>" not in text and "a &lt;b&gt; &amp; c" in text


def test_a_reference_image_is_shown_without_its_name_and_metadata(tmp_path: Path) -> None:
    """As for image-to-video: its pixels alone, under a name that says nothing."""
    image = tmp_path / "step 7 of mine.png"
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    note = PngInfo()
    note.add_text("model", "mine")
    Image.fromarray(pixels).save(image, pnginfo=note)
    clips = [Clip(n, Prompt("a", image), n, "") for n in range(2)]
    recipe = config.load(runs.RECIPE, [])
    base = Snapshot(model=recipe.model, lora=recipe.lora, label="base")
    trained = replace(base, label="step 7, EMA")
    source = Source(snapshot=trained, video=recipe.video, steps=4, shift=None, base=base)
    job = Job(source, clips, [range(1), range(1, 2)], True, out=tmp_path / "s", overwrite=False)
    key = build.make_key(job, "Which?", SECRET, [False, True])
    assert key.not_finite == ["seed 0: a"] and [pair.seed for pair in key.pairs] == [1]
    folder = tmp_path / "s"
    (folder / build.PAGE / build.CLIPS).mkdir(parents=True)
    build.publish(folder, key, job)
    name = key.pairs[0].image
    assert name is not None
    shown_image = Image.open(folder / build.PAGE / build.CLIPS / name)
    assert (np.asarray(shown_image) == pixels).all() and not shown_image.info
    text = (folder / build.PAGE / "index.html").read_text()
    assert name in text and "step 7" not in text and "of mine" not in text


BAD: dict[str, tuple[Callable[[list[str]], Sequence[str]], str]] = {
    "another study": (
        lambda lines: [lines[0].replace('"study": "', '"study": "f'), *lines[1:]],
        r"votes-ann\.jsonl:1: a vote of another study",
    ),
    "doubled": (
        lambda lines: [*lines, lines[1]],
        r"votes-ann\.jsonl:5: ann has voted on this pair before \(.*votes-ann\.jsonl:2\)",
    ),
    "cut": (lambda lines: [*lines[:3], lines[3][:40]], r"votes-ann\.jsonl:4: cut off, or no vote"),
    "no object": (lambda lines: ["[1]\n"], r"votes-ann\.jsonl:1: cut off, or no vote"),
    "unknown pair": (
        lambda lines: [json.dumps(json.loads(lines[0]) | {"pair": "0123"})],
        r"pair='0123': unknown in this study",
    ),
    "no choice": (
        lambda lines: [lines[0].replace('"tie"', '"both"')],
        r"choice='both': must be left, right, tie",
    ),
    "edited": (
        lambda lines: [lines[0].replace('"left": "', '"left": "0')],
        r"not the sides that the page shows to ann",
    ),
    "renamed": (
        lambda lines: [one.replace('"ann"', '"bob"') for one in lines],
        r"not the sides that the page shows to bob",
    ),
    "no name": (lambda lines: [lines[0].replace('"ann"', '""')], r"rater='': not a name"),
    "empty": (lambda lines: [], r"votes: no votes; put the files"),
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_votes_are_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key, study = written(tmp_path, pairs=4)
    lines = [line(study, "ann", pair, "tie") for pair in key.pairs]
    change, told = BAD[kind]
    file = tmp_path / build.VOTES / "votes-ann.jsonl"
    file.write_text("".join(change(lines)))
    with pytest.raises(UserError, match=told):
        read_votes(file.parent, key, study)
    assert cli.main(["study", "--read", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_changed_or_missing_key_is_refused(tmp_path: Path) -> None:
    key, study = written(tmp_path, pairs=4)
    (tmp_path / build.VOTES / "a.jsonl").write_text(line(study, "ann", key.pairs[0], "left"))
    first = key.pairs[0]
    turned = replace(first, run=first.against, against=first.run)
    (tmp_path / KEY).write_text(replace(key, pairs=[turned, *key.pairs[1:]]).to_json())
    changed, other = read_key(tmp_path)
    with pytest.raises(UserError, match="or the key was changed after it"):
        read_votes(tmp_path / build.VOTES, changed, other)
    (tmp_path / KEY).write_text('{"pairs": [3]}')
    with pytest.raises(UserError, match="not the key of a study"):
        read_key(tmp_path)
    (tmp_path / KEY).unlink()
    with pytest.raises(UserError, match=r"key\.json cannot be read"):
        read_key(tmp_path)


def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, told in (
        ([], "study: give a run to write a study of, or --read FOLDER"),
        (["x", "--read", "y"], "study: give a run to write a study of, or --read FOLDER"),
        (["x", "--json", "-"], "--json: is for --read"),
        (["--read", "y", "--out", "z"], "--out: is for writing a study"),
        (["x", "--against", "first"], "--against=first: not a checkpoint"),
    ):
        assert cli.main(["study", *options]) == 2
        assert told in capsys.readouterr().err


def test_a_run_is_drawn_against_its_base_model(
    two_rank_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By two ranks the clips are those of `fastgrpo sample` by one, byte for byte; a second seed
    comes after every prompt has had its first."""
    options = ["--set", "evaluate.steps=2", "--set", "evaluate.prompts=2"]
    out = tmp_path / "study"
    command = ["study", str(two_rank_run), "--pairs", "3", "--out", str(out), *options]
    prompts = tmp_path / "two.txt"
    prompts.write_text("a red circle moves left\na blue square moves right\n")
    result = forks.run("fastgrpo.cli", [*command, "--prompts", str(prompts)], ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"3 pairs in {out}\n" in result.stdout
    key, _ = read_key(out)
    assert [(pair.prompt[:5], pair.seed) for pair in key.pairs] == [
        ("a red", 0),
        ("a red", 1),
        ("a blu", 0),
    ]
    sample = ["sample", str(two_rank_run), "--against-base", "--out", str(tmp_path / "s")]
    assert cli.main([*sample, "--prompts", str(prompts), "--seeds", "0", "1", *options]) == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    clips = out / build.PAGE / build.CLIPS
    for pair, entry in zip(key.pairs, manifest["samples"], strict=False):
        assert (clips / pair.run).read_bytes() == (tmp_path / "s" / entry["file"]).read_bytes()
        assert (clips / pair.against).read_bytes() == (tmp_path / "s" / entry["base"]).read_bytes()
        assert video_reader.read(clips / pair.run).pixels.shape[0] == 9
    assert key.labels == {RUN: "step 2, EMA", AGAINST: "base"}
    assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main([*command[:2], "--against", "2", "--out", str(tmp_path / "b")]) == 2
    assert "is the checkpoint that is compared with it" in capsys.readouterr().err


@needs_browser
def test_a_rater_votes_in_a_browser_and_the_votes_are_read(tmp_path: Path) -> None:
    """By mouse and keys, over a reload, from the disk; the page's sides and order are Python's."""
    folder = tmp_path / "study"
    key, study = written(folder, pairs=4, clips=True)
    with browser(tmp_path) as tab:
        tab.look(1280, 900)
        tab.open((folder / build.PAGE / "index.html").as_uri())
        assert study in tab.run("document.body.innerText")
        tab.click("#name")
        tab.type("ann")
        tab.click("#form button")
        tab.wait("!document.getElementById('left').disabled")
        assert tab.run(
            "[...document.querySelectorAll('#pair video')].every((v) => v.loop && !v.paused)"
        )
        expected = order(study, "ann", key.pairs)
        assert tab.run("document.getElementById('prompt').textContent") == expected[0].prompt
        sources = "[...document.querySelectorAll('#pair video')].map((v) => v.src.split('/').pop())"
        assert tuple(tab.run(sources)) == shown(study, "ann", expected[0])
        tab.click("#left")
        tab.wait("votes.length == 1 && !document.getElementById('left').disabled")
        tab.key("2")
        tab.wait("votes.length == 2 && !document.getElementById('left').disabled")
        tab.key("u")
        tab.wait("votes.length == 1 && !document.getElementById('left').disabled")
        # an undo right after a vote: two pairs load at once, and only the shown one may be voted on
        tab.run(
            "window.wrong = 0; const before = allow; allow = (pair) => {"
            f"  if (pair && String({sources}) !== String(sides(pair))) wrong += 1; before(pair); }}"
        )
        tab.run("vote('left'); takeBack(); vote('left')")
        tab.wait("votes.length == 1 && !document.getElementById('left').disabled")
        assert tab.run("wrong") == 0
        tab.key("3")
        # until the next pair is there, too: a vote of this very moment is still on its way to the disk
        tab.wait("votes.length == 2 && !document.getElementById('left').disabled")
        tab.open((folder / build.PAGE / "index.html").as_uri())
        tab.wait("votes.length == 2 && !document.getElementById('left').disabled")
        assert tuple(tab.run(sources)) == shown(study, "ann", expected[2])
        assert tab.run("document.getElementById('bar').value") == 2
        tab.key("1")
        tab.wait("votes.length == 3 && !document.getElementById('left').disabled")
        tab.click("#right")
        tab.wait("!document.getElementById('end').hidden")
        tab.click("#undo")
        tab.wait("votes.length == 3 && !document.getElementById('right').disabled")
        tab.click("#right")
        tab.wait("!document.getElementById('end').hidden")
        tab.click("#save")
        file = tmp_path / "votes-ann.jsonl"
        for _ in range(500):
            if file.is_file():
                break
            tab.run("new Promise((resolve) => setTimeout(resolve, 20))")
        file.rename(folder / build.VOTES / file.name)
        tab.click("#other")
        tab.wait("!rater && !document.getElementById('begin').hidden")
        assert not tab.run("[...document.querySelectorAll('#keep')].some((e) => e.offsetHeight)")
    votes = read_votes(folder / build.VOTES, key, study)
    assert [(one.pair, one.choice) for one in votes] == list(
        zip(expected, ("left", "tie", "left", "right"), strict=True)
    )
    entries = [json.loads(text) for text in (folder / build.VOTES / file.name).open()]
    assert [entry["order"] for entry in entries] == [0, 1, 2, 3]
    assert all(0 <= entry["seconds"] < 60 for entry in entries)


@needs_browser
def test_nothing_makes_the_page_scroll_sideways(tmp_path: Path) -> None:
    written(tmp_path / "study", pairs=4, clips=True)
    wide = "document.documentElement.scrollWidth > innerWidth"
    with browser(tmp_path) as tab:
        tab.open((tmp_path / "study" / build.PAGE / "index.html").as_uri())
        for begun in (False, True):
            if begun:
                tab.run("begin('ann')")
                tab.wait("!document.getElementById('left').disabled")
            for width in (400, 1280):
                tab.look(width, 900)
                assert not tab.run(wide)
