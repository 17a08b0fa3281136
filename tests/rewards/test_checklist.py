"""checklist against a stub endpoint, and vision_reward against files of planted answers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import load_served
from fastgrpo.rewards.vision_reward import QUESTIONS, VisionReward, digest
from tests.harness import endpoint
from tests.harness.endpoint import MODEL, Stub
from tests.harness.servers import CAPTIONS, clips

ASKED = ("Does it show [[prompt]]?", "Is it sharp?", "Is it {prompt}, really?")
WEIGHTS = (1.0, -0.5, 0.25)
PLANTED = {"Does": 0.9, "Is it sharp?": 0.3, "Is it a": 0.6}


def write(folder: Path, questions: Any = ASKED, weights: Any = WEIGHTS) -> dict[str, str]:
    """The two files, and the options that name them."""
    folder.mkdir(exist_ok=True)
    (folder / "questions.txt").write_text("\n".join(questions) + "\n\n")
    (folder / "weights.json").write_text(json.dumps(weights))
    return {
        "questions": str(folder / "questions.txt"),
        "question_weights": str(folder / "weights.json"),
    }


def spec_of(url: str, files: Mapping[str, str], weights: Any = None) -> RewardSpec:
    options = {"endpoints": url, "model": MODEL, **files}
    return RewardSpec(name="checklist", weights=weights or {}, options=options)


def planted(asked: Mapping[str, Any]) -> dict[str, float]:
    """The probability of yes that belongs to a question's first words."""
    text = asked["messages"][0]["content"][-1]["text"]
    (yes,) = (p for begins, p in PLANTED.items() if text.startswith(begins))
    return {"yes": 0.8 * yes, "no": 0.8 * (1 - yes)}


@pytest.fixture
def stub() -> Iterator[Stub]:
    with endpoint.running(planted) as running:
        yield running


# ---- checklist


def test_the_score_is_the_weighted_mean_of_what_each_question_says(
    stub: Stub, tmp_path: Path
) -> None:
    reward = rewards.load(spec_of(stub.url, write(tmp_path)))
    assert reward.names == ("checklist", "q1", "q2", "q3") and reward.reads_prompts
    scores = reward(clips()[:2], ["a cat", "a dog"], 8.0)
    terms = zip(WEIGHTS, PLANTED.values(), strict=True)
    mean = sum(w * (2 * p - 1) for w, p in terms) / 3
    assert scores.values["checklist"].tolist() == pytest.approx([mean, mean])
    for n, p in enumerate(PLANTED.values(), 1):
        assert scores.values[f"q{n}"].tolist() == pytest.approx([p, p])
    asked = {"Does it show a cat?", "Is it sharp?", "Is it a dog, really?"}
    assert len(stub.texts) == 6 and asked <= set(stub.texts)
    assert not any("vision" in name.lower() for name in (*reward.names, type(reward).__name__))


def test_a_question_without_an_answer_leaves_the_clip_without_a_score(
    stub: Stub, tmp_path: Path
) -> None:
    def silent(asked: Mapping[str, Any]) -> Mapping[str, float]:
        unread = "a dog, really" in asked["messages"][0]["content"][-1]["text"]
        return {"well": 0.9} if unread else planted(asked)

    stub.answer = silent
    source = ScorerInProcess([spec_of(stub.url, write(tmp_path))])
    scores = source.score(clips()[:2], ["a cat", "a dog"], 8.0)["checklist"]
    assert scores.valid.tolist() == [True, False]
    assert all(column[1].isnan() for column in scores.values.values())


def test_its_identity_is_its_questions_and_weights_wherever_they_lie(tmp_path: Path) -> None:
    def identity(folder: str, *content: Any) -> str:
        return load_served(spec_of("http://a", write(tmp_path / folder, *content))).identity

    usual = identity("one")
    assert identity("two") == usual
    changed = [identity("three", [*ASKED[:2], "Other?"]), identity("four", ASKED, [1, 2, 3])]
    assert len({usual, *changed}) == 3


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "none": ([], WEIGHTS, r"options\.questions=.*: has 0 questions"),
    "twice": (["Same?", "Same?"], [1, 2], "asks 'Same\\?' twice"),
    "too few": (ASKED, [1, 2], r"question_weights=.*: has 2 weights for 3 questions"),
    "an object": (ASKED, {"a": 1}, "is no JSON list of finite numbers"),
    "NaN": (ASKED, [1, 2, float("nan")], "is no JSON list of finite numbers"),
    "a text": (ASKED, [1, 2, "3"], "is no JSON list of finite numbers"),
    "all 0": (ASKED, [0, 0, 0], "not all 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_what_is_wrong_with_the_files(fault: str, tmp_path: Path) -> None:
    questions, weights, said = FAULTS[fault]
    with pytest.raises(UserError, match=said) as raised:
        rewards.check_settings(spec_of("http://a", write(tmp_path, questions, weights)))
    assert "\n" not in str(raised.value)


def test_check_finds_missing_files_and_parts(tmp_path: Path) -> None:
    files = write(tmp_path)
    with pytest.raises(UserError, match=r"rewards\.options\.question_weights: missing"):
        rewards.check_settings(spec_of("http://a", {"questions": files["questions"]}))
    with pytest.raises(UserError, match=r"questions=.*nope: cannot be read"):
        rewards.check_settings(spec_of("http://a", files | {"questions": str(tmp_path / "nope")}))
    rewards.check_settings(spec_of("http://a", files, {"checklist": 1.0, "q3": 0.0}))
    with pytest.raises(UserError, match=r"has no part 'q4'; its parts are checklist and q1 to q3"):
        rewards.check_settings(spec_of("http://a", files, {"q4": 0.0}))


# ---- vision_reward

COEFFICIENTS = [6.27717 / QUESTIONS] * QUESTIONS
"""As many as the authors' and with their sum, so that the clip without a yes has their score."""
ROWS = {0: [n / 28 for n in range(29)], 1: [1.0] + [0.0] * 28, 2: [0.573] * 29}


def row(clip: int, yes: Any, **changed: Any) -> str:
    return json.dumps(
        {"pixels": digest(clips()[clip]), "prompt": CAPTIONS[clip], "yes": yes} | changed
    )


def vision(folder: Path, *lines: str, **options: Any) -> RewardSpec:
    weights = folder / "weight.json"
    weights.write_text(json.dumps(COEFFICIENTS))
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    usual = {
        "scores": str(folder / "scores.jsonl"),
        "question_weights": str(weights),
        "weights_sha256": sha256(weights),
    }
    chosen = {key: value for key, value in (usual | options).items() if value is not None}
    return RewardSpec(name="vision_reward", weights={}, options=chosen)


def test_it_is_the_formula_over_the_answers_of_the_clips_own_row(tmp_path: Path) -> None:
    reward = rewards.load(vision(tmp_path, *(row(clip, yes) for clip, yes in ROWS.items())))
    scores = reward(clips()[:4], CAPTIONS[:4], 8.0)
    assert scores.valid.tolist() == [True, True, True, False], "the fourth clip has no row"
    w = COEFFICIENTS[0]
    for clip, yes in ROWS.items():
        signed = sum(w * (2 * p - 1) for p in yes) / QUESTIONS
        assert scores.values["VisionReward"][clip].item() == pytest.approx(signed, abs=1e-7)
        plain = sum(w * p for p in yes) / QUESTIONS
        assert scores.values["VisionReward_p"][clip].item() == pytest.approx(plain, abs=1e-7)
    # a mean probability of 0.573 is the paper's 0.124
    assert scores.values["VisionReward_p"][2].item() == pytest.approx(0.124, abs=5e-4)
    assert all(column[3].isnan() for column in scores.values.values())
    other = reward(clips()[:1], [CAPTIONS[1]], 8.0)
    assert not other.valid.any(), "another prompt is another question"


def test_a_clip_of_which_no_answer_was_understood_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores\.jsonl, line 2: no answer is yes, .* -0\.2164542"):
        rewards.check_settings(vision(tmp_path, row(0, ROWS[0]), row(1, [0.0] * 29)))
    weights = torch.tensor(COEFFICIENTS, dtype=torch.float64)
    reward = VisionReward({(digest(clips()[0]), "p"): torch.zeros(29).double()}, weights, "")
    score = reward(clips()[:1], ["p"], 8.0).values["VisionReward"].item()
    assert score == pytest.approx(-0.2164542, abs=1e-6), "which is the score that the line names"


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "no prompt": row(0, ROWS[0], prompt=None),
    "no pixels": row(0, ROWS[0], pixels=3),
    "28 answers": row(0, ROWS[0][:28]),
    "above 1": row(0, [1.5, *ROWS[0][1:]]),
    "NaN": row(0, [float("nan"), *ROWS[0][1:]]),
    "true": row(0, [True, *ROWS[0][1:]]),
    "no list": row(0, "yes"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_line_is_named(fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^rewards\.options\.scores=.*, line 2: ") as raised:
        rewards.check_settings(vision(tmp_path, row(1, ROWS[1]), BROKEN[fault]))
    assert "\n" not in str(raised.value)


def test_only_the_authors_weights_are_taken_unless_another_file_is_accepted(tmp_path: Path) -> None:
    good = row(0, ROWS[0])
    for changed, said in (
        ({"weights_sha256": None}, r"its SHA-256 is [0-9a-f]{64}, not that of VisionReward's"),
        ({"scores": ""}, r"rewards\.options\.scores: missing"),
        ({"question_weights": ""}, r"rewards\.options\.question_weights: missing"),
    ):
        with pytest.raises(UserError, match=said):
            rewards.check_settings(vision(tmp_path, good, **changed))
    with pytest.raises(UserError, match="line 2: that clip was there before"):
        rewards.check_settings(vision(tmp_path, good, good))
    with pytest.raises(UserError, match="has no scores"):
        rewards.check_settings(vision(tmp_path))
