"""The one reader of videos: frames as a player shows them, and the same frames for every use."""

import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgrpo.data import video_reader
from fastgrpo.data.images import read_frames, read_image
from fastgrpo.data.video_reader import VideoError

SIZE = (96, 160)  # height, width
TURNS: dict[
    int, Callable[[Tensor], Tensor]
] = {  # counterclockwise degrees and mirroring, as av_display_rotation has them
    0: lambda x: x,
    90: lambda x: torch.rot90(x, 1, (1, 2)),
    180: lambda x: torch.rot90(x, 2, (1, 2)),
    -90: lambda x: torch.rot90(x, -1, (1, 2)),
}


def frames(height: int = SIZE[0], width: int = SIZE[1], count: int = 12) -> NDArray[np.uint8]:
    """Squares of random colours that move to the right."""
    squares = np.random.default_rng(0).integers(0, 256, (-(-height // 16), -(-width // 16), 3))
    first = squares.astype(np.uint8).repeat(16, 0).repeat(16, 1)[:height, :width]
    return np.stack([np.roll(first, 4 * number, 1) for number in range(count)])


def write(
    file: Path,
    pixels: NDArray[np.uint8],
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    change: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """A video of eight frames per second, its index in front.  change: sets more on its stream"""
    options = {"movflags": "+faststart"} if file.suffix in (".mp4", ".mov") else {}
    with av.open(str(file), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = pixel_format
        change(stream)
        kind = "rgba" if pixels.shape[-1] == 4 else "rgb24"
        for array in pixels:
            frame = av.VideoFrame.from_ndarray(array, format=kind)
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode(None))
    return file


def decoded(file: Path) -> Tensor:
    """Every frame as it is stored, by PyAV alone."""
    with av.open(str(file)) as container:
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(arrays))


@pytest.mark.parametrize(
    ("codec", "pixel_format", "ending", "decoder"),
    [
        ("libx264", "yuv420p", "mp4", "decord"),  # with B-frames, an edit list, one key frame
        ("libx264", "yuv420p", "mkv", "decord"),
        ("libx265", "yuv420p", "mp4", "decord"),
        ("mpeg4", "yuv420p", "avi", "decord"),
        ("libvpx", "yuv420p", "webm", "decord"),
        ("libvpx-vp9", "yuv420p", "webm", "decord"),
        ("libsvtav1", "yuv420p", "mp4", "PyAV"),
        ("libx264", "yuv420p10le", "mp4", "PyAV"),
        ("libx264", "yuv444p", "mp4", "PyAV"),
    ],
)
def test_every_use_gets_the_same_frames(
    tmp_path: Path, codec: str, pixel_format: str, ending: str, decoder: str
) -> None:
    """Against PyAV's frames, bit for bit, whichever decoder has read them and however many."""
    file = write(tmp_path / f"a.{ending}", frames(), codec, pixel_format)
    expected = decoded(file)
    footage = video_reader.read(file)
    assert (footage.decoder, footage.fps) == (decoder, 8.0)
    assert torch.equal(footage.pixels, expected)
    for indices in ([0], [11], [3, 7], [0, 5, 6, 10]):
        some = video_reader.read(file, indices)
        assert some.decoder == decoder and torch.equal(some.pixels, expected[indices])
    assert torch.equal(read_image(file), expected[0])
    with pytest.raises(VideoError, match="frame 12 was asked for, but it has only 12 frames"):
        video_reader.read(file, [0, 12])


@pytest.mark.parametrize("degrees", TURNS)
@pytest.mark.parametrize("size", [SIZE, (48, 96), (34, 98)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(
    tmp_path: Path, degrees: int, size: tuple[int, int], mirrored: bool
) -> None:
    """As phones write them, and narrow ones, whose rows decord shifts."""

    def turn(stream: Any) -> None:
        stream.set_display_rotation(degrees, hflip=mirrored)

    file = write(tmp_path / "a.mp4", frames(*size, count=3), change=turn)
    footage = video_reader.read(file)
    stored = decoded(file)
    expected: Tensor = TURNS[degrees](stored)
    expected = expected.flip(2) if mirrored else expected
    assert torch.equal(footage.pixels, expected)
    assert torch.equal(read_image(file), expected[0])
    assert footage.decoder == ("decord" if degrees == 0 and not mirrored else "PyAV")


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_decord_turns_wide_frames_alike(tmp_path: Path, degrees: int) -> None:
    """Another implementation says which way is up."""
    import decord

    file = write(
        tmp_path / "a.mp4",
        frames(128, 160, count=3),
        change=lambda stream: stream.set_display_rotation(degrees),
    )
    reader = decord.VideoReader(str(file))
    other = reader.get_batch(range(3)).asnumpy()
    assert np.array_equal(video_reader.read(file).pixels.numpy(), other)


def test_turning_by_other_than_quarters_is_refused(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.mp4", frames(), change=lambda stream: stream.set_display_rotation(30)
    )
    with pytest.raises(VideoError, match="by other than quarters"):
        video_reader.read(file)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(Fraction(2), (96, 320)), (Fraction(1, 2), (192, 160)), (Fraction(16, 15), (96, 171))],
)
def test_pixels_are_square(tmp_path: Path, aspect: Fraction, size: tuple[int, int]) -> None:
    def set_aspect(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    file = write(tmp_path / "a.mp4", frames(), change=set_aspect)
    footage = video_reader.read(file)
    assert footage.pixels.shape == (12, *size, 3) and footage.decoder == "PyAV"
    picture = Image.fromarray(decoded(file)[0].numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(footage.pixels[0].numpy(), np.array(picture))


@pytest.mark.parametrize(
    ("codec", "pixel_format", "ending"),
    [("libvpx-vp9", "yuva420p", "webm"), ("png", "rgba", "mov"), ("qtrle", "argb", "mov")],
)
def test_transparent_parts_are_white(
    tmp_path: Path, codec: str, pixel_format: str, ending: str
) -> None:
    alpha = np.full((12, *SIZE, 1), 255, np.uint8)
    alpha[:, :48] = 0
    file = write(
        tmp_path / f"a.{ending}", np.concatenate([frames(), alpha], 3), codec, pixel_format
    )
    pixels = video_reader.read(file).pixels
    assert pixels.shape == (12, *SIZE, 3)
    assert pixels[:, :40].min() >= 250 and pixels[:, 56:].float().mean() < 200


@pytest.mark.parametrize("ending", ["mkv", "webm", "mp4", "avi"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_a_file_without_its_end_is_no_shorter_clip(
    tmp_path: Path, ending: str, share: float
) -> None:
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    file = tmp_path / f"a.{ending}"
    write(file, frames(count=40), codec)
    whole = video_reader.read(file).pixels
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    try:
        assert torch.equal(video_reader.read(file).pixels, whole)  # it lacks AVI's index alone
        assert (ending, share) == ("avi", 0.95)
    except VideoError as error:
        assert re.search(r"it ends early, \d+ frames of about \d+|or damaged", str(error))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "avif"])
def test_an_animated_picture_is_a_clip(tmp_path: Path, ending: str) -> None:
    still = np.zeros((20, 30, 3), np.uint8)
    pictures = [Image.fromarray(still + value) for value in (20, 200, 90)]
    file = tmp_path / f"a.{ending}"
    times = [100, 300, 100]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=times)
    pixels, fps = read_frames(file, "picture")
    assert fps == pytest.approx(10, rel=1e-3)
    expected = torch.tensor([20, 200, 200, 200, 90])
    assert (pixels[:, 5, 5, 0].int() - expected).abs().max() <= 3
    assert torch.equal(read_image(file), pixels[0])


def test_further_pictures_of_a_file_are_no_animation(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    pixels, fps = read_frames(tmp_path / "a.tiff", "picture")
    assert pixels.shape == (1, 8, 8, 3) and fps is None


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="it has no pictures"):
        video_reader.read(tmp_path / "a.mp4")


def test_what_decord_returns_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few frames or a fourth channel, as of narrow ones: PyAV reads the file instead."""
    import decord

    file = write(tmp_path / "a.mp4", frames())
    expected = decoded(file)
    for wrong in (expected[:-1], torch.cat([expected, expected[..., :1]], 3)):

        class Reader:
            def __init__(self, *arguments: object, **options: object) -> None:
                self.frames = wrong  # noqa: B023

            def __len__(self) -> int:
                return len(self.frames)

            def get_batch(self, numbers: list[int]) -> "Reader":
                return self

            def asnumpy(self) -> NDArray[np.uint8]:
                return self.frames.numpy()

        monkeypatch.setattr(decord, "VideoReader", Reader)
        footage = video_reader.read(file)
        assert footage.decoder == "PyAV" and torch.equal(footage.pixels, expected)


def test_decord_is_imported_where_a_video_is_read() -> None:
    check = "import sys, fastgrpo.data.video_reader; sys.exit('decord' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
