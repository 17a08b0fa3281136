"""A reward is handed its prompts' rows: in the process, behind a server, and in a run."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.cli.main import main
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import PromptText, Reward, Scores, row_of
from fastgrpo.rewards.networks.geneval.judge import GenEval, Settings
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.loaded_reward import load_served
from tests.harness import runs
from tests.harness.servers import CAPTIONS, TOKEN, clips, running

OWN = """
import torch
from fastgrpo.core.reward import Reward, Scores, row_of

COLUMNS = ("size",)
PARTS = ("size",)


class Size(Reward):
    names = PARTS

    def __call__(self, pixels, prompts, fps):
        values = torch.tensor([float(row_of(text).get("size", "nan")) for text in prompts])
        values += pixels.float().mean((1, 2, 3, 4)) / 255
        return Scores({"size": values}, torch.isfinite(values))


def load(spec):
    return Size()
"""


class Sizes(Reward):
    """What the row says."""

    names = ("size",)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        values = torch.tensor([row_of(prompt).get("size", torch.nan) for prompt in prompts])
        return Scores({"size": values}, torch.isfinite(values))


def test_rows_go_through_the_server_with_their_prompts() -> None:
    """Prompts without rows among them; the batcher mixes and divides them as it likes."""
    pixels = clips()
    prompts = [
        PromptText(CAPTIONS[n % len(CAPTIONS)], {"size": float(n)} if n % 3 else None)
        for n in range(len(pixels))
    ]
    with running({"sizes": Sizes()}, batch_size=2) as url:
        client = RewardClient([url], token=TOKEN, names=["sizes"])
        client.wait_ready(10)
        scores = client.score(pixels, prompts, 8.0)["sizes"]
        without = client.score(pixels, [str(text) for text in prompts], 8.0)["sizes"]
        client.close()
    expected = [float(n) for n in range(len(pixels)) if n % 3]
    assert scores.values["size"][scores.valid].tolist() == expected
    assert not without.valid.any()


def test_a_prompt_with_a_row_is_a_text_like_any_other() -> None:
    prompt = PromptText("a cat", {"size": 2})
    assert prompt == "a cat" and hash(prompt) == hash("a cat") and json.dumps(prompt) == '"a cat"'
    again = pickle.loads(pickle.dumps(prompt))
    assert again == prompt and row_of(again) == {"size": 2}


@pytest.mark.parametrize("rows", [{}, [], [{}, {}], [1], [None]])
def test_rows_of_another_form_are_refused(rows: object) -> None:
    with pytest.raises(wire.WireError, match=r"^rows: "):
        wire.with_rows(["a cat"], rows)


def test_geneval_reads_what_a_prompt_asks_in_its_row() -> None:
    class One:
        def __call__(self, shown: Tensor) -> list[None]:
            return [None] * len(shown)

    settings = Settings(("GenEval", "graded", "exact"), None, "all", 2, "of a test")
    reward = GenEval(One(), None, settings)  # type: ignore[arg-type]
    bench = {"include": [{"class": "bench", "count": 3}], "tag": "counting"}
    found = reward._specification(PromptText("three benches", bench))
    assert found is not None and found.counting and found.include[0].count == 3
    assert reward._specification(PromptText("x", {"include": [{"class": "?"}]})) is None
    assert reward._specification("no row") is None
    assert reward._specification(reward.golden[1]) is not None  # type: ignore[index]


def test_what_a_reward_reads_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = [f"rewards=[{{name='{tmp_path}/own.py', where='process', weights={{size=1.0}}}}]"]
    assert main(["check", str(runs.RECIPE), *own]) == 2
    said = capsys.readouterr().err
    assert "prompts.reward_columns=[]: lacks size, which own reads of each prompt's row" in said
    assert rewards.columns(RewardSpec(name="geneval", weights={})) == ("include",)
    assert rewards.columns(RewardSpec(name="geneval", weights={}, options={"rows": "x"})) == ()
    assert rewards.columns(config.load(runs.RECIPE).rewards[0]) == ()


def test_a_reward_that_reads_rows_is_tried_with_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    rows, others = tmp_path / "rows.jsonl", tmp_path / "others.jsonl"
    rows.write_text('{"caption": "x", "size": 3}\n{"caption": "y", "size": 4.5}\n')
    others.write_text('{"caption": "x", "length": 3}\n')
    check = ["check-reward", str(own), "--no-server"]
    assert main([*check, "--rows", str(rows)]) == 0
    for options, said in (
        ([], "own: reads size of each prompt's row, which drawn clips do not have; add --rows"),
        (["--rows", str(others)], "has no size, which own reads; it has caption, length."),
    ):
        assert main([*check, *options]) == 2
        assert said in capsys.readouterr().err
    assert main(["check-reward", "tiny_world", "--no-server", "--rows", str(rows)]) == 2
    assert "tiny_world reads no rows; name their columns" in capsys.readouterr().err


def test_a_reward_that_cannot_do_without_a_row_is_told_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.replace('.get("size", "nan")', '["size"]'))
    spec = RewardSpec(name="own", file=tmp_path / "own.py", weights={"size": 1.0})
    said = "KeyError: 'size'.*; correct its file: of a prompt without size, as of this clip, the "
    with pytest.raises(UserError, match=said):
        load_served(spec).warm_up()


def test_a_run_scores_with_the_rows_of_its_prompts(tmp_path: Path) -> None:
    """The score is the row's number and a fraction, so that its mean says which rows were there."""
    (tmp_path / "own.py").write_text(OWN)
    rows = [
        {"prompt": f"a red circle moves left {n}", "size": 40 if n < 8 else 70} for n in range(10)
    ]
    for name, some in (("train", rows[:8]), ("heldout", rows[8:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    overrides = [
        *(f"prompts.{name}={tmp_path}/{name}.jsonl" for name in ("train", "heldout")),
        *('prompts.reward_columns=["size"]', "run.iterations=1", "evaluate.prompts=1"),
        f"rewards=[{{name='{tmp_path}/own.py', where='process', weights={{size=1.0}}}}]",
    ]
    runs.succeed(tmp_path / "run", overrides)
    assert 40 < runs.metrics(tmp_path / "run")[0]["reward/size"] < 41
    before = json.loads((tmp_path / "run" / "summary.json").read_text())["before"]["size"]
    assert 70 < before < 71
