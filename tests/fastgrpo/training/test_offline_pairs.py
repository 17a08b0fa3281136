"""Offline DPO: a file of preferred pairs becomes latents, and a run trains on it and resumes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.data import images, preferred_pairs, video, video_reader
from fastgrpo.data.tiny_world import shapes
from fastgrpo.models.loading.encode_pixels import encode_pixels
from fastgrpo.training import methods
from fastgrpo.training.scoring.offline import OfflinePairs
from tests.harness import runs, tiny

COUNT = 12


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips that show their captions, against noise, as videos; one prompt has two pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number, meaning in enumerate(shapes.meanings()[0][:COUNT]):
        good = torch.from_numpy(shapes.draw(meaning))
        video.write_mp4(folder / f"{number}.mp4", good, shapes.FPS)
        video.write_mp4(folder / f"{number}-worse.mp4", good.flip(0), shapes.FPS)
        names = {"chosen": f"{number}.mp4", "rejected": f"{number}-worse.mp4"}
        rows.append(json.dumps({"prompt": shapes.caption(meaning, 0)} | names))
    rows.append(rows[0].replace("0.mp4", "1.mp4", 1))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(rows) + "\n")
    return pairs


def overrides(file: Path) -> list[str]:
    return [
        "objective.kind=dpo",
        f"objective.dpo_pairs={file}",
        f"prompts.train={file}",
        "prompts.per_iteration=2",
        "rollout.samples_per_prompt=2",
        "rollout.shared_noise=false",
        "objective.best_of_n=none",
        "optimizer.batch_size=4",
    ]


def test_pixels_become_the_latents_from_which_frames_come() -> None:
    """Oracle: the VAE alone, its mode decoded without any normalisation."""
    policy = tiny.load_policy()
    vae: Any = policy.vae
    clips = torch.stack([torch.from_numpy(shapes.draw(m)) for m in shapes.meanings()[0][:2]])
    latents = encode_pixels(policy, clips.to(tiny.device()))
    frames = clips.to(tiny.device()).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.decode(vae.encode(frames).latent_dist.mode()).sample
        torch.testing.assert_close(policy.frames(latents, {}), expected, atol=1e-5, rtol=1e-5)
    assert latents.dtype == torch.float32
    off = (policy.decode(latents, {}).pixels.cpu().float() - clips.float()).abs().mean()
    assert off < 12  # of 255: what the tiny VAE loses


def test_slots_are_the_chosen_and_the_rejected_file_of_their_prompt(file: Path) -> None:
    recipe = config.load(runs.RECIPE, overrides(file))
    texts = [shapes.caption(meaning, 0) for meaning in shapes.meanings()[0][:2]]
    pairs = OfflinePairs.of(recipe, texts)
    assert pairs is not None and len(pairs.pairs[texts[0]]) == 2
    policy = tiny.load_policy()
    plan = methods.of("dpo").plan(tiny.plan(policy, shared_noise=False), recipe.objective)
    drawn = pairs.draw(policy, plan, texts, [2, 3])
    (pair,) = pairs.pairs[texts[1]]
    for slot, name, x_0 in zip((2, 3), (pair.chosen, pair.rejected), drawn.final, strict=True):
        wide = video_reader.read(name).pixels
        clip = torch.stack([images.cover(frame, 32, 32) for frame in wide])[None]
        torch.testing.assert_close(encode_pixels(policy, clip)[0], x_0)
        assert torch.equal(drawn.trajectories[slot].states[plan.steps], x_0)
    assert not torch.equal(drawn.final[0], drawn.final[1])
    assert pairs.advantages(4).tolist() == [1.0, -1.0, 1.0, -1.0]


def test_mistakes_in_a_file_of_pairs_are_named(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "pairs.jsonl"
    for row, message in (
        ({"prompt": "a", "chosen": "no.mp4", "rejected": "no.mp4"}, "line 1 names"),
        ({"prompt": " ", "chosen": "x", "rejected": "x"}, "line 1 has no text in 'prompt'"),
        ({"prompt": "a", "rejected": "x"}, "line 1 has no file name in 'chosen'"),
    ):
        broken.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=re.escape(message)):
            preferred_pairs.read(str(broken))
    recipe = config.load(runs.RECIPE, overrides(file))
    with pytest.raises(UserError, match="has no pair for the training prompt 'a boat'"):
        OfflinePairs.of(recipe, ["a boat"])
    for key, message in (
        ("rollout.samples_per_prompt=4", "rollout.samples_per_prompt=4: with objective.dpo_pairs"),
        (f"objective.dpo_pairs={broken}", "line 1 has no file name in 'chosen'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            methods.check(config.load(runs.RECIPE, [*overrides(file), key]))


@pytest.mark.slow
def test_a_run_on_a_file_of_pairs_learns_to_prefer_and_resumes(file: Path, tmp_path: Path) -> None:
    offline = [*runs.SMALLER, *overrides(file), "optimizer.lr=1e-4"]
    runs.succeed(tmp_path / "whole", offline)
    runs.succeed(tmp_path / "parts", [*offline, "run.iterations=1"])
    runs.succeed(tmp_path / "parts", offline)
    whole, parts = (runs.checkpoint(tmp_path / name, 2, tmp_path) for name in ("whole", "parts"))
    runs.assert_same_checkpoint(whole, parts)
    for line in runs.metrics(tmp_path / "whole"):
        assert line["update/grad_norm"] > 0 < line["update/transitions"]
