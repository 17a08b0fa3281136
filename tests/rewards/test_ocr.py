"""OCR: the distance against brute force, and real weights on drawn text where rapidocr is there."""

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards import ocr
from fastgrpo.rewards.networks.ocr import engine as engines
from fastgrpo.rewards.networks.ocr.engine import Picture
from fastgrpo.rewards.networks.ocr.matching import distance, plain, quoted, similarity

needs_rapidocr = pytest.mark.skipif(
    find_spec("rapidocr") is None, reason="rapidocr is not installed (the extra `ocr`)"
)


def spec(**options: str | float) -> RewardSpec:
    return RewardSpec(name="ocr", weights={"OCR": 1.0}, options=dict(options))


# The distance


def levenshtein(a: str, b: str) -> int:
    """By its recursive definition."""

    @cache
    def tail(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return tail(i + 1, j + 1)
        return 1 + min(tail(i + 1, j), tail(i, j + 1), tail(i + 1, j + 1))

    return tail(0, 0)


def words() -> list[tuple[str, str]]:
    random = np.random.default_rng(3)
    lengths = random.integers(0, 8, (60, 2))
    return [("".join(random.choice([*"abc"], n)), "".join(random.choice([*"abc"], m)))
            for n, m in lengths]  # fmt: skip


@pytest.mark.parametrize("surplus", [0.0, 0.25, 1.0])
def test_the_distance_is_the_best_over_all_windows(surplus: float) -> None:
    """Over every contiguous part of what was read; with surplus 1 it is Levenshtein's."""
    for read, target in words():
        windows = {(i, j) for i in range(len(read) + 1) for j in range(i, len(read) + 1)}
        wanted = min(
            levenshtein(read[i:j], target) + surplus * (len(read) - j + i) for i, j in windows
        )
        assert distance(read, target, surplus) == pytest.approx(wanted), (read, target)
        assert distance(read, target) == levenshtein(read, target)


@pytest.mark.parametrize(
    ("read", "target", "rule", "score"),
    [
        ("OPEN", "open", "edit", 1.0),
        ("o p e n", "Open", "edit", 1.0),
        ("OPEM", "OPEN", "edit", 0.75),
        ("", "OPEN", "edit", 0.0),
        ("something else altogether", "OPEN", "edit", 0.0),  # never below 0
        ("xOPENx", "OPEN", "edit", 0.5),
        ("OPEN" * 50, "OPEN", "edit", 0.0),  # what endless text earns
        ("OPEN" * 50, "OPEN", "flow_grpo", 1.0),
        ("OPEM", "OPEN", "flow_grpo", 0.75),
    ],
)
def test_similarity(read: str, target: str, rule: str, score: float) -> None:
    assert similarity(read, target, 1.0, rule == "flow_grpo") == score


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "OPEN 24" at night', "OPEN 24"),
        ('"A" and "B"', "A"),
        ("a sign \N{LEFT DOUBLE QUOTATION MARK}Auf\N{RIGHT DOUBLE QUOTATION MARK}", "Auf"),
        ("don't 'quote' me", None),
        ('an odd " mark', None),
        ('an empty ""', ""),
        ("", None),
    ],
)
def test_the_text_between_the_first_quotes(prompt: str, text: str | None) -> None:
    assert quoted(prompt) == text


# The reward, with an engine that says what it saw


def reward_with(engine: Callable[[Picture], str], **options: str | float) -> ocr.Ocr:
    return ocr.Ocr(engine, ocr.Options.model_validate(options), 4, "of a test")


def test_a_clip_is_the_mean_of_all_its_frames() -> None:
    """Frames without text count as 0; over those above 0 alone one good frame would do."""
    read = {0: "", 1: "OPEN", 2: "OPEM", 3: ""}
    pixels = torch.arange(4, dtype=torch.uint8).view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 3).clone()
    reward = reward_with(lambda picture: read[int(picture[0, 0, 0])])
    scores = reward(pixels, ['"OPEN"'], 8.0)
    assert scores.values["OCR"].item() == (1.0 + 0.75) / 4


def test_prompts_that_ask_for_no_text_have_no_score() -> None:
    reward = reward_with(lambda picture: "OPEN")
    prompts = ['"OPEN"', "no quotes", '" "', '"OPEN" again']
    scores = reward(torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8), prompts, 8.0)
    assert scores.valid.tolist() == [True, False, False, True]
    assert scores.values["OCR"].isnan().tolist() == [False, True, True, False]


class Seen:
    """A RapidOCR that keeps what it was given and finds nothing, as None."""

    txts = scores = None
    picture: Picture

    def __call__(self, picture: Picture) -> "Seen":
        self.picture = picture
        return self


def test_the_engine_is_given_bgr() -> None:
    model = Seen()
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert engines._Lines(model)(red) == ""
    assert model.picture[0, 0].tolist() == [0, 0, 255] and model.picture.flags.c_contiguous


# Rows


def rows_file(folder: Path, *rows: dict[str, object]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_text_may_come_from_a_column(tmp_path: Path) -> None:
    file = rows_file(
        tmp_path, {"caption": "a  sign", "words": "OPEN"}, {"caption": "b", "words": 7}
    )
    reward = reward_with(
        lambda picture: "open", rows=file, prompt_column="caption", text_column="words"
    )
    assert [reward.target(p) for p in ("a sign", "b", 'c "OPEN"')] == ["OPEN", "7", None]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        ([{"prompt": "a"}], "line 1 has no 'text'"),
        ([{"text": "a"}], "has no text in 'prompt'"),
        (
            [{"prompt": "a", "text": "A"}, {"prompt": "a", "text": "B"}],
            "line 2 has a prompt that an earlier row has with other values",
        ),
    ],
)
def test_wrong_rows_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]], said: str
) -> None:
    monkeypatch.setattr(engines, "model_files", lambda: (tmp_path, tmp_path))
    with pytest.raises(UserError) as caught:
        rewards.check_settings(spec(rows=rows_file(tmp_path, *rows)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Settings


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"options": {"rows": "nowhere.jsonl"}},
            "rewards.options.rows=nowhere.jsonl: no such file",
        ),
        ({"options": {"rule": "window"}}, "rewards.options.rule='window'"),
        ({"options": {"surplus": 2.0}}, "rewards.options.surplus=2.0"),
        ({"options": {"row": "x"}}, "did you mean 'rows'"),
        ({"device": "cuda"}, "rewards.device=cuda: ocr reads on the CPU"),
        ({"dtype": "bfloat16"}, "rewards.dtype=bfloat16: ocr reads on the CPU"),
        ({"path": "weights"}, "rewards.path=weights: ocr brings its own models"),
    ],
)
def test_a_check_finds_mistakes_without_loading(
    changed: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "model_files", lambda: (tmp_path, tmp_path))
    with pytest.raises(UserError) as caught:
        rewards.check_settings(spec().model_copy(update=changed))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = (
        "rewards.name=ocr: needs rapidocr and onnxruntime, not installed here; "
        "pip install 'fastgrpo[ocr]'."
    )
    for act in (rewards.check_settings, rewards.load):
        with pytest.raises(UserError) as caught:
            act(spec())
        assert str(caught.value) == told
    assert "rapidocr" not in sys.modules or find_spec("rapidocr") is None


# Real weights


@pytest.fixture(scope="module")
def real() -> ocr.Ocr:
    return ocr.load(spec())


def score(reward: ocr.Ocr, picture: Tensor, text: str) -> float:
    return reward(picture[None, None], [f'a sign "{text}"'], 8.0).values["OCR"].item()


@needs_rapidocr
@pytest.mark.parametrize("text", ["Hello World", "NASA 2049", "OPEN 24 HOURS"])
def test_drawn_text_is_read(real: ocr.Ocr, text: str) -> None:
    letters = len(plain(text))
    picture = ocr.drawn(text)
    assert score(real, picture, text) == 1.0
    other = text.replace("o", "x").replace("4", "7").replace("OPEN", "OPEX", 1)
    edits = levenshtein(plain(text), plain(other))
    assert edits and score(real, picture, other) == pytest.approx(1 - edits / letters)
    assert score(real, 255 - picture, text) == 1.0  # white on black


@needs_rapidocr
def test_blank_pictures_noise_and_turned_lines(real: ocr.Ocr) -> None:
    noise = torch.randint(0, 256, (256, 256, 3), generator=torch.Generator().manual_seed(0))
    for picture in (torch.zeros(256, 256, 3), torch.full((256, 256, 3), 255), noise):
        assert score(real, picture.to(torch.uint8), "OPEN") == 0.0
    assert score(real, ocr.drawn("OPEN").flip(1), "OPEN") < 1.0  # mirrored


@needs_rapidocr
def test_two_lines_are_read_from_top_to_bottom(real: ocr.Ocr) -> None:
    lines = [torch.nn.functional.pad(ocr.drawn(t), (0, 0, 0, w)) for t, w in
             (("Step Goal", 0), ("Achieved", 0))]  # fmt: skip
    width = min(line.shape[1] for line in lines)
    picture = torch.cat([line[:, :width] for line in lines])
    assert score(real, picture, "Step Goal Achieved") >= 0.9
    assert score(real, picture, "Achieved Step Goal") < 0.7


@needs_rapidocr
def test_the_golden_clip_and_the_fingerprint(real: ocr.Ocr, tmp_path: Path) -> None:
    assert real.golden is not None
    clip, prompt, fps = real.golden
    assert real(clip[None], [prompt], fps).values["OCR"].item() == 1.0
    file = rows_file(tmp_path, {"prompt": "a", "text": "A"})
    others = [spec(surplus=0.5), spec(rule="flow_grpo"), spec(rows=file)]
    others.append(spec().model_copy(update={"frames": "first"}))
    found = {ocr.load(other).fingerprint for other in others}
    rows_file(tmp_path, {"prompt": "a", "text": "B"})
    found.add(ocr.load(spec(rows=file)).fingerprint)
    assert len(found | {real.fingerprint}) == 6
    assert ocr.load(spec(threads=2)).fingerprint == real.fingerprint
