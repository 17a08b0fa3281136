"""`fastgrpo check-reward`, and rewards by function and by an installed package's entry point."""

import re
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
from fastgrpo.tools.check.reward import clips_of
from fastgrpo.tools.check.reward_contract import CAPTIONS, RULES, clips, contract
from tests import ROOT
from tests.harness import runs
from tests.harness.servers import same

TWO = """
import torch
from fastgrpo.core.reward import Reward, Scores

PARTS = ("mean",)


class Mean(Reward):
    names = PARTS

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, pixels, prompts, fps):
        values = self.sign * pixels.float().mean((1, 2, 3, 4))
        return Scores({"mean": values}, torch.isfinite(values))


def bright(spec):
    return Mean(1.0)


def dark(spec):
    return Mean(-1.0)
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No path and no module of one test is another's."""
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if name.startswith(("own_reward_", "lookers")):
            del sys.modules[name]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    (tmp_path / "two.py").write_text(TWO)
    return tmp_path / "two.py"


def means(sign: float) -> torch.Tensor:
    """float32 [6]"""
    return sign * clips().float().mean((1, 2, 3, 4))


# ---- a function of a file


def test_two_functions_of_one_file_are_two_rewards(two: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = runs.RECIPE.read_text()
    start, end = text.index("[[rewards]]"), text.index("[checkpoint]")
    own = '[[rewards]]\nname = "./two.py:{}"\nweights = {{ {} = 1.0 }}\n\n'
    recipe.write_text(text[:start] + own.format("bright", "mean") + text[end:])
    (spec,) = config.load(recipe).rewards
    assert (spec.name, spec.file, spec.function) == ("bright", two, "bright")
    (again := tmp_path / "again.toml").write_text(config.load(recipe).to_toml())
    assert config.load(again).rewards == (spec,)
    both = [rewards.plain(f"{two}:{name}") for name in ("bright", "dark")]
    scores = ScorerInProcess(both).score(clips(), CAPTIONS, 8.0)
    assert torch.equal(scores["bright"].values["mean"], means(1.0))
    assert torch.equal(scores["dark"].values["mean"], means(-1.0))
    with (
        launch_beside(both, tmp_path / "run") as (url, token),
        RewardClient([url], token, ["bright", "dark"]) as client,
    ):
        assert same(client.score(clips(), CAPTIONS, 8.0), scores)


def test_a_function_that_is_not_there_is_named(two: Path) -> None:
    assert rewards.plain(f"{two}:load").function is None
    for name, said in (
        (f"{two}:pale", r"two\.py has no function pale; add it at its top level"),
        (f"{two}", r"two\.py has no function load"),
        (f"{two}:9", r"no such reward"),
    ):
        with pytest.raises(UserError, match=said):
            rewards.load(rewards.plain(name))
    spec = RewardSpec(name="tiny_world", weights={}, function="bright")
    with pytest.raises(UserError, match=r"rewards\.function=bright: only a file of your own"):
        rewards.load(spec)


def test_check_reads_what_the_file_declares(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"rewards=[{{name='{two}:bright', weights={{shine=1.0}}}}]"
    assert main(["check", str(runs.RECIPE), own]) == 2
    assert "bright has no part 'shine'; its parts are mean." in capsys.readouterr().err


# ---- an installed package


def install(folder: Path, value: str = "lookers.two:bright", name: str = "glow") -> None:
    """A package with an entry point, in a folder that Python looks into."""
    (folder / "lookers").mkdir(parents=True)
    (folder / "lookers" / "__init__.py").write_text("")
    (folder / "lookers" / "two.py").write_text(TWO)
    about = folder / "lookers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lookers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fastgrpo.rewards]\n{name} = {value}\n")


def test_an_installed_reward_has_a_name_and_its_file_is_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    assert "glow" in rewards.known()
    spec = rewards.plain("glow")
    assert rewards.file_of(spec) == site / "lookers" / "two.py" and rewards.parts(spec) == ("mean",)
    assert "lookers.two" not in sys.modules, "what it declares is read without importing it"
    inside = ScorerInProcess([spec]).score(clips(), CAPTIONS, 8.0)
    assert torch.equal(inside["glow"].values["mean"], means(1.0))
    with (
        launch_beside([spec], tmp_path / "run") as (url, token),
        RewardClient([url], token, ["glow"]) as client,
    ):
        assert same(client.score(clips(), CAPTIONS, 8.0), inside)
    before = load_served(spec).identity
    (site / "lookers" / "two.py").write_text(TWO + "# changed\n")
    assert load_served(spec).identity != before


def test_an_entry_point_without_its_module_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "lookers.three:bright")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"glow: the entry point lookers\.three:bright names a module"
    ):
        rewards.load(rewards.plain("glow"))


def test_a_reward_of_the_folder_comes_before_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, name="tiny_world")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rewards.known().count("tiny_world") == 1
    assert rewards.load(rewards.plain("tiny_world")).names == ("VQ", "MQ", "TA")


# ---- the command


def example() -> str:
    """The reward that docs/extending.md shows."""
    text = (ROOT / "docs" / "extending.md").read_text()
    (found,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    return str(found)


def test_the_example_of_the_docs_keeps_the_contract_behind_a_server_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(example().splitlines()) <= 15
    (tmp_path / "my_reward.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    assert main(["check-reward", "./my_reward.py"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:-1]] == [["ok", name] for name in RULES]
    assert re.fullmatch(r"my_reward takes \S+ ms per clip of 9 frames of 32 x 32\.", said[-1])


FAULTS = {
    "batches": ("values = values - values.mean()", "a clip alone has another score"),
    "form": ("values = values[:1]", r"mean is torch.float32 \[1\], not float32 \[6\]"),
    "odd_prompts": ("values[[not p for p in prompts]] = float('inf')", "mean is not finite"),
    "golden": (
        "self.calls = getattr(self, 'calls', 0) + 1; values = values + (len(values) == 1) * self.calls",
        "another score the second time",
    ),
    "values": ("raise KeyError('of my own')", r"it raised KeyError: 'of my own', at .*two\.py:16"),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_broken_rule_is_told_and_the_exit_code_is_1(
    rule: str, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, told = FAULTS[rule]
    start = "        return Scores("
    valid = "torch.ones(len(values), dtype=torch.bool)"
    text = TWO.replace(start, f"        {body}\n{start}").replace("torch.isfinite(values)", valid)
    two.write_text(text)
    assert main(["check-reward", f"{two}:bright", "--no-server"]) == 1
    said = capsys.readouterr().out
    broken = said.partition(f"BROKEN  {rule}")[2].splitlines()
    assert broken and re.search(told, broken[1]), said
    assert "per clip" not in said


def test_behind_a_server_other_scores_are_told(two: Path) -> None:
    """A reward that looks at where it runs."""
    text = TWO.replace("self.sign = sign", "import sys; self.sign = sign * len(sys.argv)")
    two.write_text(text)
    found = contract(rewards.plain(f"{two}:bright"), ["server"])
    assert found == {"server": ["behind a server its scores differ"]}


def test_its_settings_are_the_command_lines_or_a_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rewards.toml"
    file.write_text('[[rewards]]\nname = "video_stats"\noptions = { grid_period = 1 }\n')
    assert main(["check-reward", "video_stats", "--recipe", str(file), "--no-server"]) == 2
    assert "rewards.options.grid_period=1" in capsys.readouterr().err
    one = ["check-reward", "video_stats", "--no-server", "--option", "grid_period=8"]
    assert main([*one, "--set", "frames=2"]) == 0


def test_what_cannot_be_loaded_is_one_line_and_exit_code_2(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two.write_text("import not_installed\n" + TWO)
    assert main(["check-reward", f"{two}:bright"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ModuleNotFoundError" in line and "two.py:1" in line


def test_it_may_be_tried_on_clips_of_the_users_own(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    command = ["check-reward", f"{two}:bright", "--no-server", "--clips", str(folder)]
    for n, clip in enumerate(clips()[:3, :5]):
        write_mp4(folder / f"{n}.mp4", clip.repeat_interleave(8, 1).repeat_interleave(8, 2), 8.0)
        (folder / f"{n}.txt").write_text(f"a prompt {n}")
        if n == 0:
            assert main(command) == 2
            assert "has one clip; give two or more" in capsys.readouterr().err
    found = clips_of(folder)
    assert found.pixels.shape == (3, 5, 256, 256, 3)
    assert found.prompts == ["a prompt 0", "a prompt 1", "a prompt 2"]
    assert main(command) == 0
    assert "ms per clip of 5 frames of 256 x 256." in capsys.readouterr().out
    write_mp4(folder / "3.mp4", clips()[0].repeat_interleave(8, 1).repeat_interleave(8, 2), 8.0)
    assert main(command) == 2
    assert "3.mp4 has [9, 256, 256, 3], and 0.mp4 [5, 256, 256, 3]" in capsys.readouterr().err
