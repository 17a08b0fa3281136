"""Reference images: what comes out of a file, the resize and crop rule, and what is said of damaged
files.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.data import video, video_reader
from fastgrpo.data.images import cover, read_image

RED, GREEN, BLUE = (220, 30, 40), (20, 200, 60), (30, 60, 210)


def bands(height: int, widths: tuple[int, int, int]) -> Tensor:
    """Red, green and blue columns.  returns uint8 [H, sum(widths), 3]"""
    row = [
        colour
        for colour, width in zip((RED, GREEN, BLUE), widths, strict=True)
        for _ in range(width)
    ]
    return torch.tensor(row, dtype=torch.uint8).expand(height, -1, -1)


def noisy(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "webp", "ppm"])
def test_a_picture_comes_back_as_it_was_written(tmp_path: Path, ending: str) -> None:
    pixels = noisy(20, 30)
    Image.fromarray(pixels.numpy()).save(tmp_path / f"a.{ending}", lossless=True)
    (tmp_path / f"a.{ending}").rename(tmp_path / "no_ending")  # the content tells what it is
    assert torch.equal(read_image(tmp_path / "no_ending"), pixels)


def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path: Path) -> None:
    pixels = noisy(4, 6)
    turned, clear, grey, palette = (
        tmp_path / f"{name}.png" for name in ("turned", "clear", "grey", "palette")
    )

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels.numpy()).save(turned, exif=exif)
    assert torch.equal(read_image(turned), torch.rot90(pixels, -1))

    alpha = torch.full((4, 6, 1), 255, dtype=torch.uint8)
    alpha[0] = 0
    Image.fromarray(torch.cat([pixels, alpha], 2).numpy()).save(clear)
    assert bool((read_image(clear)[0] == 255).all()) and torch.equal(
        read_image(clear)[1:], pixels[1:]
    )

    ramp = torch.arange(256)
    Image.fromarray((ramp * 257).to(torch.uint16).reshape(16, 16).numpy()).save(grey)
    assert torch.equal(read_image(grey)[..., 1], ramp.to(torch.uint8).reshape(16, 16))

    few = bands(4, (2, 3, 1))
    Image.fromarray(few.numpy()).convert("P", palette=Image.Palette.ADAPTIVE).save(palette)
    assert (read_image(palette).int() - few.int()).abs().max() <= 4


def test_of_a_video_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = torch.stack([bands(200, (100, 60, 160)), *[bands(200, (20, 280, 20))] * 8])
    video.write_mp4(tmp_path / "clip.mp4", frames, 8)
    first = read_image(tmp_path / "clip.mp4")
    assert first.shape == (200, 320, 3) and first.dtype == torch.uint8
    assert torch.equal(first, video_reader.read(tmp_path / "clip.mp4").pixels[0])
    near, far = ((first.int() - frame.int()).abs().float().mean() for frame in frames[:2])
    assert near < 3 < far


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (96, 96)])
def test_the_middle_is_kept(height: int, width: int) -> None:
    wide = bands(32, (16, 32, 16))  # the middle square is green
    assert bool((cover(wide[:, 16:48], height, width) == torch.tensor(GREEN)).all())
    for image in (wide, wide.transpose(0, 1)):
        found = cover(image, height, width)
        assert found.shape == (height, width, 3)
        # the filter sees some columns that are cut
        inner = found[height // 8 : -height // 8, width // 8 : -width // 8]
        assert (inner.int() - torch.tensor(GREEN)).abs().max() <= 12


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (20, 100), (33, 47)])
@pytest.mark.parametrize("wanted", [(32, 32), (40, 24), (80, 144)])
def test_scale_to_cover_then_crop_the_centre(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    image = noisy(*size)
    picture = Image.fromarray(image.numpy())
    # Pillow's own arithmetic of the same rule
    fitted = ImageOps.fit(picture, wanted[::-1], Image.Resampling.LANCZOS)
    assert (cover(image, *wanted).int() - torch.from_numpy(np.array(fitted)).int()).abs().max() <= 1
    mirrored = cover(image.flip(0, 1), *wanted).flip(0, 1)
    assert (mirrored.int() - cover(image, *wanted).int()).abs().max() <= 1


def test_a_ramp_keeps_its_slope() -> None:
    """Closed form: of a ramp of slope 2 whose 64 middle columns are halved, pixel i is 2 (16 + 2 i
    + 1/2).
    """
    ramp = (2 * torch.arange(96)).to(torch.uint8)[None, :, None].expand(64, 96, 3)
    expected = 2 * (16 + 2 * torch.arange(32) + 0.5)
    assert (cover(ramp, 32, 32)[16, :, 0] - expected).abs().max() <= 1


def test_an_image_of_the_size_is_not_touched() -> None:
    image = noisy(24, 40)
    assert torch.equal(cover(image, 24, 40), image)


def broken(tmp_path: Path, kind: str) -> Path:
    """A file that is no image."""
    file = tmp_path / kind
    pixels = noisy(64, 64)
    if kind.startswith("cut"):
        Image.fromarray(pixels.numpy()).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "flipped.png":
        Image.fromarray(pixels.numpy()).save(file)
        content = bytearray(file.read_bytes())
        content[40:60] = bytes(20)
        file.write_bytes(content)
    elif kind == "folder.png":
        file.mkdir()
    elif kind == "float.tiff":
        Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(file)
    elif kind != "missing.png":
        contents = {
            "empty.jpg": b"",
            "text.jpg": b"<html>not found</html>\n",
            "noise.mp4": bytes(range(256)) * 9,
        }
        file.write_bytes(contents[kind])
    return file


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing.png", "No such file"),
        ("folder.png", "Is a directory"),
        ("cut.png", "truncated"),
        ("cut.jpg", "truncated"),
        ("flipped.png", ""),
        ("float.tiff", "32-bit values"),
        ("empty.jpg", "neither a picture nor a video"),
        ("text.jpg", "neither a picture nor a video"),
        ("noise.mp4", "neither a picture nor a video"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, kind: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = broken(tmp_path, kind)
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_image(file)
    line = str(caught.value)
    assert line.startswith(f"reference image {file}: cannot be read (") and line.endswith(
        "replace it."
    )
    assert told in line and "\n" not in line and line.count(str(file)) == 1
    assert not capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_to_a_file_is_anything_but_a_users_mistake(tmp_path: Path) -> None:
    """Bytes anywhere overwritten, or the end missing: an image or a UserError, never another
    exception.
    """
    generator = np.random.default_rng(0)
    sources = []
    for ending in ("png", "jpg", "webp", "gif", "bmp", "tiff", "avif"):
        sources.append(tmp_path / f"a.{ending}")
        Image.fromarray(noisy(24, 24).numpy()).save(sources[-1])
    sources.append(tmp_path / "a.mp4")
    video.write_mp4(sources[-1], noisy(24, 24)[None].repeat(4, 1, 1, 1), 8)
    refused = 0
    for source in sources:
        for _ in range(30):
            content = bytearray(source.read_bytes())
            for place in generator.integers(0, len(content), 12):
                content[place] = generator.integers(0, 256)
            end = int(generator.integers(len(content) // 2, len(content) + 1))
            file = tmp_path / "damaged"
            file.write_bytes(content[:end])
            try:
                assert read_image(file).ndim == 3
            except UserError:
                refused += 1
    assert refused > 50
