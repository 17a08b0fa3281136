"""A reward in a file of the user's own: named by its path, and its mistakes told in one line."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgrpo import rewards
from fastgrpo.cli.main import main
from fastgrpo.core import config
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.data.video import write_mp4
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import load_served
from fastgrpo.rewards.serving.server.child import launch_beside
from tests.harness import runs
from tests.harness.servers import CAPTIONS, clips, same

OWN = """
import torch
import beside_it
from fastgrpo.core.reward import Reward, Scores
{top}

class Bright(Reward):
    names = ("bright",)

    def __call__(self, pixels, prompts, fps):
        values = pixels.float().mean((1, 2, 3, 4)) * beside_it.GAIN
        {body}
        return Scores({{"bright": values}}, torch.ones(len(values), dtype=torch.bool))


def load(spec):
    {load}
    return Bright()
"""


def write(folder: Path, name: str = "my_reward", **parts: str) -> Path:
    (folder / "beside_it.py").write_text("GAIN = 2.0\n")
    file = folder / f"{name}.py"
    file.write_text(OWN.format(**({"top": "", "body": "", "load": ""} | parts)))
    return file


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No module of a test's file is another's."""
    paths = list(sys.path)
    yield
    sys.path[:] = paths
    sys.modules.pop("beside_it", None)


def spec_of(file: Path) -> RewardSpec:
    return rewards.plain(str(file))


def test_a_path_names_a_reward_relative_to_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path)
    recipe = tmp_path / "recipe.toml"
    text = runs.RECIPE.read_text()
    start, end = text.index("[[rewards]]"), text.index("[checkpoint]")
    own = '[[rewards]]\nname = "./my_reward.py"\nweights = { bright = 1.0 }\n\n'
    recipe.write_text(text[:start] + own + text[end:])
    (spec,) = config.load(recipe).rewards
    assert (spec.name, spec.file) == ("my_reward", file)
    assert RewardSpec.model_validate(spec.model_dump(mode="json")) == spec
    again = tmp_path / "again.toml"
    again.write_text(config.load(recipe).to_toml())
    assert config.load(again).rewards == (spec,)
    with pytest.raises(UserError, match=r"write the path of 'mine\.py' as \./mine\.py"):
        config.section(RewardSpec, "rewards", {"name": "mine.py", "weights": {}})


def test_it_scores_the_same_in_the_process_and_behind_a_server(tmp_path: Path) -> None:
    spec = spec_of(write(tmp_path))
    inside = ScorerInProcess([spec]).score(clips(), CAPTIONS, 8.0)
    expected = clips().float().mean((1, 2, 3, 4)) * 2.0
    assert torch.equal(inside["my_reward"].values["bright"], expected)
    with (
        launch_beside([spec], tmp_path / "run") as (url, token),
        RewardClient([url], token, ["my_reward"]) as client,
    ):
        assert same(client.score(clips(), CAPTIONS, 8.0), inside)


def test_its_identity_is_its_code_wherever_it_lies(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    one, other = (write(tmp_path / folder) for folder in ("one", "other"))
    identity = load_served(spec_of(one)).identity
    assert load_served(spec_of(other)).identity == identity
    write(tmp_path / "other", top="# changed")
    assert load_served(spec_of(other)).identity != identity


FAULTS = {
    "import": ({"top": "import not_installed"}, "ModuleNotFoundError: No module named", 5),
    "syntax": ({"top": "values = = 3"}, "SyntaxError: invalid syntax", 5),
    "load": ({"load": "raise FileNotFoundError('no weights here')"}, "no weights here", 17),
    "call": ({"body": "raise KeyError('of my own')"}, "KeyError: 'of my own'", 12),
    "value": ({"body": "raise ValueError('too small')"}, "ValueError: too small", 12),
    "one score": ({"body": "values = values[:1]"}, r"gave bright \[1\] for 2 clips", None),
    "a part": ({"body": "return Scores({'A': values}, values > 0)"}, "no part 'bright'", None),
    "no scores": ({"body": "return values"}, "gave a Tensor, not Scores", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_told_with_text_and_place_before_anything_costly(
    fault: str, tmp_path: Path
) -> None:
    parts, said, line = FAULTS[fault]
    file = write(tmp_path, **parts)
    with pytest.raises(UserError, match=said) as raised:
        ScorerInProcess([spec_of(file)]).try_out(9, (32, 32), 8.0)
    message = str(raised.value)
    assert message.startswith("rewards.name=my_reward: ") and "\n" not in message
    if line is not None:
        assert f"{file}:{line}" in message


@pytest.mark.parametrize("fault", ["import", "syntax", "load", "call", "one score"])
def test_behind_a_server_likewise(fault: str, tmp_path: Path) -> None:
    parts, said, _ = FAULTS[fault]
    spec = spec_of(write(tmp_path, **parts))
    with pytest.raises(UserError, match=f"rewards.name=my_reward: .*{said}"):
        load_served(spec).warm_up()


def test_in_a_run_it_is_one_line_and_nothing_is_encoded(tmp_path: Path) -> None:
    file = write(tmp_path, body="raise KeyError('of my own')")
    reward = f'rewards=[{{name="{file}", weights={{bright=1.0}}, where="process"}}]'
    line = runs.complaint(tmp_path / "run", [reward])
    assert "KeyError: 'of my own'" in line and f"{file}:12" in line
    assert not (tmp_path / "run" / "embeddings").exists()


def test_what_it_raises_later_is_told_with_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, body="if prompts[0] == 'odd': raise KeyError('of my own')")
    source = ScorerInProcess([spec_of(file)])
    with caplog.at_level(logging.WARNING):
        scores = source.score(clips()[:2], ["odd", "p"], 8.0)["my_reward"]
    assert not scores.valid.any()
    for told in (caplog.text, source.hint):
        assert "KeyError: 'of my own'" in told and f"{file}:12" in told


def test_the_score_command_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    write_mp4(tmp_path / "clip.mp4", clips()[0], 8)
    monkeypatch.chdir(tmp_path)
    command = ["score", str(tmp_path / "clip.mp4"), "--reward", "./my_reward.py"]
    assert main([*command, "--prompt", "p"]) == 0
    assert "bright" in capsys.readouterr().out
    write(tmp_path, top="import not_installed")
    assert main([*command, "--prompt", "p"]) == 2
    said = capsys.readouterr().err
    assert "my_reward.py:5" in said and "Traceback" not in said


def test_a_file_of_the_folder_that_is_not_python_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def load(spec:\n")
    (tmp_path / "well.py").write_text("def load(spec): ...\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\ndef load(spec): ...\n")
    monkeypatch.setattr(rewards, "FOLDER", tmp_path)
    assert rewards.known() == ("well",)
    with pytest.raises(UserError, match=r"rewards\.name=broken: SyntaxError: .*broken\.py:1;"):
        rewards.load(rewards.plain("broken"))
    with pytest.raises(UserError, match=r"rewards\.name=latin: .*latin\.py cannot be read"):
        rewards.least_frames(rewards.plain("latin"))
    with pytest.raises(UserError, match=r"no_such\.py: no such file; give the path"):
        rewards.load(rewards.plain("./no_such.py"))
