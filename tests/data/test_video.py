"""Video files: what is written is what is read, the bytes repeat, and wrong input is named."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastgrpo.data import video, video_reader
from fastgrpo.data.tiny_world import shapes

CLIP = shapes.draw(shapes.Meaning("red", "triangle", "right", "fast"))


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("colour", shapes.COLOURS)
def test_a_drawn_clip_survives_the_round_trip(tmp_path: Path, colour: str) -> None:
    clip = shapes.draw(shapes.Meaning(colour, "circle", "up", "slow"))
    video.write_mp4(tmp_path / "new" / "clip.mp4", torch.from_numpy(clip), shapes.FPS)
    footage = video_reader.read(tmp_path / "new" / "clip.mp4")
    pixels, fps = footage.pixels, footage.fps
    assert fps == shapes.FPS
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (shapes.FRAMES, 192, 192, 3)  # 32 enlarged six times
    assert psnr(pixels.numpy(), clip.repeat(6, axis=1).repeat(6, axis=2)) > 38
    assert psnr(pixels[:, 3::6, 3::6].numpy(), clip) > 38


def test_browsers_get_the_format_that_they_play(tmp_path: Path) -> None:
    video.write_mp4(tmp_path / "clip.mp4", CLIP, 24000 / 1001)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(24000 / 1001)
        assert stream.frames == len(CLIP)
        assert [
            int(x) for x in (stream.codec_context.colorspace, stream.codec_context.color_range)
        ] == [1, 1]


def test_the_same_clip_gives_the_same_bytes() -> None:
    first = video.mp4_bytes(CLIP, 8.0)
    assert first == video.mp4_bytes(torch.from_numpy(CLIP.copy()), 8.0)
    assert first != video.mp4_bytes(CLIP[::-1].copy(), 8.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 33, 201, 3), (198, 1206)), ((3, 201, 203, 3), (202, 204)), ((2, 1, 1, 3), (192, 192))],
)
def test_any_size_becomes_even_and_large_enough(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    video.write_mp4(tmp_path / "clip.mp4", pixels, 8.0)
    assert video_reader.read(tmp_path / "clip.mp4").pixels.shape == (shape[0], *expected, 3)


def test_single_frames_can_be_read(tmp_path: Path) -> None:
    video.write_mp4(tmp_path / "clip.mp4", CLIP, 8.0)
    every = video_reader.read(tmp_path / "clip.mp4").pixels
    assert torch.equal(video_reader.read(tmp_path / "clip.mp4", [0, 4, 8]).pixels, every[[0, 4, 8]])
    with pytest.raises(ValueError, match=r"frame 9 was asked for.*9 frames"):
        video_reader.read(tmp_path / "clip.mp4", [0, 9])
    with pytest.raises(ValueError, match="ascending"):
        video_reader.read(tmp_path / "clip.mp4", [4, 0])


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        video.mp4_bytes(torch.zeros(2, 8, 8, 3), 8.0)
    with pytest.raises(ValueError, match=r"\[F, H, W, 3\]"):
        video.mp4_bytes(torch.zeros(8, 8, 3, dtype=torch.uint8), 8.0)
    with pytest.raises(ValueError, match="fps=0"):
        video.mp4_bytes(CLIP, 0)


def test_a_contact_sheet_shows_every_frame_of_every_clip() -> None:
    clips = np.stack([CLIP, 255 - CLIP])
    sheet = np.asarray(
        video.contact_sheet(clips, ["first", "a text far too long for its row " * 9])
    )
    top, side, gap = 4 + 20, 64, 4
    for n in range(2):
        for f in range(len(CLIP)):
            y, x = top + n * (side + gap + 20), gap + f * (side + gap)
            assert np.array_equal(sheet[y : y + side : 2, x : x + side : 2], clips[n, f])
    assert sheet[4:24].min() < 100  # there is text
    assert video.contact_sheet(torch.from_numpy(clips)).size == (9 * 68 + 4, 2 * 68 + 4)
    with pytest.raises(ValueError, match="one text for each"):
        video.contact_sheet(clips, ["one"])


def test_a_picture_is_written_exactly(tmp_path: Path) -> None:
    from PIL import Image

    video.write_png(tmp_path / "new" / "frame.png", torch.from_numpy(CLIP[0]))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "frame.png")), CLIP[0])
