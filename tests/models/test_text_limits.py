"""Which texts are longer than a family's encoders see: a text is cut exactly where another end of
it changes no condition.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Encoder, Prompt
from fastgrpo.models.loading import policies

FEATURES = {"text_encoder": "text", "text_encoder_2": "pooled"}
FLUX = {"text_encoder": "pooled", "text_encoder_2": "text"}
POOLED = {"text_encoder": "pooled", "text_encoder_2": "pooled"}  # texts of several encoders
OTHERS = {"flux": FLUX, "stable_diffusion_3": POOLED}
IMAGES = ("flux_2", "qwen_image", "stable_diffusion", "stable_diffusion_3", "z_image")
WANS = ("wan", "wan_a14b", "wan_a14b_i2v", "wan_i2v", "wan_i2v_14b")
VIDEOS = ("hunyuan_video", "hunyuan_video_15", "hunyuan_video_15_i2v", "skyreels_i2v", *WANS)
FAMILIES = ("flux", *IMAGES, *VIDEOS)
BEHIND = {"flux_2": 24, "hunyuan_video_15": 14, "hunyuan_video_15_i2v": 14, "z_image": 14}
"""More tokens than a text's end and what follows it in the family's template; 4 of the others."""
VIDEO = Video(frames=9, height=32, width=32)


@pytest.fixture(scope="module", params=FAMILIES)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Encoder, Path]]:
    """A family's name, its encoder, a picture."""
    folder = tmp_path_factory.mktemp(request.param)
    importlib.import_module(f"tests.harness.folders.{request.param}").write(folder / "model")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    video = Video(frames=1, height=32, width=32) if request.param in IMAGES else VIDEO
    settings = Model(family=request.param, path=str(folder / "model"))
    with policies.encoder(settings, video, torch.device("cpu")) as encoder:
        yield request.param, encoder, folder / "a.png"


def test_a_text_is_cut_where_its_end_changes_nothing(opened: tuple[str, Encoder, Path]) -> None:
    family, encoder, image = opened
    features, behind = OTHERS.get(family, FEATURES), BEHIND.get(family, 4)
    beginning, lengths = "a cat", [0]
    while len(lengths) < 1100 and not (cut := encoder.cut(beginning + " on" * lengths[-1])):
        lengths.append(lengths[-1] + 1)
    assert cut, "no text is cut"
    for count in range(max(lengths[-1] - 3, 0), lengths[-1] + behind // 2):
        texts = [f"{beginning}{' on' * count} {end}" for end in ("red", "dog")]
        cuts = [encoder.cut(text) for text in texts]
        one, two = encoder([Prompt(text, image) for text in texts])
        for part, name in features.items():
            if name not in one:
                continue
            shared = min(len(one[name]), len(two[name]))
            equal = torch.equal(one[name][:shared], two[name][:shared])
            seen = [seen for own in cuts if (seen := own.get(part))]
            assert all(least < all_ for least, all_ in seen)
            if name == "text" and all(all_ - least > behind for least, all_ in seen) and seen:
                assert equal, (count, part)
            if not seen:
                assert not equal or len(one[name]) != len(two[name]), (count, part)


def test_a_long_text_is_counted_and_a_short_one_is_not(
    opened: tuple[str, Encoder, Path],
) -> None:
    _, encoder, image = opened
    assert encoder.cut("a cat") == {}
    long = "a cat " + "on a red mat " * 400
    cut = encoder.cut(long)
    assert cut and all(0 < seen < count for seen, count in cut.values())
    one, two = encoder([Prompt(f"{long} {end}", image) for end in ("red", "dog and a cat")])
    assert all(torch.equal(one[name], two[name]) for name in one), "the end is not seen"
