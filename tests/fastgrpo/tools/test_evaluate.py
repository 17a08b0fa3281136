"""`fastgrpo evaluate`: the base model against the trained one, by the paired difference of what
several rewards say.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo import rewards
from fastgrpo.algorithm import noise
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.policy import Policy, Prompt, move, stack
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import World
from fastgrpo.tools.evaluate import evaluate
from fastgrpo.tools.evaluate import table as results_table
from fastgrpo.tools.evaluate.evaluate import Column, Plan, Result
from fastgrpo.tools.sample import sample, sample_files
from fastgrpo.tools.sample.source import Asked, find
from fastgrpo.tools.sample.work import Work
from fastgrpo.training import rollout
from tests.harness import forks, judged, runs, tiny

BOTH = ("--rewards", "tiny_world", "video_stats")
SHORT = ("--limit", "5", "--seeds", "2", "--steps", "4")
PARTS = ("VQ", "MQ", "TA")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has undone what was done to its base model: noise on the weights of the shipped
    tiny one.
    """
    return judged.write(tmp_path_factory.mktemp("judged"))


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), *options, "--json", "-"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture(scope="module")
def improved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(JSON, Markdown) of the run by two rewards."""
    folder = tmp_path_factory.mktemp("tables")
    files = ("--json", str(folder / "table.json"), "--markdown", str(folder / "table.md"))
    assert cli.main(["evaluate", str(run), *SHORT, *BOTH, *files]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["table.json", "table.md"]
    return json.loads((folder / "table.json").read_text()), (folder / "table.md").read_text()


def test_a_planted_improvement_is_seen(improved: tuple[dict[str, Any], str]) -> None:
    table = improved[0]["table"]
    assert list(table)[:3] == [f"tiny_world.{part}" for part in PARTS] and list(table)[-1] == "sum"
    assert "video_stats.grid" in table and len(table) == 3 + 9 + 1
    for key in ("tiny_world.VQ", "sum"):
        assert table[key]["low"] > 0 and table[key]["pairs"] == 10, table[key]


def test_means_and_intervals_are_those_of_the_clips(improved: tuple[dict[str, Any], str]) -> None:
    content = improved[0]
    assert [(clip["seed"]) for clip in content["clips"]] == [0, 1] * 5
    for key in ("tiny_world.VQ", "tiny_world.TA", "video_stats.speed"):
        base, trained = (
            np.array([clip[side][key] for clip in content["clips"]]) for side in ("base", "trained")
        )
        column, difference = content["table"][key], trained - base
        assert column["base"] == pytest.approx(base.mean()) and column["trained"] == pytest.approx(
            trained.mean()
        )
        assert column["difference"] == pytest.approx(difference.mean())
        of_prompts = difference.reshape(5, 2).mean(1)
        # what it tends to
        expected = of_prompts.mean() + np.array([-1.96, 1.96]) * of_prompts.std() / np.sqrt(5)
        width = expected[1] - expected[0]
        assert [column["low"], column["high"]] == pytest.approx(expected, abs=0.2 * width)
    total = sum(
        np.array([clip["trained"][f"tiny_world.{part}"] for clip in content["clips"]])
        for part in PARTS
    )
    assert content["table"]["sum"]["trained"] == pytest.approx(np.mean(total)), "every weight is 1"


def test_a_clips_score_is_the_rewards_of_the_samplers_pixels(
    run: Path, improved: tuple[dict[str, Any], str]
) -> None:
    """Put together here from the parts: noise of the seed, ODE, decode, reward."""
    clip = improved[0]["clips"][3]
    source = find(Asked(str(run)))
    assert source.base is not None and clip["seed"] == 1
    device = tiny.device()
    with policies.encoder(source.snapshot.model, source.video, device) as encode:
        condition = move(stack(encode([Prompt(clip["prompt"])])), device)
    for side, weights in (("base", source.base), ("trained", source.snapshot)):
        policy: Policy = weights.load(device)
        shape = policy.latent_shape(source.video)
        grid = policy.time_grid(4, source.shift, shape).to(device)
        start = noise.normal([sample.noise_key(1)], shape).to(device)
        x = rollout.sample_ode(policy, start, grid, condition)
        scores = rewards.load(rewards.plain("tiny_world"))(
            policy.decode(x, condition).pixels.cpu(), [clip["prompt"]], source.video.fps
        )
        for part in PARTS:
            assert clip[side][f"tiny_world.{part}"] == float(scores.values[part][0])


def test_the_markdown_is_the_papers_form(improved: tuple[dict[str, Any], str]) -> None:
    table, lines = improved[0]["table"], improved[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    assert cells[0][:4] == ["", *PARTS] and cells[0][-1] == "sum"
    assert [row[0] for row in cells[2:]] == ["base", "step 7", "difference", "95 % interval"]
    vq = table["tiny_world.VQ"]
    interval = f"{vq['low']:+.4f} .. {vq['high']:+.4f}"
    means = [f"{vq['base']:.4f}", f"{vq['trained']:.4f}", f"{vq['difference']:+.4f}"]
    assert [row[1] for row in cells[2:]] == [*means, interval]
    assert lines[-1].startswith(
        "5 prompts with 2 seeds each, the same noise on both sides, 4 ODE steps"
    )


def test_the_base_against_itself_differs_in_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = evaluated(capsys, run, "--step", "0", "--limit", "2", "--seeds", "1", "--steps", "2")
    assert (
        content["weights"] == {"base": "base", "trained": "step 0"}
        and content["checkpoint"] is None
    )
    assert list(content["table"]) == [*(f"tiny_world.{part}" for part in PARTS), "sum"]
    for column in content["table"].values():
        assert (
            column["difference"] == column["low"] == column["high"] == 0.0 and column["pairs"] == 2
        )
        assert column["base"] == column["trained"] > 0
    assert all(clip["base"] == clip["trained"] for clip in content["clips"])


def test_prompts_that_are_cut_are_counted_named_and_marked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"a red circle\n{'a red circle ' * 40}moves left\n")
    short = ("--rewards", "video_stats", "--seeds", "1", "--steps", "2", "--set", "video.frames=5")
    assert cli.main(["evaluate", str(run), "--prompts", str(file), *short, "--json", "-"]) == 0
    said = capsys.readouterr()
    assert (
        "prompts: 1 are longer than an encoder sees (text_encoder_2 cuts 1), such as " in said.err
    )
    assert f"{file}: line 2: text_encoder_2 sees" in said.err
    content = json.loads(said.out)
    marks = [clip.get("tokens_seen") for clip in content["clips"]]
    assert marks[0] is None and marks[1]["text_encoder_2"][1] > marks[1]["text_encoder_2"][0]
    assert content["caption"].endswith("; 1 of the prompts are longer than a text encoder sees")


def test_two_ranks_give_the_figures_of_one(
    run: Path, improved: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    command = ["evaluate", str(run), *SHORT, *BOTH, "--json", str(tmp_path / "two")]
    result = forks.run("fastgrpo.cli", command, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("95 % interval ") == 1
    assert json.loads((tmp_path / "two").read_text()) == improved[0]


def test_samples_of_a_run_are_scored_with_their_prompts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the manifest: prompts and size; pictures of two clips are no clips."""
    out = tmp_path / "samples"
    assert (
        cli.main(
            [
                "sample",
                str(run),
                "--out",
                str(out),
                "--limit",
                "1",
                "--steps",
                "2",
                "--against-base",
            ]
        )
        == 0
    )
    manifest = json.loads((out / sample_files.MANIFEST).read_text())
    (entry,) = manifest["samples"]
    capsys.readouterr()
    assert cli.main(["score", str(out), "--reward", "tiny_world", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["files"]
    assert [Path(row["file"]).name for row in rows] == [entry["base"], entry["file"]]
    for row in rows:
        assert (
            row["prompt"] == entry["prompt"]
            and row["shape"] == [9, 32, 32, 3]
            and row["invalid"] == {}
        )
    named = [str(out / entry[key]) for key in ("file", "beside")]
    assert cli.main(["score", *named, "--reward", "tiny_world", "--json", "-"]) == 0
    clip, beside = json.loads(capsys.readouterr().out)["files"]
    assert clip == rows[1] and "shows several clips together" in beside["invalid"]["file"]["reason"]


def plan(run: Path, specs: Sequence[config.RewardSpec]) -> Plan:
    source = find(Asked(str(run)))
    clips, batches = sample.deal([Prompt("a"), Prompt("b")], range(2), 1)
    return Plan(Work(source, clips, batches, True), list(specs), 2)


def test_pairs_without_a_score_are_left_out_and_counted(run: Path) -> None:
    nan = float("nan")
    specs = [
        config.RewardSpec(name="one", weights={"A": 2.0, "B": 1.0}),
        config.RewardSpec(name="other", weights={"A": 0.0, "C": 0.0}),
    ]
    scores = {
        "one.A": torch.tensor(
            [[1.0, 2.0], [nan, 9.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64
        ),
        "one.B": torch.tensor(
            [[0.0, 1.0], [0.0, 1.0], [0.0, nan], [0.0, 1.0]], dtype=torch.float64
        ),
        "other.A": torch.full((4, 2), nan, dtype=torch.float64),
        "other.C": torch.tensor(
            [[1.0, 2.0], [1.0, 2.0], [1.0, nan], [nan, 2.0]], dtype=torch.float64
        ),
    }
    result = Result(plan(run, specs), evaluate.columns(plan(run, specs), scores), scores)
    assert result.columns["one.A"] == Column(
        base=1.0, trained=2.0, difference=1.0, low=1.0, high=1.0, pairs=3
    )
    assert result.columns["sum"] == Column(
        base=2.0, trained=5.0, difference=3.0, low=3.0, high=3.0, pairs=2
    ), "a monitor without a score spoils no sum"
    heading, base, _, difference, interval = results_table.rows(result)
    assert heading == ["", "one.A", "B", "other.A", "C", "sum"], (
        "a part of two rewards is told apart"
    )
    assert base == ["base", "1.000", "0.000", "-", "1.000", "2.000"] and interval[3] == "-"
    assert difference[4] == "+1.000" and interval[4] == "-", "one prompt says nothing of others"
    assert result.caption().endswith(
        "left out: 1 for one.A, 1 for B, 4 for other.A, 2 for C, 2 for sum"
    )
    assert json.loads(result.to_json())["table"]["other.A"]["base"] is None


def test_mistakes_are_one_line_before_anything_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "judges.toml").write_text(
        '[[rewards]]\nname = "tiny_world"\nweights = { VG = 0.0 }\n'
    )
    cases = {
        (str(runs.RECIPE),): "a base model, or a folder without a recipe that names its own",
        (str(tmp_path),): "neither a run folder nor one in the diffusers layout",
        (str(run), "--step", "9"): "keeps no such checkpoint; use one of 7.",
        (str(run), "--rewards", "hsp"): "rewards.name='hsp': no such reward",
        (str(run), "--rewards", "hps"): "rewards.path: missing",
        (
            str(run),
            "--rewards",
            str(tmp_path / "judges.toml"),
        ): "tiny_world has no part 'VG'; its parts are VQ, MQ, TA.",
        (str(run), "--json", str(tmp_path / "no" / "x")): "--json=",
        (str(run), "--markdown", str(tmp_path)): "--markdown=",
        (str(run), "--server", "http://127.0.0.1:9"): "--token-file: missing",
    }
    for options, message in cases.items():
        capsys.readouterr()
        assert cli.main(["evaluate", *options]) == 2
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("fastgrpo: ")
        ]
        assert len(lines) == 1 and message in lines[0], lines


def test_a_clip_of_latents_that_are_not_finite_has_no_score(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its pixels look like."""
    real = sample.generate

    def broken(share: sample.Share, world: World) -> Any:
        for drawn in real(share, world):
            yield replace(drawn, finite=[True, False]) if drawn.number == 0 else drawn

    monkeypatch.setattr(sample, "generate", broken)
    asked = Asked(str(run), changes={"rollout": {"steps": 2}})
    result = evaluate.evaluate(asked, evaluate.Wanted(limit=2, seeds=1))
    assert result is not None and {column.pairs for column in result.columns.values()} == {1}
    assert torch.isfinite(result.scores["tiny_world.VQ"]).tolist() == [[True, False], [True, True]]
