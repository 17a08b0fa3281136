"""`fastgrpo reproduce`: every table and figure as runs and an output."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark import choosing
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS, MODELS
from fastgrpo.tools.evaluate.benchmark.choosing import Judge, Sources, Unknown
from fastgrpo.tools.evaluate.benchmark.estimates import Measured
from fastgrpo.tools.evaluate.benchmark.protocols import PROTOCOLS
from fastgrpo.tools.evaluate.reproduce import carrying_out, diversity, results
from fastgrpo.tools.evaluate.reproduce.entries import ENTRIES, Entry, Run, entry_of
from fastgrpo.tools.evaluate.reproduce.recipes import Options, folder_of, recipe_of
from fastgrpo.tools.evaluate.reproduce.results import Outcome
from tests import ROOT
from tests.harness import runs
from tests.harness.weights import clip

LAUNCH = ROOT / "launch"
PAPERS = [*(f"table{n}" for n in range(1, 7)), "figure1", "figure2", "figure3a", "figure3b"]
PAPERS += ["figure4a", "figure4b", "figure4c", *(f"figure{n}" for n in range(5, 20))]


def options(folder: Path, **more: Any) -> Options:
    return Options(weights=folder, out=folder / "out", launch=LAUNCH, **more)


def test_every_table_and_figure_of_the_paper_has_an_entry() -> None:
    assert [*ENTRIES] == PAPERS
    assert entry_of("Fig. 4a") == ("figure4a", ENTRIES["figure4a"])
    assert entry_of("Table 2")[0] == "table2"
    with pytest.raises(UserError, match="TABLE_OR_FIGURE=table7: the paper has none"):
        entry_of("table7")


@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_says_what_an_entry_takes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES[name]
    command = ["reproduce", name, "--weights", str(tmp_path), "--launch", str(LAUNCH), "--dry-run"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{name}: {entry.title}"
    assert "not stated by the paper" in lines and "output" in lines
    for run in entry.runs:
        marked = f" [baseline: {run.baseline}]" if run.baseline else ""
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"  {run.name}{marked}: "))
        assert f"launch/{run.recipe}.toml" in lines[at]
        assert all(switch in lines[at] for switch in run.switches)
        priced = f"{run.gpus} x h800" in lines[at + 1] and "GPU-hours" in lines[at + 1]
        unknown = bool(run.baseline) and "no file training/methods/" in lines[at + 1]
        assert priced or unknown, lines[at + 1]
    text = "\n".join(lines)
    for column in {column for run in entry.runs for column in run.trained}:
        for need in COLUMNS[column].needs:
            (line,) = (line for line in lines if line.startswith(f"  {need}: "))
            assert line.endswith("; missing") and "licence" in line
    if entry.runs:
        assert ("GPU-hours by plan" in text) == (entry.output != "settings")
        assert any(f"  {model}: " in text and "GB in 16 bits" in text for model in MODELS)
    assert not [*tmp_path.iterdir()], "a dry run writes nothing"


def test_table_6_is_compared_key_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "table6", "--weights", str(tmp_path), "--launch", str(LAUNCH)]
    assert cli.main([*command, "--dry-run", "--set", "rollout.samples_per_prompt=16"]) == 0
    said = capsys.readouterr().out
    assert "  flux-hps is as in Table 6: but rollout.samples_per_prompt 16, paper 12\n" in said
    assert cli.main(command) == 2
    assert "there is nothing to run" in capsys.readouterr().err


def test_a_runs_recipe_is_the_launch_files_with_its_rewards(tmp_path: Path) -> None:
    (tmp_path / "stable-diffusion-v1-4").mkdir()
    by_name = {run.name: run for entry in ENTRIES.values() for run in entry.runs}
    both = recipe_of(by_name["sd-hps-clip"], options(tmp_path))
    assert both.model.path == str((tmp_path / "stable-diffusion-v1-4").resolve())
    assert both.weights == {"HPS": 1.0, "CLIP": 1.0}
    assert both.rewards[0].path == str(tmp_path / "HPS_v2.1_compressed.pt")
    assert both.run.dir == tmp_path / "out" / "runs" / "sd-hps-clip"
    alone = recipe_of(by_name["sd-hps"], options(tmp_path))
    assert alone.weights == {"HPS": 1.0, "CLIP": 0.0}, "the recipe's monitor stays one"
    binary = recipe_of(by_name["sd-binary-hps"], options(tmp_path))
    assert binary.rewards[0].threshold == {"HPS": 0.28}
    assert binary.weights == {"HPS_above": 1.0, "HPS": 0.0, "CLIP": 0.0}
    video = recipe_of(by_name["skyreels-mq"], options(tmp_path))
    assert video.weights == {"MQ": 1.0, "VQ": 0.0, "TA": 0.0}
    assert video.rewards[0].options["template"].endswith("VideoAlign/prompt_template.py")  # type: ignore[union-attr]
    assert by_name["sd-hps"].switches == () and both.objective.kind == "grpo"
    file = tmp_path / "again.toml"
    file.write_text(both.to_toml())
    assert config.load(file) == both, "what a scheduler is given is the same recipe"


STAND_INS = {
    "VQ": "tiny_world.VQ",
    "MQ": "tiny_world.MQ",
    "TA": "tiny_world.TA",
    "VisionReward": "video_stats.speed",
}
SHORTEST = ("run.iterations=1", "prompts.limit=4", "evaluate.prompts=1", "evaluate.clips=0")
TINY = ("--set=video.frames=5", "--set=evaluate.steps=2", "--set=rollout.steps=3")


def test_the_whole_chain_runs_on_the_tiny_world(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def begin(arguments: Sequence[str]) -> int:
        began.append(arguments[0])
        return cli.main(arguments)

    monkeypatch.setattr(carrying_out, "start", begin)
    small = [f"--set={override}" for override in (*runs.SMALL, *SHORTEST)]
    command = ["reproduce", "table5", "--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    command += ["--recipe", str(runs.RECIPE), "--limit", "2", "--seeds", "1", *small, *TINY]
    command += [f"--judge={column}={judge}" for column, judge in STAND_INS.items()]
    assert cli.main(command) == 0
    assert began == ["train", "evaluate"]
    content = json.loads((tmp_path / "out" / "table5.json").read_text())
    assert content["stand_in"] and content["runs"][0]["trained"] == {"VQ": 1.0, "MQ": 1.0}
    recipe = config.load(tmp_path / "out" / "recipes" / "hunyuan-vq-mq.toml")
    assert recipe.weights == {"VQ": 1.0, "MQ": 1.0} and recipe.rewards[0].name == "tiny_world"
    lines = (tmp_path / "out" / "table5.md").read_text().splitlines()
    assert lines[2] == "|  | " + " | ".join(f"{column} (stand-in)" for column in STAND_INS) + " |"
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| base",
        "| HunyuanVideo + VQ & MQ",
        "| paper: HunyuanVideo",
        "| paper: HunyuanVideo + VQ & MQ",
    ]
    assert "- a stand-in by --recipe or --judge: these are not the paper's numbers" in lines
    capsys.readouterr()
    assert cli.main(command) == 0
    assert began == ["train", "evaluate"], "what is finished is not done again"
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("table5.md", "table5.json")
    ]


def sheet(trained: dict[str, float | None]) -> dict[str, Any]:
    """A sheet as `evaluate --benchmark` writes it; None: not measured."""

    def side(value: float) -> dict[str, float]:
        return {"mean": value, "low": value - 0.01, "high": value + 0.01}

    columns: dict[str, Any] = {}
    for name, value in trained.items():
        columns[name] = {"unknown": "no weights", "overall": None}
        if value is not None:
            overall = {"base": side(0.2), "trained": side(value)}
            columns[name] = {"judge": "hps.HPS", "stand_in": False, "overall": overall}
    return {"columns": columns, "weights": {"trained": "step 300"}, "settings": []}


def test_a_table_has_a_row_per_method_and_marks_what_is_not_known(tmp_path: Path) -> None:
    entry = ENTRIES["table4"]
    sheets = {run.name: sheet({"HPS-v2.1": 0.3, "CLIP": 0.4}) for run in entry.runs}
    # 0.9: of a reward that the run was not trained on, which is another cell's number
    sheets["sd-clip"] = sheet({"HPS-v2.1": 0.9, "CLIP": None})
    why = dict.fromkeys(("sd-hps-dpo", "sd-clip-dpo"), "cannot be trained here: no such kind")
    for name in why:
        del sheets[name]
    outcome = Outcome(sheets, why)
    rows = results.table_rows(entry, outcome)
    assert rows[0] == ["", "HPS-v2.1", "CLIP"]
    assert rows[1][0] == "base" and rows[1][1] == "0.200 (0.190 .. 0.210)"
    assert rows[2] == ["DanceGRPO", "0.300 (0.290 .. 0.310)", "not measured"]
    assert rows[5] == ["DPO", "not measured", "not measured"]
    assert [row[0] for row in rows[6:]] == [f"paper: {row}" for row in PROTOCOLS["table4"].paper]
    assert rows[-1] == ["paper: DPO", "0.241", "0.367"]
    told = results.notes(entry, options(tmp_path), outcome)
    assert any("baseline DPO" in line and line.endswith("no such kind") for line in told)


def test_curves_are_moving_averages_of_the_runs_metrics(tmp_path: Path) -> None:
    entry, chosen = ENTRIES["figure2"], options(tmp_path)
    for run, parts in zip(entry.runs, ({"VQ": 2.0, "MQ": 1.0}, {"MQ": 3.0}), strict=True):
        folder = folder_of(run, chosen)
        folder.mkdir(parents=True)
        rows = [
            {"iteration": n} | {f"reward/{part}": value * n for part, value in parts.items()}
            for n in range(12)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    picture, file = results.write_curves("figure2", entry, chosen, {})
    content = json.loads(file.read_text())
    assert [*content["rewards"]["VQ"]] == ["HunyuanVideo + VQ & MQ"]
    assert content["rewards"]["MQ"]["SkyReels-I2V + MQ"][:3] == [0.0, 3.0, 6.0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = results.smoothed([*map(float, range(12))])
    expected = [np.mean(range(max(0, n - results.WINDOW + 1), n + 1)) for n in range(12)]
    assert found.tolist() == pytest.approx(expected)
    assert results.smoothed([None, 2.0]).tolist()[1] == 2.0 and math.isnan(
        results.smoothed([None])[0]
    )


def entry_with(*parts: Run) -> Entry:
    return Entry(title="one", output="study", runs=parts)


def test_a_baseline_that_cannot_be_trained_is_left_out_and_any_other_run_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying_out, "refuse", lambda recipe: None)
    base = ENTRIES["table2"].runs[0]
    other = Run(
        name="other", row="other", recipe="t2i_sd", gpus=8, trained=base.trained, baseline="DDPO"
    )

    def begin(arguments: Sequence[str]) -> int:
        return 2 if "other" in arguments[1] else 0

    chosen = options(tmp_path)
    found = carrying_out.carry_out("x", entry_with(base, other), chosen, [], begin)
    assert found == [folder_of(base, chosen)]
    with pytest.raises(UserError, match=r"`fastgrpo train` of sd-hps ended with exit code 1"):
        carrying_out.carry_out("x", entry_with(base), chosen, [], lambda arguments: 1)


def test_pictures_are_drawn_beside_the_base_at_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying_out, "refuse", lambda recipe: None)
    asked: list[list[str]] = []

    def begin(arguments: Sequence[str]) -> int:
        asked.append([*arguments])
        return 0

    folders = carrying_out.carry_out(
        "figure6",
        ENTRIES["figure6"],
        options(tmp_path),
        [],
        begin,
    )
    assert [folder.name for folder in folders] == ["60", "120", "180", "240", "300"]
    assert asked[0][0] == "train" and len(asked) == 6
    assert "--against-base" in asked[1] and asked[1][-2:] == ["--step", "60"]
    assert asked[1].count("--prompt") == 3


def test_diversity_is_the_mean_distance_of_a_prompts_seeds(tmp_path: Path) -> None:
    clip.write_open_clip(tmp_path / "DFN5B-CLIP-ViT-H-14-378")
    judge = choosing.choose(COLUMNS["CLIP"], Sources(weights=tmp_path), tmp_path)
    assert isinstance(judge, Judge)
    generator = np.random.default_rng(0)
    samples = []
    for prompt in ("a cat", "the red cat"):
        same = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        for seed in range(3):
            stem = f"{prompt[0]}{seed}"
            noise = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
            for ending, pixels in (("-base", noise), ("", same)):
                Image.fromarray(pixels).save(tmp_path / f"{stem}{ending}.png")
            files = {"base": f"{stem}-base.png", "file": f"{stem}.png"}
            finite = {"finite": True, "base_finite": seed < 2 or prompt == "a cat"}
            samples.append({"prompt": prompt, "seed": seed, **files, **finite})
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": samples}))
    found = diversity.of_samples(tmp_path, judge)
    assert isinstance(found, Measured) and found.overall.prompts == 2
    assert found.overall.trained.mean == pytest.approx(0.0, abs=1e-6), "all seeds look alike"
    assert found.overall.base.mean > 1e-3 and found.overall.difference.high < 0
    vectors = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=-1)
    pairs = [1 - float(a @ b) for n, a in enumerate(vectors) for b in vectors[:n]]
    assert diversity.spread(vectors) == pytest.approx(np.mean(pairs))
    both: dict[str, Measured | Unknown] = {"one": found, "two": Unknown("no weights")}
    content = json.loads(diversity.as_json(both))["runs"]
    assert content["two"] == {"unknown": "no weights"}
    assert content["one"]["base"]["mean"] == found.overall.base.mean
    other = choosing.choose(
        COLUMNS["CLIP"], Sources(judges={"CLIP": ("tiny_world", "VQ")}), tmp_path
    )
    assert isinstance(diversity.of_samples(tmp_path, other), Unknown)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--weights", str(tmp_path)]
    cases = {
        ("table9", *here): "TABLE_OR_FIGURE=table9: the paper has none",
        ("table2", "--weights", str(tmp_path / "no")): "--weights=",
        ("table2", *here, "--launch", str(tmp_path), "--dry-run"): "has no t2i_sd.toml",
        ("table2", *here, "--gpu", "abacus", "--dry-run"): "--gpu=abacus: not in the table",
        ("table2", *here, "--launch", str(LAUNCH), "--out", str(tmp_path / "out")): "sd-hps: ",
    }
    for command, message in cases.items():
        capsys.readouterr()
        assert cli.main(["reproduce", *command]) == 2, command
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("fastgrpo: ")
        ]
        assert len(lines) == 1 and message in lines[0], lines
