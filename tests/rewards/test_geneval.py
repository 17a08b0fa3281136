"""GenEval: the rules on hand-made objects, post-processing on planted logits, the converter's round
trip, colours with a planted CLIP, and the reward end to end on tiny weights.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.networks.geneval import detector, openmmlab
from fastgrpo.rewards.networks.geneval.colours import Colours, cut_out
from fastgrpo.rewards.networks.geneval.judge import GenEval, Settings
from fastgrpo.rewards.networks.geneval.names import CLASSES, COLOURS
from fastgrpo.rewards.networks.geneval.rules import (
    Box,
    Found,
    correct,
    exact,
    graded,
    grouped,
    relations,
    specification,
)
from tests.harness.weights import clip
from tests.harness.weights import geneval as tiny

SMALL = torch.ones(1, 1, dtype=torch.bool)


def thing(name: str, score: float = 0.95, at: tuple[float, float] = (0, 0)) -> Found:
    return Found(name, score, (at[0], at[1], at[0] + 100, at[1] + 100), SMALL)


def square(x: float, y: float) -> Box:
    return (x, y, x + 100, y + 100)


# The rules


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        ((200, 0), {"left of"}),
        ((40, 0), set()),
        ((41, 0), {"left of"}),  # 21 / 41 of the way; at 40 it is half, which is not above it
        ((150, 150), {"left of", "above"}),
        ((0, 0), set()),
        ((0, -200), {"below"}),
        ((-200, 0), {"right of"}),
        ((0, 200), {"above"}),
    ],
)
def test_golden_positions(other: tuple[float, float], wanted: set[str]) -> None:
    assert relations(square(0, 0), square(*other)) == wanted


def judged(
    row: dict[str, Any], found: Sequence[Found], colour: str = "red"
) -> tuple[bool, float, bool]:
    asked = specification(row)
    groups = grouped(found, asked.counting)
    return tuple(rule(asked, groups, lambda one: colour) for rule in (correct, graded, exact))  # type: ignore[return-value]


def include(*entries: dict[str, Any], tag: str = "two_object", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(entries), **more}


BENCH, COW = {"class": "bench", "count": 1}, {"class": "cow", "count": 1}
THREE = include(
    {"class": "cow", "count": 3}, tag="counting", exclude=[{"class": "cow", "count": 4}]
)
RED = include({"class": "cow", "count": 1, "color": "red"}, tag="colors")
LEFT = include(BENCH, COW | {"position": ["left of", 0]}, tag="position")


@pytest.mark.parametrize(
    ("row", "found", "wanted"),
    [
        (include(BENCH), [thing("bench")], (True, 1.0, True)),
        (include(BENCH), [], (False, 0.0, False)),
        (include(BENCH), [thing("bench", 0.3)], (False, 0.0, False)),  # must exceed
        (include(BENCH, COW), [thing("bench")], (False, 0.5, False)),
        # a spare object hurts the benchmark nowhere but in counting
        (include(BENCH), [thing("bench")] * 2, (True, 0.0, False)),
        (include(BENCH), [thing("bench")] * 4, (True, 0.0, False)),  # not -2
        (THREE, [thing("cow")] * 3, (True, 1.0, True)),
        (THREE, [thing("cow")] * 4, (False, pytest.approx(2 / 3), False)),
        (THREE, [thing("cow")] * 2, (False, pytest.approx(2 / 3), False)),
        # 0.9 in counting
        (THREE, [thing("cow")] * 2 + [thing("cow", 0.8)], (False, pytest.approx(2 / 3), False)),
        (RED, [thing("cow")], (True, 1.0, True)),
        (RED, [thing("cow")] * 2, (True, 0.0, False)),  # 1 - 1 and 0
        (LEFT, [thing("bench", at=(300, 0)), thing("cow")], (True, 1.0, True)),
        (LEFT, [thing("bench"), thing("cow", at=(300, 0))], (False, pytest.approx(2 / 3), False)),
        # the target failed: the term of the position is 0, not 0 and 1
        (LEFT, [thing("cow")], (False, pytest.approx(1 / 3), False)),
    ],
)
def test_verdicts(row: dict[str, Any], found: list[Found], wanted: tuple[Any, ...]) -> None:
    assert judged(row, found) == wanted


def test_another_colour_is_wrong() -> None:
    assert judged(RED, [thing("cow")], "blue") == (False, 0.5, False)
    two = include({"class": "cow", "count": 2, "color": "red"})
    asked, colours = specification(two), iter(["red", "blue"] * 3)
    groups = grouped([thing("cow")] * 2, counting=False)
    assert not correct(asked, groups, lambda one: next(colours))
    assert graded(asked, groups, lambda one: next(colours)) == 0.75


def test_the_best_of_a_class_are_judged() -> None:
    """Of several cows the benchmark takes the likeliest, wherever the others are."""
    cows = [thing("cow", 0.5, (600, 0)), thing("cow", 0.8)]
    assert judged(LEFT, [thing("bench", at=(300, 0)), *cows])[0]
    assert not judged(LEFT, [thing("bench", at=(300, 0)), thing("cow", 0.9, (600, 0)), *cows])[0]
    many = grouped([thing("cow", 0.4 + n / 100) for n in range(30)], counting=False)["cow"]
    assert len(many) == 16 and many[0].score == pytest.approx(0.69)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no list 'include'"),
        (include({"class": "mouse", "count": 1}), "asks for 'mouse'"),  # it is a computer mouse
        (include({"class": "cow", "count": 0}), "asks for 0 of cow"),
        (include(COW | {"color": "beige"}), "the colour 'beige'"),
        (include(COW | {"position": ["left of", 0]}), "no relation to an earlier object"),
        (include(BENCH, COW | {"position": ["beside", 0]}), "no relation to an earlier object"),
    ],
)
def test_wrong_rows(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        specification(row)


def test_names_are_the_benchmarks() -> None:
    assert len(CLASSES) == 80 and len(set(CLASSES)) == 80 and len(COLOURS) == 10
    renamed = (CLASSES[64], CLASSES[65], CLASSES[66])
    assert renamed == ("computer mouse", "tv remote", "computer keyboard")
    assert (CLASSES[0], CLASSES[63], CLASSES[67], CLASSES[79]) == (
        *("person", "laptop", "cell phone"),
        "toothbrush",
    )


# The detector's pixels and objects


@pytest.mark.parametrize(
    ("height", "width", "size", "padded"),
    [
        (512, 512, (800, 800), (800, 800)),
        (1024, 1024, (800, 800), (800, 800)),
        (480, 832, (769, 1333), (800, 1344)),
        (400, 640, (800, 1280), (800, 1280)),
    ],
)
def test_sizes(height: int, width: int, size: tuple[int, int], padded: tuple[int, int]) -> None:
    shown, inner = detector.prepared(torch.zeros(1, height, width, 3, dtype=torch.uint8))
    assert inner == size and tuple(shown.shape[-2:]) == padded
    assert (shown[0, :, size[0] :] == 0).all()  # padded after normalising


def test_pixels_are_rgb_and_not_antialiased() -> None:
    red = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    red[..., 0] = 255
    shown, _ = detector.prepared(red)
    wanted = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert shown[0, :, 5, 5].tolist() == pytest.approx(wanted, abs=1e-5)
    stripes = torch.zeros(1, 1600, 1600, 3, dtype=torch.uint8)
    stripes[:, :, ::4] = 255  # one column of four; halved, each pixel is the mean of two
    shown, _ = detector.prepared(stripes)
    levels = shown[0, 0, 0] * 58.395 + 123.675
    assert set(levels.round().int().tolist()) == {0, 128}


def planted() -> tuple[Tensor, Tensor]:
    """Logits [3, 81] and masks [3, 8, 8]: query 0 is a bench and, less, a cow; query 1 nothing;
    query 2 a cow with no mask.
    """
    logits = torch.full((3, 81), -20.0)
    logits[0, CLASSES.index("bench")], logits[0, CLASSES.index("cow")] = 1.0, 0.5
    logits[1, 80] = logits[2, CLASSES.index("cow")] = 20.0
    masks = torch.full((3, 8, 8), -3.0)
    masks[0, 2:6, 1:5] = 3.0
    return logits, masks


def test_one_query_may_be_two_objects_and_scores_are_products() -> None:
    logits, masks = planted()
    found = detector.objects(logits, masks, (8, 8), (8, 8), (8, 8))
    sure = torch.tensor(3.0).sigmoid().item()
    chances = torch.tensor([1.0, 0.5]).softmax(0)
    assert [one.name for one in found] == ["bench", "cow"]
    assert [one.score for one in found] == pytest.approx((chances * sure).tolist(), rel=1e-5)
    assert found[0].box == (1.0, 2.0, 5.0, 6.0)  # right and bottom one past the last pixel
    assert int(found[0].mask.sum()) == 16
    assert detector.extent(torch.zeros(4, 4, dtype=torch.bool)) == (0.0, 0.0, 0.0, 0.0)


def test_padding_is_cut_off_before_masks_get_the_pictures_size() -> None:
    logits, masks = planted()
    masks[0] = -3.0
    masks[0, :, 4:] = 3.0  # of the network's 32 x 32, whose right half is padding
    assert detector.objects(logits, masks, (32, 32), (32, 16), (64, 32)) == []
    found = detector.objects(logits, masks, (32, 32), (32, 32), (64, 64))
    assert found[0].box == (32.0, 0.0, 64.0, 64.0)


def test_at_most_a_hundred_of_queries_and_classes_together() -> None:
    logits = torch.full((150, 81), -20.0)
    logits[:, 0] = 20.0
    masks = torch.full((150, 2, 2), 5.0)
    assert len(detector.objects(logits, masks, (2, 2), (2, 2), (2, 2))) == 100


# The weights


def test_patches_are_merged_in_the_order_of_unfold() -> None:
    """What mmdetection computes with nn.Unfold, transformers does with concatenated patches."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 4, 6), torch.randn(5, 12)  # [B, C, H, W], [out, 4 C]
    theirs = F.unfold(x, 2, stride=2).transpose(1, 2) @ weight.T
    parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    ours = torch.cat(parts, 1).flatten(2).transpose(1, 2) @ openmmlab.merged_order(weight).T
    torch.testing.assert_close(ours, theirs)


def test_the_published_names_close() -> None:
    """649 tensors of OpenMMLab make the 757 of Mask2FormerModel and the 2 of the class head."""
    config = Mask2FormerConfig(**openmmlab.CONFIG, num_labels=80)
    with torch.device("meta"):
        body, head = Mask2FormerModel(config), nn.Linear(256, 81)
    wanted = body.state_dict() | {f"class_predictor.{n}": t for n, t in head.state_dict().items()}
    theirs = tiny.to_openmmlab(wanted)
    assert (len(theirs), len(body.state_dict())) == (649, 757)
    assert sum(t.numel() for t in body.state_dict().values()) == 68_720_266
    assert sum(t.numel() for t in head.parameters()) == 20_817
    ours = openmmlab.to_transformers(theirs, "of a test")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in wanted.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a tiny detector of each layout, at a tiny size, and its class of weights."""
    monkeypatch.setattr(openmmlab, "CONFIG", tiny.CONFIG)
    monkeypatch.setattr(detector, "SHORT", 64)
    tiny.write(tmp_path)
    tiny.write_transformers(tmp_path / "hf")
    return tmp_path


def pictures(count: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (count, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_converted_weights_compute_what_the_network_does(small: Path) -> None:
    body, head = tiny.network()
    whole = detector.Detector(body, head)
    for made in (
        detector.of_openmmlab(small / "detector.pth"),
        detector.of_transformers(small / "hf"),
    ):
        found, wanted = made(pictures()), whole(pictures())
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours is not None and theirs is not None and len(theirs) > 0
            assert [(o.name, o.box) for o in ours] == [(t.name, t.box) for t in theirs]
            scores = torch.tensor([[o.score, t.score] for o, t in zip(ours, theirs, strict=True)])
            torch.testing.assert_close(scores[:, 0], scores[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("panoptic_head.query_embed.weight", None, "queries_embedder.weight is None"),
        ("panoptic_head.cls_embed.weight", torch.zeros(134, 32), r"is \[134, 32\], where"),
        ("bbox_head.fc.weight", torch.zeros(1), "holds bbox_head.fc.weight, which"),
    ],
)
def test_other_checkpoints_are_one_line(
    small: Path, name: str, tensor: Tensor | None, said: str
) -> None:
    saved = torch.load(small / "detector.pth", weights_only=True)
    state = {n: t for n, t in saved["state_dict"].items() if n != name}
    torch.save({"state_dict": state | ({} if tensor is None else {name: tensor})}, small / "x.pth")
    with pytest.raises(UserError, match=said):
        detector.of_openmmlab(small / "x.pth")


# Colours


class PlantedClip:
    """A CLIP whose vectors are mean colours: of pictures their own, of texts what is written."""

    rgb: ClassVar = {
        "red": (1.0, 0, 0),
        "green": (0, 1.0, 0),
        "blue": (0, 0, 1.0),
        "white": (1.0, 1.0, 1.0),
    }

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(images.float().mean((1, 2)), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        self.texts = list(texts)
        rgb = [next((v for c, v in self.rgb.items() if c in t), (0.0, 0.0, 0.0)) for t in texts]
        return F.normalize(torch.tensor(rgb), dim=-1)


def test_colours_of_flat_objects() -> None:
    planted: Any = PlantedClip()
    colours = Colours(planted)
    picture = torch.full((60, 60, 3), 255, dtype=torch.uint8)
    picture[10:30, 10:30] = torch.tensor([200, 0, 0], dtype=torch.uint8)
    picture[40:50, 10:50] = torch.tensor([0, 0, 200], dtype=torch.uint8)
    for rows, columns, colour in (((10, 30), (10, 30), "red"), ((40, 50), (10, 50), "blue")):
        mask = torch.zeros(60, 60, dtype=torch.bool)
        mask[slice(*rows), slice(*columns)] = True
        one = Found("cow", 0.9, detector.extent(mask), mask)
        assert colours(picture, one) == colour
        assert tuple(cut_out(picture, one).shape[:2]) == (
            rows[1] - rows[0],
            columns[1] - columns[0],
        )
    assert len(planted.texts) == 30 and planted.texts[:3] == [
        "a photo of a red cow",
        "a photo of a red-colored cow",
        "a photo of a red object",
    ]


def test_what_is_around_an_object_is_grey() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    cut = cut_out(torch.zeros(4, 4, 3, dtype=torch.uint8), Found("cow", 1.0, (1, 1, 4, 4), mask))
    assert cut.shape == (3, 3, 3) and set(cut.flatten().tolist()) == {0, 0x99}


# The reward

ROWS = (
    {"tag": "single_object", "include": [BENCH], "prompt": "a photo of a bench"},
    {**THREE, "prompt": "a photo of three cows"},
)


def spec(folder: Path, name: str = "geneval", **options: str) -> RewardSpec:
    return RewardSpec(
        name=name,
        weights={},
        path=str(folder / "detector.pth" if name == "geneval" else folder / "hf"),
        device="cpu",
        options={"rows": str(folder / "rows.jsonl"), "clip": str(folder / "clip")} | options,
    )


@pytest.fixture
def files(small: Path) -> Path:
    """All that the reward reads."""
    (small / "clip").mkdir()
    clip.write_transformers(small / "clip")
    (small / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return small


@pytest.mark.parametrize("name", ["geneval", "geneval_hf"])
def test_the_reward_end_to_end(files: Path, name: str) -> None:
    """Asked for what the tiny detector finds, a picture is right; the parts' names differ."""
    loaded: Any = rewards.load(spec(files, name))
    found = loaded.detector(pictures())[0]
    best = max(found, key=lambda one: one.score)
    count = sum(one.name == best.name for one in found)
    row = {"tag": "x", "include": [{"class": best.name, "count": count}], "prompt": "as found"}
    (files / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*ROWS, row)))
    reward = rewards.load(spec(files, name))
    scores = reward(pictures()[:, None], ["as found", "no row"], 8.0)
    end = "_hf" if name == "geneval_hf" else ""
    assert reward.names == (f"GenEval{end}", f"graded{end}", f"exact{end}")
    assert [scores.values[part][0].item() for part in reward.names] == [1.0, 1.0, 1.0]
    assert scores.valid.tolist() == [True, False]
    assert rewards.load(spec(files, name)).fingerprint == reward.fingerprint != loaded.fingerprint


class Benches(nn.Module):
    """A detector that finds as many benches as the first pixel says; None: of 255."""

    def forward(self, shown: Tensor) -> list[list[Found] | None]:
        numbers = shown[:, 0, 0, 0].tolist()
        return [None if n == 255 else [thing("bench")] * int(n) for n in numbers]


def test_a_clip_is_the_mean_of_its_frames_and_a_failed_frame_has_no_score() -> None:
    asked = {"a photo of a bench": specification(include(BENCH))}
    nothing: Any = None
    settings = Settings(("GenEval", "graded", "exact"), asked, "all", 2, "of a test")
    reward = GenEval(Benches(), nothing, settings)  # type: ignore[arg-type]
    pixels = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    pixels[:, :, 0, 0, 0] = torch.tensor([[1, 0, 2], [1, 255, 1]])
    scores = reward(pixels, ["a photo  of a bench"] * 2, 8.0)
    assert scores.valid.tolist() == [True, False]
    row = [scores.values[part][0].item() for part in reward.names]
    assert row == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert all(scores.values[part][1].isnan() for part in reward.names)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"path": None}, "rewards.path: missing; give mask2former_swin-s"),
        ({"path": "nowhere.pth"}, "rewards.path=nowhere.pth: no such file"),
        ({"options": {"clip": None}}, "rewards.options.clip: missing"),
        ({"options": {"clip": "nowhere"}}, "rewards.options.clip=nowhere: no such file or folder"),
        ({"options": {"row": "x"}}, "did you mean 'rows'"),
        ({"dtype": "bfloat16"}, "rewards.dtype=bfloat16: GenEval's thresholds"),
    ],
)
def test_a_check_finds_mistakes_without_reading_weights(
    files: Path, changed: dict[str, Any], said: str
) -> None:
    (files / "detector.pth").write_bytes(b"not looked at")
    good = spec(files)
    rewards.check_settings(good)
    options = {
        k: v for k, v in (good.options | changed.get("options", {})).items() if v is not None
    }
    with pytest.raises(UserError) as caught:
        rewards.check_settings(good.model_copy(update=changed | {"options": options}))
    assert said in str(caught.value)


def test_a_wrong_row_names_its_prompt(files: Path) -> None:
    row = {"tag": "x", "include": [{"class": "unicorn", "count": 1}], "prompt": "a unicorn"}
    (files / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="the row of 'a unicorn' asks for 'unicorn', which"):
        rewards.check_settings(spec(files))


def test_the_transformers_folder_is_named_when_it_is_none(files: Path) -> None:
    shutil.rmtree(files / "hf")
    with pytest.raises(UserError, match=r"no folder with a config\.json; give the downloaded"):
        rewards.check_settings(spec(files, "geneval_hf"))


def test_what_lies_beside_the_weights_changes_no_identity(files: Path) -> None:
    before = rewards.load(spec(files, "geneval_hf")).fingerprint
    (files / "hf" / "README.md").write_text("a note")
    assert rewards.load(spec(files, "geneval_hf")).fingerprint == before
    config = files / "hf" / "config.json"
    config.write_text(config.read_text().rstrip() + "\n\n")
    assert rewards.load(spec(files, "geneval_hf")).fingerprint != before
