"""CLIP rewards against the references' own numbers (goldens/open_clip_tiny) and transformers' whole
pipeline.
"""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import RewardWrapper
from fastgrpo.rewards.common import frames, weight_files
from fastgrpo.rewards.networks.clip import preprocess, weights
from fastgrpo.rewards.networks.clip.clip_reward import ClipReward, Rating
from fastgrpo.rewards.networks.clip.tokenizer import (
    FILES,
    ClipTokenizer,
    clean_open_clip,
    clean_transformers,
    read_merges,
)
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from tests import GOLDENS
from tests.harness.weights import clip

GOLDEN = GOLDENS / "open_clip_tiny"
GOLDEN_CFG: dict[str, Any] = {  # from the golden's own metadata
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 48, "head_width": 12, "patch_size": 28},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
WRITERS = {
    "hps": clip.write_hps,
    "clip_score": clip.write_open_clip,
    "pick_score": clip.write_transformers,
}
PART = {"hps": "HPS", "clip_score": "CLIP", "pick_score": "PickScore"}
PROMPTS = ["a red cat", "the car"]


def golden() -> tuple[dict[str, Tensor], Tensor]:
    """The reference's inputs and outputs, and its frames as uint8 [N, H, W, 3]."""
    with safe_open(GOLDEN / "io.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors, tensors["frames_u8"].permute(0, 2, 3, 1).contiguous()


def golden_reward(cfg: dict[str, Any], antialias: bool = True) -> ClipReward:
    """The golden checkpoint behind the golden token ids, whose real vocabulary is not in the
    repository.
    """
    tensors, _ = golden()
    loaded = weights.read(GOLDEN / "open_clip_tiny.pt", cfg, None, torch.float32)
    pixels = preprocess.Preprocess(size=224, resize="letterbox", antialias=antialias)
    ids: Any = lambda prompts: tensors["input_ids"].long()[[int(prompt) for prompt in prompts]]  # noqa: E731
    return ClipReward(loaded.model, ids, pixels, Rating("HPS", "first", 1.0, 2), "")


def spec(name: str, folder: Path, **settings: Any) -> RewardSpec:
    return RewardSpec.model_validate(
        {"name": name, "weights": {PART[name]: 1.0}, "path": str(folder)} | settings
    )


def clips(batch: int, count: int, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    """Smooth coloured noise, uint8 [B, F, H, W, 3]."""
    coarse = torch.rand(batch * count, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (
        (255 * fine)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .reshape(batch, count, height, width, 3)
    )


def test_golden_pixels_features_and_score() -> None:
    expected, images = golden()
    reward = golden_reward(GOLDEN_CFG)
    pixels = reward.preprocess(images)
    assert torch.equal(pixels[..., ::4, ::4], expected["pixel_values"])
    numbers = ["0", "1", "2"]
    torch.testing.assert_close(
        reward.image_features(images), expected["image_features"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        reward.text_features(numbers), expected["text_features"], atol=1e-5, rtol=0
    )
    scores = reward(images[:, None], numbers, 8.0)
    torch.testing.assert_close(scores.values["HPS"], expected["score"], atol=1e-5, rtol=0)
    assert scores.valid.all()


def test_image_vectors_are_the_mean_of_a_clips_frames_also_behind_a_threshold() -> None:
    expected, images = golden()
    reward = golden_reward(GOLDEN_CFG)
    scorer = ScorerInProcess([])
    assert not scorer.has_vectors
    # abstract: the threshold, which is what wraps a reward, defines how it is called
    wrapper: Any = type("Wrapped", (RewardWrapper,), {"__call__": None})(reward)
    served: Any = {
        "plain": SimpleNamespace(reward=object()),
        "hps": SimpleNamespace(reward=wrapper),
    }
    scorer.served = served
    assert scorer.has_vectors
    clips = torch.stack([images[:2], images[1:3]])
    vectors = scorer.image_vectors(clips)
    own = expected["image_features"]
    torch.testing.assert_close(
        vectors, torch.stack([own[:2].mean(0), own[1:3].mean(0)]), atol=1e-5, rtol=0
    )


def test_the_wrong_gelu_or_filter_is_seen() -> None:
    expected, images = golden()
    quick = golden_reward(GOLDEN_CFG | {"quick_gelu": True}).image_features(images)
    assert (quick - expected["image_features"]).abs().max() > 1e-4
    plain = golden_reward(GOLDEN_CFG, antialias=False).preprocess(images)
    assert not torch.equal(plain[..., ::4, ::4], expected["pixel_values"])


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors", "module.bin"])
def test_open_clip_layout_gives_the_same_network(
    tmp_path: Path, file: str, quick_gelu: bool
) -> None:
    model = clip.network(quick_gelu)
    state = clip.to_open_clip(model.state_dict())
    if file == "weights.safetensors":
        save_file(state, tmp_path / file)
    else:
        prefix = "module." if file == "module.bin" else ""
        torch.save(
            {"state_dict": {prefix + name: tensor for name, tensor in state.items()}},
            tmp_path / file,
        )
    loaded = weights.read(
        tmp_path / file, clip.MODEL_CFG | {"quick_gelu": quick_gelu}, None, torch.float32
    )
    pixels, ids = (
        torch.randn(2, 3, 32, 32),
        torch.tensor([[519, 512, 514, 520, 0], [519, 3, 520, 0, 0]]),
    )
    for mine, theirs in (
        (loaded.model.get_image_features(pixels), model.get_image_features(pixels)),
        (loaded.model.get_text_features(ids), model.get_text_features(ids)),
    ):
        torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)
    assert loaded.logit_scale == pytest.approx(np.exp(3.0))


def test_the_published_size_of_vit_h_14() -> None:
    """Every tensor of a full-size open_clip ViT-H-14 finds its place, and there are 986.11 million
    values.
    """
    with torch.device("meta"):
        wanted = CLIPModel(weights._config(weights.VIT_H_14, *_towers(), 224)).state_dict()
    found = weights.to_transformers(clip.to_open_clip(wanted))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert round(sum(tensor.numel() for tensor in wanted.values()) / 1e6, 2) == 986.11


def _towers() -> tuple[Any, Any]:
    return weights.VIT_H_14["vision_cfg"], weights.VIT_H_14["text_cfg"]


@pytest.mark.parametrize(
    ("height", "width"), [(60, 40), (40, 60), (31, 47), (32, 20), (20, 32), (33, 33), (500, 3)]
)
def test_letterbox_keeps_everything_and_adds_black(height: int, width: int) -> None:
    white = torch.full((1, height, width, 3), 255, dtype=torch.uint8)
    boxed = preprocess.letterbox(white, 32, antialias=True)[0]
    rows, columns = (max(round(side * 32 / max(height, width)), 1) for side in (height, width))
    top, left = (32 - rows) // 2, (32 - columns) // 2
    expected = torch.zeros(3, 32, 32)
    expected[:, top : top + rows, left : left + columns] = 1
    torch.testing.assert_close(boxed, expected, atol=1e-5, rtol=0)


def test_letterbox_treats_portrait_as_landscape_turned() -> None:
    landscape = clips(1, 2, 24, 60)[0]
    turned = preprocess.letterbox(landscape.transpose(1, 2).contiguous(), 32, antialias=True)
    torch.testing.assert_close(
        turned, preprocess.letterbox(landscape, 32, antialias=True).transpose(2, 3)
    )


@pytest.mark.parametrize(
    ("height", "width"), [(40, 52), (52, 40), (33, 37), (35, 61), (32, 32), (16, 35), (90, 33)]
)
def test_centre_crop_is_that_of_transformers(height: int, width: int) -> None:
    images = clips(1, 2, height, width)[0]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = processor(
        [Image.fromarray(image.numpy()) for image in images], return_tensors="pt"
    ).pixel_values
    mine = preprocess.Preprocess(size=32, resize="shortest", crop="down")(images)
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


def test_centre_crop_of_open_clip_rounds_half_to_even() -> None:
    """35 columns cropped to 32 start at round(1.5) = 2 by torchvision's rule and at 1 by
    transformers'.
    """
    columns = (
        torch.arange(35, dtype=torch.uint8).reshape(1, 1, 35, 1).expand(1, 32, 35, 3).contiguous()
    )
    rules: tuple[tuple[Literal["half_even", "down"], int], ...] = (("half_even", 2), ("down", 1))
    for crop, first in rules:
        pixels = preprocess.Preprocess(
            size=32, resize="shortest", crop=crop, mean=(0.0,) * 3, std=(1.0,) * 3
        )(columns)
        assert (255 * pixels[0, 0, 0, 0]).round() == first


def test_squash_keeps_no_ratio() -> None:
    images = clips(1, 2)[0]
    processor = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    expected = processor(
        [Image.fromarray(image.numpy()) for image in images], return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(
        preprocess.Preprocess(size=32, resize="squash")(images), expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("rule", "total", "chosen"),
    [
        ("all", 3, [0, 1, 2]),
        ("first", 9, [0]),
        ("middle", 9, [4]),
        ("middle", 1, [0]),
        (1, 9, [4]),
        (2, 8, [2, 6]),
        (3, 9, [1, 4, 7]),
        (4, 53, [6, 19, 33, 46]),
        (9, 4, [0, 1, 2, 3]),
        (5, 5, [*range(5)]),
    ],
)
def test_which_frames(rule: str | int, total: int, chosen: list[int]) -> None:
    assert frames.choose(rule, total) == chosen


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_several_frames_are_averaged(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    pixels = clips(2, 6)
    single = rewards.load(spec(name, tmp_path))
    each = torch.stack(
        [single(pixels[:, [i]], PROMPTS, 8.0).values[PART[name]] for i in range(6)], 1
    )
    assert each.std(1).min() > 1e-3
    for rule, chosen in (("all", range(6)), ("first", [0]), ("middle", [3]), (2, [1, 4])):
        found = rewards.load(spec(name, tmp_path, frames=rule))(pixels, PROMPTS, 8.0)
        torch.testing.assert_close(
            found.values[PART[name]], each[:, list(chosen)].mean(1), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_published_folder_end_to_end(tmp_path: Path, name: str) -> None:
    """The whole chain, from text and uint8 frames, against transformers' model, tokenizer and image
    processor.
    """
    model = WRITERS[name](tmp_path)
    pixels = clips(2, 1, 40, 40)
    images = [Image.fromarray(image.numpy()) for image in pixels[:, 0]]
    own = (
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        if name == "clip_score"
        else {}
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **own
    )
    inputs = processor(images, return_tensors="pt").pixel_values
    ids = clip.tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        cosine = model(pixel_values=inputs, **ids).logits_per_image.diagonal() / np.exp(3.0)
    expected = cosine * (np.exp(3.0) if name == "pick_score" else 1.0)
    tolerance = 0.02 if name == "hps" else 1e-4  # HPS resizes floats, the processor uint8
    scores = rewards.load(spec(name, tmp_path))(pixels, PROMPTS, 8.0)
    assert scores.valid.all()
    assert scores.values[PART[name]].dtype == torch.float32
    torch.testing.assert_close(scores.values[PART[name]], expected.float(), atol=tolerance, rtol=0)
    swapped = rewards.load(spec(name, tmp_path))(pixels, PROMPTS[::-1], 8.0).values[PART[name]]
    assert (
        swapped - scores.values[PART[name]]
    ).abs().min() > 1e-3  # each clip is scored for its own prompt


def test_pick_score_scales(tmp_path: Path) -> None:
    clip.write_transformers(tmp_path)
    pixels = clips(2, 1)
    scales = ("cosine", "logits", "logits / 26")
    found = [
        rewards.load(spec("pick_score", tmp_path, options={"scale": scale}))(
            pixels, PROMPTS, 8.0
        ).values["PickScore"]
        for scale in scales
    ]
    torch.testing.assert_close(found[1], found[0] * float(np.exp(3.0)))
    torch.testing.assert_close(found[2], found[1] / 26)


def test_what_the_config_says_about_pixels(tmp_path: Path) -> None:
    """resize_mode of the config is followed; the option goes before it; 34 pixels give the 4 x 4
    patches of 32.
    """
    clip.write_open_clip(tmp_path / "squash", resize="squash")
    clip.write_open_clip(tmp_path / "silent")
    pixels = clips(2, 1, 40, 80)

    def score(folder: str, **chosen: Any) -> Tensor:
        return rewards.load(spec("clip_score", tmp_path / folder, options=chosen))(
            pixels, PROMPTS, 8.0
        ).values["CLIP"]

    torch.testing.assert_close(score("silent", resize="squash"), score("squash"))
    torch.testing.assert_close(score("squash", resize="shortest"), score("silent"))
    assert (score("squash") - score("silent")).abs().min() > 1e-3
    assert (score("silent", image_size=34) - score("silent")).abs().min() > 1e-4


def test_batches_change_rounding_only(tmp_path: Path) -> None:
    clip.write_hps(tmp_path)
    pixels, prompts = clips(5, 2), ["a red cat", "the car", "a red cat", "", "an ant"]
    found = [
        rewards.load(spec("hps", tmp_path, frames="all", batch_size=size))(
            pixels, prompts, 8.0
        ).values["HPS"]
        for size in (1, 2, 7)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
    one = rewards.load(spec("hps", tmp_path, frames="all", batch_size=1))
    alone = torch.cat([one(pixels[[i]], [prompts[i]], 8.0).values["HPS"] for i in range(5)])
    assert torch.equal(alone, found[0])  # one at a time: the same bits in any company


def test_bfloat16_is_near_and_a_broken_network_is_invalid(tmp_path: Path) -> None:
    clip.write_hps(tmp_path)
    pixels = clips(2, 1)
    exact = rewards.load(spec("hps", tmp_path))(pixels, PROMPTS, 8.0).values["HPS"]
    rounded = rewards.load(spec("hps", tmp_path, dtype="bfloat16"))
    torch.testing.assert_close(rounded(pixels, PROMPTS, 8.0).values["HPS"], exact, atol=0.1, rtol=0)
    assert isinstance(rounded, ClipReward)
    # of "the", the second prompt
    rounded.model.text_model.embeddings.token_embedding.weight[515] = float("nan")
    scores = rounded(pixels, PROMPTS, 8.0)
    assert scores.valid.tolist() == [True, False]
    assert scores.values["HPS"].isnan().tolist() == [False, True]


def test_ids_are_those_of_transformers() -> None:
    texts = ["A red CAT, the cat's ant!", "don't  we'll\tgo\n3.14", "", "日本 café 🎉", "cat " * 30]
    theirs = clip.tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt")
    merges = [(first, second) for first, second in (merge.split() for merge in clip.MERGES)]
    mine = ClipTokenizer(merges, 20, clean_transformers)(texts)
    assert torch.equal(mine, theirs.input_ids.masked_fill(theirs.attention_mask == 0, 0))


def test_special_tokens_in_a_prompt_are_plain_text() -> None:
    for clean in (clean_transformers, clean_open_clip):
        tokenizer = ClipTokenizer([], 40, clean)
        ids = tokenizer(["a <|endoftext|> b", "a <end_of_text> b", "a <|startoftext|>"])
        assert (ids == tokenizer.end).sum(1).tolist() == [1, 1, 1]
        assert (ids == tokenizer.start).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("It\u2019s \u201ccurly\u201d", 'it\'s "curly"'),
        ("salt &amp; pepper &amp;lt;3", "salt & pepper <3"),
        ("  many\n\tspaces  ", "many spaces"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("\ufb01ne \uff26\uff35\uff2c\uff2c", "fine full"),
    ],
)
def test_open_clip_repairs_text(text: str, clean: str) -> None:
    assert clean_open_clip(text) == clean


def test_merges_are_read_from_every_published_file(tmp_path: Path) -> None:
    clip.write_merges(tmp_path)
    # longer than CLIP uses
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(
        gzip.compress(('"version\n' + "\n".join([*clip.MERGES, "x y", "z z"]) + "\n").encode())
    )
    (tmp_path / "tokenizer.json").write_text(clip.tokenizer().backend_tokenizer.to_str())
    found = [read_merges(tmp_path / name, clip.VOCABULARY) for name in FILES]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(clip.MERGES)


def test_fingerprint_follows_what_changes_scores(tmp_path: Path) -> None:
    clip.write_hps(tmp_path / "a")
    clip.write_hps(tmp_path / "b")
    state = torch.load(tmp_path / "b" / "HPS_v2.1_compressed.pt", weights_only=True)
    state["state_dict"]["ln_final.bias"][0] += 1e-3
    torch.save(state, tmp_path / "b" / "HPS_v2.1_compressed.pt")

    def mark(folder: str = "a", **settings: Any) -> str:
        reward = rewards.load(spec("hps", tmp_path / folder, **settings))
        assert isinstance(reward, ClipReward)
        return reward.fingerprint

    same = {mark(), mark(batch_size=3), mark(device="cpu"), mark(frames="first")}
    other = {
        mark("b"),
        mark(frames="all"),
        mark(dtype="bfloat16"),
        mark(options={"antialias": False}),
    }
    assert len(same) == 1
    assert len(next(iter(same))) == 64
    assert len(other | same) == 5


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(file: Path, name: str) -> None:
    state = torch.load(file, weights_only=True)
    del state["state_dict"][name]
    torch.save(state, file)


def code(file: Path) -> None:
    file.write_bytes(pickle.dumps({"state_dict": RunsCode()}, protocol=2))


class RunsCode:
    """A pickle that would leave a file behind if it were executed."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("executed", "w")


def config(folder: Path, **changes: Any) -> None:
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": clip.MODEL_CFG | changes})
    )


HPS = "HPS_v2.1_compressed.pt"
MISTAKES: list[tuple[str, str, Callable[[Path], Any], dict[str, Any], tuple[str, ...]]] = [
    ("no path", "hps", lambda f: None, {"path": None}, ("rewards.path: missing", "xswu/HPSv2")),
    ("no folder", "hps", shutil.rmtree, {}, ("no such file", HPS)),
    (
        "no file",
        "pick_score",
        lambda f: (f / "model.safetensors").unlink(),
        {},
        ("model.safetensors", "PickScore_v1"),
    ),
    (
        "version 2.0",
        "hps",
        lambda f: (f / HPS).rename(f / "HPS_v2_compressed.pt"),
        {},
        ("has no HPS_v2.1_compr",),
    ),
    ("cut", "hps", lambda f: truncate(f / HPS), {}, (HPS, "damaged", "download it again")),
    (
        "cut",
        "pick_score",
        lambda f: truncate(f / "model.safetensors"),
        {},
        ("model.safetensors", "damaged"),
    ),
    ("empty", "hps", lambda f: (f / HPS).write_bytes(b""), {}, (HPS, "damaged")),
    ("code", "hps", lambda f: code(f / HPS), {}, (HPS, "more than tensors")),
    ("list", "hps", lambda f: torch.save([1], f / HPS), {}, (HPS, "no state_dict")),
    (
        "other",
        "hps",
        lambda f: torch.save({"x": torch.ones(1)}, f / HPS),
        {},
        ("neither open_clip", "'x'"),
    ),
    (
        "less",
        "hps",
        lambda f: without(f / HPS, "visual.proj"),
        {},
        ("visual_projection.weight' is missing", HPS),
    ),
    (
        "layers",
        "hps",
        lambda f: config(f, text_cfg=clip.MODEL_CFG["text_cfg"] | {"layers": 1}),
        {},
        ("not part of",),
    ),
    (
        "shape",
        "hps",
        lambda f: config(f, embed_dim=16),
        {},
        ("[24, 48] where the config means [16, 48]", "1 more"),
    ),
    (
        "tower",
        "clip_score",
        lambda f: config(f, vision_cfg={"timm_model_name": "x"}),
        {},
        ("timm_model_name",),
    ),
    (
        "half",
        "clip_score",
        lambda f: config(f, text_cfg={}),
        {},
        ("open_clip_config.json", "not a model_cfg"),
    ),
    (
        "no config",
        "clip_score",
        lambda f: (f / "open_clip_config.json").unlink(),
        {},
        ("clip_config.json is missing",),
    ),
    (
        "no config",
        "hps",
        lambda f: (f / "open_clip_config.json").unlink(),
        {},
        ("is missing (and 908 more", HPS),
    ),
    (
        "no config",
        "pick_score",
        lambda f: (f / "config.json").unlink(),
        {},
        ("config.json is missing",),
    ),
    (
        "bad config",
        "pick_score",
        lambda f: (f / "config.json").write_text("{"),
        {},
        ("config.json cannot be read",),
    ),
    (
        "merges",
        "hps",
        lambda f: (f / "merges.txt").write_text("#version\nc a\n"),
        {},
        ("1 merges", "needs 7"),
    ),
    (
        "tokenizer",
        "hps",
        lambda f: (f / "merges.txt").unlink(),
        {},
        ("rewards.options.tokenizer", "merges.txt"),
    ),
    (
        "hub",
        "hps",
        lambda f: None,
        {"path": "nobody/nothing"},
        ("rewards.path=nobody/nothing", "hub", HPS),
    ),
    (
        "neighbour",
        "hps",
        lambda f: config(f, quick_gelu=True),
        {},
        ("its gelu is not that of", "in its own folder"),
    ),
    (
        "typo",
        "hps",
        lambda f: None,
        {"options": {"antialais": True}},
        ("did you mean 'antialias'?",),
    ),
    (
        "value",
        "hps",
        lambda f: None,
        {"options": {"antialias": "blue"}},
        ("rewards.options.antialias='blue'",),
    ),
    (
        "scale",
        "pick_score",
        lambda f: None,
        {"options": {"scale": "log"}},
        ("rewards.options.scale='log'", "cosine"),
    ),
    (
        "size",
        "clip_score",
        lambda f: None,
        {"options": {"image_size": 48}},
        ("position_embedding", "where the config"),
    ),
    ("device", "hps", lambda f: None, {"device": "gpu"}, ("rewards.device=gpu", "cuda")),
    ("device", "hps", lambda f: None, {"device": "cuda:64"}, ("rewards.device=cuda:64", "GPUs")),
]


@pytest.mark.parametrize(
    ("name", "spoil", "settings", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_one_line_with_its_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Callable[[Path], Any],
    settings: dict[str, Any],
    said: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    WRITERS[name](tmp_path / "folder")
    spoil(tmp_path / "folder")
    with pytest.raises(UserError) as caught:
        rewards.load(spec(name, tmp_path / "folder", **settings))
    message = str(caught.value)
    assert "\n" not in message
    assert all(words in message for words in said), message
    assert not (tmp_path / "executed").exists()


def test_a_hub_repository_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and what lies beside them are found by the repository's name, as its download
    left them.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    clip.write_open_clip(tmp_path / "models--apple--tiny" / "snapshots" / commit)
    (tmp_path / "models--apple--tiny" / "refs").mkdir()
    (tmp_path / "models--apple--tiny" / "refs" / "main").write_text(commit)
    clip.write_open_clip(tmp_path / "folder")
    pixels = clips(2, 1)
    found = [
        rewards.load(spec("clip_score", Path(path)))(pixels, PROMPTS, 8.0).values["CLIP"]
        for path in ("apple/tiny", str(tmp_path / "folder"))
    ]
    assert torch.equal(*found)


def test_only_the_frames_looked_at_matter(tmp_path: Path) -> None:
    """What a client leaves out by `frames_used`, and a server fills with black, changes nothing."""
    clip.write_transformers(tmp_path)
    reward = rewards.load(spec("pick_score", tmp_path, frames=3, threshold={"PickScore": 0.0}))
    pixels = clips(2, 7)
    kept = reward.frames_used(7, 8.0)  # through the threshold
    assert kept is not None
    assert kept == [1, 3, 5]
    black = torch.zeros_like(pixels)
    black[:, kept] = pixels[:, kept]
    assert torch.equal(
        *(reward(each, PROMPTS, 8.0).values["PickScore"] for each in (pixels, black))
    )


def test_clips_of_another_form_are_refused(tmp_path: Path) -> None:
    clip.write_hps(tmp_path)
    reward = rewards.load(spec("hps", tmp_path))
    for pixels, prompts in (
        (clips(2, 1).float(), PROMPTS),
        (clips(2, 1)[0], PROMPTS),
        (clips(2, 1), ["one"]),
    ):
        with pytest.raises(ValueError, match=r"give one prompt|expected torch\.uint8"):
            reward(pixels, prompts, 8.0)


def test_a_pointer_of_git_lfs_is_told_with_its_remedy(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=r"model.pt: is a pointer of git-lfs .* git lfs pull"):
            weight_files.locate(str(path), ["model.pt"], [], "rewards.path", "name a file")
    with pytest.raises(UserError, match="git lfs pull"):
        weight_files.read(file)


@pytest.mark.parametrize("name", WRITERS)
def test_scores_with_a_gradient_are_the_scores_and_their_slope(name: str, tmp_path: Path) -> None:
    """Against the uint8 path, which rounds after Pillow's resizing, and finite differences."""
    WRITERS[name](tmp_path)
    reward: Any = rewards.load(spec(name, tmp_path, frames=2))
    reward.model.double()
    pixels, part = clips(2, 3) // 2 + 60, PART[name]  # within the range, at whose ends slopes break
    frames = pixels.double().requires_grad_()
    found = reward.differentiable(frames, PROMPTS, 8.0)[part]
    exact = reward(pixels, PROMPTS, 8.0).values[part]
    spread = (exact[0] - exact[1]).abs().item()
    assert (found - exact).abs().max().item() < 0.05 * spread
    found.sum().backward()
    assert frames.grad is not None
    seen = frames.grad.flatten(2).abs().sum(2) > 0
    assert seen.tolist() == [[True, False, True]] * 2  # the frames that are scored
    along = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [reward.differentiable(frames + s * along, PROMPTS, 8.0)[part] for s in (0.1, -0.1)]
    slope = (frames.grad * along).flatten(1).sum(1)
    torch.testing.assert_close(
        slope.float(), (ends[0] - ends[1]).float() / 0.2, rtol=0.02, atol=1e-6
    )
