"""`fastgrpo score`: what a reward says of the decoded pixels, and why it says nothing of some."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.cli import main as cli
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.data import video, video_reader
from fastgrpo.data.images import read_image
from fastgrpo.data.tiny_world import shapes
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.tools.score import clip_files, judges
from fastgrpo.tools.score.judges import Asked, Judges, RecordingReward, Servers
from fastgrpo.training.evaluation import Evaluation
from tests import ROOT
from tests.harness import servers

MEANINGS = shapes.meanings()[0][:3]
CAPTIONS = [shapes.caption(meaning, 0) for meaning in MEANINGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips as mp4 with their captions beside them, a picture as png and jpg, and half an
    mp4.
    """
    folder = tmp_path_factory.mktemp("clips")
    for number, (meaning, caption) in enumerate(zip(MEANINGS, CAPTIONS, strict=True)):
        video.write_mp4(folder / f"{number}.mp4", shapes.draw(meaning), 8.0)
        (folder / f"{number}.txt").write_text(f"{caption}\n")
    video.write_png(folder / "still.png", shapes.draw(MEANINGS[0])[0].repeat(8, 0).repeat(8, 1))
    Image.open(folder / "still.png").save(folder / "still.jpg", quality=90)
    (folder / "half.mp4").write_bytes((folder / "0.mp4").read_bytes()[:2000])
    (folder / "half.txt").write_text(CAPTIONS[0])
    return folder


def scored(capsys: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, Any]:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert cli.main(["score", *map(str, options), "--json", "-"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def complaint(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    capsys.readouterr()
    assert cli.main(["score", *map(str, options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("fastgrpo: ")


def values(scores: Scores) -> dict[str, float]:
    return {part: float(column[0]) for part, column in scores.values.items()}


def test_scores_are_the_rewards_of_the_decoded_pixels(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [folder / f"{number}.mp4" for number in range(3)]
    result = scored(capsys, *files, "--reward", "tiny_world", "--reward", "video_stats")
    loaded = {name: rewards.load(rewards.plain(name)) for name in ("tiny_world", "video_stats")}
    for file, caption, row in zip(files, CAPTIONS, result["files"], strict=True):
        footage = video_reader.read(file)
        pixels, fps = footage.pixels, footage.fps
        assert row["file"] == str(file) and row["prompt"] == caption and row["invalid"] == {}
        assert row["shape"] == [9, 192, 192, 3] and row["fps"] == fps == 8.0
        for name, reward in loaded.items():
            assert row["scores"][name] == values(reward(pixels[None], [caption], fps))
    mean = sum(row["scores"]["tiny_world"]["MQ"] for row in result["files"]) / 3
    assert result["means"]["tiny_world"]["MQ"] == {"mean": mean, "clips": 3}


@pytest.mark.parametrize("name", ["still.png", "still.jpg"])
def test_pictures_are_clips_of_one_frame(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    # it asks for no prompt
    (row,) = scored(capsys, folder / name, "--reward", "video_stats")["files"]
    pixels = read_image(folder / name)[None]
    assert row["shape"] == [1, 256, 256, 3]
    expected = rewards.load(rewards.plain("video_stats"))(pixels[None], [""], 8.0)
    assert row["scores"]["video_stats"] == values(expected)


def test_clips_are_judged_in_the_size_in_which_they_were_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of small clips are enlarged.

    Shrunk again they score as drawn but for the encoder's loss.
    """
    command = (folder / "0.mp4", "--reward", "tiny_world", "--size", "32x32")
    own = scored(capsys, *command)["files"][0]
    drawn = torch.from_numpy(shapes.draw(MEANINGS[0]))
    expected = values(rewards.load(rewards.plain("tiny_world"))(drawn[None], [CAPTIONS[0]], 8.0))
    assert own["shape"] == [9, 32, 32, 3]
    assert own["scores"]["tiny_world"] == pytest.approx(expected, abs=0.03)
    enlarged = scored(capsys, *command[:-2])["files"][0]["scores"]["tiny_world"]
    assert enlarged["VQ"] < 0.5 < expected["VQ"], (
        "edges of the enlarged clip are soft in its own pixels"
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (25, 31), (480, 270)])
def test_shrinking_undoes_the_enlarging_of_small_clips(height: int, width: int) -> None:
    clip = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    shown = torch.from_numpy(video._presentable(clip.numpy()).copy())
    assert torch.equal(clip_files.shrink(shown, (height, width), Path("x.mp4")), clip)
    square = torch.tensor([[0, 2], [4, 7]], dtype=torch.uint8)[None, :, :, None].expand(1, 2, 2, 3)
    assert clip_files.shrink(square, (1, 1), Path("x.mp4")).flatten().tolist() == [3, 3, 3], (
        "13 / 4"
    )
    with pytest.raises(UserError, match="no whole multiple of 33x32"):
        clip_files.shrink(shown, (33, 32), Path("x.mp4"))


def test_what_cannot_be_scored_is_listed_and_the_rest_is_scored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (folder / "half.mp4", folder / "0.mp4", folder / "none.mp4", folder / "still.png")
    result = scored(
        capsys, *files, "--prompt", CAPTIONS[0], "--reward", "tiny_world", "--reward", "video_stats"
    )
    half, good, none, still = result["files"]
    assert half["scores"] == none["scores"] == {} and half["shape"] is None
    assert (
        half["invalid"]["file"]["class"] == "unreadable"
        and "half.mp4: neither a picture nor" in half["invalid"]["file"]["reason"]
    )
    assert "No such file" in none["invalid"]["file"]["reason"]
    assert good["invalid"] == {} and None not in good["scores"]["tiny_world"].values()
    assert still["invalid"]["tiny_world"]["class"] == "ValueError"
    assert "judges motion" in still["invalid"]["tiny_world"]["reason"]
    assert set(still["scores"]["tiny_world"].values()) == {None}
    assert None not in still["scores"]["video_stats"].values(), "the other reward judges it"
    assert result["means"]["tiny_world"]["VQ"] == {
        "mean": good["scores"]["tiny_world"]["VQ"],
        "clips": 1,
    }
    assert cli.main(["score", *map(str, files), "--prompt", "a", "--reward", "tiny_world"]) == 0
    printed = capsys.readouterr()
    assert "tiny_world: ValueError: " in printed.out and "mean of the valid" in printed.out
    assert printed.err == ""


def test_alone_it_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("half.mp4",): "half.mp4: neither a picture nor a video, or damaged; write it again.",
        (
            "none.mp4",
        ): "none.mp4: cannot be read (No such file or directory); correct the name or the file.",
        ("none.mp4", "half.mp4"): "(none of the 2 files can be scored)",
        ("0.txt",): "0.txt: of an unknown kind; give one of .mp4,",
    }
    for names, message in cases.items():
        files = [folder / name for name in names]
        assert message in complaint(capsys, *files, "--reward", "tiny_world", "--prompt", "a")


def test_a_folder_stands_for_its_clips_and_prompts_come_in_order(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes((folder / f"{number}.mp4").read_bytes())
    listed = tmp_path / "prompts.jsonl"
    listed.write_text("".join(json.dumps({"prompt": "the same words"}) + "\n" for _ in range(2)))
    rows = scored(capsys, tmp_path, "--reward", "tiny_world", "--prompts", listed)["files"]
    assert [(Path(row["file"]).name, row["prompt"]) for row in rows] == [
        ("0.mp4", "the same words"),
        ("1.mp4", "the same words"),
    ]
    message = complaint(capsys, tmp_path / "0.mp4", "--reward", "tiny_world", "--prompts", listed)
    assert "has 2 prompts for 1 files" in message
    assert "0.mp4 (and 1 more): no prompt; give --prompt" in complaint(
        capsys, tmp_path, "--reward", "tiny_world"
    )


def test_a_server_gives_the_scores_of_this_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(servers.TOKEN)
    files = (
        folder / "0.mp4",
        folder / "still.png",
        "--prompt",
        CAPTIONS[0],
        "--reward",
        "tiny_world",
        "--size",
        "32x32",
    )
    here = scored(capsys, *files)
    with servers.running({"tiny_world": rewards.load(rewards.plain("tiny_world"))}) as url:
        there = scored(capsys, *files, "--server", url, "--token-file", tmp_path / "token")
        wrong = complaint(capsys, *files, "--server", url, "--path", "x")
        missing = complaint(
            capsys,
            folder / "0.mp4",
            "--reward",
            "hps",
            "--server",
            url,
            "--token-file",
            tmp_path / "token",
        )
    assert [row["scores"] for row in there["files"]] == [row["scores"] for row in here["files"]]
    assert there["files"][1]["invalid"]["tiny_world"]["class"] == "server"
    assert "leave out --path" in wrong and "has no reward 'hps', only tiny_world" in missing


def test_clips_of_a_runs_evaluation_know_their_prompt_and_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "run" / "evaluation" / "step-3"
    kept.mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_text((ROOT / "launch" / "t2v_tiny.toml").read_text())
    for number in range(2):
        (kept / f"00{number}.mp4").write_bytes((folder / f"{number}.mp4").read_bytes())
    clips = ["step-3/000.mp4", "step-3/001.mp4"]
    prompts = [caption for caption in CAPTIONS for _ in range(2)]  # two seeds each
    Evaluation(
        iteration=3, prompts=prompts, seeds=[0, 1] * 3, scores={}, weights={}, clips=clips
    ).write(kept.with_suffix(".json"))
    rows = scored(capsys, kept, "--reward", "tiny_world")["files"]
    assert [row["prompt"] for row in rows] == CAPTIONS[:2]
    assert [row["shape"] for row in rows] == [[9, 32, 32, 3]] * 2


class Odd(Reward):
    """A reward that fails in the way that the prompt says."""

    names = ("A", "B")
    reads_prompts = False

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        (prompt,) = prompts
        one, nan = torch.ones(1), torch.full((1,), math.nan)
        answers = {
            "well": Scores({"A": one, "B": one}, torch.tensor([True])),
            "no score": Scores({"A": nan, "B": nan}, torch.tensor([False])),
            "not finite": Scores({"A": one, "B": nan}, torch.tensor([True])),
            "malformed": Scores({"A": one}, torch.tensor([True])),
        }
        if prompt not in answers:
            raise KeyError("a long\nstory")
        return answers[prompt]


def test_a_clip_without_a_score_says_why() -> None:
    source = ScorerInProcess([])
    recorder = RecordingReward(Odd())
    source.served = {"odd": Served(recorder, rewards.plain("odd"))}
    opened = Judges([source], {"odd": ("A", "B")}, {"odd": recorder})
    clip = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert not opened.read_prompts
    for prompt in ("no score", "not finite", "malformed", "raise"):
        verdict = opened.score(clip, prompt, 8.0)["odd"]
        assert verdict.kind == {"raise": "KeyError"}.get(prompt, prompt)
        missing = [part for part, score in verdict.scores.items() if math.isnan(score)]
        assert missing == (["B"] if prompt == "not finite" else ["A", "B"])
    assert opened.score(clip, "not finite", 8.0)["odd"].reason == "B=nan"
    assert opened.score(clip, "well", 8.0)["odd"].kind is None


def test_settings_reach_the_reward_that_is_meant(tmp_path: Path) -> None:
    asked = Asked(
        names=("hps", "video_stats"),
        paths=("hps=weights/a=b.pt",),
        options=("video_stats.grid_period=8", "hps.tokenizer=./merges"),
        settings=("hps.frames=4", "hps.threshold.HPS=0.28", "video_stats.fps=24"),
    )
    hps, stats = judges.specs(asked)
    assert hps == RewardSpec(
        name="hps",
        weights={},
        path=str(Path("weights/a=b.pt").absolute()),
        frames=4,
        threshold={"HPS": 0.28},
        options={"tokenizer": str(Path("merges").absolute())},
    )
    assert stats == RewardSpec(name="video_stats", weights={}, fps=24.0, options={"grid_period": 8})
    file = tmp_path / "judges.toml"
    file.write_text(
        '[[rewards]]\nname = "hps"\npath = "./a.pt"\n[[rewards]]\nname = "video_stats"\n'
    )
    named = judges.specs(Asked(file=file))
    assert [(spec.name, spec.path) for spec in named] == [
        ("hps", str(tmp_path / "a.pt")),
        ("video_stats", None),
    ]
    assert [spec.name for spec in judges.specs(Asked(names=("video_stats",), file=file))] == [
        "video_stats"
    ]


def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = folder / "0.mp4"
    two = ("--reward", "tiny_world", "--reward", "video_stats")
    cases = {
        (clip,): f"--reward: missing; name one of {', '.join(rewards.known())}, or",
        (clip, "--reward", "hsp"): "rewards.name='hsp': no such reward",
        (clip, "--reward", "hps", "--reward", "hps"): "--reward=hps: is named twice",
        (
            clip,
            *two,
            "--path",
            "x.pt",
        ): "--path=x.pt: of which reward (tiny_world, video_stats)? Write it as NAME=PATH.",
        (clip, *two, "--option", "grid_period=8"): "of which reward",
        (
            clip,
            "--reward",
            "video_stats",
            "--option",
            "grid=8",
        ): "rewards.options.grid: video_stats has no such option",
        (
            clip,
            "--reward",
            "video_stats",
            "--set",
            "frame=8",
        ): "a reward has no such key; did you mean 'frames'?",
        (clip, "--reward", "video_stats", "--set", "frames"): "not of the form key=value",
        (clip, "--reward", "hps"): "rewards.path: missing",
        (
            clip,
            "--reward",
            "tiny_world",
            "--size",
            "33x32",
        ): "no whole multiple of 33x32; correct --size.",
        (
            clip,
            "--reward",
            "tiny_world",
            "--json",
            tmp_path / "no" / "x",
        ): "cannot be written there",
        (clip, "--reward", "tiny_world", "--prompt", "a", "--prompts", "b"): "not both",
        (clip, "--reward", "tiny_world", "--server", "http://127.0.0.1:9"): "--token-file: missing",
        (tmp_path, "--reward", "tiny_world"): "the folder has no clips or pictures",
        (clip, "--recipe", tmp_path / "none.toml"): "no such file; give the path of a recipe",
    }
    for options, message in cases.items():
        assert message in complaint(capsys, *options), options


def test_the_json_file_is_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "score",
        str(folder / "0.mp4"),
        "--reward",
        "tiny_world",
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert cli.main(command) == 0
    assert "VQ" in capsys.readouterr().out, "and the table"
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["rewards"][0]["name"] == "tiny_world" and len(content["files"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_servers_need_no_weights_here() -> None:
    with pytest.raises(UserError, match="unreachable"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "START_TIMEOUT_S", 0.3)
        patch.setenv("FASTGRPO_TOKEN", "x")
        with judges.opened([rewards.plain("hps")], Servers(("http://127.0.0.1:9",))):
            pass


@pytest.mark.parametrize("form", ["0.mp4", "./0.mp4", ".", "../{name}/0.mp4", "../{name}"])
def test_a_clip_may_be_named_from_any_folder(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(capsys, folder / "0.mp4", "--reward", "video_stats")["files"][0]
    monkeypatch.chdir(folder)
    result = scored(capsys, form.format(name=folder.name), "--reward", "video_stats")
    (row,) = [row for row in result["files"] if Path(row["file"]).name == "0.mp4"]
    assert (row["scores"], row["prompt"]) == (whole["scores"], CAPTIONS[0])


def test_a_runs_clips_keep_prompt_and_size_wherever_they_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "run" / "evaluation" / "step-3"
    video.write_mp4(step / "000.mp4", shapes.draw(MEANINGS[0]), 8.0)
    step.with_name("step-3.json").write_text(
        json.dumps({"clips": ["step-3/000.mp4"], "prompts": [CAPTIONS[0]]})
    )
    (tmp_path / "run" / "recipe.toml").write_text((ROOT / "launch" / "t2v_tiny.toml").read_text())
    (tmp_path / "link").symlink_to(step)
    places = [(step, "000.mp4"), (step, "."), (step.parent, "step-3"), (tmp_path / "run", "e")]
    (tmp_path / "run" / "e").symlink_to(step)
    for place, name in [*places, (tmp_path, "link/000.mp4"), (tmp_path, str(step))]:
        monkeypatch.chdir(place)
        (row,) = scored(capsys, name, "--reward", "video_stats")["files"]
        assert (row["prompt"], row["shape"]) == (CAPTIONS[0], [9, 32, 32, 3]), (place, name)


def test_what_read_a_file_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (folder / "0.mp4", folder / "still.png", folder / "half.mp4")
    rows = scored(capsys, *files, "--prompt", "x", "--reward", "video_stats")["files"]
    assert [row["decoder"] for row in rows] == ["decord", "Pillow", None]
