"""What `fastgrpo check`, and the first lines of every command that loads a recipe, say of it."""

from pathlib import Path

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserErrors
from fastgrpo.tools.check import check, without_effect
from fastgrpo.training import methods
from tests import ROOT
from tests.harness import runs

NFT = ("objective.kind=nft", "rollout.shared_noise=false")
IN_VAIN = [  # the overrides, the key among them that has no effect, and the reason
    (("objective.nft_beta=0.5",), "with objective.kind=grpo; nft reads it"),
    (("objective.nft_kl=0",), "with objective.kind=grpo; nft reads it"),
    (("objective.max_kl=1e-3",), "with objective.kind=grpo; dppo reads it"),
    (("objective.clip_range=1e-3", "objective.kind=dppo"), "with objective.kind=dppo; awm, ddpo, grpo"),
    (("objective.clip_range=1e-3", *NFT), "with objective.kind=nft; awm, ddpo, grpo, guard reads it"),
    (("objective.kl_weight=0.1", *NFT), "with objective.kind=nft"),
    (("rollout.eta=0.9", *NFT), "with objective.kind=nft, which draws no noise"),
    (("rollout.sampler=flow", *NFT), "with objective.kind=nft, which draws no noise"),
    (("rollout.window_schedule=first",), "without rollout.window"),
    (("rollout.window_every=3",), "without rollout.window"),
    (("rollout.window_stride=2", "rollout.window=3", "rollout.window_schedule=random"),
     "with rollout.window_schedule=random"),
    (("objective.timestep_choice=first", "objective.timestep_fraction=1"),
     "all 5 steps are trained"),
    (("objective.best_of_n=16",), "all 16 samples of a prompt are trained"),
    (("prompts.heldout_share=0.5",), "with prompts.heldout"),
    (("prompts.column=text",), "a .txt file has no columns"),
    (("prompts.max_nsfw=0.1",), "without prompts.nsfw_columns"),
    (("model.keep=attention",), "without model.gradient_checkpointing"),
    (("model.guidance_dtype=float32",), "with model.dtype=float32"),
    (("server.token_file=/t",), "without server.urls"),
    (("server.outage_s=9", "rewards.0.where=process"), without_effect.PROCESS),
    (("server.urls=['http://a:1']", "rewards.0.urls=['http://b:1']"),
     "every reward names its own urls"),
    (("rewards.0.urls=['http://b:1']", "rewards.0.where=process"),
     "with where=process of tiny_world"),
]  # fmt: skip
IN_USE = [
    ("objective.kind=dppo", "objective.max_kl=1e-3", "objective.kl_weight=0.1"),
    (*NFT, "objective.nft_beta=0.5", "objective.nft_kl=0"),
    ("rollout.window=3", "rollout.window_every=3", "rollout.window_stride=2"),
    ("rollout.window=3", "objective.timestep_choice=first", "objective.timestep_fraction=0.3"),
    ("prompts.heldout=none", "prompts.heldout_share=0.5"),
    ("model.gradient_checkpointing=2", "model.keep=attention"),
    ("model.guidance_dtype=float32", "model.dtype=bfloat16"),
    ("server.urls=['http://a:1']", "server.token_file=/t", "server.outage_s=9"),
]


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_TOKEN", "secret")


def in_vain(*overrides: str) -> list[str]:
    """The lines on the demo's recipe, whose average NFT draws with."""
    return without_effect.lines(config.load(runs.RECIPE, ["objective.best_of_n=none", *overrides]))


@pytest.mark.parametrize(("overrides", "why"), IN_VAIN)
def test_a_key_that_is_set_in_vain_is_told_with_the_reason(
    overrides: tuple[str, ...], why: str
) -> None:
    key = overrides[0].partition("=")[0]
    (line,) = [line for line in in_vain(*overrides) if line.startswith(f"{key}=")]
    assert f"has no effect ({why}" in line and line.endswith("; leave it out.")


@pytest.mark.parametrize("overrides", IN_USE)
def test_a_key_that_has_an_effect_is_not_told(overrides: tuple[str, ...]) -> None:
    assert not [line for line in in_vain(*overrides) if line.partition("=")[0] in str(overrides)]


@pytest.mark.parametrize("file", sorted(ROOT.glob("launch/*.toml")), ids=lambda file: file.stem)
def test_no_recipe_here_sets_a_key_in_vain(file: Path, tmp_path: Path) -> None:
    recipe = config.load(file)
    assert not without_effect.lines(recipe)
    resolved = tmp_path / "recipe.toml"
    resolved.write_text(recipe.to_toml())
    assert not without_effect.lines(config.load(resolved)), "which names every key"


@pytest.mark.parametrize(
    "file",
    sorted(ROOT.glob("launch/**/*.toml")),
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_nothing_but_weights_keeps_a_recipe_here_from_passing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rewards' weights lie in weights/, where a checkout has none; their models on hubs."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # nothing is fetched by a check
    try:
        check.check(file, [f"run.dir={tmp_path / 'run'}"])
    except UserErrors as error:
        others = [line for line in error.lines if f"={ROOT / 'weights'}/" not in line]
        assert not others


def test_the_rules_name_keys_that_there_are() -> None:
    sections = config.Recipe.model_fields
    for rule in without_effect.RULES:
        assert set(rule.keys) <= set(sections[rule.section].annotation.model_fields)  # type: ignore[union-attr]
    for method in methods.known():
        assert set(methods.traits_of(method).own_keys) <= set(config.Objective.model_fields)


def test_check_and_train_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "rollout.window_every=3: has no effect (without rollout.window); leave it out."
    overrides = ["rollout.window_every=3", f"run.dir={tmp_path / 'run'}"]
    assert cli.main(["check", str(runs.RECIPE), *overrides]) == 0
    assert f"# {said}\n" in capsys.readouterr().out
    check.refuse(config.load(runs.RECIPE, overrides))
    assert capsys.readouterr().out == f"{said}\n"


FAMILIES = "flux, flux_2, hunyuan_video, hunyuan_video_15, hunyuan_video_15_i2v, qwen_image, "
FAMILIES += "skyreels_i2v, stable_diffusion, stable_diffusion_3, wan, wan_a14b, wan_a14b_i2v, "
FAMILIES += "wan_i2v, wan_i2v_14b, z_image"
HELD = "model.path holds a HunyuanVideoPipeline, which hunyuan_video reads."


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("./my_family.py", f"is no family's name. {HELD} Use one of {FAMILIES}; a family of"),
        ("my/family", f"is no family's name. {HELD} Use one of {FAMILIES}; a family of"),
        ("sd3", f"no file models/sd3.py. {HELD} Use one of {FAMILIES}, or add models/sd3.py"),
        ("wan", "names a HunyuanVideoPipeline, not a WanPipeline; set model.family=hunyuan_video"),
    ],
)
def test_a_wrong_family_is_told_with_the_families_and_what_the_folder_holds(
    family: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(runs.RECIPE), f"model.family={family}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line, line


def test_a_folder_of_no_family_is_told_with_the_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    for family, said in (
        ("flux", "correct the path. There are the"),
        ("x", "which no family reads"),
    ):
        wrong = (f"model.path={tmp_path}", f"model.family={family}")
        assert cli.main(["check", str(runs.RECIPE), *wrong]) == 2
        line = capsys.readouterr().err.splitlines()[0]  # the network's folder is missing, too
        assert said in line and FAMILIES in line and "MochiPipeline" in line


def test_a_wrong_value_is_not_missing_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a key that has no default."""
    assert cli.main(["check", str(runs.RECIPE), "run.iterations=x", "video.frames=-3"]) == 2
    said = capsys.readouterr().err
    assert "run.iterations='x': must be a whole number above 0." in said
    assert "missing" not in said and said.count("\n") == 2
