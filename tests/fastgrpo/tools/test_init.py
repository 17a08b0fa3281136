"""A new folder to train in: its recipe says what the one that comes along says, and all of it works."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo import rewards
from fastgrpo.cli.main import main
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.tools.start import init as start
from fastgrpo.tools.start.init import Hardware
from fastgrpo.tools.start.recipe_text import with_value
from tests import ROOT

HEAD = "''':'\n"  # ends the lines that slurm reads


def values(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what a new folder has of its own."""
    tree = recipe.model_dump()
    del tree["prompts"]["train"]
    for reward in tree["rewards"]:
        del reward["path"], reward["options"]
    return tree


@pytest.mark.parametrize("name", sorted(start.recipes()))
def test_a_new_folder_has_the_recipe_and_names_no_other_folder(name: str, tmp_path: Path) -> None:
    files = start.init(tmp_path / "new", name, None)
    folder, own_name = tmp_path / "new", Path(name).name
    text = (folder / f"{own_name}.toml").read_text()
    assert "../" not in re.sub("#.*", "", text)
    made = values(config.load(folder / f"{own_name}.toml"))
    own = made["rewards"] = list(made["rewards"])
    assert own.pop()["weights"] == {"brightness": 0.0}
    given = values(config.load(ROOT / "launch" / f"{name}.toml"))
    assert made == given | {"rewards": list(given["rewards"])}
    launcher = (folder / f"{own_name}.sh").read_text()
    given_launcher = (ROOT / "launch" / f"{own_name}.sh").read_text()
    if name == own_name:
        assert launcher.split(HEAD)[0] == given_launcher.split(HEAD)[0]
    else:  # the slurm options of its own machine
        gpus = {"one_card": 1, "one_node": 8}[name.split("/")[0]]
        assert "#SBATCH --nodes=1\n" in launcher and f"--gpus-per-node={gpus}\n" in launcher
    assert f"fastgrpo watch {made['run']['dir']}" in (folder / "README.md").read_text()
    assert {file.name for file in files} == {file.name for file in (tmp_path / "new").iterdir()}


def test_the_commands_of_a_new_folder_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "new"]) == 0
    assert "next: cd new" in capsys.readouterr().out
    monkeypatch.chdir("new")
    assert main(["check", "t2v_tiny.toml"]) == 0
    assert capsys.readouterr().out.startswith("# prompts: 1,440 to train on, 24 held out\n")
    pixels, spec = torch.arange(2, dtype=torch.uint8) * 255, rewards.plain("./my_reward.py")
    scores = rewards.load(spec)(pixels.reshape(2, 1, 1, 1, 1).expand(2, 3, 4, 4, 3), ["", ""], 8.0)
    assert scores.values["brightness"].tolist() == [0, 1]
    assert "fastgrpo sample runs/t2v_tiny" in Path("README.md").read_text()


def test_a_recipe_is_tuned_for_the_hardware_that_is_named(tmp_path: Path) -> None:
    start.init(tmp_path, "t2i_sd", Hardware(16, "l40s", per_node=4))
    given, made = (config.load(f / "t2i_sd.toml") for f in (ROOT / "launch", tmp_path))
    text = (tmp_path / "t2i_sd.toml").read_text()
    changed = re.findall(r"^(\w+) = .*# plan --tune for 16 x l40s$", text, re.MULTILINE)
    tuned, before = values(made), values(given)
    differing = {
        key
        for section, content in before.items()
        if section != "rewards"
        for key in content
        if content[key] != tuned[section][key]
    }
    assert differing and differing <= set(changed)
    assert differing <= {
        *("sp", "shard", "offload", "prefetch", "rollout_weights", "store", "batch_size"),
        *("gradient_checkpointing", "keep", "decode_batch", "where"),
    }
    assert re.search(r"^# Plan: 16 x l40s: \d+ s per iteration, [\d.]+ GiB", text, re.MULTILINE)
    asked = re.findall(r"^#SBATCH --(nodes|gpus-per-node|cpus-per-task)=(\d+)$",
                       (tmp_path / "t2i_sd.sh").read_text(), re.MULTILINE)  # fmt: skip
    assert dict(asked) == {"nodes": "4", "gpus-per-node": "4", "cpus-per-task": "32"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "t2v_hunuan"], "--from=t2v_hunuan: no such recipe. Did you mean t2v_hunyuan?"),
        (["--gpus", "8"], "--gpus: says nothing alone; add --gpu, too."),
        (["--gpus", "12", "--gpu", "h100"], "--gpus=12: not a multiple of the 8 of a node"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_hardware_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "tune", lambda given: None)
    said = "--gpus=1: t2v_hunyuan does not fit on 1 x 4090 with any settings of the same results"
    with pytest.raises(UserError, match=said):
        start.init(tmp_path / "new", "t2v_hunyuan", Hardware(1, "4090"))
    assert not (tmp_path / "new").exists()


def test_memory_of_the_host_is_told(tmp_path: Path) -> None:
    start.init(tmp_path, "t2i_sd", Hardware(1, "4090"))
    text = (tmp_path / "t2i_sd.toml").read_text()
    assert ("Of a node's own memory" in text) == ("offload = true" in text or '"host"' in text)


def test_no_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"FOLDER=.*: has a prompts\.txt already; choose another"):
        start.init(tmp_path, "t2v_tiny", None)
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    "key", ["run.seed", "model.dtype", "lora.rank", "rewards.1.where", "run.new"]
)
def test_a_key_is_set_and_nothing_else_changes(key: str) -> None:
    text = (
        '# head\n[run]\ndir = "runs/x"\nseed = 3  # three\n\n[model]  # which\ndtype = "b"\n'
        '[[rewards]]\nname = "a"\n\n[[rewards]]\nname = "b"\n'
    )
    made = with_value(text, key, 7, "why")
    tree: Any = tomllib.loads(text)
    node, (*above, last) = tree, key.split(".")
    for part in above:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = 7
    assert tomllib.loads(made) == tree
    assert f"{last} = 7  # why\n" in made and made.startswith("# head\n[run]\n")
