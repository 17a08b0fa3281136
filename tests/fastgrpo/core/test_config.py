"""Recipes: overrides, paths, and that every mistake is one line that names the place and the
remedy.
"""

import tomllib
from pathlib import Path

import pytest

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.training import methods
from tests import ROOT

RECIPE = ROOT / "launch" / "t2v_tiny.toml"


def test_every_shipped_recipe_loads_and_round_trips(tmp_path: Path) -> None:
    for file in sorted(RECIPE.parent.glob("*.toml")):
        recipe = config.load(file)
        copy = tmp_path / file.name
        copy.write_text(recipe.to_toml())
        assert config.load(copy) == recipe


def test_overrides_have_types_and_reach_into_lists(tmp_path: Path) -> None:
    recipe = config.load(
        RECIPE,
        [
            "run.iterations=7",
            "optimizer.lr=3e-5",
            "rewards.0.where=process",
            "track.wandb=true",
            "run.dir=a b",
        ],
    )
    assert recipe.run.iterations == 7 and recipe.optimizer.lr == 3e-5 and recipe.track.wandb
    assert recipe.rewards[0].where == "process" and recipe.run.dir == Path("a b")
    assert recipe.objective.best_of_n == 8
    assert config.load(RECIPE, ["objective.best_of_n=none"]).objective.best_of_n is None


def test_paths_of_the_file_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = config.load(RECIPE)
    assert Path(recipe.prompts.train).is_file() and Path(recipe.prompts.train).is_absolute()
    assert config.load(RECIPE, ["prompts.train=../x.txt"]).prompts.train == str(
        tmp_path.parent / "x.txt"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stepz=5", "Unknown key 'rollout.stepz'; did you mean 'rollout.steps'?"),
        ("objective.groupsize=5", "Unknown key 'objective.groupsize'"),
        ("rollout.lr=1e-3", "Unknown key 'rollout.lr'; did you mean 'optimizer.lr'?"),
        ("rolout.steps=5", "Unknown key 'rolout'; did you mean 'rollout'?"),
        ("rollout.steps=many", "rollout.steps='many': input should be a valid integer"),
        ("rollout.steps=1", "rollout.steps=1: input should be greater than or equal to 2"),
        ("rollout.eta=0.0", "rollout.eta=0.0: GRPO needs a stochastic sampler; use eta > 0"),
        ("optimizer.updates_per_iteration=3", "does not divide the 8 samples trained per prompt"),
        (
            "objective.best_of_n=18",
            "objective.best_of_n=18: must be even and at most rollout.samples_per_prompt=16",
        ),
        ("objective.best_of_n=3", "objective.best_of_n=3: must be even"),
        ("rewards.0.weights={VQ=0.0}", "every weight is 0"),
        ("rewards.3.where=process", "no such entry; there are 1"),
        ("server.urls=['http://127.0.0.1:1']", "server.token_file: missing"),
        ("steps=5", "not of the form section.key=value"),
        ("run.iterations", "not of the form section.key=value"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        methods.check(config.load(RECIPE, [override]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_that_would_divide_are_named() -> None:
    with pytest.raises(UserError, match="use one of 1, 2, 4, 8"):
        config.load(RECIPE, ["optimizer.updates_per_iteration=3"])


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(UserError, match="not a TOML file"):
        config.load(tmp_path / "broken.toml")
    (tmp_path / "short.toml").write_text("[run]\ndir = 'x'\n")
    with pytest.raises(
        UserError, match=r"run.iterations: missing; add it to the recipe or as an override"
    ):
        config.load(tmp_path / "short.toml")


def test_steps_trained_is_ceil_of_tau_t_and_never_the_last() -> None:
    assert (
        config.load(RECIPE, ["rollout.steps=12", "objective.timestep_fraction=0.6"]).steps_trained
        == 8
    )
    assert (
        config.load(RECIPE, ["rollout.steps=12", "objective.timestep_fraction=1.0"]).steps_trained
        == 11
    )


def test_every_key_is_described() -> None:
    text = config.describe()
    for key in config.all_keys():
        assert key.split(".")[-1] in text
    tomllib.loads(config.load(RECIPE).to_toml())
