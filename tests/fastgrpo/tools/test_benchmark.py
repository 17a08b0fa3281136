"""`fastgrpo evaluate --benchmark`: protocols, task means, marks for what is not known."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastgrpo import rewards
from fastgrpo.cli import main as cli
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark import choosing, estimates, prompt_sets
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS, DOWNLOADS
from fastgrpo.tools.evaluate.benchmark.choosing import Judge, Sources, Unknown
from fastgrpo.tools.evaluate.benchmark.protocols import PROTOCOLS
from fastgrpo.tools.sample import sample
from tests.harness import judged
from tests.harness.weights import clip

SHORT = ("--limit", "1", "--seeds", "1", "--steps", "2", "--set", "video.frames=5")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.write(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def hps_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two styles: a list of texts, as the benchmark has it, and a file of lines."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "anime.json").write_text(json.dumps(["a cat  on a roof", "a cat on a roof"]))
    (folder / "photo.txt").write_text("a dog\na boat\na tree\n")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random judges under the names of launch/."""
    folder = tmp_path_factory.mktemp("weights")
    clip.write_hps(folder)
    clip.write_open_clip(folder / "DFN5B-CLIP-ViT-H-14-378")
    clip.write_transformers(folder / "PickScore_v1")
    return folder


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_benchmark_runs_on_the_tiny_world(
    name: str, run: Path, hps_prompts: Path, tmp_path: Path
) -> None:
    columns = PROTOCOLS[name].columns
    options = [f"--judge={column}=video_stats.sharpness" for column in columns]
    if any(block.prompts == "hps" for block in PROTOCOLS[name].blocks):
        options.append(f"--hps-prompts={hps_prompts}")
    files = [f"--json={tmp_path / 'sheet.json'}", f"--markdown={tmp_path / 'sheet.md'}"]
    assert cli.main(["evaluate", str(run), "--benchmark", name, *SHORT, *options, *files]) == 0
    content = json.loads((tmp_path / "sheet.json").read_text())
    lines = (tmp_path / "sheet.md").read_text().splitlines()
    assert [*content["columns"]] == columns
    for column in content["columns"].values():
        assert column["stand_in"] and column["overall"]["difference"]["mean"], column
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["", *(f"{column} (stand-in)" for column in columns)]
    stated = {row[0]: row[1:] for row in cells if row[0].startswith("paper: ")}
    for row, numbers in PROTOCOLS[name].paper.items():
        assert stated[f"paper: {row}"] == [
            str(numbers[column]) if column in numbers else "" for column in columns
        ]
    unstated = {one["name"] for one in content["settings"] if not one["stated"]}
    assert {"seeds", "denoising steps", "guidance", "size"} <= unstated
    assert any(line.startswith("- denoising steps: 2 (not stated by the paper)") for line in lines)


def test_judges_of_a_folder_are_set_as_the_paper_has_them(
    run: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has no weights or prompts is marked, never filled in."""
    options = ["--benchmark", "table2", "--weights", str(weights), *SHORT]
    assert cli.main(["evaluate", str(run), *options, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    columns = content["columns"]
    assert columns["HPS-v2.1"]["unknown"].startswith("no prompts of the HPS benchmark")
    assert "mask2former" in columns["GenEval"]["unknown"]
    assert columns["GenEval"]["overall"] is None
    (picture,) = content["clips"]["test"]
    for name in ("CLIP", "Pick-a-Pic"):
        mean = columns[name]["overall"]["trained"]["mean"]
        key = f"{COLUMNS[name].reward}.{COLUMNS[name].part}"
        assert mean == picture["trained"][key] and abs(mean) < 1, "a cosine"
    assert columns["CLIP"]["overall"]["difference"]["low"] is None, "one prompt has no interval"
    families = [one["value"] for one in content["settings"] if one["name"] == "model"]
    assert families == [
        "hunyuan_video, where the table's is stable_diffusion: not comparable with its numbers"
    ]


def test_the_protocol_sets_the_scale_whoever_names_the_weights(
    weights: Path, tmp_path: Path
) -> None:
    spec = RewardSpec(
        name="pick_score",
        path=str(weights / "PickScore_v1"),
        weights={"PickScore": 1.0},
        options={"scale": "logits"},
    )
    for sources in (Sources(files=[spec]), Sources(recipe=[spec]), Sources(weights=weights)):
        found = choosing.choose(COLUMNS["Pick-a-Pic"], sources, tmp_path)
        assert isinstance(found, Judge) and not found.stands_in
        assert found.spec.options["scale"] == "cosine" and found.spec.weights == {"PickScore": 0.0}
        assert rewards.load(found.spec).names == ("PickScore",)
    missing = spec.model_copy(update={"path": str(tmp_path / "none")})
    found = choosing.choose(COLUMNS["Pick-a-Pic"], Sources(recipe=[missing]), tmp_path)
    assert isinstance(found, Unknown) and "cannot be loaded here" in found.reason
    with pytest.raises(UserError, match=r"--rewards: for Pick-a-Pic, rewards.path="):
        choosing.choose(COLUMNS["Pick-a-Pic"], Sources(files=[missing]), tmp_path)


def test_the_overall_score_is_the_mean_of_the_tasks_and_prompts_are_resampled_within_them() -> None:
    generator = np.random.default_rng(1)
    of_prompt = generator.normal(size=60)
    prompts = np.repeat(np.arange(60), 4)
    groups = np.where(prompts < 40, "many", "few")
    base = np.repeat(of_prompt, 4) + np.where(groups == "few", 3.0, 0.0)
    scores = np.column_stack([base, base + 1.0])
    found = estimates.measured(scores, prompts.tolist(), groups.tolist(), {})
    many, few = found.groups["many"], found.groups["few"]
    assert (many.prompts, few.prompts, many.pairs) == (40, 20, 160)
    assert many.base.mean == pytest.approx(of_prompt[:40].mean())
    middle = (many.base.mean + few.base.mean) / 2
    assert found.overall.base.mean == pytest.approx(middle) != pytest.approx(base.mean())
    # what the bootstrap tends to: the variance of each task's mean over its prompts
    errors = [own.std() / np.sqrt(len(own)) for own in (of_prompt[:40], of_prompt[40:])]
    half = 1.96 * np.hypot(*errors) / 2
    assert found.overall.base.low == pytest.approx(middle - half, abs=0.1 * half)
    assert found.overall.base.high == pytest.approx(middle + half, abs=0.1 * half)
    shift = found.overall.difference
    assert [shift.mean, shift.low, shift.high] == pytest.approx([1.0, 1.0, 1.0]), "paired"


def test_images_without_a_score_are_left_out_and_a_task_without_any_has_no_mean() -> None:
    nan = float("nan")
    scores = np.array([[1.0, 2.0], [nan, 5.0], [3.0, 4.0], [nan, 1.0]])
    found = estimates.measured(scores, [0, 0, 1, 2], ["a", "a", "a", "b"], {})
    assert found.missing == 2 and found.groups["a"].base.mean == 2.0
    assert np.isnan(found.groups["b"].base.mean) and np.isnan(found.overall.base.mean)


def test_what_the_benchmarks_programs_print_too() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert estimates.geneval_extras(scores, [0, 0, 1, 1]) == {
        "correct images": (0.5, 0.25),
        "prompts with a correct image": (1.0, 0.5),
    }
    ramp = np.column_stack([np.arange(20.0), np.zeros(20)])
    found = estimates.hps_extras(np.concatenate([ramp, ramp[:7]]), ["anime"] * 20 + ["photo"] * 7)
    assert list(found) == ["anime: s.d. of 10 chunks"]
    assert found["anime: s.d. of 10 chunks"] == pytest.approx((np.arange(10).std() * 2, 0.0))


def test_the_official_prompts_ship_and_a_limit_is_of_each_task() -> None:
    found = prompt_sets.geneval(None)
    assert Counter(found.groups) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert "the official file, 553 prompts" in found.origin
    assert len({prompt.text for prompt in found.prompts}) == 553
    short = found.first(2)
    assert Counter(short.groups) == dict.fromkeys(Counter(found.groups), 2)
    assert short.prompts[:2] == found.prompts[:2] and "--limit" in short.origin
    licence = prompt_sets.GENEVAL_FILE.with_name("LICENSE").read_text()
    assert "MIT License" in licence and "Dhruba Ghosh" in licence


def test_every_style_is_a_file_and_the_same_prompt_may_come_twice(hps_prompts: Path) -> None:
    found = prompt_sets.hps(hps_prompts)
    assert Counter(found.groups) == {"anime": 2, "photo": 3}
    assert found.prompts[0] == found.prompts[1]
    assert "not as many as the benchmark's 4 x 800" in found.origin


def test_every_download_of_a_column_is_described() -> None:
    needed = {name for column in COLUMNS.values() for name in column.needs}
    assert needed == set(DOWNLOADS)
    assert all(one.licence and one.source and one.size for one in DOWNLOADS.values())


def test_mistakes_are_one_line_before_anything_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a photo of a cow"}\n')
    cases = {
        ("--weights", str(tmp_path)): "--weights: has no effect without --benchmark",
        ("--benchmark", "geneval"): "nothing of it can be measured (GenEval: no weights of geneval",
        ("--benchmark", "geneval", "--judge", "GenEval"): "not of the form COLUMN=REWARD.PART",
        ("--benchmark", "geneval", "--judge", "Clip=hps.HPS"): "no column 'Clip'",
        ("--benchmark", "geneval", "--judge", "GenEval=tiny_world.VG"): "has no part 'VG'",
        ("--benchmark", "geneval", "--judge", "GenEval=hps.HPS"): "rewards.path: missing",
        (
            "--benchmark",
            "geneval",
            "--geneval-prompts",
            str(tmp_path / "rows.jsonl"),
        ): "--geneval-prompts=",
        ("--benchmark", "hps", "--hps-prompts", str(tmp_path / "no")): "--hps-prompts=",
        ("--benchmark", "table5", "--hps-prompts", str(tmp_path)): "has no effect with",
        ("--benchmark", "geneval", "--server", "http://127.0.0.1:9"): "are loaded here",
    }
    for options, message in cases.items():
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), *options]) == 2, options
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("fastgrpo: ")
        ]
        assert len(lines) == 1 and message in lines[0], (lines, message)
