"""A resumed run has the network and the rewards that it began with, or says which are others."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.checkpoint import provenance
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving import in_process
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.run import file_hashes
from fastgrpo.train import train
from tests.harness import runs, tiny
from tests.harness.servers import TOKEN, running

WEIGHTS = "diffusion_pytorch_model.safetensors"


def recipe(folder: Path, *overrides: str) -> Recipe:
    """Adapters on a copy of the tiny model beside the run's folder."""
    small = [
        *runs.SMALL,
        *runs.SMALLER,
        "lora.rank=2",
        f"run.dir={folder / 'run'}",
        f"model.path={folder / 'model'}",
    ]
    return config.load(runs.RECIPE, [*small, *overrides])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model and of a run with it that has an iteration to go."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny.FOLDER, folder / "model")
    assert train(recipe(folder, "run.iterations=1")) is not None
    return folder


def test_a_run_notes_its_network_and_its_rewards(begun: Path) -> None:
    noted = json.loads((begun / "run" / "provenance.json").read_text())
    transformer = begun / "model" / "transformer"
    assert noted["network"] == {
        name: sha256(transformer / name) for name in ("config.json", WEIGHTS)
    }
    assert list(noted["rewards"]) == ["tiny_world"] and noted["rewards"]["tiny_world"]["identity"]


def test_another_network_beneath_the_adapters_is_refused_and_the_same_read_once(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = begun / "model" / "transformer" / WEIGHTS
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
        with pytest.raises(
            UserError, match=f"model.path={begun / 'model'}: the network's {WEIGHTS} is not the one"
        ):
            train(recipe(begun))
        assert (begun / "run" / "requeue").read_text() == "no\n"
    finally:
        weights.write_bytes(content)
    read: list[Path] = []

    def hashed(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setattr(file_hashes, "sha256", hashed)
    provenance.check_network(recipe(begun))
    assert read == [weights]  # its time is another
    provenance.check_network(recipe(begun))
    assert read == [weights]


def test_a_reward_of_other_weights_is_refused_and_of_other_code_told(
    begun: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    (tmp_path / "model").symlink_to(begun / "model")
    recipe_file = tmp_path / "run" / "recipe.toml"
    recipe_file.write_text(
        recipe_file.read_text().replace(str(begun / "model"), str(tmp_path / "model"))
    )
    noted = (tmp_path / "run" / "provenance.json").read_text()
    known = json.loads(noted)["rewards"]["tiny_world"]

    def now_with(**changed: str) -> None:
        now = {"tiny_world": known | changed}
        monkeypatch.setattr(provenance, "rewards", lambda sources: now)

    now_with(fingerprint="of other weights")
    with pytest.raises(
        UserError, match=r"rewards\.name=tiny_world: its weights or settings are not those that"
    ):
        train(recipe(tmp_path))
    assert (tmp_path / "run" / "requeue").read_text() == "no\n"
    now_with(identity="of another torch")
    capsys.readouterr()
    assert train(recipe(tmp_path)) is not None
    out = capsys.readouterr().out
    assert (
        "reward tiny_world: its code or a library (torch, transformers, pillow) is another than "
        "when the run" in out
    )
    assert "resumed from checkpoint step-1" in out
    assert (tmp_path / "run" / "provenance.json").read_text() == noted  # the first iteration's


class Weighed(Reward):
    """A reward with weights."""

    names = ("A",)
    fingerprint = "of its weights"

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        return Scores({"A": torch.ones(len(pixels))}, torch.ones(len(pixels), dtype=torch.bool))


class Bare(Weighed):
    """One without."""

    fingerprint = ""


def test_a_reward_is_told_the_same_in_the_process_and_behind_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: dict[str, Reward] = {"weighed": Weighed(), "bare": Bare()}
    monkeypatch.setattr(in_process, "load_served", lambda spec: Served(held[spec.name], spec))
    inside = provenance.rewards([ScorerInProcess([plain(name)]) for name in held])
    with running(held) as url:
        clients = [RewardClient([url], TOKEN, [name]) for name in held]
        for client in clients:
            client.wait_ready(10.0)
        outside = provenance.rewards(clients)
        for client in clients:
            client.close()
    assert inside == outside
    assert {name: one["fingerprint"] for name, one in inside.items()} == {
        "weighed": "of its weights",
        "bare": "",
    }
    assert inside["weighed"]["identity"] != inside["bare"]["identity"]


def test_a_folder_without_notes_binds_nobody(tmp_path: Path) -> None:
    source: Any = ScorerInProcess([plain("tiny_world")])
    assert provenance.check_rewards(tmp_path, [source]) == []
    provenance.check_network(recipe(tmp_path))  # whose model is not even there
