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


def test_a_home_folder_and_variables_stand_for_what_a_shell_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home-of-me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    typed = {"~/runs/a": "/home-of-me/runs/a", "$SCRATCH/a": "/scratch/me/a"}
    typed |= {"${SCRATCH}/ä ö": "/scratch/me/ä ö", "a b": "a b", "2026-11-21": "2026-11-21"}
    file = tmp_path / "recipe.toml"
    for text, meant in typed.items():
        assert config.load(RECIPE, [f"run.dir={text}"]).run.dir == Path(meant)
        file.write_text(RECIPE.read_text().replace("runs/t2v_tiny", text))
        assert config.load(file, ["prompts.train=x.txt"]).run.dir == Path(meant)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$SCRATCH").mkdir()  # what exists as it is written is that
    assert config.load(RECIPE, ["model.path=$SCRATCH"]).model.path == str(tmp_path / "$SCRATCH")


def test_paths_are_recorded_whole_and_hub_ids_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "sd").mkdir(parents=True)
    keys = ("model.path", "model.network", "rewards.0.path")
    for key in keys:
        for name in ("owner/name", "owner/name@main", "owner/name@refs/pr/3"):
            assert f'= "{name}"' in config.load(RECIPE, [f"{key}={name}"]).to_toml()
        for name in ("m/sd", "./m/sd", "m/sd/", "m/../m/sd"):
            assert f'= "{tmp_path}/m/sd"' in config.load(RECIPE, [f"{key}={name}"]).to_toml()
    weights = config.load(RECIPE, ["rewards.0.path=w/hps.pt"]).rewards[0].path
    assert weights == str(tmp_path / "w" / "hps.pt")  # no hub id ends so
    (tmp_path / "t.py").touch()
    option = config.load(RECIPE, ["rewards.0.options.template=t.py"]).rewards[0].options
    assert option == {"template": str(tmp_path / "t.py")}


def test_a_bom_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.read_text(), encoding="utf-8-sig")
    assert config.load(file).run == config.load(RECIPE).run


def test_text_is_text_whatever_it_looks_like() -> None:
    said = ["track.project=2026", "track.entity=true", "model.negative_prompt='a'", "model.cfg=2"]
    recipe = config.load(RECIPE, said)
    assert (recipe.track.project, recipe.track.entity) == ("2026", "true")
    assert recipe.model.negative_prompt == "a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stepz=5", "Unknown key 'rollout.stepz'; did you mean 'rollout.steps'?"),
        ("objective.groupsize=5", "Unknown key 'objective.groupsize'"),
        ("rollout.lr=1e-3", "Unknown key 'rollout.lr'; did you mean 'optimizer.lr'?"),
        ("rolout.steps=5", "Unknown key 'rolout'; did you mean 'rollout'?"),
        ("rollout.steps=many", "rollout.steps='many': must be a whole number at least 2."),
        ("rollout.steps=1", "rollout.steps=1: must be a whole number at least 2."),
        (
            "rollout.batch_size=-4",
            "rollout.batch_size=-4: must be a whole number above 0, or auto.",
        ),
        (
            "model.gradient_checkpointing=-1",
            "model.gradient_checkpointing=-1: must be true or false, or a whole number above 0, or a "
            "finite number above 0 and below 1.",
        ),
        ("rewards.0.frames=frist", "or all, first or middle; did you mean first?"),
        ("rewards.0.weights={XX='a'}", "rewards.0.weights.XX='a': must be a finite number."),
        ("server.urls='http://x'", "must be an array of texts, such as"),
        ("server.urls='http://x'", '; write it as ["http://x"].'),
        ("rewards=[]", "rewards=[]: must be an array of tables, at least one"),
        ("optimizer.betas=3", "must be an array of 2 numbers, such as [0.9, 0.999]."),
        ("optimizer.scheduler=cosine", "optimizer.warmup_updates and optimizer.decay_updates"),
        ("run.eval_steps=5", "evaluations on the way come after each evaluate.every iterations"),
        ("evaluate.nothing=5", "[evaluate] has prompts, seeds, steps, clips, every, alarm, "),
        ("evaluate.alarm=ring", "must be off, warn, stop or return"),
        ("server.urls=['http:/x']", "server.urls='http:/x': not the address of a server"),
        ("rewards.0.urls=['h:80']", "rewards.0.urls='h:80': not the address of a server"),
        ("lora.alpha=2.0", "lora.alpha: has no effect without adapters"),
        ("prompts.language_column=l", "has no effect without prompts.languages"),
        ("rollout.eta=0.0", "rollout.eta=0.0: GRPO needs a stochastic sampler; use eta > 0"),
        ("optimizer.updates_per_iteration=3", "does not divide the 8 samples trained per prompt"),
        (
            "objective.best_of_n=18",
            "objective.best_of_n=18: must be even and at most rollout.samples_per_prompt=16",
        ),
        ("objective.best_of_n=3", "objective.best_of_n=3: must be even"),
        ("distributed.offload=disk", "distributed.offload='disk': must be true or false, or nvme."),
        ("distributed.offload=nvme", "distributed.offload_path: missing; distributed.offload=nvme"),
        ("distributed.offload_path=/x", "distributed.offload_path=/x: has no effect without"),
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
    said = str(caught.value)
    assert message in said and "\n" not in said and "mistake" not in said


def test_a_run_that_is_to_go_back_needs_the_checkpoints_of_its_evaluations() -> None:
    back = ["evaluate.alarm=return", "evaluate.every=20"]
    assert config.load(RECIPE, back).evaluate.alarm_lr == 0.5
    with pytest.raises(UserError, match=r"use a multiple of checkpoint.every=10, or set"):
        config.load(RECIPE, [*back, "evaluate.every=15"])
    with pytest.raises(UserError, match=r"keep_best=false: evaluate.alarm=return goes back to the"):
        config.load(RECIPE, [*back, "checkpoint.keep_best=false"])
    config.load(RECIPE, ["evaluate.alarm=return"])  # an override for another day


def test_adapters_have_nothing_to_put_on_a_disk() -> None:
    disk = ["distributed.offload=nvme", "distributed.offload_path=/x"]
    assert config.load(RECIPE, disk).distributed.offload == "nvme"
    with pytest.raises(UserError, match=r"distributed.offload=nvme: adapters of lora.rank=4 have"):
        config.load(RECIPE, [*disk, "lora.rank=4"])


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


def test_what_comes_with_the_package_is_recorded_by_its_name(tmp_path: Path) -> None:
    recipe = config.load(RECIPE)
    assert Path(recipe.prompts.train).is_file() and Path(recipe.model.path).is_dir()
    text = recipe.to_toml()
    assert 'path = "builtin:tiny_hunyuan_video"' in text and str(ROOT) not in text
    (tmp_path / "again.toml").write_text(text)
    assert config.load(tmp_path / "again.toml") == recipe
    with pytest.raises(
        UserError, match=r"model\.path=builtin:tiny: nothing .*; use one of .*video"
    ):
        config.load(RECIPE, ["model.path=builtin:tiny"])


def test_the_keys_of_one_section_come_with_their_values() -> None:
    text = config.describe("optimizer")
    assert "[optimizer]" in text and "[run]" not in text
    assert "Values: constant, linear or cosine." in text
    assert "Values: a whole number at least 0." in text
    assert "Values: process or server." in config.describe("rewards")
    with pytest.raises(UserError, match=r"SECTION=optimiser: no such section; use one of run, mod"):
        config.describe("optimiser")
